"""The device of a process, with the settings of torch and of the allocator that a run has."""

from __future__ import annotations

import functools

import torch

from tiedlora.models.device import resolve_device
from tiedlora.training.allocator import keep_freed_memory


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
        # What names no device, such as a stream or a CUDA graph, takes the current one.
        torch.cuda.set_device(device)
    return device
