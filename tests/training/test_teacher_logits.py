"""The teacher's logits: computed once, exact, never confused with others, used where none can be written.

That a student is bit-equal whether they were computed or read, after a kill too: tests/training/test_resume.py.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, snapshot
from made_up import CPU, Hostile, TinyTeacher, content_of, flip_bit, random_images, run_of

import utils
from data_sets import DATA_SETS
from runtime import checkpoint
from runtime.device import Runtime
from runtime.files import save_arrays
from training.teacher_logits import Teacher
from utils import Normaliser, Views

COUNT = 24
IMAGES = random_images(COUNT)
SPEC = replace(DATA_SETS["cifar10"], fingerprint="a" * 16, train_images=COUNT)
ROWS = torch.arange(COUNT)
VIEWS = Views(IMAGES, SPEC, CPU.device)


@pytest.fixture
def make(tiny_models, tmp_path):
    """A function that makes a teacher's logits in the test's folder; its weights are drawn from a seed."""

    def make(weights: int = 0, spec=SPEC, runtime=CPU) -> Teacher:
        content = content_of(run_of("--tto"), weights=weights)
        return Teacher(tmp_path / "teacher.pt", spec, runtime, tmp_path, content)

    return make


def test_logits_are_the_models_in_evaluation_mode_in_half_precision(make, monkeypatch):
    monkeypatch.setattr(utils, "EVALUATION_BATCH", 10)
    teacher = make()
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    for k in (0, 7, 161):
        logits = teacher.view_logits(k, VIEWS, ROWS)
        expected = teacher.model(VIEWS.images(ROWS, k))
        assert logits.dtype == torch.float16 and logits.shape == (COUNT, 10) and not expected.requires_grad
        torch.testing.assert_close(logits.float(), expected, rtol=2**-11, atol=1e-6)
    expected = teacher.model(Normaliser(SPEC, CPU.device)(IMAGES.pixels[:5]))
    for holdout in (5, 0):
        tested = teacher.test_logits(IMAGES[:5], holdout)
        torch.testing.assert_close(tested.float(), expected, rtol=2**-11, atol=1e-6)
        assert (teacher.folder / "test.npz").exists() == (not holdout), "held-out images depend on --subset, too"
    assert {len(images) for images in teacher.model.seen} == {10, COUNT, 5}, "full batches, and those of this test"
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())


def test_the_key_changes_with_all_that_logits_depend_on(make, monkeypatch, real=Views.images):
    bf16 = Runtime(CPU.device, "bf16")
    pixels, mean = replace(SPEC, fingerprint="b" * 16), replace(SPEC, mean=(0.5, 0.5, 0.5))
    std, flip = replace(SPEC, std=(0.2, 0.2, 0.2)), replace(SPEC, flip=False)
    made = [make(), make(weights=1), make(runtime=bf16), *(make(spec=spec) for spec in (pixels, mean, std, flip))]
    assert len({teacher.folder for teacher in made}) == len(made)
    assert make().folder == made[0].folder
    monkeypatch.setattr(Views, "images", lambda views, rows, k: 0.5 * real(views, rows, k))
    assert make().folder != made[0].folder, "the augmentation has changed"


ONES = np.ones((COUNT, 10), np.float16)
FOREIGN = {
    "a bit flipped": lambda path, key: flip_bit(path, 300),
    "a shorter header": lambda path, key: (
        save_arrays(path, key, logits=np.ones((9999, 10), np.float16))
        or path.write_bytes(path.read_bytes().replace(b"\1\0v\0", b"\1\0V\0", 1))
    ),
    "an array": lambda path, key: np.lib.format.open_memmap(path, "w+", np.float16, (COUNT, 10)),
    "another key": lambda path, key: save_arrays(path, "other", logits=ONES),
    "other classes": lambda path, key: save_arrays(path, key, logits=ONES[:, :9]),
    "another type": lambda path, key: save_arrays(path, key, logits=ONES.astype(np.float32)),
    "too few": lambda path, key: save_arrays(path, key, logits=ONES[:-1]),
    "not finite": lambda path, key: save_arrays(path, key, logits=ONES * np.inf),
    "code": lambda path, key: np.savez(path, key=key, logits=np.array([Hostile()], object)),
}


@pytest.mark.parametrize("damage", FOREIGN)
def test_a_damaged_or_foreign_file_is_computed_again(damage, make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    teacher = make()
    expected = teacher.view_logits(3, VIEWS, ROWS)
    path = teacher.folder / "03.npz"
    whole = path.read_bytes()
    FOREIGN[damage](path, teacher.key)
    assert path.read_bytes() != whole
    again = make()
    assert torch.equal(again.view_logits(3, VIEWS, ROWS), expected) and again.model.seen
    assert path.read_bytes() == whole and not Path("hacked").exists()
    assert [p.name for p in path.parent.iterdir() if p.name[0] == "."] == []


LEARN = ["--num_epochs=2"]


def student_in(folder: str) -> tuple[dict, str]:
    """A student's run, and a hash of its weights."""
    content = checkpoint.load(Path(folder, "digits_student_kd_t5_subset40.pt"))
    return content["run"], checkpoint.fingerprint(content["model"])


def logits_of(folder: Path) -> dict[str, str]:
    """All files of logits below `folder`."""
    return {path: content for path, content in snapshot(folder).items() if "_logits_" in path}


def test_students_of_any_seed_temperature_loss_or_subset_share_the_logits(learn, tmp_path):
    learn("--tto")
    learn("--kd", "--subset=60", "--teacher=weights/digits_teacher_subset40.pt")
    before = logits_of(tmp_path)
    assert len(before) == 3, "two views and their description"
    learn("--kd", "--seed=7", "--temp=2", "--loss", "ls", "--num_epochs=4", "--name=a")
    assert logits_of(tmp_path) == before
    learn("--kd", "--views=81", "--name=b", "--num_epochs=5")
    assert before.items() <= logits_of(tmp_path).items() and len({Path(p).parent for p in logits_of(tmp_path)}) == 1
    learn("--kd", "--views=162", "--flip", "--name=c")
    assert len({Path(path).parent for path in logits_of(tmp_path)}) == 2, "mirrored views are others"


def test_a_disk_that_refuses_the_logits_costs_only_the_cache(learn, tmp_path):
    learn("--tto")
    learn("--kd", "--name=whole")
    (folder,) = {Path(path).parent for path in logits_of(tmp_path)}
    shutil.rmtree(folder)
    folder.touch()  # no file can be written below it
    assert learn("--kd").count("; the teacher's logits are not stored") == 2
    assert student_in("weights") == student_in("weights/whole")


@pytest.fixture
def mine(learn, digits, tmp_path, monkeypatch):
    """A folder of logits as docs/own.md writes it, of the very teacher in weights/."""
    learn("--tto")
    model = TinyTeacher()
    checkpoint.load_weights(model, checkpoint.load(tmp_path / "weights" / "digits_teacher_subset40.pt"))
    monkeypatch.setattr("torchvision.models.resnet18", lambda num_classes: model)
    (code,) = re.findall("```python\n(import .*?)```", (REPOSITORY / "docs" / "own.md").read_text(), re.DOTALL)
    assert code.count("\n") <= 15
    for of_the_page, here in {
        '"cifar10", Path("data")': f'"digits", Path({str(digits)!r})',
        '"auto", "fp32"': '"cpu", "fp32"',
        "torch.nn.Upsample(size=64)": "torch.nn.Identity()",
        "range(16)": "range(2)",
    }.items():
        assert of_the_page in code
        code = code.replace(of_the_page, here)
    exec(code.replace("resnet18-1", "resnet18-0"), {})
    exec(code, {})  # replaces those of another key
    return tmp_path / "weights" / "my_teacher"


def test_a_folder_of_logits_teaches_like_the_checkpoint(mine, learn, monkeypatch):
    learn("--kd")
    monkeypatch.setattr(TinyTeacher, "forward", None)
    before = snapshot(mine)
    output = learn("--kd", f"--teacher={mine}", "--plots_path=p", "--name=mine")
    assert f" --teacher {mine} --device cpu --plots_path p --name mine`\n" in output
    (expected, weights), (found, weights_of_mine) = student_in("weights"), student_in("weights/mine")
    assert weights_of_mine == weights
    assert found["teacher"] == "resnet18-1" != expected["teacher"] and snapshot(mine) == before
    learn("--all", "--temp", "5", f"--teacher={mine}", "--name=all")
    rows = json.loads(Path("plots/all/results_digits_subset40/results.json").read_text())["rows"]
    assert len(rows) == 2 and all("agreement" in row for row in rows)
    (mine / "test.npz").unlink()
    output = learn("--all", "--temp", "5", f"--teacher={mine}", "--name=all")
    assert output.startswith("2 runs, 2 of them finished\n"), "the student without KD is no teacher"
    assert f"\nno student is compared with the teacher: can't use {mine / 'test.npz'}: No such file" in output
    output = learn("--all", "--temp", "5", "--holdout=4", f"--teacher={mine}", "--name=all")
    assert f"no student is compared with the teacher: {mine} has no logits of held-out images" in output


def describe(folder: Path, **changes) -> None:
    content = json.loads((folder / "teacher.json").read_text())
    (folder / "teacher.json").write_text(json.dumps(content | changes))


WRONG = {
    "01.npz: No such file or directory; write it (docs/own.md)": lambda folder: (folder / "01.npz").unlink(),
    "damaged; write it (docs/own.md), or give another --teacher, or --views 1": lambda at: flip_bit(at / "01.npz", 300),
    "00.npz: it is damaged; write it": lambda folder: flip_bit(folder / "00.npz", 300),
    "00.npz: it has the logits of 24 images, not 40": lambda at: save_arrays(at / "00.npz", "resnet18-1", logits=ONES),
    "it has another key": lambda folder: describe(folder, key="resnet18-2"),
    "here (other classes)": lambda folder: describe(folder, classes=["cat", "dog"]),
    "(other views)": lambda folder: describe(folder, views="b" * 16),
    "has logits of other data than digits here (other images)": lambda folder: describe(folder, images="b" * 16),
    "has logits of other data than digits here (other flip)": lambda folder: describe(folder, flip=True),
    "is missing, or ": lambda folder: (folder / "teacher.json").unlink(),
    "describes no logits for this version": lambda folder: (folder / "teacher.json").write_text("[1"),
}


def test_a_folder_of_logits_that_does_not_fit_is_one_line(mine, learn):
    for tells, spoil in WRONG.items():
        folder = shutil.copytree(mine, "spoilt", dirs_exist_ok=True)
        spoil(Path(folder))
        assert tells in learn("--kd", f"--teacher={folder}", code=2)
