"""What a user gets wrong: exit code 2, one line on stderr, and every file as it was.

Each row of CASES is typed as a command in a folder of its own. How it is run:

- PARSED: the parser alone; that the script asks it before it imports torch is tested in test_config.py.
- FORKED: the script as `__main__`, in a process forked from one that has imported torch already.
- REAL: a real `python train.py ...` that imports torch; one of the above.
"""

import shlex
import subprocess
from collections.abc import Callable

import pytest
from conftest import assert_one_line, run_script, snapshot
from damages import (
    DAMAGES,
    QUICK,
    RESUME_DAMAGES,
    file_as_folder,
    flip_bit,
    folder_with_mode,
    hostile,
    in_weights,
    replace_batch,
    text,
)

import config

PARSED, FORKED, REAL = "parsed", "forked", "real"


def case(name: str, how: str, command: str, tells: str, prepare: Callable | None = None):
    """A command, how it is run, a pattern its error line must match, and what is done to its folder before."""
    return pytest.param(how, command, tells, prepare, id=name)


def parsed(command: str, tells: str):
    return case(command, PARSED, command, tells)


def ignored(command: str, *options: str, why: str) -> list:
    """The command with each option that it would ignore; the line names the option and says `why`."""
    return [parsed(f"{command} --{option}", f"--{option.split()[0]} {why}") for option in options]


def values(command: str, *wrong: str) -> list:
    """The command with each wrong value of its last option."""
    return [parsed(f"{command} {value}", command.split()[-1]) for value in wrong]


CASES = [
    parsed("train.py --tto True --kd True", "--tto .*--kd"),
    parsed("test.py --tto True --kd True", "--tto .*--kd"),
    # What the command would ignore.
    *ignored("train.py", "temp 5", "alpha 0.5", "cache_teacher False", "loss ls", "kd_weight 9", "ce_weight 1",
             why="means something with --kd True or --all"),
    *ignored("train.py --tto True", "temp 20", "alpha 1", why="means something with --kd True or --all True"),
    *ignored("train.py --kd False", "temp 5", why="means something with --kd True or --all True"),
    *ignored("train.py --kd True", "seeds 2", why="means something with --all True alone"),
    *ignored("train.py --all True", "teacher my.pt", why="do not go together"),
    *ignored("train.py", "seeds 2", "teacher my.pt", why="means something with --(all|kd) True alone"),
    *ignored("train.py --tto True", "teacher my.pt", why="means something with --kd True alone"),
    *ignored("train.py --kd True", "matched True", why="means something with --all True alone"),
    *ignored("train.py --kd True --alpha 0.5", "kd_weight 2", "ce_weight 1", why="do not go together"),
    *ignored("test.py", "temp 20", "loss ls", why="means something with --kd True alone"),
    *ignored("test.py --tto True", "temp 20", why="means something with --kd True alone"),
    *ignored("test.py --checkpoint my.pt", "tto True", "kd True", "temp 20", "loss ls", "seed 7", "dataset digits",
             "subset 40", "holdout 8", "compare True", why="do not go together"),
    parsed("test.py --tto True --teacher my.pt --seed 7", "--teacher names the teacher to evaluate, .*--seed"),
    *ignored("test.py --compare True", "tto True", "kd True", "temp 20", "loss ls", "seed 7", "image cat.png",
             "soften 5", "json r.json", "export s.pt2", why="do not go together"),
    *ignored("test.py --soften 1 5", "json r.json", "export s.pt2", why="do not go together"),
    *values("test.py --soften", "0", "nan", "1001"),
    parsed("test.py --soften 5 --teacher my.pt", "--soften asks one model: give --tto True"),
    *ignored("test.py --image cat.png", "subset 40", "holdout 8", "json r.json", "export s.pt2", "data_path d",
             why="do not go together"),
    *values("train.py --kd True --temp", "0", "0.009", "-1", "nan", "inf", "-inf", "abc", "1e999", "1001", "''"),
    parsed("test.py --kd True --temp 0", "--temp"),
    parsed("train.py --kd True --temp 5 20", "--temp"),
    *values("train.py --kd True --alpha", "2", "-0.1", "nan", "one"),
    *values("train.py --kd True --kd_weight", "-1", "nan", "1e7", "''"),
    *values("train.py --kd True --ce_weight", "-1", "nan"),
    *values("train.py --kd True --loss", "at", "KD", "''", "kd ls"),
    parsed("train.py --all True --loss ls dkd ls", "--loss names one twice"),
    parsed("train.py --all True --loss ls dkd --kd_weight 9", "--kd_weight and --ce_weight are those of one loss"),
    parsed("train.py --all True --loss kd ls --alpha 0.5", "--alpha weighs --loss kd alone: leave it out"),
    parsed("train.py --kd True --loss dkd --kd_weight 9", "--kd_weight: --loss dkd has 2, not 1"),
    parsed("train.py --kd True --kd_weight 9 1", "--kd_weight: --loss kd has 1, not 2"),
    parsed("train.py --kd True --loss ls --alpha 0.9", "--alpha weighs --loss kd alone: leave it out"),
    parsed("train.py --all True --matched True", "--matched True means something with another --loss than kd"),
    parsed("train.py --all True --loss ls --matched True --kd_weight 9", "--matched True takes each loss at its usual"),
    *values("train.py --num_epochs", "0", "-1", "2.5", "many", "1" + 400 * "0", "2147483648"),
    *values("train.py --batch_size", "0", "-8"),
    *values("train.py --lr", "0", "-0.1", "nan", "inf"),
    parsed("train.py --weight_decay -1", "--weight_decay"),
    parsed("train.py --head_lr 0", "--head_lr"),
    *values("train.py --subset", "0", "-5", "1.5"),
    parsed("test.py --subset 0", "--subset"),
    parsed("train.py --holdout -1", "--holdout"),
    parsed("train.py --all True --resume True", "--resume"),
    *values("train.py --all True --seeds", "0", "1001"),
    parsed("train.py --all True --seed 2147483647 --seeds 2", "--seed 2147483647 leaves no room for 2 --seeds"),
    *values("train.py --views", "0", "163"),
    parsed("train.py --dataset digits --views 82", "--views.* 81 "),
    parsed("train.py --dataset folder --flip False --views 82", "--views.* 81 "),
    parsed("train.py --skip_broken True", "--skip_broken means something with --dataset folder alone"),
    parsed("test.py --skip_broken True", "--skip_broken means something with --dataset folder alone"),
    parsed("test.py --image cat.png --dataset folder --skip_broken True", "--image and --skip_broken do not go"),
    case("no folder of pictures", FORKED, "train.py --dataset folder", "no folder data/train: --data_path names"),
    *values("train.py --seed", "-1", "2147483648", "x"),
    parsed("train.py --save_seconds -1", "--save_seconds"),
    *values("train.py --weights_path", "''"),
    *values("train.py --kd True --teacher", "''"),
    *values("test.py --image", "''"),
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
    parsed("test.py --export model.onnx", ".pt2"),
    *values("test.py --json", "''", ".", "..", "weights/student.pt"),
    parsed("test.py --export ''", "--export"),
    parsed("test.py --checkpoint .", "--checkpoint"),
    # The device and the folders.
    case("device out of reach", FORKED, "train.py --device cuda:99", "--device cuda:99"),
    case("test device out of reach", FORKED, "test.py --device cuda:99", "--device cuda:99"),
    case("weights is a file", FORKED, f"train.py {QUICK}", "can't use weights", file_as_folder("weights")),
    case("plots is a file", FORKED, f"train.py {QUICK}", "can't use plots", file_as_folder("plots")),
    case("weights in a file", FORKED, f"train.py {QUICK} --weights_path x/y", "can't use x/y", file_as_folder("x")),
    case("weights in no folder", FORKED, f"train.py {QUICK} --weights_path /proc/w", "can't use /proc/w"),
    case("plots in no folder", FORKED, f"train.py {QUICK} --plots_path /proc/w", "can't use /proc/w"),
    case("weights is read-only", FORKED, f"train.py {QUICK}", "weights: permission",
         folder_with_mode("weights", 0o555)),
    case("plots is read-only", FORKED, f"train.py {QUICK}", "plots: permission", folder_with_mode("plots", 0o555)),
    case("weights closed to us", FORKED, "train.py --kd True", "weights/teacher.pt: permission",
         folder_with_mode("weights", 0o600)),
    case("weights is a loop", FORKED, "test.py --compare True", "no finished checkpoint",
         lambda folder: (folder / "weights").symlink_to("weights")),
    case("log is a folder", FORKED, f"train.py {QUICK}", "can't write plots/digits_student_subset40.jsonl",
         lambda folder: [(folder / "plots" / "digits_student_subset40.jsonl").mkdir(parents=True),
                         in_weights("digits_student_subset40.pt", text)(folder)]),
    case("nothing to resume", FORKED, f"train.py {QUICK} --resume True", "--resume True: there is no unfinished run"),
    case("holdout of all", FORKED, f"train.py {QUICK} --holdout 40", "--holdout 40 leaves none of the 40"),
    # The teacher's checkpoint.
    case("no teacher", FORKED, "train.py --kd True", "train one with `python train.py --tto True`"),
    case("no teacher of digits", FORKED, f"train.py --kd True {QUICK}",
         "`python train.py --tto True --dataset digits --data_path .*`"),
    case("no teacher of a holdout", FORKED, f"train.py --kd True {QUICK} --holdout 8 --weights_path w --seed 7",
         "no teacher w/digits_teacher_subset40_holdout8.pt: "
         ".*`python train.py --tto True --dataset digits .*--subset 40 --holdout 8 --device cpu --precision fp32`"),
    case("no teacher there", FORKED, "train.py --kd True --teacher my.pt", "no teacher my.pt: give another"),
    *(
        case(f"teacher: {name}", FORKED, "train.py --kd True", f"weights/teacher.pt.*({tells})",
             in_weights("teacher.pt", damage))
        for name, (damage, tells) in DAMAGES.items()
    ),
    case("teacher: hostile, really", REAL, "train.py --kd True", "damaged", in_weights("teacher.pt", hostile)),
    # What test.py evaluates.
    case("never trained", FORKED, "test.py",
         r"weights/student.pt in /.*/weights: .*`python train.py`, or .*--weights_path"),
    case("teacher never trained", FORKED, "test.py --tto True", r"weights/teacher.pt.*`python train.py --tto True`"),
    case("no such teacher", FORKED, "test.py --tto True --teacher my.pt",
         "there is no teacher my.pt: check its name, or leave --teacher out"),
    case("T never trained", FORKED, "test.py --kd True --temp 7", r"student_kd_t7.pt.*train.py --kd True --temp 7`"),
    *(
        case(f"tested: {name}", FORKED, "test.py --tto True", f"weights/teacher.pt.*({tells})",
             in_weights("teacher.pt", damage))
        for name, (damage, tells) in DAMAGES.items()
    ),
    # The resume state.
    *(
        case(f"resume: {name}", FORKED, f"train.py {QUICK}", f"digits_student_subset40.last.pt.*({tells})",
             in_weights("digits_student_subset40.last.pt", damage))
        for name, (damage, tells) in RESUME_DAMAGES.items()
    ),
    # The data.
    case("data is a file", FORKED, "train.py", "data/cifar-10-batches-py", file_as_folder("data")),
    case("no data, no network", FORKED, "train.py", "https://www.cs.toronto.edu.*data/cifar-10-batches-py|"
         "data/cifar-10-batches-py.*https://www.cs.toronto.edu"),
    case("data without permission", FORKED, "train.py", "data/cifar-10-batches-py", folder_with_mode("data", 0)),
    *(
        case(f"data: {name} {batch}", FORKED, "train.py", "data/cifar-10-batches-py", replace_batch(batch, change))
        for batch in ("data_batch_2", "test_batch")
        for name, change in (("flipped", flip_bit), ("truncated", lambda b: b[: len(b) // 2]), ("missing", None))
    ),
]  # fmt: skip


def parse_here(name: str, arguments: list[str], capsys) -> subprocess.CompletedProcess:
    """What the script does with its command line before anything else."""
    code = 0
    try:
        (config.parse_train if name == "train.py" else config.parse_test)(arguments)
    except SystemExit as error:
        code = error.code
    return subprocess.CompletedProcess([], code, *capsys.readouterr())


@pytest.mark.parametrize(("how", "command", "tells", "prepare"), CASES)
def test_a_wrong_input_is_one_line_and_harms_nothing(how, command, tells, prepare, tmp_path, request, capsys):
    name, *arguments = shlex.split(command)
    if how == PARSED:
        return assert_one_line(parse_here(name, arguments, capsys), tells)
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
        done = run_script(name, *arguments, cwd=tmp_path)
    assert_one_line(done, tells)
    assert snapshot(tmp_path) == before, "a file was changed, removed or left behind"
    assert not (tmp_path / "hacked").exists(), "code in a checkpoint was run"
