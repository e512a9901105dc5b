"""What makes two runs the same, the same but for the seed, or a pair: decided here and nowhere else."""

import json
from dataclasses import dataclass

from config import LOSSES, ce_weight_of, plain

MACHINE = {"torch", "device", "world_size"}  # what a run may change under way
LOSS = {"loss", "temp", "kd_weight", "nckd_weight", "ce_weight"}  # what two ways to distil differ in
DISTILLATION = LOSS | {"kd", "cache_teacher", "teacher"}  # what a student with KD has and its control has not
OF_KD = {"temp": float, "loss": str, "kd_weight": float, "ce_weight": float}
KINDS = {**OF_KD, "nckd_weight": float, "subset": int, "holdout": int, "teacher": str, "images": str}
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
        """ValueError where a fact is of the wrong kind or out of bounds, or one that all runs have is missing."""
        facts = dict(self.facts)
        if self["kd"] and "alpha" in facts:  # of a version that knew one loss
            alpha = facts.pop("alpha")
            facts |= {"loss": "kd", "kd_weight": alpha, "ce_weight": ce_weight_of(alpha)}
        if "head_lr" in facts:  # perhaps of a version in which batch norm had no rate of its own
            facts.setdefault("norm_lr", 1.0)
        object.__setattr__(self, "facts", facts)
        needed = NEEDED | (OF_KD if self["kd"] else {})
        for name, kind in {**KINDS, **needed}.items():
            value = self[name]
            if not (isinstance(value, kind) or (value is None and name not in needed)):
                raise ValueError(f"{name} is {value!r}")
        for name, value in self.facts.items():
            is_number = isinstance(value, (int, float)) and value >= 0
            if not isinstance(name, str) or not (is_number or value is None or isinstance(value, str)):
                raise ValueError(f"{name!r} is {value!r}")

    def __getitem__(self, name: str):
        """A fact, or None."""
        return self.facts.get(name)

    def differing(self, other: "Identity") -> list[str]:
        """The names of the facts in which two runs differ."""
        return [name for name in {**self.facts, **other.facts} if self[name] != other[name]]

    def without(self, *names: str) -> str:
        """A key that runs share if they differ in these facts at most."""
        facts = {name: value for name, value in self.facts.items() if name not in names and value is not None}
        return json.dumps(facts, sort_keys=True)

    def can_go_on_as(self, other: "Identity") -> bool:
        """Whether an unfinished run may be finished as `other`: on another machine too, with other last bits."""
        return set(self.differing(other)) <= MACHINE

    def is_control_of(self, other: "Identity") -> bool:
        """Whether this is the student without KD that differs from the one with KD in the loss alone."""
        return other["kd"] and not self["kd"] and set(self.differing(other)) <= DISTILLATION

    def has_seen_holdout(self, subset: int | None, holdout: int, whole: int) -> bool:
        """Whether this run was trained on images that these options keep aside, the last `holdout` of `whole` ones."""
        seen = min(self["subset"] or whole, whole) - (self["holdout"] or 0)
        return holdout > 0 and seen > min(subset or whole, whole) - holdout

    def is_plain_kd_beside(self, other: "Identity") -> bool:
        """Whether this is plain KD, at its usual weights or the other run's, and that one differs in the loss alone."""
        if self["loss"] != "kd" or other["loss"] in (None, "kd") or not set(self.differing(other)) <= LOSS:
            return False
        total = other["kd_weight"] + (other["nckd_weight"] or 0)
        matched = (self["temp"], self["kd_weight"], self["ce_weight"]) == (other["temp"], total, other["ce_weight"])
        return matched or not self.weights

    @property
    def place(self) -> tuple:
        """Where it stands among others: the teacher, the student without KD, then by loss, temperature and seed."""
        loss = list(LOSSES).index(self["loss"]) if self["loss"] in LOSSES else -1
        return self["role"] != "teacher", loss, self["temp"] or 0.0, self["seed"]

    def beside(self, other: "Identity", ignoring: set[str] = frozenset()) -> str:
        """In what this run differs from another, in words: `num_epochs 30, not 16`."""
        names = [name for name in self.differing(other) if name not in ignoring]
        return "; ".join(f"{name} {self[name]}, not {other[name]}" for name in names)

    @property
    def title(self) -> str:
        """Role and KD, and how the images depart from the whole set."""
        if self["role"] == "teacher":
            title = "Teacher (VGG19 with BN)"
        elif self["kd"]:
            title = f"Student (with {self['loss'].upper()}, Temp = {plain(self['temp'])}{self.weights})"
        else:
            title = "Student (w/o KD)"
        return title + "".join(f", {name} {self[name]}" for name in ("subset", "holdout") if self[name])

    @property
    def weights(self) -> str:
        """The weights of a student with KD in words, unless they are plain KD's usual ones."""
        usual = LOSSES["kd"]
        if (self["loss"], self["kd_weight"], self["ce_weight"]) == ("kd", *usual.kd_weights, usual.ce_weight):
            return ""
        terms = {"kd": ("KL",), "dkd": ("TCKD", "NCKD")}.get(self["loss"], (self["loss"].upper(),))
        weights = (self["kd_weight"], self["nckd_weight"])[: len(terms)]
        weighed = zip((*weights, self["ce_weight"]), (*terms, "CE"), strict=True)
        return ", " + " + ".join(f"{plain(weight)} {term}" for weight, term in weighed)

    def says(self, name: str) -> str:
        """A fact in words."""
        value = self[name]
        if name in ("teacher", "images"):
            return f"{name} {str(value)[:8]}"
        if name in WORDS and value is not None:
            return WORDS[name].format(value)
        return f"{name} {value}"


def labels(runs: list[Identity]) -> list[str]:
    """A title for each of these rows or curves, with what sets it apart from others of its title; the seed does not."""
    found = []
    for run in runs:
        rivals = [other for other in runs if other.title == run.title]
        names = dict.fromkeys(name for rival in rivals for name in rival.facts if name != "seed")
        apart = [name for name in names if len({repr(rival[name]) for rival in rivals}) > 1]
        found.append(", ".join([run.title, *(run.says(name) for name in apart)]))
    return found
