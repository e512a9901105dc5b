"""What makes two runs the same, the same but for the seed, or a pair: decided here and nowhere else."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from config import plain

MACHINE = {"torch", "device", "world_size"}  # what changes the last bits of a run and nothing else
DISTILLATION = {"kd", "temp", "alpha", "cache_teacher", "teacher"}  # what a student with KD has and its control has not
TITLED = {"role", "kd", "temp", "subset", "holdout"}  # what a run's title says by itself
NEEDED = {"role": str, "architecture": str, "num_classes": int, "dataset": str, "kd": bool, "seed": int}
WORDS = {
    "num_epochs": "{} epochs", "batch_size": "batch {}", "views": "{} views", "world_size": "{} processes",
    "torch": "torch {}", "device": "{}", "optimizer": "{}", "precision": "{}",
}  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """All that shapes a run's result, as plain values by name: role, architecture, data set, options, teacher, machine.

    What a kind of run has not (a student without KD its temperature) is not among them.
    """

    facts: dict

    def __post_init__(self) -> None:
        """ValueError where a fact that all runs have is missing or of the wrong kind."""
        for name, kind in NEEDED.items():
            if not isinstance(self.facts.get(name), kind):
                raise ValueError(f"{name} is {self.facts.get(name)!r}")
        if self["kd"] and not isinstance(self["temp"], float):
            raise ValueError(f"temp is {self['temp']!r}")

    def __getitem__(self, name: str):
        """A fact, or None."""
        return self.facts.get(name)

    def differing(self, other: "Identity") -> list[str]:
        """The names of the facts in which two runs differ."""
        return [name for name in {**self.facts, **other.facts} if self[name] != other[name]]

    def without(self, *names: str) -> str:
        """A key that runs share if they differ in these facts at most."""
        return json.dumps({name: value for name, value in self.facts.items() if name not in names}, sort_keys=True)

    def can_go_on_as(self, other: "Identity") -> bool:
        """Whether an unfinished run may be finished as `other`: on another machine too, with other last bits."""
        return set(self.differing(other)) <= MACHINE

    def is_control_of(self, other: "Identity") -> bool:
        """Whether this is the student without KD that differs from the one with KD in the loss alone."""
        return other["kd"] and not self["kd"] and set(self.differing(other)) <= DISTILLATION

    def has_seen_holdout(self, subset: int | None, holdout: int) -> bool:
        """Whether this run was trained on images that one of these options keeps aside, the last `holdout` ones."""
        whole = 10**9  # images, more than any training set has
        seen = (self["subset"] or whole) - (self["holdout"] or 0)
        return holdout > 0 and seen > (subset or whole) - holdout

    def beside(self, other: "Identity") -> str:
        """In what this run differs from another, in words: `num_epochs 30, not 16`."""
        return "; ".join(f"{name} {self[name]}, not {other[name]}" for name in self.differing(other))

    @property
    def title(self) -> str:
        """Role and KD, and how the images depart from the whole set."""
        if self["role"] == "teacher":
            title = "Teacher (VGG19 with BN)"
        elif self["kd"]:
            title = f"Student (with KD, Temp = {plain(self['temp'])})"
        else:
            title = "Student (w/o KD)"
        return title + "".join(f", {name} {self[name]}" for name in ("subset", "holdout") if self[name])

    def says(self, name: str) -> str:
        """A fact in words."""
        value = self[name]
        if name == "teacher":
            return f"teacher {str(value)[:8]}"
        if name in WORDS and value is not None:
            return WORDS[name].format(value)
        return f"{name} {value}"


def labels(runs: list[Identity]) -> list[str]:
    """A title for each of these rows or curves, with what sets it apart from others of its title; the seed does not."""
    titles = Counter(run.title for run in runs)
    found = []
    for run in runs:
        rivals = [other for other in runs if other.title == run.title]
        apart = [name for name in all_names(rivals) if name not in TITLED and len({repr(r[name]) for r in rivals}) > 1]
        words = [run.says(name) for name in apart if name != "seed"] if titles[run.title] > 1 else []
        found.append(", ".join([run.title, *words]))
    return found


def all_names(runs: Iterable[Identity]) -> list[str]:
    """The names of all facts that any of these runs has."""
    return list(dict.fromkeys(name for run in runs for name in run.facts))
