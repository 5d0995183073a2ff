"""Errors with a message for the user, and how a command ends.

Exit codes: 0 done; 1 a bug (with its traceback), or a sweep with failed cells; 2 a mistake that the message explains; 3
a check found a difference; 75 stopped on request (the same command continues); 141 the reader of the output has ended.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line: it names the key or file, what is wrong, what is allowed, and what to do.
    Commands print it without a traceback and exit with code 2. Every other exception is a bug and keeps its traceback.
    """


def made_once(made: dict[K, T | UserError], key: K, make: Callable[[], T]) -> T:
    """What `make` gives, made at the first call with this key. A mistake is remembered as well.

    Args:
        made: what was made earlier, by key.

    Raises:
        UserError: that of `make`, at each call.
    """
    if key not in made:
        try:
            made[key] = make()
        except UserError as error:
            made[key] = error
    found = made[key]
    if isinstance(found, UserError):
        raise found
    return found


class Diverged(UserError):
    """A loss or a gradient was not finite. In a search, this is a result, and no other failure is."""


class StoppedEarly(Exception):
    """The run was asked to stop and has saved a checkpoint."""


class Paused(StoppedEarly):
    """The run has reached train.pause_after and has saved a checkpoint."""


_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS starts at the first product, and finds no memory on a full GPU
    "bad_alloc",
    "Cannot allocate memory",
    "could not create a primitive",  # a product of oneDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch has an exception class for this only on a GPU, so otherwise the text decides."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, ImportError, SystemError)) and any(words in str(error) for words in _NO_MEMORY)
    )


MISTAKE = 2
DISAGREES = 3
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
CLOSED_PIPE = 141
"""What a shell reports for a program that SIGPIPE ended."""
STOP_MESSAGE = "stopped; the same command continues, from the newest checkpoint if there is one"
CONSOLE = "tiedlora"
"""The console command. It makes `tiedlora NAME` the name of the program (sys.argv[0])."""
LONGEST_MESSAGE = 2000
"""Most characters of a message that are printed. Some messages quote a file, which may have any length."""
SECONDS_TO_LEAVE_A_DESTRUCTOR = 0.1

_OS_ERRORS = {
    errno.ENOSPC: "the disk is full; make space",
    errno.EDQUOT: "the disk quota is used up; make space",
    errno.EACCES: "no permission to read or to write it; change that, or choose another place",
    errno.EPERM: "writing there is not allowed; choose another folder (outputs= or --out)",
    errno.ENOTDIR: "a file is where a folder is needed; choose another folder (outputs= or --out)",
    errno.EEXIST: "a file is where a folder is needed; choose another folder (outputs= or --out)",
    errno.EISDIR: "a folder is where a file is needed; remove it, or choose another folder (outputs= or --out)",
    errno.ELOOP: "a symbolic link leads to itself, or is not allowed there; remove it, or choose another folder",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one (outputs= or --out)",
    errno.EROFS: "the file system is read-only; choose another folder (outputs= or --out)",
}


def as_called(text: str) -> str:
    """The text with all commands named as the present one was called: `tiedlora score` or `scripts/score.py`."""
    if not sys.argv[0].startswith(f"{CONSOLE} "):
        return text
    # torchrun starts a file or a module, and no command.
    text = re.sub(r"(torchrun [^`;.]*)\btrain\.py\b", rf"\1-m {CONSOLE} train", text)
    return re.sub(r"(?<![\w./-])(?:python\s+)?(?:scripts/(\w+)|(train))\.py\b", rf"{CONSOLE} \1\2", text)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a mistake or a stop into one line on standard error and an exit code; a bug keeps its traceback.

    Raises:
        SystemExit: with code 2 after a mistake, 75 after a stop, 141 if the reader of the output has closed it.
    """
    # A log line whose reader has ended is lost without a traceback.
    logging.raiseExceptions = False
    sys.unraisablehook = _send_again
    _replace_closed_streams()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:
        drop_output()
        raise SystemExit(STOPPED if _is_stop(error.__context__) else CLOSED_PIPE) from None
    except SystemExit:
        # Raised by a command that has named its failures. Its output may still wait for a reader that has ended.
        _flush(sys.stdout, "")
        raise
    except UserError as error:
        _end(f"error: {as_called(str(error))}", MISTAKE)
    except StoppedEarly:
        _end("stopped with a checkpoint; the same command continues from it", STOPPED)
    except KeyboardInterrupt:
        _end(STOP_MESSAGE, STOPPED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EIO and _is_stop(error.__context__):
            # The terminal has closed, which was the signal to stop. The last line had no reader.
            _end(STOP_MESSAGE, STOPPED)
        if (problem := _of_the_machine(error)) is None:
            raise
        _end(f"error: {problem}", MISTAKE)


def _replace_closed_streams() -> None:
    """Python gives a stream that the shell has closed (>&-) no object, and Hydra writes to it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _of_the_machine(error: Exception) -> str | None:
    """What is wrong with a disk, a folder or the memory, and what to do; None if the error is a bug."""
    if (number := _error_number(error)) in _OS_ERRORS:
        name = getattr(error, "filename", None) or "a file"
        return f"{name}: {_OS_ERRORS[number]}, then run the command again"
    if isinstance(error, FileNotFoundError) and _folder_is_gone():
        return "the present folder is gone; change to one that exists, then run the command again"
    if isinstance(error, FileNotFoundError) and traceback.extract_tb(error.__traceback__)[-1].name == "mkdir":
        # As in /proc, or where disks are mounted when they are asked for.
        advice = "choose another folder (outputs=, cache= or --out), then run the command again"
        return f"{error.filename}: no folder can be made there; {advice}"
    if is_out_of_memory(error):
        # Passes of training and batches of scoring are halved, so memory ran out elsewhere, or for a single row.
        advice = "close other programs, or take a smaller model, tying or rank, or train.dtype=bfloat16"
        return f"out of memory while loading, at an update or elsewhere; {advice}"
    return None


def _error_number(error: Exception) -> int | None:
    """The errno of an OSError, also of one that a library in Rust (safetensors, tokenizers) has put into words."""
    in_words = re.search(r"\(os error (\d+)\)", str(error))
    return int(in_words[1]) if in_words else getattr(error, "errno", None)


def _folder_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _is_stop(error: BaseException | None) -> bool:
    """Whether an error came while the command was ending because it was asked to stop: its last line had no reader."""
    return error is not None and (isinstance(error, (KeyboardInterrupt, StoppedEarly)) or _is_stop(error.__context__))


def drop_output(stream: TextIO | None = None) -> None:
    """Let standard output, or another stream, lead nowhere, because its reader, such as `head`, has ended.

    Without this, Python would report the error again when it exits.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def output_is_closed() -> bool:
    """Whether the reader of standard output has ended."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        # A stream without a file, as in a notebook.
        return False


def _send_again(dropped: sys.UnraisableHookArgs) -> None:
    """A KeyboardInterrupt that came in a destructor, where Python drops it, comes a moment later."""
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        threading.Timer(SECONDS_TO_LEAVE_A_DESTRUCTOR, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)


def _end(message: str, code: int) -> None:
    # Always one line of printable characters: control characters in an error could rewrite the terminal.
    line = "".join(c if c.isprintable() else " " for c in message)
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[:LONGEST_MESSAGE]} ..."
    # Whether or not somebody still reads the output, the code says how the command ended.
    _flush(sys.stdout, "")
    _flush(sys.stderr, f"{line}\n")
    raise SystemExit(code)


def _flush(stream: TextIO, text: str) -> None:
    """Write the text, and what waits before it, unless the reader of the stream has ended, or its terminal."""
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:
        drop_output(stream)
