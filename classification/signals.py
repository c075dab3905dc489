"""SIGTERM and SIGINT: asked to stop, the trainer finishes its step and saves before it goes."""

from __future__ import annotations

import signal
import time
import types

TOGETHER = 1.0  # seconds; a terminal and a launcher may both pass on the same Ctrl-C


class StoppedError(Exception):
    """A signal ended the run. `status` is the exit status that a shell expects: 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StopRequest:
    """While open, a first SIGTERM or SIGINT is only remembered; a second SIGINT, a second later, interrupts at once.

    Attributes:
        number: the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        if self.number and number == signal.SIGINT and time.monotonic() - self._since > TOGETHER:
            raise KeyboardInterrupt
        self.number, self._since = self.number or number, self._since or time.monotonic()

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
