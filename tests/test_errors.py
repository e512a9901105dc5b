"""What a user gets wrong: exit code 2, one line on stderr, and every file as it was.

Each row of CASES is typed as a command in a folder of its own. How it is run:

- PARSED: a real `python train.py ...`; the options are refused before torch is imported, so that is cheap.
- FORKED: the script as `__main__`, in a process forked from one that has imported torch already.
- REAL: a real `python train.py ...` that imports torch; a sample of the above, and what needs a process of its own.
"""

import ctypes
import hashlib
import os
import re
import shlex
import signal
import socketserver
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run_script
from kill_marathon import wait

import checkpoint
from config import DATASETS, parse_train
from models import ARCHITECTURES, build_model
from run import make_optimizer
from runtime import UserError
from utils import load_images

PARSED, FORKED, REAL = "parsed", "forked", "real"
QUICK = "--dataset digits --subset 40 --batch_size 8 --num_epochs 1 --device cpu --precision fp32 --data_path {digits}"
DIGITS_OPTIONS = parse_train(QUICK.split()).result_options()


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder with the drawn data set, so that a run which gets as far as the data does so at once."""
    folder = tmp_path_factory.mktemp("digits")
    load_images(DATASETS["digits"], folder)
    return folder


# ------------------------------------------------------------------------------ damaged files


def write_checkpoint(path: Path, role: str = "teacher", **changes) -> None:
    """A checkpoint whose description fits the role, with `changes`; its weights are small and fit nothing."""
    content = {
        "role": role, "architecture": ARCHITECTURES[role], "num_classes": 10, "dataset": "cifar10", "kd": False,
        "options": {}, "teacher": "", "epoch": 1, "versions": {}, "model": {"weight": torch.zeros(1000)},
    }  # fmt: skip
    checkpoint.save(path, content | changes)


def text(path: Path) -> None:
    path.write_text("these are my notes\n")


class Hostile:
    """A pickle that makes a file when a careless reader loads it."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def hostile(path: Path) -> None:
    torch.save({"format": 1, "role": "teacher", "options": {}, "model": Hostile()}, path)


def hostile_old_style(path: Path) -> None:
    torch.save({"model": Hostile()}, path, _use_new_zipfile_serialization=False)


def truncated(path: Path) -> None:
    write_checkpoint(path)
    os.truncate(path, path.stat().st_size // 2)


def short_by_one(path: Path) -> None:
    write_checkpoint(path)
    os.truncate(path, path.stat().st_size - 1)


def bit_flipped(path: Path) -> None:
    write_checkpoint(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def directory(path: Path) -> None:
    path.mkdir()


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")


def bare_list(path: Path) -> None:
    torch.save([1, 2, 3], path)


def bare_weights(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def described(**changes) -> Callable[[Path], None]:
    return lambda path: write_checkpoint(path, **changes)


DAMAGES = {
    "text": (text, "damaged or no checkpoint"),
    "hostile": (hostile, "damaged or no checkpoint"),
    "hostile old style": (hostile_old_style, "damaged or no checkpoint"),
    "truncated": (truncated, "damaged or no checkpoint"),
    "short by one byte": (short_by_one, "damaged or no checkpoint"),
    "bit flipped": (bit_flipped, "damaged or no checkpoint"),
    "empty": (empty, "damaged or no checkpoint"),
    "directory": (directory, "is a directory"),
    "another zip": (other_zip, "damaged or no checkpoint"),
    "a list": (bare_list, "damaged or no checkpoint"),
    "bare weights": (bare_weights, "damaged or no checkpoint"),
    "newer format": (described(format=checkpoint.FORMAT + 1), "format 2, this version reads up to 1"),
    "format of no sense": (described(format="x"), "format x"),
    "other role": (described(role="student"), "holds role student"),
    "other data set": (described(dataset="digits"), "holds dataset digits"),
    "other classes": (described(num_classes=100), "holds num_classes 100"),
    "other architecture": (described(architecture="vgg19_bn/0"), "holds architecture vgg19_bn/0"),
    "other weights": (described(), "does not fit the model VGG"),
    "weights that are none": (described(model={"features.0.weight": "x"}), "does not fit the model VGG"),
    "weights of no kind": (described(model=3), "does not fit the model VGG|damaged or no checkpoint"),
}


def resume_state(**changes) -> Callable[[Path], None]:
    """A resume state of the command QUICK that starts over its log, with `changes`."""

    def prepare(path: Path) -> None:
        model = build_model("student", 10)
        optimizer = make_optimizer(model, parse_train(["--dataset=digits"]), torch.device("cpu"))
        state = {
            "dataset": "digits", "options": DIGITS_OPTIONS, "model": model.state_dict(), "epoch": 0, "step": 0,
            "seconds": 0.0, "totals": torch.zeros(5), "log_length": 0, "optimizer": optimizer.state_dict(),
            "scheduler": {"lr_lambdas": [None]},
        }  # fmt: skip
        state |= changes
        write_checkpoint(path, "student", **{k: v for k, v in state.items() if v is not None})

    return prepare


RESUME_DAMAGES = {name: DAMAGES[name] for name in ("text", "hostile", "truncated", "bit flipped", "empty", "directory")}
RESUME_DAMAGES |= {
    "of a teacher": (described(role="teacher"), "holds role teacher"),
    "finished checkpoint": (described(role="student", options=DIGITS_OPTIONS), "damaged|no unfinished run"),
    "other learning rate": (resume_state(options=DIGITS_OPTIONS | {"lr": 9.0}), "--lr 9.0, not 0.*--resume False"),
    "other options": (
        resume_state(options=DIGITS_OPTIONS | {"num_epochs": 9, "subset": 50}),
        "--subset 50, not 40; --num_epochs 9, not 1.*--resume False",
    ),
    "another teacher's": (resume_state(teacher="0123456789abcdef"), "another teacher.*--resume False"),
    "optimizer of another model": (resume_state(optimizer={"state": {}, "param_groups": []}), "damaged"),
    "weights of another model": (resume_state(model={}), "does not fit the model StudentCNN"),
    "no optimizer": (resume_state(optimizer=None), "damaged"),
    "options of no kind": (resume_state(options=3), "damaged"),
}

# ------------------------------------------------------------------------------ data


def link_data(folder: Path, cifar10: Path) -> Path:
    """The real files, as links, in `folder`/data."""
    batches = folder / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True, exist_ok=True)
    for file in (cifar10 / batches.name).iterdir():
        (batches / file.name).symlink_to(file.resolve())
    return batches


def replace_batch(name: str, change: Callable[[bytes], bytes] | None) -> Callable[[Path, Path], None]:
    """Put a changed copy in the place of one file of the data, or nothing."""

    def prepare(folder: Path, cifar10: Path) -> None:
        file = link_data(folder, cifar10) / name
        content = file.read_bytes()
        file.unlink()
        if change:
            file.write_bytes(change(content))

    return prepare


def flip_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def file_as_folder(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("a file\n")


def folder_with_mode(name: str, mode: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).mkdir(mode=mode)


def in_weights(name: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / "weights").mkdir()
        damage(folder / "weights" / name)

    return prepare


def with_log(prepare_state: Callable[[Path], None], log: str | None) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        prepare_state(folder)
        (folder / "plots").mkdir()
        if log is not None:
            (folder / "plots" / "digits_student.jsonl").write_text(log)

    return prepare


# ------------------------------------------------------------------------------ the cases


def case(name: str, how: str, command: str, tells: str, prepare: Callable | None = None):
    """A command, how it is run, a pattern its error line must match, and what is done to its folder before."""
    return pytest.param(how, command, tells, prepare, id=name)


def parsed(command: str, tells: str):
    return case(command, PARSED, command, tells)


def values(command: str, *wrong: str) -> list:
    """The command with each wrong value of its last option."""
    return [parsed(f"{command} {value}", command.split()[-1]) for value in wrong]


CASES = [
    parsed("train.py --tto True --kd True", "--tto .*--kd"),
    parsed("test.py --tto True --kd True", "--tto .*--kd"),
    *values("train.py --kd True --temp", "0", "-1", "nan", "inf", "-inf", "abc", "1e999", "''"),
    parsed("test.py --kd True --temp 0", "--temp"),
    parsed("train.py --kd True --temp 5 20", "--temp"),
    *values("train.py --kd True --alpha", "2", "-0.1", "nan", "one"),
    *values("train.py --num_epochs", "0", "-1", "2.5", "many"),
    *values("train.py --batch_size", "0", "-8"),
    *values("train.py --lr", "0", "-0.1", "nan", "inf"),
    parsed("train.py --weight_decay -1", "--weight_decay"),
    *values("train.py --subset", "0", "-5", "1.5"),
    parsed("test.py --subset 0", "--subset"),
    parsed("train.py --holdout -1", "--holdout"),
    *values("train.py --views", "0", "163"),
    parsed("train.py --dataset digits --views 82", "--views.* 81 "),
    *values("train.py --seed", "-1", "2147483648", "x"),
    parsed("train.py --save_seconds -1", "--save_seconds"),
    parsed("train.py --dataset imagenet", "--dataset.*cifar10"),
    parsed("test.py --dataset imagenet", "--dataset.*cifar10"),
    parsed("train.py --device tpu", "--device"),
    parsed("train.py --precision fp16", "--precision"),
    parsed("train.py --kd maybe", "True or False"),
    parsed("train.py --resume perhaps", "--resume"),
    parsed("train.py --epochs 3", "--epochs"),
    parsed("train.py weights", "weights"),
    parsed("train.py --lr", "--lr"),
    parsed("train.py --all True --kd True", "--all"),
    parsed("train.py --seeds 2", "--all"),
    parsed("test.py --export model.onnx", ".pt2"),
    # The device and the folders.
    case("device out of reach", FORKED, "train.py --device cuda:99", "--device cuda:99"),
    case("test device out of reach", FORKED, "test.py --device cuda:99", "--device cuda:99"),
    case("weights is a file", FORKED, f"train.py {QUICK}", "can't use weights", file_as_folder("weights")),
    case("plots is a file", FORKED, f"train.py {QUICK}", "can't use plots", file_as_folder("plots")),
    case("weights in a file", FORKED, f"train.py {QUICK} --weights_path x/y", "can't use x/y", file_as_folder("x")),
    case("weights in no folder", FORKED, f"train.py {QUICK} --weights_path /proc/w", "can't use /proc/w"),
    case("plots in no folder", FORKED, f"train.py {QUICK} --plots_path /proc/w", "can't use /proc/w"),
    case("weights is read-only", REAL, f"train.py {QUICK}", "weights: permission", folder_with_mode("weights", 0o555)),
    case("plots is read-only", REAL, f"train.py {QUICK}", "plots: permission", folder_with_mode("plots", 0o555)),
    case("nothing to resume", FORKED, f"train.py {QUICK} --resume True", "--resume True: there is no unfinished run"),
    case("holdout of all", FORKED, f"train.py {QUICK} --holdout 40", "--holdout 40 leaves none of the 40"),
    # The teacher's checkpoint.
    case("no teacher", REAL, "train.py --kd True", "train one with `python train.py --tto True`"),
    case("no teacher of digits", FORKED, f"train.py --kd True {QUICK}", "train.py --tto True --dataset digits`"),
    case("no teacher there", FORKED, "train.py --kd True --teacher my.pt", "no teacher my.pt"),
    *(
        case(f"teacher: {name}", FORKED, "train.py --kd True", f"weights/teacher.pt.*({tells})",
             in_weights("teacher.pt", damage))
        for name, (damage, tells) in DAMAGES.items()
    ),
    case("teacher: hostile, really", REAL, "train.py --kd True", "damaged", in_weights("teacher.pt", hostile)),
    # What test.py evaluates.
    case("never trained", REAL, "test.py", r"weights/student.pt.*`python train.py`"),
    case("teacher never trained", FORKED, "test.py --tto True", r"weights/teacher.pt.*`python train.py --tto True`"),
    case("T never trained", FORKED, "test.py --kd True --temp 7", r"student_kd_t7.pt.*train.py --kd True --temp 7`"),
    *(
        case(f"tested: {name}", FORKED, "test.py --tto True", f"weights/teacher.pt.*({tells})",
             in_weights("teacher.pt", damage))
        for name, (damage, tells) in DAMAGES.items()
    ),
    # The resume state and its log.
    *(
        case(f"resume: {name}", FORKED, f"train.py {QUICK}", f"digits_student.last.pt.*({tells})",
             with_log(in_weights("digits_student.last.pt", damage), ""))
        for name, (damage, tells) in RESUME_DAMAGES.items()
    ),
    *(
        case(f"resume: {name} log", FORKED, f"train.py {QUICK}", "digits_student.jsonl.*--resume False",
             with_log(in_weights("digits_student.last.pt", resume_state(log_length=100)), log))
        for name, log in (("no", None), ("shorter", "{}\n"))
    ),
    # The data.
    case("data is a file", FORKED, "train.py", "data/cifar-10-batches-py", file_as_folder("data")),
    case("no data, no network", FORKED, "train.py", "https://www.cs.toronto.edu.*data/cifar-10-batches-py|"
         "data/cifar-10-batches-py.*https://www.cs.toronto.edu"),
    case("data without permission", REAL, "train.py", "data/cifar-10-batches-py", folder_with_mode("data", 0)),
    *(
        case(f"data: {name} {batch}", FORKED, "train.py", "data/cifar-10-batches-py", replace_batch(batch, change))
        for batch in ("data_batch_2", "test_batch")
        for name, change in (("flipped", flip_byte), ("truncated", lambda b: b[: len(b) // 2]), ("missing", None))
    ),
]  # fmt: skip


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below `folder`, with the hash of its bytes, and every link with its target."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            files[str(path)] = os.readlink(path)
        elif path.is_file():
            files[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files


def without_override() -> None:
    """Before exec: give up root's power over the modes of files (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    library = ctypes.CDLL(None)
    for capability in (1, 2):
        library.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def assert_one_line(done: subprocess.CompletedProcess, tells: str) -> None:
    """Exit code 2 and one line, which matches `tells`."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert re.match(r"(train|test)\.py: error: ", lines[0])
    assert re.search(tells, lines[0], re.IGNORECASE), lines[0]


@pytest.mark.parametrize(("how", "command", "tells", "prepare"), CASES)
def test_a_wrong_input_is_one_line_and_harms_nothing(how, command, tells, prepare, tmp_path, request):
    name, *arguments = shlex.split(command)
    if "{digits}" in arguments:
        arguments[arguments.index("{digits}")] = str(request.getfixturevalue("digits"))
    if prepare is not None and prepare.__code__.co_argcount == 2:
        prepare(tmp_path, request.getfixturevalue("cifar10"))
    elif prepare is not None:
        prepare(tmp_path)
    (tmp_path / "student.pt").write_bytes(b"a bystander")
    before = snapshot(tmp_path)
    if how == FORKED:
        done = request.getfixturevalue("forked")(name, *arguments, folder=tmp_path)
    else:
        done = run_script(name, *arguments, cwd=tmp_path, preexec_fn=without_override if how == REAL else None)
    assert_one_line(done, tells)
    assert snapshot(tmp_path) == before, "a file was changed, removed or left behind"
    assert not (tmp_path / "hacked").exists(), "code in a checkpoint was run"


def test_there_are_at_least_forty_wrong_inputs():
    assert len({case.id for case in CASES}) == len(CASES) >= 40


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(tmp_path):
    # Headers and directory of the archive included: where a flip does no harm, what is read is what was written.
    path = tmp_path / "small.pt"
    weights = torch.arange(6.0)
    checkpoint.save(path, {"role": "student", "options": {"lr": 0.1}, "model": {"weight": weights}})
    whole = path.read_bytes()
    weights_entry = whole.rindex(b"PK\1\2", 0, whole.rindex(b"data/0"))  # of the directory: all its bits are tried
    flips = [(place, place % 8) for place in range(len(whole))]
    flips += [(place, bit) for place in range(weights_entry, weights_entry + 46) for bit in range(8)]
    refused = 0
    for place, bit in flips:
        changed = bytearray(whole)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        try:
            content = checkpoint.load(path, role="student")
        except UserError:
            refused += 1
        else:
            assert torch.equal(content["model"]["weight"], weights), f"bit {bit} of byte {place}"
            assert content["options"] == {"lr": 0.1}
    assert refused > len(whole) // 4


# ------------------------------------------------------------------------------ a download cut in the middle


class CutShort(socketserver.StreamRequestHandler):
    """Promise the archive, send a part of it and close the connection."""

    def handle(self):
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 170498071\r\n\r\n" + bytes(100_000))


def test_a_cut_download_is_no_data_and_a_later_run_recovers(tmp_path, cifar10, forked):
    command = ["train.py", "--subset=16", "--batch_size=8", "--num_epochs=1", "--device=cpu"]
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), CutShort) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/cifar-10-python.tar.gz"
        done = forked(*command, folder=tmp_path, url=url)
        server.shutdown()
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("train.py: error: no whole CIFAR10 in data/cifar-10-batches-py")
    assert url in line
    again = forked(*command, folder=tmp_path)
    assert_one_line(again, "no whole CIFAR10 in data/cifar-10-batches-py")  # what came is not taken for the data
    assert not (tmp_path / "weights").exists()
    link_data(tmp_path, cifar10)
    done = forked(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights" / "student.pt").exists()


# ------------------------------------------------------------------------------ a disk that is full


def quick(digits: Path, *more: str) -> list[str]:
    return ["train.py", *QUICK.format(digits=digits).split(), *more]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system with room for 3 MB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"can't mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(small_disk, tmp_path, digits, forked):
    (small_disk / "digits_student.pt").write_bytes(b"finished before" * 100_000)
    before = snapshot(small_disk)
    done = forked(*quick(digits), "--weights_path", small_disk, "--save_seconds=0", folder=tmp_path)
    assert_one_line(done, rf"can't write {small_disk}/digits_student.last.pt: .*unchanged")
    after = snapshot(small_disk)
    assert before.items() <= after.items()
    assert not [path for path in after if path.endswith(".tmp")]


@pytest.mark.parametrize(
    ("file_size", "tells"),
    [(500_000, r"can't write weights/digits_student.last.pt: .*unchanged"), (400, "can't write plots/.*unchanged")],
    ids=["checkpoint", "log"],
)
def test_a_refused_write_leaves_what_was_there(file_size, tells, tmp_path, digits, forked):
    done = forked(*quick(digits), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    before = snapshot(tmp_path)
    done = forked(*quick(digits, "--lr=0.2"), folder=tmp_path, file_size=file_size)
    assert_one_line(done, tells)
    after = snapshot(tmp_path)
    assert before[f"{tmp_path}/weights/digits_student.pt"] == after[f"{tmp_path}/weights/digits_student.pt"]
    log = before[f"{tmp_path}/plots/digits_student.jsonl"]  # begun anew where the log is not what was refused
    assert after[f"{tmp_path}/plots/digits_student.jsonl{'.previous' if file_size > 1000 else ''}"] == log
    assert not [path for path in after if path.endswith(".tmp")]
    done = forked(*quick(digits, "--lr=0.2"), folder=tmp_path)
    assert done.returncode == 0, "there is room again: " + done.stderr


def test_no_room_for_the_teacher_cache_costs_the_cache_alone(tmp_path, digits, start_script):
    teacher = build_model("teacher", 10)
    content = {"dataset": "digits", "model": teacher.state_dict()}
    write_checkpoint(tmp_path / "weights" / "digits_teacher.pt", **content)
    # 2,000 x 162 x 11 numbers of 2 bytes are 7.1 MB: more than any other file that the run writes.
    script = start_script(*quick(digits, "--kd", "--subset=2000"), folder=tmp_path, file_size=6_000_000)
    wait(lambda: "going on without it" in script.read("stdout"), script)
    os.kill(script.pid, signal.SIGTERM)
    done = script.end()
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert re.search(
        r"teacher cache: can't write weights/digits_teacher_\w+\.cache: .*going on without it", done.stdout
    )
    assert not list((tmp_path / "weights").glob("*.cache*"))
    assert (tmp_path / "weights" / "digits_student_kd_t5.last.pt").exists()
