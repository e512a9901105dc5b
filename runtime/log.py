"""A run's log: a header, then a JSON line an epoch."""

import json
import os
from pathlib import Path

from runtime.errors import UserError, reason
from runtime.files import writing


class RunLog:
    """The run's JSON lines: a header, then one line an epoch, each on disk before the next step is taken.

    The run's resume state holds its `text`, too: whatever became of the file meanwhile, it is written anew.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, ""

    @property
    def header(self) -> dict:
        """The first line."""
        return json.loads(self.text.splitlines()[0])

    @property
    def lines(self) -> list[dict]:
        """The epochs' lines."""
        return [json.loads(line) for line in self.text.splitlines()[1:]]

    def begin(self, header: dict, keep_old: bool = True) -> None:
        """Start with the header line; an older log with epochs may be moved aside. UserError where that fails."""
        self.text = json.dumps(header) + "\n"
        with writing(self.path) as temporary:
            temporary.write_text(self.text)
            if keep_old and self.path.exists() and self.path.read_bytes().count(b"\n") > 1:
                os.replace(self.path, self.path.with_name(self.path.name + ".previous"))

    def append(self, line: dict) -> None:
        """Add an epoch's line; UserError where that fails."""
        self.write(self.text + json.dumps(line) + "\n")

    def write(self, text: str) -> None:
        """Make `text` the whole log; UserError where that fails."""
        with writing(self.path) as temporary:
            temporary.write_text(text)
        self.text = text


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """A log's header and its epochs; UserError where it is missing or not such a log."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return lines[0], lines[1:]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"can't read the log {path}: {reason(error) if isinstance(error, OSError) else 'damaged'}"
        ) from error
