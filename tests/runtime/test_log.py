"""A run's log: whole, its own, and of what was before."""

import pytest

from runtime.errors import UserError
from runtime.log import RunLog, read_log


@pytest.mark.parametrize("meanwhile", ["another run's", "cut", "longer", "removed"])
def test_a_resumed_run_has_its_own_log_whatever_became_of_the_file(meanwhile, tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.begin({"run": "student"})
    log.append({"epoch": 1})
    saved = log.text
    log.append({"epoch": 2})
    if meanwhile == "removed":
        log.path.unlink()
    else:
        longer = log.text + '{"epoch": 3, "half a li'
        log.path.write_text({"another run's": '{"run": "other"}\n', "cut": saved[:-5], "longer": longer}[meanwhile])
    again = RunLog(log.path)
    again.write(saved)
    again.append({"epoch": 2, "again": True})
    assert read_log(log.path) == ({"run": "student"}, [{"epoch": 1}, {"epoch": 2, "again": True}])


def test_only_a_log_with_epochs_is_kept_and_only_if_asked(tmp_path):
    path, previous = tmp_path / "log.jsonl", tmp_path / "log.jsonl.previous"
    RunLog(path).begin({"run": 1})
    again = RunLog(path)
    again.begin({"run": 2})
    assert not previous.exists(), "a header alone says nothing"
    again.append({"epoch": 1})
    RunLog(path).begin({"run": 3}, keep_old=False)
    assert not previous.exists()
    again.write(again.text)
    RunLog(path).begin({"run": 4})
    assert read_log(previous) == ({"run": 2}, [{"epoch": 1}]) and read_log(path) == ({"run": 4}, [])


@pytest.mark.parametrize(
    "content, why", [(None, "No such file"), ("", "damaged"), ("{}\n{", "damaged"), ("x", "damaged")]
)
def test_what_is_no_log_is_said_to_be_none(content, why, tmp_path):
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"can't read the log .*log.jsonl: {why}"):
        read_log(path)
