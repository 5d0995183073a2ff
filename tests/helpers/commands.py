"""Run train.py in its own process, without the seconds that a new interpreter needs to import torch.

A server process imports torch and transformers once for all tests of a worker, and every command is forked from it. The
server itself never computes anything, so a forked command starts from the same state as a new interpreter.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from helpers.processes import SECONDS_AT_MOST, STARTED, end_group

from tiedlora.places import PROJECT

T = TypeVar("T")
SCRIPT = PROJECT / "train.py"
WITH_TORCH = multiprocessing.get_context("forkserver")
WITH_TORCH.set_forkserver_preload(["tiedlora.runs.trainer", "tiedlora.tasks.task_metric", "reasoning_gym"])


@dataclass(frozen=True)
class Ended:
    code: int
    """The exit code, or minus the signal that ended it."""
    out: str
    err: str


class Command:
    """A running train.py. Its group of processes ends with it."""

    def __init__(self, *words: str, cwd: Path = PROJECT) -> None:
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name) / name for name in ("out", "err")]
        self.pid = self._start(words, cwd)
        STARTED.add(self.pid)

    def _start(self, words: tuple[str, ...], cwd: Path) -> int:
        self._process = WITH_TORCH.Process(target=_run_script, args=(words, cwd, dict(os.environ), self._files))
        self._process.start()
        return self._process.pid

    def _wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ended(self) -> Ended:
        self._wait(SECONDS_AT_MOST)
        end_group(self.pid)
        code = self._wait(SECONDS_AT_MOST)
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        self._output.cleanup()
        return Ended(code, out, err)


class FreshCommand(Command):
    """As Command, in a new interpreter: for commands that start worker processes, which is not safe in a forked one."""

    def _start(self, words: tuple[str, ...], cwd: Path) -> int:
        command = [sys.executable, str(SCRIPT), *words]
        with open(self._files[0], "w") as out, open(self._files[1], "w") as err:
            self._popen = subprocess.Popen(command, stdout=out, stderr=err, cwd=cwd, start_new_session=True)
        return self._popen.pid

    def _wait(self, seconds: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        return self._popen.returncode


def _run_script(words: tuple[str, ...], cwd: Path, environment: dict[str, str], files: list[Path]) -> None:
    # A group of its own, so that the end of the group is not that of the tests.
    os.setsid()
    # A run collects garbage several times. Without this, each collection would visit all objects of the modules.
    gc.freeze()
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [str(SCRIPT), *words]
    # An interpreter puts the script's folder first.
    sys.path.insert(0, str(PROJECT))
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        # A process of multiprocessing ends without them.
        atexit._run_exitfuncs()


def wait_until(condition: Callable[[], T], seconds: float = 150) -> T:
    """Wait until `condition` returns a true value, and return this value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return value
