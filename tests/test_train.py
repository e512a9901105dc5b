"""train.py with tiny models: the names of what it leaves, what it says, and which runs it goes on with or keeps."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from conftest import snapshot
from made_up import CPU, TinyTeacher, fingerprint_of, format_1, options_of, save_run, tiny_student

import test as test_script
import train
from datasets import DATASETS
from runtime import checkpoint
from runtime.errors import Stopped, UserError
from runtime.log import read_log
from training.run import identity_of

SIZE = ["--subset=40", "--batch_size=8", "--num_epochs=1"]


@pytest.fixture
def learn(digits, tiny_models, tmp_path, monkeypatch):
    """A function that runs train.py over 40 digits in the test's folder; its exit code."""
    monkeypatch.setattr(train, "plot_curves", lambda *_: [])
    monkeypatch.setattr(train, "plot_comparison", lambda logs, path: path)
    monkeypatch.chdir(tmp_path)
    same = ["--dataset=digits", f"--data_path={digits}", "--device=cpu", "--precision=fp32"]

    def run(*arguments: str, size: list[str] = SIZE) -> int:
        return train.main([*same, *size, *arguments])

    run.same = same
    return run


@pytest.mark.parametrize(
    "command, name",
    [
        ("--tto", "digits_teacher_subset40"),
        ("--tto --seed=7", "digits_teacher_seed7_subset40"),
        ("", "digits_student_subset40"),
        ("--seed=7 --holdout=10", "digits_student_seed7_subset40_holdout10"),
        ("--kd --temp=5.0000001 --weights_path='my weights'", "digits_student_kd_t5.0000001_subset40"),
        ("--kd --holdout=10 --teacher=t.pt --plots_path=p", "digits_student_kd_t5_subset40_holdout10"),
    ],
)
def test_what_is_told_to_come_next_evaluates_what_was_trained(command, name, learn, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(test_script.figures, "plot_reliability", lambda logits, labels, title, path: path)
    monkeypatch.setattr(test_script.figures, "plot_confusion", lambda numbers, classes, title, path: path)
    options = options_of(f"--dataset=digits {' '.join(SIZE)} {command}")
    if options.kd:
        trained = "--tto --dataset=digits --subset=30"
        save_run(options.teacher_path.parent, trained, name=options.teacher_path.name, model=TinyTeacher())
    assert learn(*shlex.split(command)) == 0
    output = capfd.readouterr().out
    assert (options.weights_path / f"{name}.pt").exists() and not list(tmp_path.rglob("*.last.pt"))
    told = output.splitlines()[-1].removeprefix("next: python test.py ")
    assert test_script.main([*shlex.split(told), "--device=cpu", "--json=report.json"]) == 0
    report = capfd.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["checkpoint"] == str(options.checkpoint_path)
    header, lines = read_log(options.log_path)
    logged = lines[-1][options.split]
    first = f"{options.split} loss {logged['loss']:.4f} top1 {logged['top1']:.2f}% top5 {logged['top5']:.2f}%"
    assert report.splitlines()[0] == first
    content = checkpoint.load(options.checkpoint_path)
    assert content["metrics"] == logged and content["identity"].facts == header["identity"]


def test_a_trial_replaces_nothing_of_the_whole_set(learn, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "plots").mkdir()
    for name in ("weights/digits_student.pt", "weights/digits_student_kd_t5.pt", "weights/digits_student.last.pt",
                 "plots/digits_student.jsonl", "plots/digits_comparison.png"):  # fmt: skip
        (tmp_path / name).write_bytes(b"of the whole set")
    before = snapshot(tmp_path)
    assert learn() == learn("--holdout=10") == learn("--seed=7") == 0
    assert before.items() <= snapshot(tmp_path).items()
    assert len(list((tmp_path / "weights").glob("*.pt"))) == 3 + 3


def test_the_teacher_of_a_holdout_has_not_seen_it(learn, tmp_path, capfd):
    seen = "--tto --dataset=digits --subset=40"
    save_run(tmp_path, seen, name="seen.pt", model=TinyTeacher())
    assert learn("--kd", "--holdout=10", "--teacher=seen.pt") == 2
    error = capfd.readouterr().err
    assert "the teacher seen.pt was trained on images that --holdout 10 keeps aside" in error
    assert "`python train.py --tto True --dataset digits " in error
    assert "--subset 40 --holdout 10 --device cpu --precision fp32`" in error
    assert error.count("\n") == 1 and not (tmp_path / "weights").exists()
    save_run(tmp_path, f"{seen} --holdout=10", name="unseen.pt", model=TinyTeacher())
    assert learn("--kd", "--holdout=10", "--teacher=unseen.pt") == 0
    assert learn("--kd", "--teacher=seen.pt") == 0, "without a holdout there is nothing to be seen"


def test_a_teacher_of_an_older_version_teaches(learn, tmp_path):
    (tmp_path / "weights").mkdir()
    old = format_1(role="teacher", architecture="vgg19_bn/1", dataset="digits", model=TinyTeacher().state_dict())
    torch.save(old, tmp_path / "weights" / "digits_teacher_subset40.pt")
    assert learn("--kd") == 0


# ---------------------------------------------------------------------------------------------- going on


@pytest.fixture
def stopped(learn, monkeypatch, tmp_path):
    """The path of the resume state of a run that was stopped after two steps."""
    with monkeypatch.context() as patch:

        def record(run, *arguments, real=train.Run.record):
            real(run, *arguments)
            if run.step == 2:
                raise Stopped(15)

        patch.setattr(train.Run, "record", record)
        assert learn() == 128 + 15
    return tmp_path / "weights" / "digits_student_subset40.last.pt"


def change_facts(path, **changes) -> None:
    """Let the checkpoint at `path` be of another run."""
    content = torch.load(path, weights_only=True)
    content["identity"] |= changes
    torch.save(content, path)


@pytest.mark.parametrize(
    "machine",
    [{}, {"torch": "2.11.0"}, {"device": "another processor"}, {"world_size": 2}, {"torch": "x", "device": "y"}],
)
def test_a_run_goes_on_elsewhere_and_says_that_bits_may_differ(machine, stopped, learn, capfd):
    change_facts(stopped, **machine)
    capfd.readouterr()
    assert learn() == 0
    line = capfd.readouterr().out.splitlines()[0]
    assert line.startswith("going on with weights/digits_student_subset40.last.pt at epoch 1, step 2/5")
    effect = "batch norm sees other batches" if "world_size" in machine else "the last bits may differ"
    assert (f"{effect} from here" in line) == bool(machine)
    for name, value in machine.items():
        assert f"{name} {value}, not " in line
    finished = checkpoint.load(stopped.with_name("digits_student_subset40.pt"))["identity"]
    assert finished["world_size"] == 1 and finished["torch"] == torch.__version__


@pytest.mark.parametrize("fact, value", [("views", 3), ("optimizer", "sgd/2"), ("nckd_weight", 0.5), ("sync_bn", True)])
def test_another_run_is_not_gone_on_with(fact, value, stopped, learn, capfd):
    change_facts(stopped, **{fact: value, "torch": "2.11.0"})
    before = stopped.read_bytes()
    capfd.readouterr()
    assert learn() == 2
    error = capfd.readouterr().err
    assert f"{fact} {value}, not " in error and "--resume False" in error and error.count("\n") == 1
    assert stopped.read_bytes() == before


def test_a_run_is_measured_by_its_own_log_whatever_lies_at_its_path(learn, tmp_path, monkeypatch):
    own = []

    def end_epoch(run, *arguments, real=train.end_epoch):
        real(run, *arguments)
        own.append(run.log.lines[-1]["test"])
        lie = json.dumps({"epoch": 1, "test": {"top1": 99.0}, "train": {}})
        run.log.path.write_text(f"{run.log.text.splitlines()[0]}\n{lie}\n")

    monkeypatch.setattr(train, "end_epoch", end_epoch)
    assert learn() == 0
    assert checkpoint.load(tmp_path / "weights" / "digits_student_subset40.pt")["metrics"] == own[-1]


# ---------------------------------------------------------------------------------------------- what --all keeps


TEACHER = "1f3a" * 4
CHANGES = {
    "lr": 0.3, "views": 3, "num_epochs": 7, "weight_decay": 0.1, "precision": "bf16", "torch": "2.11.0",
    "device": "another processor", "world_size": 2, "optimizer": "sgd", "kd_weight": 0.5, "loss": "ls",
    "teacher": "77aa" * 4,
}  # fmt: skip


def finished(options, teacher: str) -> bool:
    return train.is_finished(options, options.spec, CPU, teacher)


@pytest.mark.parametrize(
    "command, fact", [("--kd", None), *(("--kd", fact) for fact in CHANGES), ("", None), ("", "views"), ("", "torch")]
)
def test_all_keeps_only_an_equal_run(command, fact, tmp_path):
    options = replace(options_of(command), weights_path=tmp_path)
    teacher = TEACHER if options.kd else ""
    assert not finished(options, teacher), "there is none"
    changes = {fact: CHANGES[fact]} if fact else {}
    path = save_run(tmp_path, command, **{"teacher": teacher, "model": tiny_student()} | changes)
    assert finished(options, teacher) == (not changes)
    if not changes:
        assert checkpoint.load(path)["identity"] == identity_of(options, options.spec, CPU, teacher)
        assert not finished(replace(options, resume="False"), teacher)
        options.resume_path.write_bytes(b"an unfinished run, with or without the same options")
        assert not finished(options, teacher)


def test_all_keeps_the_very_teachers_that_can_teach(tmp_path):
    spec = DATASETS["cifar10"]
    other_mean = replace(spec, mean=(0.5, 0.5, 0.5))
    for command, changes, wanted, its_spec, tells in (
        ("--num_epochs=2 --lr=0.01", {}, "", spec, ""),
        ("--subset=40", {}, "", spec, ""),
        ("", {}, "--holdout=8", spec, "on images that --holdout 8 keeps aside"),
        ("", {"images": "77aa"}, "", spec, "on other images than data holds now"),
        ("", {}, "", other_mean, "another normalisation"),
        ("", {}, "--flip=False", replace(spec, flip=False), "another --flip"),
    ):
        options = replace(options_of(f"--tto {wanted}"), weights_path=tmp_path)
        path = save_run(tmp_path, f"--tto {command}", name=options.checkpoint_path.name, model=TinyTeacher(), **changes)
        assert train.is_finished(options, its_spec, CPU, "") == (not tells)
        assert tells in train.unfit(checkpoint.load(path), options, its_spec)
    save_run(tmp_path, "", name="teacher.pt", model=tiny_student())
    with pytest.raises(UserError, match="holds role student"):
        finished(replace(options_of("--tto"), weights_path=tmp_path), "")


def test_all_distils_the_teacher_that_is_there(learn, tmp_path, capfd):
    assert learn("--tto", "--num_epochs=2") == 0
    teacher = fingerprint_of(tmp_path / "weights" / "digits_teacher_subset40.pt")
    assert learn("--all", "--temp", "5") == 0
    output = capfd.readouterr().out
    assert "digits_teacher_subset40: finished before, kept" in output
    student = checkpoint.load(tmp_path / "weights" / "digits_student_kd_t5_subset40.pt")["identity"]
    assert student["teacher"] == teacher and "python test.py" in output
    before = snapshot(tmp_path / "weights")
    assert learn("--all", "--temp", "5") == 0
    assert capfd.readouterr().out.count("finished before, kept") == 3 and snapshot(tmp_path / "weights") == before
    # Another teacher makes other students with KD, and those without stay.
    assert learn("--tto", "--resume=False", "--num_epochs=1") == 0
    capfd.readouterr()
    assert learn("--all", "--temp", "5") == 0
    output = capfd.readouterr().out
    assert "digits_student_subset40: finished before, kept" in output and output.count("kept") == 2
    again = checkpoint.load(tmp_path / "weights" / "digits_student_kd_t5_subset40.pt")["identity"]
    assert again["teacher"] == fingerprint_of(tmp_path / "weights" / "digits_teacher_subset40.pt") != teacher
