"""Ctrl-C and its kin, heard but not obeyed at once: a training step is finished, and saved, first."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self


class RunInterrupted(KeyboardInterrupt):
    """Training was interrupted, after its state was saved. The command line ends with exit code 130.

    Attributes:
        run: the `Run` as far as it got.
    """

    def __init__(self, message: str, run: Any) -> None:
        super().__init__(message)
        self.run = run


class Interrupts:
    """While entered, the first SIGINT or SIGTERM sets `asked`; a second one does what it always does."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Only the main thread may listen for signals; in others, such as a notebook's, training just runs.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()
