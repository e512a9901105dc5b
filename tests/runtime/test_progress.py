"""What is shown while a run is under way."""

import math

import pytest

from runtime.progress import Progress, duration


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00:00"), (59.9, "0:00:59"), (3661, "1:01:01"), (100_000, "1 day, 3:46:40"), (1e300, "for ever"),
     (math.nan, "for ever")],
)  # fmt: skip
def test_durations_of_any_length(seconds, text):
    assert duration(seconds) == text


def test_lines_without_a_terminal_and_nothing_where_it_is_not_visible(capsys):
    for visible in (True, False):
        with Progress("epoch 1/2", 5, visible, initial=2, seconds=0.0) as progress:
            assert progress.step() and progress.count == 3
            progress.show("loss 1.000")
    assert capsys.readouterr().out == "epoch 1/2 3/5 loss 1.000\n"
