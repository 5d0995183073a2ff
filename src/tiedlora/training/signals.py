"""Signals that ask a command to stop, and who handles them.

Before and after a run, the process ends at once (end_at_once). A run finishes its step of training first, and stops at
once outside training (StopSignal). A sweep stops its cells (stopped_by_signals).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from tiedlora.errors import STOP_MESSAGE, STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2) + (
    # A terminal that closes sends it. nohup ignores it for its program.
    () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
)
_CONDITIONS: list[Callable[[], bool]] = []


def end_at_once() -> None:
    """From now on, until another handler takes its place, a signal ends this process with the code of a stop.

    Nothing is unwound. That is safe, because a kill is safe too. A KeyboardInterrupt is not: inside an import, Python
    may drop it.
    """
    for number in SIGNALS:
        signal.signal(number, _end)


def _end(_number: int, _frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, f"{STOP_MESSAGE}\n".encode())
    os._exit(STOPPED)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside the context, a signal raises KeyboardInterrupt. For a sweep, also while none of its cells runs here."""
    earlier = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def also_stopped_by(condition: Callable[[], bool]) -> Iterator[None]:
    """Inside the context, a true `condition` asks the run of this process to stop after its step, as a signal does."""
    _CONDITIONS.append(condition)
    try:
        yield
    finally:
        _CONDITIONS.remove(condition)


class StopSignal:
    """Inside the context, handles SIGNALS.

    While `finish_step_first` is set, a signal is only stored, and the training loop checks for it after every step.
    Otherwise, and at a second SIGINT, the signal raises KeyboardInterrupt. What is not in a checkpoint is then computed
    again by the next run. When the context ends, the previous handlers of all signals that came are called too. Under
    submitit, the handler of USR2 then puts the job into the queue again, also if SIGTERM came within the same step.
    """

    def __init__(self) -> None:
        self.finish_step_first = False
        """Whether the current step should be finished first; the training loop sets it."""
        self.received: list[int] = []
        """The numbers of the signals that came."""
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether a signal or a condition of `also_stopped_by` asks the run to end."""
        return bool(self.received) or any(condition() for condition in _CONDITIONS)

    def __enter__(self) -> StopSignal:
        # Only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(self.received):
            handler = self._before[number]
            if callable(handler) and handler not in (signal.default_int_handler, _end):
                try:
                    handler(number, None)
                except Exception as error:
                    # submitit's, if the job may not be queued again. The run has its checkpoint, and has not failed.
                    raise KeyboardInterrupt(str(error)) from None

    def _take(self, number: int, _frame: FrameType | None) -> None:
        again = bool(self.received)
        self.received.append(number)
        if not self.finish_step_first or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
        # The reader of the output may have ended by the same Ctrl-C, as `tee` does. The step must go on. A print would
        # be an error if the signal came inside another one.
        with suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: saving a checkpoint after this step\n".encode())
