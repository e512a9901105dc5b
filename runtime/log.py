"""A run's log: a header, then one JSON line per epoch."""

import json
from pathlib import Path

from runtime.errors import UserError, reason
from runtime.files import writing


class RunLog:
    """The log of a run under way, on disk after each epoch.

    The run's resume state holds its `text`, too: whatever became of the file meanwhile, it is written again.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        """`writes` is False in all processes but the first."""
        self.path, self.writes, self.text = path, writes, ""

    @property
    def lines(self) -> list[dict]:
        """The lines of the epochs."""
        return [json.loads(line) for line in self.text.splitlines()[1:]]

    def append(self, line: dict) -> None:
        """Add the header or the line of an epoch; UserError if that fails."""
        self.write(self.text + json.dumps(line) + "\n")

    def write(self, text: str) -> None:
        """Make `text` the whole log; UserError if that fails."""
        self.text = text
        if self.writes:
            with writing(self.path) as temporary:
                temporary.write_text(text)


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """A log's header and the lines of its epochs; UserError if it is missing or no such log."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return lines[0], lines[1:]
    except (OSError, ValueError, IndexError) as error:
        why = reason(error) if isinstance(error, OSError) else "damaged"
        raise UserError(f"can't read the log {path}: {why}") from error
