"""What makes two runs the same, a pair, or two rows; and how rows are called."""

import itertools

import pytest
from made_up import facts_of, run_of

from datasets import DATASETS
from runtime.identity import MACHINE, Identity, labels

TEACHER, OTHER_TEACHER = "1f3a" * 4, "77aa" * 4


def student(**changes) -> Identity:
    return run_of("", **changes)


def distilled(teacher: str = TEACHER, **changes) -> Identity:
    return run_of("--kd", teacher, **changes)


# ---------------------------------------------------------------------------------------------- the same, or a pair


def test_a_run_says_all_that_shapes_it_and_nothing_that_it_has_not():
    of_kd = {"temp", "loss", "kd_weight", "ce_weight", "cache_teacher", "teacher"}
    assert distilled().facts.keys() - student().facts.keys() == of_kd
    assert {"seed", "subset", "holdout", "optimizer", "lr", "views", "torch", "device"} < student().facts.keys()
    assert student() == student() and student() != student(lr=0.2)
    assert student()["no such fact"] is None
    with_none = Identity(student().facts | {"no such fact": None})
    assert with_none.without("seed") == student().without("seed"), "two rows of one label, else"


@pytest.mark.parametrize("fact", ["torch", "device", "world_size"])
def test_another_machine_goes_on_with_a_run(fact):
    for run in (student, distilled):
        assert run(**{fact: 7}).can_go_on_as(run())
        assert run(**{fact: None}).can_go_on_as(run())
    assert distilled(**dict.fromkeys(MACHINE, 9)).can_go_on_as(distilled())


@pytest.mark.parametrize("fact", sorted(distilled().facts.keys() - {"torch", "device", "world_size"}))
def test_another_run_does_not(fact):
    value = distilled()[fact]
    other = not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else (value or 0) + 7
    changed = Identity(distilled().facts | {fact: other})
    assert not distilled().can_go_on_as(changed) and not changed.can_go_on_as(distilled())
    assert distilled().differing(changed) == [fact]
    assert distilled().beside(changed) == f"{fact} {value}, not {other}"


@pytest.mark.parametrize("fact", sorted(distilled().facts.keys() - {"kd"}))
def test_only_what_distilling_is_sets_a_student_apart_from_its_control(fact):
    value = distilled()[fact]
    other = not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else (value or 0) + 7
    changed = Identity(distilled().facts | {fact: other})
    of_distilling = fact in ("temp", "loss", "kd_weight", "ce_weight", "cache_teacher", "teacher")
    assert student().is_control_of(distilled())
    assert student().is_control_of(changed) == of_distilling
    assert of_distilling or not Identity(student().facts | {fact: other}).is_control_of(distilled())


def test_a_control_is_a_student_without_of_one_with_whatever_its_distillation():
    for with_kd in (distilled(), distilled(OTHER_TEACHER), run_of("--kd --alpha 0.5"), run_of("--kd --loss dkd")):
        assert student().is_control_of(with_kd)
        assert not with_kd.is_control_of(student()) and not with_kd.is_control_of(with_kd)
    assert not student().is_control_of(student()) and not run_of("--tto").is_control_of(distilled())


@pytest.mark.parametrize(
    "teacher, run, seen",
    [
        ("", "", False),  # nothing is kept aside
        ("--subset 40", "--subset 40", False),
        ("", "--holdout 8", True),
        ("", "--subset 40 --holdout 8", True),
        ("--holdout 8", "--holdout 8", False),
        ("--holdout 8", "--holdout 9", True),
        ("--holdout 9", "--holdout 8", False),
        ("--subset 40 --holdout 8", "--subset 40 --holdout 8", False),
        ("--subset 32", "--subset 40 --holdout 8", False),
        ("--subset 33", "--subset 40 --holdout 8", True),
        ("--subset 50 --holdout 18", "--subset 40 --holdout 8", False),
        ("--subset 40 --holdout 8", "--subset 30 --holdout 8", True),
        ("--subset 100", "--holdout 5000", False),
        ("--holdout 5000", "--subset 100 --holdout 8", True),
        # Of the 5,000 images of the digits.
        ("--dataset digits --subset 4500", "--dataset digits --holdout 500", False),
        ("--dataset digits --subset 4501", "--dataset digits --holdout 500", True),
        ("--dataset digits --holdout 500", "--dataset digits --subset 4600 --holdout 100", False),
        ("--dataset digits --subset 9000", "--dataset digits --holdout 8", True),
        ("--dataset digits --subset 9000 --holdout 8", "--dataset digits --subset 7000 --holdout 8", False),
    ],
)
def test_a_teacher_has_seen_what_it_was_trained_on(teacher, run, seen):
    wanted = run_of(run)
    whole = DATASETS[wanted["dataset"]].train_images
    assert run_of(f"--tto {teacher}").has_seen_holdout(wanted["subset"], wanted["holdout"], whole) == seen


@pytest.mark.parametrize(
    "changes", [{"role": None}, {"seed": "42"}, {"kd": 1}, {"num_classes": 10.0}, {"dataset": 3}, {"temp": None}]
)
def test_facts_that_are_none_are_refused(changes):
    facts = {name: value for name, value in (distilled().facts | changes).items() if value is not None}
    with pytest.raises(ValueError, match=next(iter(changes))):
        Identity(facts)


# ---------------------------------------------------------------------------------------------- titles and labels


def test_titles():
    assert run_of("--tto").title == "Teacher (VGG19 with BN)"
    assert student().title == "Student (w/o KD)"
    assert distilled().title == "Student (with KD, Temp = 5)"
    assert run_of("--kd --temp 5.0000001").title == "Student (with KD, Temp = 5.0000001)"
    assert run_of("--subset 40 --holdout 8").title == "Student (w/o KD), subset 40, holdout 8"


def test_one_of_a_kind_is_called_by_its_title():
    runs = [run_of("--tto --num_epochs 3"), student(), distilled(), run_of("--kd --temp 20", OTHER_TEACHER)]
    assert labels(runs) == [run.title for run in runs]


@pytest.mark.parametrize(
    "changes, words",
    [
        ([{"views": 8}, {"views": 16}], ["8 views", "16 views"]),
        ([{"views": 8}, {"views": None}], ["8 views", "views None"]),
        ([{"num_epochs": 30}, {"num_epochs": 60}], ["30 epochs", "60 epochs"]),
        ([{"batch_size": 64}, {"batch_size": 128}], ["batch 64", "batch 128"]),
        ([{"teacher": TEACHER}, {"teacher": OTHER_TEACHER}], ["teacher 1f3a1f3a", "teacher 77aa77aa"]),
        ([{"optimizer": "muon"}, {"optimizer": "sgd"}], ["muon", "sgd"]),
        ([{"precision": "fp32"}, {"precision": "bf16"}], ["fp32", "bf16"]),
        ([{"torch": "2.11"}, {"torch": "2.14"}], ["torch 2.11", "torch 2.14"]),
        ([{"device": "A, 2 threads"}, {"device": "B"}], ["A, 2 threads", "B"]),
        ([{"world_size": 1}, {"world_size": 2}], ["1 processes", "2 processes"]),
        ([{"sync_bn": True}, {"sync_bn": False}], ["sync_bn True", "sync_bn False"]),
        ([{"lr": 0.1, "views": 2}, {"lr": 0.2, "views": 3}], ["lr 0.1, 2 views", "lr 0.2, 3 views"]),
    ],
)
def test_rows_of_one_title_say_in_what_they_differ(changes, words):
    first, second = (distilled(**change) for change in changes)
    found = labels([first, student(), second])
    assert found[1] == student().title
    for label, word in zip((found[0], found[2]), words, strict=True):
        assert label.startswith(distilled().title + ", ") and sorted(label.split(", ")) == sorted(
            f"{distilled().title}, {word}".split(", ")
        )


def test_the_seed_alone_is_no_difference_and_beside_another_it_is_not_told():
    assert labels([student(seed=1, lr=0.1), student(seed=2, lr=0.2)]) == [
        "Student (w/o KD), lr 0.1", "Student (w/o KD), lr 0.2",
    ]  # fmt: skip
    assert student(seed=1).without("seed") == student(seed=2).without("seed") != student(lr=0.2).without("seed")


def test_no_two_rows_share_a_label():
    """Whatever two or three facts differ, be one missing, None, zero or of nearly the same value."""
    values = {
        "kd_weight": (0.5, 0.5000001), "lr": (0.1, None), "views": (8, None), "temp": (5.0, 5.0000001, 50.0),
        "subset": (40, None), "holdout": (0, 8, None), "torch": ("2.11", None), "device": ("cpu", None),
        "teacher": (TEACHER, OTHER_TEACHER), "optimizer": ("muon", "sgd"), "architecture": ("a/1", "a/2"),
        "num_classes": (10, 100), "new in a later version": (1, None), "cache_teacher": (True, False),
    }  # fmt: skip
    for names in itertools.combinations(values, 2):
        choices = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*(values[n] for n in names))]
        for lacking in (True, False):  # what is None may be missing, or be there as None
            facts = [facts_of("--kd", TEACHER) | choice for choice in choices]
            if lacking:
                facts = [{name: value for name, value in one.items() if value is not None} for one in facts]
            rows = {run.without("seed"): run for run in map(Identity, facts)}
            found = labels(list(rows.values()))
            assert len(set(found)) == len(found), names
