"""Start processes for a test, and end them with everything that they have started.

A test must not wait for ever. Who reads from a pipe waits until every process that has its other end has closed it, and
a stopped one (SIGSTOP) never does. So output goes to files, and at the end the whole group of processes is killed:
kill -9 ends stopped ones too.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

SECONDS_AT_MOST = 200

STARTED: set[int] = set()
"""The leaders of the groups that have not been ended. A test that fails may leave some, and conftest.py ends them."""


def end_group(leader: int) -> None:
    """Kill a process with its group and its descendants, of which some may have a group of their own."""
    STARTED.discard(leader)
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(leader)
        family = [parent, *parent.children(recursive=True)]
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def end_all() -> None:
    for leader in list(STARTED):
        end_group(leader)


@contextmanager
def started(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen]:
    """A running process, as subprocess.Popen(command, **options). Its group ends with the context."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    STARTED.add(process.pid)
    try:
        yield process
    finally:
        end_group(process.pid)
        process.wait()


def run(
    command: Sequence[str | Path], seconds: float = SECONDS_AT_MOST, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run(command, text=True, capture_output=True, **options), with the group and the files of above.

    Args:
        seconds: after so long it is killed, and its return code is that of the kill.
        check: raise CalledProcessError if it fails.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with (
            started(command, **{"stdout": out, "stderr": err, **options}) as process,
            suppress(subprocess.TimeoutExpired),
        ):
            process.wait(seconds)
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())
    if check and done.returncode != 0:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return done


def run_python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """As `run`, in a new interpreter like this one."""
    return run([sys.executable, *arguments], **options)
