"""What is shown while a run is under way."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm


class Progress(tqdm):
    """A tqdm bar on a terminal, plain lines elsewhere; silent where not `visible`."""

    def __init__(self, title: str, total: int, visible: bool, initial: int = 0, unit: str = "step") -> None:
        terminal = visible and sys.stderr is not None and sys.stderr.isatty()
        super().__init__(total=total, initial=initial, desc=title, disable=not terminal, leave=False, unit=unit)
        self.title, self.visible, self.count = title, visible, initial
        self.every = 0.5 if terminal else 30.0  # seconds
        self.shown_at = time.monotonic()

    def step(self, text_of: Callable[[], str] = lambda: "") -> None:
        """Count a step and, if it is time, show the text that a function returns, by default none."""
        self.count += 1
        self.update()
        if time.monotonic() - self.shown_at >= self.every:
            self.shown_at, text = time.monotonic(), text_of()
            if not self.disable:
                self.set_postfix_str(text)
            elif self.visible:
                print(f"{self.title} {self.count}/{self.total} {text}", flush=True)
