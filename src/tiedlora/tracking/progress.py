"""The progress of long work: a bar on a terminal, or plain lines in a log."""

from __future__ import annotations

import logging
import os
import sys
import time

from tqdm import tqdm

from tiedlora.text import clock

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


def show_log() -> None:
    """Write log lines to standard error, with the time: ours from INFO on, and warnings of others. (train.py has
    conf/hydra/job_logging.)
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tiedlora").setLevel(logging.INFO)


class ProgressBar:
    """Shows the work done, the rate and the time left: as a bar on a terminal, or as a log line every few seconds."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.started, self.started_at, self.last_line = time.monotonic(), done, time.monotonic()
        # Of several processes that train together, only the first writes to the terminal.
        on_terminal = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        options = {"leave": False, "dynamic_ncols": True, "disable": not on_terminal}
        self.bar = tqdm(desc=what, total=total, initial=done, unit=f" {unit}", **options)

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more as done."""
        self.done += count
        # Where the bar is disabled, this does nothing.
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        if self.bar.disable and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            rate = (self.done - self.started_at) / (self.last_line - self.started)
            left = (self.total - self.done) / rate if rate else 0.0
            log.info(
                "%s: %d of %d, %.2f %s/s, %s left%s",
                self.what,
                self.done,
                self.total,
                rate,
                self.unit,
                clock(left),
                f"  {note}" if note else "",
            )

    def close(self) -> None:
        """End the line of the bar."""
        self.bar.close()
