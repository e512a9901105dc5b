"""Checkpoints: what is written is what is read, or one line says what is wrong with the file."""

import os

import pytest
import torch
from made_up import Hostile, hostile, tiny_student

from models import build_model
from runtime import checkpoint
from runtime.errors import UserError

CONTENT = {"run": {"role": "student", "seed": 42, "kd_weights": (0.9,)}, "model": {"weight": torch.arange(6.0)}}


def same(content: dict) -> bool:
    return content["run"] == CONTENT["run"] and torch.equal(content["model"]["weight"], CONTENT["model"]["weight"])


def test_what_is_loaded_is_what_was_saved_and_its_path(tmp_path):
    path = tmp_path / "new folder" / "small.pt"
    checkpoint.save(path, CONTENT)
    content = checkpoint.load(path)
    assert same(content) and content.keys() == {"format", "path", *CONTENT} and content["path"] == path
    assert torch.load(path, weights_only=True)["format"] == checkpoint.FORMAT, "torch alone reads it, too"


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(tmp_path):
    # Headers and directory of the archive included: where a flip does no harm, what is read is what was written.
    path = tmp_path / "small.pt"
    checkpoint.save(path, CONTENT)
    whole = path.read_bytes()
    refused = 0
    flips = [(place, place % 8) for place in range(len(whole)) if whole[place]]  # the rest is mostly padding
    entry = whole.rindex(b"PK\1\2", 0, whole.rindex(b"data/0"))  # of the weights, in the directory
    flips += [(place, bit) for place in range(entry, entry + 46) for bit in range(8)]
    for place, bit in flips:
        changed = bytearray(whole)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        try:
            content = checkpoint.load(path)
        except UserError:
            refused += 1
        else:
            assert same(content), f"bit {bit} of byte {place}"
    assert refused > len(flips) // 2


def truncated(path) -> None:
    checkpoint.save(path, CONTENT)
    os.truncate(path, path.stat().st_size - 1)


STATE = tiny_student().state_dict()
DAMAGED = "is damaged, or no file that torch.save wrote: train it again, or give another file"
FOREIGN = "file.pt is not a checkpoint of this project: train it again, or give another file"
WRONG = {
    "missing": (lambda at: None, "no checkpoint .*file.pt"),
    "a folder": (lambda at: at.mkdir(), "can't read .*file.pt: Is a directory"),
    "empty": (lambda at: at.touch(), DAMAGED),
    "text": (lambda at: at.write_text("these are my notes\n"), DAMAGED),
    "truncated": (truncated, DAMAGED),
    "a state dict": (lambda at: torch.save(STATE, at), FOREIGN),
    "a list": (lambda at: torch.save([1, 2, 3], at), FOREIGN),
    "format before": (lambda at: torch.save(CONTENT | {"format": 2}, at), "has format 2, this version reads format 3"),
    "code": (hostile, "file.pt"),
    "code, old style": (lambda at: torch.save([Hostile()], at, _use_new_zipfile_serialization=False), "file.pt"),
    "a whole model": (lambda at: torch.save(tiny_student(), at), "file.pt"),
}  # fmt: skip


@pytest.mark.parametrize("write, tells", WRONG.values(), ids=WRONG)
def test_a_file_that_is_no_checkpoint_is_said_to_be_what_it_is(write, tells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file.pt")
    with pytest.raises(UserError, match=tells):
        checkpoint.load(tmp_path / "file.pt")
    assert not (tmp_path / "hacked").exists(), "code in the file was run"


@pytest.mark.parametrize("model", [STATE, {"features.0.weight": "x"}, {}, "x", None])
def test_weights_that_do_not_fit_name_the_file_and_the_model(model):
    content = {"path": "w/a.pt"} | ({} if model is None else {"model": model})
    with pytest.raises(UserError, match="w/a.pt does not fit the model StudentCNN"):
        checkpoint.load_weights(build_model("student"), content)


def test_a_fingerprint_is_of_names_numbers_and_context():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    found = checkpoint.fingerprint(weights)
    assert len(found) == 16 and int(found, 16) and found == checkpoint.fingerprint(dict(weights))
    in_other_order = weights | {"a": weights["a"].T.contiguous().T}
    assert checkpoint.fingerprint(in_other_order) == found, "the order in memory is no part of it"
    others = [weights | {"a": weights["a"] + 1e-6}, {"a": weights["a"]}, {"c": weights["a"], "b": weights["b"]}]
    prints = [found, *(checkpoint.fingerprint(other) for other in others), checkpoint.fingerprint(weights, "bf16")]
    assert len(set(prints)) == len(prints)
