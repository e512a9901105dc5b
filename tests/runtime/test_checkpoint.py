"""Checkpoints: what is written is what is read, or it is refused."""

import pytest
import torch
from conftest import room
from made_up import facts_of, format_1, run_of

from runtime import checkpoint
from runtime.errors import UserError
from runtime.identity import NEEDED, Identity


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(tmp_path):
    # Headers and directory of the archive included: where a flip does no harm, what is read is what was written.
    path = tmp_path / "small.pt"
    weights = torch.arange(6.0)
    facts = {name: fact for name, fact in facts_of("--lr 0.1").items() if name in (*NEEDED, "lr")}
    checkpoint.save(path, {"identity": facts, "model": {"weight": weights}})
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
            assert content["identity"] == Identity(facts)
    assert refused > len(whole) // 4


@pytest.mark.parametrize("size", [0, 500, 5000])
def test_a_full_disk_is_no_bug_wherever_it_is_met(size, tmp_path):
    path = tmp_path / "small.pt"
    path.write_bytes(b"old")
    with room(size), pytest.raises(UserError, match="can't write .*small.pt: File too large; what was there is unch"):
        checkpoint.save(path, {"model": {"weight": torch.zeros(2000)}})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_a_checkpoint_of_the_format_before_still_says_what_it_is(tmp_path):
    runs = []
    for name, content in (("student", format_1()), ("kd", format_1(kd=True))):
        torch.save(content, tmp_path / f"{name}.pt")
        runs.append(checkpoint.load(tmp_path / f"{name}.pt", role="student", dataset="cifar10")["identity"])
    student, distilled = runs
    assert student["optimizer"] == distilled["optimizer"] == "sgd" and student["num_epochs"] == 5
    assert distilled["temp"] == 5.0 and distilled["teacher"] == "1f3a" * 4
    assert distilled.title == "Student (with KD, Temp = 5)" and student.title == "Student (w/o KD)"
    assert student["torch"] == "2.11" and student["device"] is None
    assert student["norm_lr"] == distilled["norm_lr"] == 1.0  # as all but the last layer's
    assert student.is_control_of(distilled) and not distilled.is_control_of(student)
    # Nothing that runs here now is its control or goes on with it: where it ran, it does not say.
    here = "--optimizer sgd --num_epochs 5 --batch_size 128 --lr 0.1 --head_lr 1 --views 1"
    assert not run_of(here).is_control_of(distilled)
    assert not student.is_control_of(run_of(f"--kd {here}", teacher="1f3a" * 4))


def test_a_format_that_is_not_known_yet_is_named(tmp_path):
    torch.save(format_1(format=3), tmp_path / "new.pt")
    with pytest.raises(UserError, match="format 3, this version reads up to 2"):
        checkpoint.load(tmp_path / "new.pt")


def test_a_fingerprint_is_of_names_numbers_and_context():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    found = checkpoint.fingerprint(weights)
    assert len(found) == 16 and int(found, 16) and found == checkpoint.fingerprint(dict(weights))
    in_other_order = {"a": weights["a"].T.contiguous().T, "b": weights["b"]}
    assert checkpoint.fingerprint(in_other_order) == found, "the order in memory is no part of it"
    others = [
        {"a": weights["a"] + 1e-6, "b": weights["b"]}, {"a": weights["a"]}, {"c": weights["a"], "b": weights["b"]},
    ]  # fmt: skip
    prints = [found, *(checkpoint.fingerprint(other) for other in others), checkpoint.fingerprint(weights, "bf16")]
    assert len(set(prints)) == len(prints)
