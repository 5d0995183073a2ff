"""How a command ends: one line for a person, and an exit code that says what to do.

0 done; 1 a bug (with its traceback); 2 a mistake that the message says how to mend; 75 stopped on
request with a checkpoint: the same command goes on.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tiedlora.errors import UserError, out_of_memory

MISTAKE = 2
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
LONGEST = 2000
"""Characters of a message: some quote a file, which may be of any length."""

_DISK = {
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
def exits() -> Iterator[None]:
    """Turn what a person can mend into one line on standard error and an exit code."""
    try:
        yield
    except UserError as error:
        _end(f"error: {error}", MISTAKE)
    except KeyboardInterrupt:
        _end("stopped; the same command goes on from the newest checkpoint", STOPPED)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        _end(f"error: {error.filename}: {_DISK[error.errno]}, then run the same command: it goes on", MISTAKE)
    except Exception as error:
        # Known by name: importing torch here would cost every command its start-up.
        names = {kind.__name__ for kind in type(error).__mro__}
        if "Interrupted" in names:
            _end("stopped with a checkpoint; the same command goes on from it", STOPPED)
        if not out_of_memory(error):
            raise
        _end("error: out of memory; lower train.microbatch_tokens (same result) or score.batch_size", MISTAKE)


def _end(message: str, code: int) -> None:
    # One line whatever the error held: control characters could rewrite the terminal.
    line = "".join(c if c.isprintable() else " " for c in message)
    print(line if len(line) <= LONGEST else f"{line[:LONGEST]} ...", file=sys.stderr)
    raise SystemExit(code)
