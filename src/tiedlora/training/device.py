"""The device of this process, with the settings of torch and of the allocator that a run has."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys

import torch

from tiedlora.models.device import resolve_device

log = logging.getLogger(__name__)

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""mallopt's settings: how much free memory at the heap's end is returned, and how many blocks may be outside it."""


@functools.cache
def own_threads() -> int:
    """Torch's number of threads in this process before any run has set another one."""
    return torch.get_num_threads()


def set_up_device(name: str, threads: int | None, local_index: int | None = None) -> torch.device:
    """The device, after the process has its number of threads and, on a CPU, keeps freed memory.

    Training, later scores and measurements share this: rounding and speed depend on both settings.

    Args:
        name: as train.device.
        threads: as train.threads; None takes torch's own number, also after a run with another one.
        local_index: as resolve_device.

    Raises:
        UserError: the device is not here.
    """
    own = own_threads()
    torch.set_num_threads(own if threads is None else threads)
    device = resolve_device(name, local_index)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.index is not None:
        # What names no device, such as a stream, takes the current one.
        torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Make the process keep freed memory until it ends. With another libc than glibc, this does nothing.

    By default, glibc returns every large block to the kernel when it is freed. When the block is needed again, the
    kernel fills each page with zeros. For the 25 MB of a chunk of float32 logits, this takes 15 ms; the softmax itself
    takes 2 ms.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    if not (libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1)):
        log.debug("glibc took no settings for its heap")
