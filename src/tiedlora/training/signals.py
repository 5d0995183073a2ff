"""Signals as a request to stop: after a step while training, at once anywhere else."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Takes SIGNALS while it is entered.

    In the training loop (`in_loop`) a signal is remembered, and the loop asks after every step; anywhere
    else, or at a second SIGINT, it raises KeyboardInterrupt. Nothing is lost then either: what is not in
    a checkpoint by that time is computed again. At the end, whoever handled the signal before has it too:
    under submitit, USR2 then requeues the job.
    """

    def __init__(self) -> None:
        self.finish_step_first = False
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether somebody wants the run to end."""
        return self.received is not None

    def __enter__(self) -> StopSignal:
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received is not None:
            handler = self._before[self.received]
            if callable(handler) and handler is not signal.default_int_handler:
                handler(self.received, None)

    def _take(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.requested(), number
        if not self.finish_step_first or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
        print(f"{signal.Signals(number).name}: saving a checkpoint after this step", file=sys.stderr)
