"""Whether a process works on a run, found without taking the run's lock: who only watches must not hold it."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path

LOCKS = Path("/proc/locks")
"""Linux's list of the locks of this machine."""
F_OFD_GETLK = 36
"""The number of fcntl's command that asks who would be in the way of a lock. Python has no name for it before 3.13."""
FLOCK = "hhqqi4x"
"""struct flock on 64-bit Linux: type, whence, start, length, process, and padding."""


def locked_inodes() -> set[int]:
    """The inodes of the files that a process of this machine has locked; empty where the system does not say.

    Another user's container has a list of its own.
    """
    inodes = set()
    with suppress(OSError, ValueError, IndexError):
        for line in LOCKS.read_text().splitlines():
            # 1: FLOCK  ADVISORY  WRITE 7293 fe:00:11280538 0 EOF. A waiting lock has "->" before its kind.
            words = line.split()
            if words[1] != "->":
                inodes.add(int(words[5].rpartition(":")[2]))
    return inodes


def is_locked(path: Path, inodes: set[int]) -> bool:
    """Whether a process has locked the file: one of this machine, or of another one that shares the file by NFS.

    On NFS, Linux turns flock into a lock of the file's bytes. The server can be asked about these without taking one.

    Args:
        inodes: those of `locked_inodes`, which one look at many files shares.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if os.fstat(descriptor).st_ino in inodes:
            return True
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = struct.unpack(FLOCK, fcntl.fcntl(descriptor, F_OFD_GETLK, asked))[0]
        return bool(kind != fcntl.F_UNLCK)
    except (OSError, struct.error):
        return False
    finally:
        os.close(descriptor)
