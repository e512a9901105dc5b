"""From what was typed to the runs to do, which runs belong together, and a run under way."""

import json
import shlex
from dataclasses import asdict, fields, replace

import pytest
import torch
import torch.distributed as dist
from made_up import CPU, run_of, runs_of

import train
import training.run
import training.runs
from config import parse_test, parse_train
from data_sets import DATA_SETS
from runtime.device import Runtime
from runtime.errors import UserError
from runtime.progress import Progress
from training.recipes import CIFAR, LOSS_DEFAULTS, OPTIMIZERS, RECIPE_FIELDS, LossDefaults, recipe_of, scale_recipe
from training.run import Run, RunFiles
from training.runs import RunConfig, describe_differences, differences, is_baseline_of, is_kd_baseline_of, name_of, plan

SPEC = replace(DATA_SETS["cifar10"], fingerprint="a" * 16, train_images=50_000)

NAMES = [
    ("", "student", "Student (w/o KD)"),
    ("--tto True", "teacher", "Teacher (VGG19 with BN)"),
    ("--tto True --seed 7 --subset 40", "teacher_seed7_subset40", "Teacher (VGG19 with BN), subset 40"),
    ("--kd True --seed 42", "student_kd_t5", "Student (with KD, Temp = 5)"),
    ("--kd True --temp 5.0000001", "student_kd_t5.0000001", "Student (with KD, Temp = 5.0000001)"),
    ("--kd True --temp 1e3 --seed 0", "student_kd_t1000_seed0", "Student (with KD, Temp = 1000)"),
    ("--kd --loss dkd --size 64 --dataset digits", "digits_student_dkd_t4_size64",
     "Student (with DKD, Temp = 4, 1 TCKD + 8 NCKD + 1 CE), size 64"),
    ("--kd --student my_models:net", "student_my_models.net_kd_t5", "Student my_models:net (with KD, Temp = 5)"),
    ("--kd True --loss kd_as_ls", "student_kd_as_ls_t2", "Student (with KD, Temp = 2, 9 KL + 0.1 CE)"),
    ("--subset 40 --holdout 8 --seed 7", "student_seed7_subset40_holdout8", "Student (w/o KD), subset 40, holdout 8"),
    ("--omit dog 3 --student_images 1500", "student_omit_cat_dog_images1500",
     "Student (w/o KD), omit cat dog, 1,500 images"),
    ("--dataset folder --omit 'a (b)' 1", "folder_student_omit_1_a_(b)", "Student (w/o KD), omit 1 a (b)"),
]  # fmt: skip


@pytest.mark.parametrize("command, stem, title", NAMES)
def test_each_run_has_a_file_name_a_title_and_a_command_that_both_scripts_understand(command, stem, title):
    words = shlex.split(command)
    name = name_of(parse_test(words))
    assert name.stem == stem and name_of(parse_train(words)) == name
    assert run_of(command).title == title
    for script, parse in (("train.py", parse_train), ("test.py", parse_test)):
        typed = shlex.split(name.command(script, weights_path="my weights"))
        assert typed[:2] == ["python", script]
        options = parse(typed[2:])
        assert name_of(options) == name and str(options.weights_path) == "my weights"


def test_all_plans_every_run_once_and_in_order():
    options = parse_train(["--all", "--loss", "kd", "ls", "--temp", "5", "20", "--seeds", "2", "--seed", "7"])
    runs = plan(options, SPEC, "bf16", 2)
    students = [f"student{kd}_seed{seed}" for seed in (7, 8) for kd in ("", "_kd_t5", "_kd_t20", "_ls_t5", "_ls_t20")]
    assert [run.stem for run in runs] == ["teacher", *students]
    assert {(run.precision, run.processes, run.num_classes) for run in runs} == {("bf16", 2, 10)}
    assert run_of("--kd --dataset cifar100").temp == 2.0 and run_of("--kd --dataset cifar100 --loss dkd").temp == 4.0


def test_each_loss_has_its_own_temperatures_and_weights(monkeypatch):
    runs = runs_of("--all --loss kd ls dkd --matched")
    assert [(run.stem, run.kd_weights, run.ce_weight) for run in runs[2:]] == [
        ("student_kd_t5", (0.9,), 0.1), ("student_kd_t20", (0.9,), 0.1), ("student_ls_t2", (9.0,), 0.1),
        ("student_dkd_t4", (1.0, 8.0), 1.0), ("student_kd_as_ls_t2", (9.0,), 0.1),
        ("student_kd_as_dkd_t4", (9.0,), 1.0),
    ]  # fmt: skip
    assert [run.loss for run in runs_of("--all --matched --loss ls kd_as_ls")] == [None, None, "ls", "kd_as_ls"]
    assert runs_of("--kd --loss dkd") == [runs[5]], "--all trains the run that is trained alone"
    assert run_of("--kd --loss kd_as_ls") == replace(run_of("--kd --temp=2 --kd_weight=9"), loss="kd_as_ls")
    assert run_of("--kd --alpha=0.3") == run_of("--kd --kd_weight=0.3 --ce_weight=0.7")
    assert run_of("--kd --alpha=0.9") == run_of("--kd"), "1 - 0.9 is 0.1"
    assert run_of("--kd --ce_weight=0.5").title == "Student (with KD, Temp = 5, 0.9 KL + 0.5 CE)"
    monkeypatch.setitem(LOSS_DEFAULTS, "mine", LossDefaults("mine", (4.0,), (1.0, 2.0), 1.0))
    mine = replace(run_of("--kd"), loss="mine", kd_weights=(1.0, 2.0), ce_weight=1.0)
    assert mine.title == "Student (with MINE, Temp = 5, 1 MINE + 2 MINE + 1 CE)"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_all_the_recipe_options_are_the_students(optimizer):
    typed = dict(zip(RECIPE_FIELDS, (1, 9.0, 0.7, 7.0, 3, 0.1, 2), strict=True))
    shared = f"--dataset=digits --optimizer={optimizer} --subset=40 --holdout=8"
    words = " ".join(f"--{name}={value}" for name, value in typed.items())
    for weights in ("--kd_weight=0.5 --ce_weight=0.5", "--alpha=0.5"):
        teacher, *students = runs_of(f"--all --seed=43 {weights} --temp 20 {shared} {words}")
        assert [teacher] == runs_of(f"--tto {shared}")
        assert [(run.seed, run.kd_weights, run.ce_weight) for run in students] == [(43, (), 1.0), (43, (0.5,), 0.5)]
    for student in students:
        assert {name: getattr(student, name) for name in typed} == typed


def test_one_run_typed_in_two_ways_is_one_run():
    assert runs_of("--tto --views=162") == runs_of("--tto") != runs_of("--tto --views=8")
    options = parse_train(["--sync_bn"])
    one, two = (plan(options, SPEC, "fp32", processes)[0] for processes in (1, 2))
    assert one == run_of("") and not one.sync_bn, "there is nothing to synchronise in one process"
    assert two.sync_bn and differences(one, two) == ["sync_bn", "processes"]


def test_recipes_are_scaled_to_a_folder_within_bounds():
    teacher, sgd = CIFAR["teacher", "muon"], CIFAR["student", "sgd"]
    for images, epochs, batch in (
        (1, 64, 32), (4000, 64, 32), (12_500, 64, 128), (25_000, 32, 256), (50_000, 16, 256), (1_000_000, 4, 256),
    ):  # fmt: skip
        assert scale_recipe(teacher, images) == replace(teacher, num_epochs=epochs, batch_size=batch)
        assert scale_recipe(sgd, images).batch_size == min(batch, 128)
    assert recipe_of("cifar100", "teacher", "muon", 25_000) == teacher, "which was chosen for it"
    assert recipe_of("svhn", "teacher", "muon", 25_000) == scale_recipe(teacher, 25_000)
    student = recipe_of("digits", "student", "muon", 5000)
    for images, epochs, batch in ((5000, 3, 64), (1500, 10, 32), (50, 30, 32)):
        scaled = replace(student, num_epochs=epochs, batch_size=batch)
        assert recipe_of("digits", "student", "muon", 5000, images) == scaled
    spec = replace(DATA_SETS["folder"], classes=("a", "b"), train_images=25_000, fingerprint="d" * 16)
    expected = asdict(scale_recipe(sgd, 25_000)) | {"views": 162, "num_classes": 2, "images": "d" * 16}
    (run,) = runs_of("--dataset=folder --optimizer=sgd", spec)
    assert {name: getattr(run, name) for name in expected} == expected


# ---------------------------------------------------------------------------------------------- comparing runs

OF_KD = {"loss", "temp", "kd_weights", "ce_weight", "teacher", "teacher_unknown"}


def changed(run: RunConfig, name: str) -> RunConfig:
    """The run with another value of a field."""
    value = getattr(run, name)
    if isinstance(value, bool):
        return replace(run, **{name: not value})
    if isinstance(value, str):
        return replace(run, **{name: {"loss": "ls", "role": "teacher"}.get(name, f"{value}x")})
    return replace(run, **{name: (*value, 1.0) if isinstance(value, tuple) else (value or 0) + 7})


@pytest.mark.parametrize("name", [f.name for f in fields(RunConfig)])
def test_which_runs_belong_together(name):
    baseline, run = run_of(""), run_of("--kd")
    other = changed(run, name)
    assert differences(run, other) == differences(other, run) == [name]
    assert differences(run, run) == differences(run, other, {name, "lr"}) == []
    assert is_baseline_of(baseline, run) and is_baseline_of(baseline, other) == (name in OF_KD)
    assert name in OF_KD or not is_baseline_of(changed(baseline, name), run)


def test_differences_in_words():
    run, other = run_of("--kd --loss dkd"), run_of("--kd --loss dkd --kd_weight 2 8", teacher="resnet18-1")
    assert describe_differences(run, other) == "kd_weights 1 8, not 2 8; teacher bbbbbbbb, not resnet18-1"


def test_baselines_are_the_student_without_kd_and_plain_kd_of_the_same_teacher_and_recipe():
    dkd = run_of("--kd --loss dkd")
    runs = run_of(""), dkd, run_of("--tto")
    assert [(run, other) for run in runs for other in runs if is_baseline_of(run, other)] == [runs[:2]]
    for command in ("--kd", "--kd --temp 20", "--kd --loss kd_as_dkd"):
        assert is_kd_baseline_of(run_of(command), dkd), command
        assert not is_kd_baseline_of(dkd, run_of(command)), command
        assert not is_kd_baseline_of(run_of(command, teacher="c" * 16), dkd), command
        assert not is_kd_baseline_of(run_of(f"{command} --seed 7"), dkd), command
    for command in ("", "--kd --alpha 0.5", "--kd --loss kd_as_ls", "--kd --loss ls", "--kd --loss dkd --temp 2",
                    "--kd --loss kd_as_dkd --temp 1"):  # fmt: skip
        assert not is_kd_baseline_of(run_of(command), dkd), command
    assert not is_kd_baseline_of(run_of("--kd"), run_of("--kd --temp 20"))
    assert not is_kd_baseline_of(run_of("--kd"), run_of("--kd --loss kd_as_dkd"))


def test_whether_a_teacher_was_trained_on_images_that_are_held_out():
    for teacher, student, saw in (
        ("", "", False), ("", "--subset 40", False), ("", "--holdout 8", True), ("", "--subset 40 --holdout 8", True),
        ("--holdout 8", "--holdout 8", False), ("--holdout 8", "--holdout 9", True),
        ("--subset 33", "--subset 40 --holdout 8", True), ("--subset 100", "--holdout 500", False),
        ("--subset 40 --holdout 8", "--subset 30 --holdout 8", True),
        ("--subset 9000", "--holdout 8", True),  # there are 5,000
        ("--subset 9000 --holdout 8", "--subset 7000 --holdout 8", False),
    ):  # fmt: skip
        run, name = run_of(f"--dataset digits --tto {teacher}"), run_of(f"--dataset digits {student}")
        assert training.runs.saw_held_out(run, name, 5000) is saw, (teacher, student)


def test_the_labels_of_a_table_tell_what_titles_hide():
    for first, second, hidden in (
        ("--kd", "--kd --loss dkd --lr 0.05", "lr 0.1; lr 0.05"),
        ("--kd", "--kd --temp 2 --alpha 0.5 --views 4", "views 16; views 4"),
        ("--kd --student_images 500", "--kd --student_images 5000", "; "),  # their recipes are scaled
        ("--student_images 500", "--student_images 5000 --lr 0.05", "lr 0.1; lr 0.05"),
        ("", "--kd --lr 0.05", "; "),  # why it has no gain is told
    ):
        runs = run_of(first), run_of(second)
        labels = training.runs.row_labels(runs)
        pairs = zip(labels, runs, strict=True)
        assert "; ".join(label.removeprefix(run.title).removeprefix(", ") for label, run in pairs) == hidden, second


def test_the_order_of_a_table():
    commands = ("--tto", "", "--seed 43", "--kd", "--kd --temp 20", "--kd --loss ls", "--kd --loss ls --seed 43")
    runs = [*map(run_of, commands), run_of("--kd --loss dkd --temp 1"), run_of("--kd --loss kd_as_ls")]
    shuffled = runs[5:] + runs[:5]
    assert sorted(shuffled, key=training.runs.row_order) == runs


@pytest.fixture
def make_run(tiny_models, tmp_path, monkeypatch):
    """A function that makes a run of 5 steps per epoch, as the first of a number of processes that are all alike."""
    monkeypatch.setattr(training.run, "DistributedDataParallel", lambda model, **_: model)

    def make(world_size: int = 1, command: str = "", precision: str = "fp32", **changes) -> Run:
        monkeypatch.setattr(dist, "all_reduce", lambda values: values.mul_(world_size))
        config = run_of(f"--batch_size=8 --num_epochs=2 --lr=0.1 {command}", processes=world_size, **changes)
        runtime = Runtime(CPU.device, precision, 0, world_size)
        options = parse_train([f"--weights_path={tmp_path}", f"--plots_path={tmp_path}"])
        return Run(config, runtime, SPEC, 40, RunFiles(config, options))

    return make


def test_each_seed_epoch_step_and_process_draws_numbers_of_its_own(make_run):
    drawn = set()
    for seed, epoch, place, rank in ((42, 0, 0, 0), (7, 0, 0, 0), (42, 1, 0, 0), (42, 0, 1, 0), (42, 0, 0, 1)):
        run = make_run(2, f"--seed={seed}")
        run.epoch, run.step, run.runtime = epoch, place, replace(run.runtime, rank=rank)
        run.seed_step()
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 5


def step(run: Run, right: int) -> None:
    """A step of which each process counts 8 / world size images."""
    count = run.batch_size // run.runtime.world_size
    correct = torch.tensor([right / run.runtime.world_size, count], dtype=torch.float64)
    run.record(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.5), correct, count)


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_epochs_sums_are_shared_out_among_its_processes(before, after, make_run):
    run = make_run(before)
    run.write_log(json.dumps(run.header()) + "\n")
    for right in (4, 6):
        step(run, right)
    run.seconds, own = 7.0, run.totals.clone()
    run.save()
    assert torch.equal(run.totals, own), "a save adds nothing to a process's own sums"
    again = make_run(after)
    again.restore()
    assert (again.epoch, again.step, again.seconds) == (0, 2, 7.0)
    assert again.runtime.total(again.totals).tolist() == [32, 16, 8, 10, 16]
    assert "loss 2.000 top1 62.50%" in train.progress_text(again)
    step(again, 8)
    assert "top1 75.00%" in train.progress_text(again)
    assert again.runtime.total(again.totals).tolist() == [48, 24, 12, 18, 24]


def test_processes_must_share_a_batch_evenly(make_run):
    with pytest.raises(UserError, match="of 8 can't be split over 3 processes: give a --batch_size that is a multiple"):
        make_run(3)
    with pytest.raises(UserError, match="a batch of 40 can't be split over 64 processes"):
        make_run(64, "--batch_size=64")  # of 40 images
    with pytest.raises(UserError, match="over 3 processes: train it first, with --tto True and a --batch_size that is"):
        make_run(3, "--tto")
    assert make_run(4).batch_size == 8 and make_run(1, "--batch_size=64").batch_size == 40
    synchronised = make_run(4, sync_bn=True).model
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synchronised.modules())


def test_sync_bn_rejects_batch_norms_that_do_more(make_run, monkeypatch):
    class BatchNormAct2d(torch.nn.BatchNorm2d):
        """As timm's, with an activation, which torch would drop."""

    monkeypatch.setattr(training.run, "build_model_of", lambda *_: torch.nn.Sequential(BatchNormAct2d(3)))
    with pytest.raises(UserError, match="--sync_bn can't convert BatchNormAct2d of --student: leave it out"):
        make_run(4, sync_bn=True)


def test_the_progress_tells_loss_accuracy_speed_rate_and_the_time_left(make_run, monkeypatch):
    monkeypatch.setattr(training.run.time, "monotonic", lambda: 0.0)
    run = make_run()
    step(run, 4)
    run.seconds = 4.0
    assert train.progress_text(run) == "loss 2.000 top1 50.00% 2 img/s lr 0.1000 left 0:00:36"


def test_progress_is_a_line_every_30_seconds(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("runtime.progress.time.monotonic", lambda: clock[0])
    with Progress("epoch 1/2", 3, visible=True) as progress:
        for clock[0] in (29.0, 31.0, 32.0):
            progress.step(lambda: "loss 1")
    assert capsys.readouterr().out == "epoch 1/2 2/3 loss 1\n"


def test_several_processes_talk_after_every_4th_step_and_the_last_one_of_an_epoch(make_run, monkeypatch):
    run, talks = make_run(2), []
    monkeypatch.setattr(Runtime, "agree", lambda *numbers: talks.append(run.step) or (0, False))
    run.steps_per_epoch = 10
    for run.step in range(1, 11):
        train.save_or_stop(run)
    assert talks == [4, 8, 10]


def test_float16_skips_a_step_whose_gradients_overflow_and_its_scale_is_resumed(make_run):
    def train_step(run: Run, factor: float) -> list[torch.Tensor]:
        with run.runtime.autocast():
            logits = run.forward(torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(8, 3, 32, 32))
        run.backward_and_step(logits.float().square().mean() * factor)
        rates = [group["lr"] for group in run.optimizer.param_groups]
        assert rates == pytest.approx([run.lr * group["lr_scale"] for group in run.optimizer.param_groups])
        run.step += 1
        momenta = [state["momentum"] for state in run.optimizer.state.values()]
        return [tensor.clone() for tensor in (*run.model.parameters(), *momenta)]

    run = make_run(precision="fp16")
    before, first_scale = train_step(run, 1.0), run.scaler.get_scale()
    assert all(map(torch.equal, before, train_step(run, float("inf"))))
    assert run.scaler.get_scale() == first_scale / 2
    run.save()
    resumed = make_run(precision="fp16")
    resumed.restore()
    assert resumed.scaler.get_scale() == first_scale / 2
    after = train_step(run, 1.0)
    assert all(map(torch.equal, after, train_step(resumed, 1.0))) and not all(map(torch.equal, after, before))
