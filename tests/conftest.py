"""The real data, and the scripts as a user runs them: in processes of their own."""

import hashlib
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import made_up
import pytest
import torch
import torch.distributed as dist

import models
import train
import utils
from data_sets.digits import make_digits
from evaluation import figures, inference, results
from utils import load_images

torch.set_num_threads(1)  # as in the processes that tests start: bits may depend on it
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no test needs a GPU
# Nothing may be downloaded by a test: no proxy listens there, so the network is always "missing".
os.environ |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
os.fsync = lambda descriptor: None  # slow on shared disks; tests/runtime/test_files.py sees when it is called
REPOSITORY = Path(__file__).resolve().parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def cifar10(request) -> Path:
    """A folder with the real CIFAR-10: unpacked once where it is kept beside the project, else ./data."""
    return real_data(request, "cifar10", "cifar-10-batches-py/test_batch")


@pytest.fixture(scope="session")
def cifar100(request) -> Path:
    """A folder with the real CIFAR-100, as that of CIFAR-10."""
    return real_data(request, "cifar100", "cifar-100-python/test")


def real_data(request, name: str, file: str) -> Path:
    unpack = REPOSITORY.parent / "shared" / name / "unpack.py"
    if unpack.exists():
        try:  # kept for the next run of the tests
            folder = Path(request.config.cache.mkdir(name))
        except (AttributeError, OSError):  # there is no cache, or it can't be written
            folder = request.getfixturevalue("tmp_path_factory").mktemp(name)
        subprocess.run([sys.executable, unpack, folder], check=True, stdout=subprocess.DEVNULL)
        return folder
    if (REPOSITORY / "data" / file).exists():
        return REPOSITORY / "data"
    pytest.skip(f"NO REAL {name.upper()}: neither {unpack} nor {REPOSITORY / 'data' / file} is there")


TINY_MODELS = {"teacher": made_up.TinyTeacher, "student": made_up.tiny_student}


@pytest.fixture
def tiny_models(monkeypatch):
    """Models of a few thousand weights in place of the real ones, whose speed is not measured."""
    for role, builder in TINY_MODELS.items():
        monkeypatch.setitem(models.BUILDERS, role, builder)
    monkeypatch.setattr(inference, "pass_seconds", lambda *arguments: 0.02)


@pytest.fixture
def no_figures(monkeypatch):
    """Nothing is drawn of a run, its report and its table."""
    monkeypatch.setattr(train, "plot_curves", touch_curves)
    for module, name in ((results, "plot_comparison"), (figures, "plot_confusion"), (figures, "plot_reliability")):
        monkeypatch.setattr(module, name, lambda *arguments: arguments[-1])


@pytest.fixture
def output_of(capfd):
    """A function that runs a script's main(), which must end with a code: its stdout, or of an error its one line."""

    def run(main: Callable, words: Sequence, code: int = 0) -> str:
        capfd.readouterr()  # of what ran before
        assert main(words) == code
        out, err = capfd.readouterr()
        assert code != 2 or err.count("\n") == 1, err
        return err if code == 2 else out

    return run


@pytest.fixture
def learn(request, digits, tiny_models, no_figures, tmp_path, monkeypatch, output_of):
    """A function that runs train.py over 40 digits for one epoch in the test's folder, and gives its output.

    Further options are those that the test's module calls LEARN.
    """
    monkeypatch.setattr(utils, "DIGITS_IMAGES", {"train": 100, "test": 20})
    monkeypatch.chdir(tmp_path)
    options = ["--dataset=digits", f"--data_path={digits}", "--device=cpu", "--precision=fp32"]
    options += ["--subset=40", "--batch_size=8", "--num_epochs=1", *getattr(request.module, "LEARN", [])]
    return lambda *words, code=0: output_of(train.main, [*options, *words], code)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder with a 25th of the drawn data set in the files of the whole one, where every process finds it."""

    def few(split: str, count: int, size: int) -> tuple:
        return make_digits(split, count // 25, size=size)

    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_sets.digits.make_digits", few)
        load_images("digits", folder, made_up.CPU)
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below `folder`, with the hash of its bytes, and every link with its target."""
    paths = sorted(folder.rglob("*"))
    links = {str(path): os.readlink(path) for path in paths if path.is_symlink()}
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    return links | {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_one_line(code: int, err: str, tells: str) -> None:
    """Exit code 2 and one line on stderr, which matches `tells`."""
    assert code == 2 and err.count("\n") == 1, err
    assert re.match(r"(train|test)\.py: error: ", err) and re.search(tells, err, re.IGNORECASE), err


# Importing torch takes seconds, a run here less: a process that did it once forks, and the fork runs the script as
# `__main__`, with an argv, outputs, signals and an exit code of its own.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train", "test", "matplotlib.backends.backend_agg", "matplotlib.figure"])


def pytest_sessionstart() -> None:
    """Start the server of forks, which imports torch beside the first tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", "ignore")  # about locks of forks that tests kill
        resource_tracker.ensure_running()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")  # it does not get sys.path
        forkserver.ensure_running()


def run_together(count: int, name: str, words: Sequence[str], folder: Path, **changes) -> tuple[list[int], str, str]:
    """A script in `count` forks, as torchrun does: exit codes (negative: of a signal), stdout, stderr together.

    `changes` are run_as_main's.
    """
    environments = [{}]
    if count > 1:  # as with torchrun, the store where they meet outlives them
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        shared["GLOO_SOCKET_IFNAME"] = "lo"  # the machine may not know its own name
        environments = [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    with tempfile.TemporaryDirectory() as outputs:
        given = [(name, words, folder, Path(outputs), environment) for environment in environments]
        forks = [FORKS.Process(target=run_as_main, args=arguments, kwargs=changes) for arguments in given]
        for fork in forks:
            fork.start()
        for fork in forks:
            fork.join(600)
        codes = [fork.exitcode for fork in forks]
        for fork in forks:
            fork.kill()
        out, err = (Path(outputs, stream).read_text() for stream in ("stdout", "stderr"))
    assert None not in codes, f"still running after 600 s: {out}"
    return codes, out, err


def touch_curves(log: Path, folder: Path) -> list[Path]:
    """In place of plot_curves, which takes longer than a tiny run."""
    paths = [folder / f"{log.stem}_{name}.png" for name in ("accuracy", "loss")]
    for path in paths:
        path.touch()
    return paths


def run_as_main(name, words, folder, outputs, environment, stdout="kept", prepare=None) -> None:
    """In the fork: run the script in `folder` with models of a few thousand weights under the names of the real ones,
    perhaps with a standard output that is "full", whose reader has "gone", or that knows "ascii" alone; `prepare` is
    called before."""
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(outputs / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ |= ONE_THREAD | environment
    torch.set_num_threads(1)
    os.chdir(folder)
    if stdout == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif stdout == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    encoding = "ascii" if stdout == "ascii" else "utf-8"
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115 - the one before knew another file
    models.BUILDERS |= TINY_MODELS
    utils.plot_curves = touch_curves
    if prepare:
        prepare()
    sys.argv = [name, *words]
    runpy.run_path(str(REPOSITORY / name), run_name="__main__")
