"""A stop signal: noted when it comes, acted on between two steps."""

import os
import signal
import threading
from dataclasses import dataclass, field


@dataclass
class StopSignal:
    """SIGINT and SIGTERM; `number` is the one that came, or 0. Outside the main thread nothing is caught."""

    number: int = 0
    previous: dict = field(default_factory=dict)

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.number and "LOCAL_RANK" not in os.environ:  # torchrun passes on each signal twice
            raise KeyboardInterrupt  # asked again: stop now, not after this step
        self.number = number
