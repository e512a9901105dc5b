"""What is shown while a run is under way."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from tqdm import tqdm


class Progress(AbstractContextManager):
    """A tqdm bar on a terminal, plain lines elsewhere; silent where not `visible`."""

    def __init__(self, title: str, total: int, visible: bool, initial: int = 0, unit: str = "step") -> None:
        self.visible = visible
        self.terminal = visible and sys.stderr is not None and sys.stderr.isatty()
        self.title, self.total, self.count = title, total, initial
        self.every = 0.5 if self.terminal else 30.0  # seconds
        self.shown_at = time.monotonic()
        self.bar = tqdm(total=total, initial=initial, desc=title, disable=not self.terminal, leave=False, unit=unit)

    def step(self, text_of: Callable[[], str] = lambda: "") -> None:
        """Count a step and, if it is time, show the text that a function returns, by default none."""
        self.count += 1
        self.bar.update()
        if time.monotonic() - self.shown_at >= self.every:
            self.shown_at, text = time.monotonic(), text_of()
            if self.terminal:
                self.bar.set_postfix_str(text)
            elif self.visible:
                print(f"{self.title} {self.count}/{self.total} {text}", flush=True)

    def __exit__(self, *exception) -> None:
        self.bar.close()
