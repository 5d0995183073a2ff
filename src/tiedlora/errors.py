"""Errors that speak to the person at the keyboard, and how a command ends.

Exit codes: 0 done; 1 a bug (with its traceback); 2 a mistake that the message explains; 75 stopped on request with a
checkpoint: the same command continues.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line: it names the key or file, what is wrong, what is allowed, what to do.
    Commands print it without a traceback and exit with code 2; every other exception is a bug
    and keeps its traceback.
    """


class StoppedEarly(Exception):
    """The run was asked to stop and has saved a checkpoint."""


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory: torch has a class for a GPU's alone, and libraries below it have none."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


MISTAKE = 2
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
CLOSED_PIPE = 141
"""What a shell reports for a program that SIGPIPE ended."""
LONGEST_MESSAGE = 2000
"""Characters of a message: some quote a file, which may be of any length."""

_OS_ERRORS = {
    errno.ENOSPC: "the disk is full; make space",
    errno.EDQUOT: "the disk quota is used up; make space",
    errno.EACCES: "no permission to write there; change it, or choose another folder with outputs=",
    errno.ENOTDIR: "a file is where a folder is wanted; choose another folder with outputs=",
    errno.EEXIST: "a file is where a folder is wanted; remove it, or choose another folder with outputs=",
    errno.EISDIR: "a folder is where a file is wanted; remove it, or choose another folder with outputs=",
    errno.ELOOP: "a symbolic link goes round, or is where none is wanted; remove it, or choose another outputs=",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one with outputs=",
    errno.EROFS: "the file system is read-only; choose another folder with outputs=",
}


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a mistake or a stop into one line on standard error and an exit code; a bug keeps its traceback."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CLOSED_PIPE) from None
    except UserError as error:
        _end(f"error: {error}", MISTAKE)
    except StoppedEarly:
        _end("stopped with a checkpoint; the same command goes on from it", STOPPED)
    except KeyboardInterrupt:
        _end("stopped; the same command goes on from the newest checkpoint", STOPPED)
    except OSError as error:
        if error.errno not in _OS_ERRORS:
            raise
        _end(f"error: {error.filename}: {_OS_ERRORS[error.errno]}, then run the same command: it goes on", MISTAKE)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _end("error: out of memory; lower train.microbatch_tokens (same result) or score.batch_size", MISTAKE)


def _end(message: str, code: int) -> None:
    # One line whatever the error held: control characters could rewrite the terminal.
    line = "".join(c if c.isprintable() else " " for c in message)
    print(line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]} ...", file=sys.stderr)
    raise SystemExit(code)
