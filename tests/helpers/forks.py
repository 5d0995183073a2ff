"""Forks of the test's process, in which everything is imported already: one, or several that train together."""

import logging
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from helpers.processes import STARTED, end_group

from tiedlora import errors
from tiedlora.training import checkpoint
from tiedlora.training.loop import TrainState


def forked(act: Callable[[], object], seconds: int = 60) -> tuple[int, str]:
    """Exit code and standard error of `act` under errors.exit_codes()."""
    with tempfile.TemporaryFile("w+") as told:
        return _ended(_fork(act, told, seconds), told)


def killed_after(act: Callable[[], object], last: Callable[[TrainState], bool]) -> None:
    """Start a run in a fork, and kill -9 the fork when it has written the first checkpoint for which `last` is true."""

    def until_killed() -> None:
        save = checkpoint.save

        def save_and_die(folder: Path, state: TrainState, *rest: object, **named: object) -> None:
            save(folder, state, *rest, **named)
            if last(state):
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.save = save_and_die
        act()

    code, told = forked(until_killed)
    assert code == -signal.SIGKILL, told


def forked_world(act: Callable[[int], object], size: int = 2, seconds: int = 60) -> list[tuple[int, str]]:
    """As `forked`, for processes that communicate like those that torchrun starts. `act` gets the process's number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def in_world(rank: int) -> None:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        os.environ.update(zip(names, map(str, (rank, rank, size, "127.0.0.1", port)), strict=True))
        act(rank)

    with ExitStack() as files:
        told = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(size)]
        children = [_fork(lambda rank=rank: in_world(rank), told[rank], seconds) for rank in range(size)]
        return [_ended(child, text) for child, text in zip(children, told, strict=True)]


def _fork(act: Callable[[], object], told: IO[str], seconds: int) -> int:
    child = os.fork()
    if child:
        STARTED.add(child)
        return child
    code = 1
    try:
        os.setsid()
        # Python's own handler, which pytest-timeout has set, would not end a child that waits in foreign code.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        os.dup2(told.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, force=True)
        with errors.exit_codes():
            act()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _ended(child: int, told: IO[str]) -> tuple[int, str]:
    _, status = os.waitpid(child, 0)
    end_group(child)
    told.seek(0)
    return os.waitstatus_to_exitcode(status), told.read()
