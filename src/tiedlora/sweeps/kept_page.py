"""The report's page, made again while a sweep runs: in a process of low priority, so that it takes no time of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiedlora.config.project import PROJECT
from tiedlora.sweeps.watched import SweepView
from tiedlora.text import visible

NICENESS = 15
LARGEST_SHARE = 0.1
"""Most of the time that pages are made, except for the last one."""


class KeptPage:
    """One file with the report's page. It is replaced as a whole, so a browser never loads half of it.

    Args:
        outputs: the folder of the runs.
        file: where the page goes.
    """

    def __init__(self, outputs: Path, file: Path) -> None:
        self.outputs, self.file = outputs, file.absolute()
        self._report: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._begun = self._not_before = 0.0
        self._shown: tuple[object, ...] = ()
        """What the sweep had finished and decided when the newest page was begun."""
        self._error = ""

    def keep(self, view: SweepView) -> None:
        """Begin a new page if something has ended since the last one, and put a finished one in its place."""
        if self._report is not None and self._report.poll() is None:
            return
        self._take()
        if time.monotonic() >= self._not_before and view.counts["done"] and self._state(view) != self._shown:
            self._begin(view)

    def finish(self, view: SweepView) -> str:
        """Make the last page, and return a line for the terminal."""
        if not view.counts["done"]:
            return f"{self.file}: no page, because no run is finished"
        self._begin(view)
        if self._report is not None:
            self._report.wait()
        self._take()
        return f"{self.file}: {self._error}" if self._error else f"open {self.file}"

    def stop(self) -> None:
        """End a page that is being made."""
        if self._report is not None:
            self._report.kill()
            self._report.wait()
        self._report = None
        if self._folder is not None:
            self._folder.cleanup()

    @staticmethod
    def _state(view: SweepView) -> tuple[object, ...]:
        return tuple(cell.cell.run_id for cell in view.cells if cell.state in ("done", "failed")), len(view.decisions)

    def _begin(self, view: SweepView) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Beside the file, so that the finished page is moved within one file system.
        self._folder = tempfile.TemporaryDirectory(prefix=f".{self.file.name}.", dir=self.file.parent)
        self._shown, self._begun = self._state(view), time.monotonic()
        report = [sys.executable, str(PROJECT / "scripts" / "report.py"), str(self.outputs)]
        with open(f"{self._folder.name}/errors.txt", "wb") as errors:
            self._report = subprocess.Popen(
                ["nice", "-n", str(NICENESS), *report, "--out", self._folder.name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                # Ctrl-C in the terminal ends the watch, which then ends this process itself.
                start_new_session=True,
            )

    def _take(self) -> None:
        """Put the page of an ended process in its place. A failure leaves the last page."""
        if self._report is None or self._folder is None:
            return
        folder = Path(self._folder.name)
        if self._report.wait() == 0:
            os.replace(folder / "index.html", self.file)
            self._error = ""
        else:
            lines = (folder / "errors.txt").read_text(errors="replace").strip().splitlines()
            self._error = visible(lines[-1][:300]) if lines else f"report.py ended with {self._report.returncode}"
        self._not_before = time.monotonic() + (time.monotonic() - self._begun) / LARGEST_SHARE
        self._folder.cleanup()
        self._report = self._folder = None
