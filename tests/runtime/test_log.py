"""A run's log: a header and one line per epoch, whatever became of the file meanwhile."""

import pytest

from runtime.errors import UserError
from runtime.log import RunLog, read_log


def test_a_resumed_run_restores_its_log(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.append({"run": "student"})
    saved = log.text
    log.append({"epoch": 1})
    assert read_log(log.path)[0] == {"run": "student"} and log.lines == [{"epoch": 1}]
    again = RunLog(log.path)
    again.write(saved)
    again.append({"epoch": 1, "again": True})
    assert read_log(log.path) == ({"run": "student"}, [{"epoch": 1, "again": True}])


def test_a_new_run_replaces_the_old_log_and_only_the_first_process_writes(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"run": "old"}\n{"epoch": 1}\n')
    other = RunLog(path, writes=False)
    other.append({"run": "new"})
    assert other.text == '{"run": "new"}\n' and read_log(path) == ({"run": "old"}, [{"epoch": 1}])
    RunLog(path).append({"run": "new"})
    assert read_log(path) == ({"run": "new"}, [])


@pytest.mark.parametrize("content, why", [(None, "No such file"), ("", "damaged"), ("{}\n{", "damaged")])
def test_a_missing_or_damaged_log_is_one_line(content, why, tmp_path):
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"can't read the log .*log.jsonl: {why}"):
        read_log(path)
