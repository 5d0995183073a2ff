"""The progress of long work: a bar or a clock on a terminal, or plain lines in a log."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm
from typing_extensions import override

from tiedlora.text import clock

log = logging.getLogger(__name__)
# tqdm's own lock is also one between processes: a forked one that is killed with it would stop all others.
tqdm.set_lock(threading.RLock())

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_SILENCE = 30.0
"""After so long without a line, a log says what goes on."""
SECONDS_BETWEEN_TICKS = 1.0
"""So often a terminal shows the time, also while nothing is done."""


class AboveBars(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes log lines above a bar, and never behind it."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def show_log() -> None:
    """Write log lines to standard error, with the time: ours from INFO on, and warnings of others. (train.py has
    conf/hydra/job_logging.)
    """
    logging.basicConfig(
        level=logging.WARNING, handlers=[AboveBars()], format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("tiedlora").setLevel(logging.INFO)


class ProgressBar:
    """Shows the work done, the rate and the time left: as a bar on a terminal, or as a log line every few seconds.

    The time goes on while nothing is done, so nobody takes a slow first step for a hang. Close it in any case.
    """

    def __init__(self, what: str, total: int | None, unit: str = "", done: int = 0) -> None:
        """
        Args:
            total: None if nobody knows how long the work is. Then only the time is shown.
        """
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.note = ""
        """What the last work gave, such as its loss."""
        self._doing = ""
        self.started, self.started_at, self.last_line = time.monotonic(), done, time.monotonic()
        # Of several processes that train together, only the first writes to the terminal.
        is_first = os.environ.get("RANK", "0") == "0"
        form = "{desc}: {elapsed}" if total is None else None
        options = {"file": sys.stderr, "leave": False, "dynamic_ncols": True}
        options["disable"] = not (is_first and sys.stderr.isatty())
        self.bar = tqdm(desc=what, total=total, initial=done, unit=f" {unit}", bar_format=form, **options)
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._show_time, daemon=True)
        if is_first:
            self._clock.start()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside the context, the bar says what is done that does not advance it."""
        before = self._doing
        self.now_doing(what)
        yield
        self.now_doing(before)

    def now_doing(self, what: str) -> None:
        """From now on the bar says this, until it advances."""
        self._doing = what
        self._show()

    def advance(self, count: int) -> None:
        """Count `count` more as done."""
        self.done += count
        self._doing = ""
        # Where the bar is disabled, these do nothing.
        self.bar.set_postfix_str(self.note, refresh=False)
        self.bar.update(count)
        if self.bar.disable and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            rate = (self.done - self.started_at) / (self.last_line - self.started)
            left = ((self.total or 0) - self.done) / rate if rate else 0.0
            log.info(
                "%s: %d of %d, %.2f %s/s, %s left%s",
                self.what,
                self.done,
                self.total,
                rate,
                self.unit,
                clock(left),
                f"  {self.note}" if self.note else "",
            )

    def close(self) -> None:
        """End the line of the bar, and its clock."""
        self._closed.set()
        if self._clock.is_alive():
            # Otherwise it could draw the bar again.
            self._clock.join()
        self.bar.close()

    def _show(self) -> None:
        self.bar.set_postfix_str(self._doing or self.note, refresh=False)
        self.bar.refresh()

    def _show_time(self) -> None:
        """Until the bar is closed, show the time on a terminal, and break a long silence of a log."""
        while not self._closed.wait(SECONDS_BETWEEN_TICKS):
            self._show()
            if self.bar.disable and time.monotonic() - self.last_line >= SECONDS_OF_SILENCE:
                self.last_line = time.monotonic()
                work = "" if self.total is None else f" {self.done} of {self.total} {self.unit},"
                doing = f" {self._doing}," if self._doing else ""
                log.info("%s:%s%s %s so far", self.what, work, doing, clock(self.last_line - self.started))


@contextmanager
def running_clock(what: str) -> Iterator[None]:
    """Inside the context, a terminal shows what is done and for how long, and a log gets a line if it takes long."""
    bar = ProgressBar(what, None)
    try:
        yield
    finally:
        bar.close()
