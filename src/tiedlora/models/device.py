"""The device of this process, its peak of memory, and the settings of torch and of the allocator that a run has."""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tiedlora.config.schema import SLOT_DEVICE
from tiedlora.errors import UserError
from tiedlora.records.provenance import Execution

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
NOT_TRIED = ("mps", "xpu")
"""Apple's and Intel's accelerators. This project was never tried on them, so they are used only by name."""
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")
"""The CPU flags on which the kernel of a bfloat16 product depends."""
SHORTEST_WATCH = 0.5
"""Seconds. The system counts a core's time in hundredths, and a short burst of another program means little."""
TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""mallopt's settings: how much free memory at the heap's end is returned, and how many blocks may be outside it."""


def resolve_device(name: str) -> torch.device:
    """The device that `train.device` names. `auto` takes the accelerator, except one of NOT_TRIED, or else the CPU.

    Raises:
        UserError: the name, or the slot of a sweep, asks for a device that is not here.
    """
    if name == "auto":
        found = _accelerator()
        if found and found.type not in NOT_TRIED:
            return found
        if slot := os.environ.get(SLOT_DEVICE):
            raise UserError(
                f"hydra.launcher.devices: has {slot}, and torch finds no such CUDA device here; correct the list, or "
                "use train.device=cpu"
            )
        return CPU
    device = torch.device(name)
    if not _is_here(device):
        raise UserError(f"device {name}: no such device here; use auto or cpu (train.device= or --device)")
    return device


def _accelerator() -> torch.device | None:
    """The kind of accelerator that torch can use here, without a number; None without one."""
    # A driver that torch cannot use may still count its GPUs.
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _is_here(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    found = _accelerator()
    return found is not None and found.type == device.type and (device.index or 0) < torch.accelerator.device_count()


def here_or_auto(name: str) -> str:
    """The device that a finished run names, or `auto` if it is not here: scores need no GPU."""
    return name if name == "auto" or _is_here(torch.device(name)) else "auto"


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
        local_index: the number of this process on this machine, if several processes each have a GPU.

    Raises:
        UserError: the device is not here.
    """
    own = own_threads()
    torch.set_num_threads(own if threads is None else threads)
    device = resolve_device(name)
    if device.type == "cpu":
        keep_freed_memory()
        return device
    if device.type in NOT_TRIED:
        log.info("device %s: this project was never tried on this kind of device", device)
    if local_index is not None:
        device = torch.device(device.type, local_index)
    if device.index is not None:
        # What names no device, such as a stream, takes the current one.
        torch.accelerator.set_device_index(device.index)
    return device


def emulates_bfloat16(device: torch.device, dtype: str) -> bool:
    """Whether the run computes in bfloat16 on a CUDA GPU without such arithmetic (T4, V100). Never tried on one."""
    if device.type != "cuda" or dtype != "bfloat16":
        return False
    return not torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def watched_cores(device: torch.device) -> Iterator[None]:
    """Measure in the block how busy other programs keep this process's cores. Log it if too few are left for threads.

    The threads of a product wait for the slowest of them. SmolLM2-135M took 47 s a step with two threads on a busy
    machine of two cores, and 2.6 s with one.
    """
    before, started = _seconds_of_others(), time.monotonic()
    yield
    seconds, threads, cores = time.monotonic() - started, torch.get_num_threads(), len(_cores())
    if device.type != "cpu" or threads == 1 or seconds < SHORTEST_WATCH:
        return
    used = min(max((_seconds_of_others() - before) / seconds, 0.0), cores)
    if threads - (cores - used) > 0.5:
        free = max(1, round(cores - used))
        log.info(
            "%d threads on %d cores, of which others use %.1f: train.threads=%d may be much faster",
            threads,
            cores,
            used,
            free,
        )


def _cores() -> set[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _seconds_of_others() -> float:
    """Seconds that this process's cores have worked for others since the machine started.

    Where the system does not say it, minus the seconds of this process.
    """
    names, ticks = {f"cpu{number}" for number in _cores()}, 0
    with suppress(OSError):
        for line in Path("/proc/stat").read_text().splitlines():
            name, *counts = line.split()
            if name in names:
                # As proc(5): user, nice, system, irq, softirq and steal, without idle and iowait.
                ticks += sum(map(int, [*counts[:3], *counts[5:8]]))
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system


def keep_freed_memory() -> None:
    """Make the process keep freed memory until it ends. With another libc than glibc, this does nothing.

    By default, glibc returns every large block to the kernel when it is freed. When the block is needed again, the
    kernel fills each page with zeros. For the 25 MB of a chunk of float32 logits, this takes 15 ms; the softmax itself
    takes 2 ms.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)


def execution_on(device: torch.device, processes: int = 1) -> Execution:
    """The record of the device, the threads of this process, the number of processes, and the processor."""
    if device.type != "cpu":
        return Execution(_accelerator_name(device), None, processes)
    return Execution(device.type, torch.get_num_threads(), processes, processor_name())


def _accelerator_name(device: torch.device) -> str:
    if device.type == "mps":
        # Part of the processor, whose name it shares.
        return f"mps ({_cpu_model()})"
    return str(torch.get_device_module(device).get_device_name(device))


def processor_name() -> str:
    """The CPU's model, with the vector and bfloat16 instructions on which the rounding of torch's kernels depends."""
    flags = _cpu_facts().get("flags", "").split()
    instructions = [torch.backends.cpu.get_cpu_capability(), *(flag for flag in BFLOAT16_FLAGS if flag in flags)]
    return f"{_cpu_model()} ({', '.join(instructions)})"


def _cpu_model() -> str:
    if sys.platform == "darwin":
        with suppress(OSError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip() or platform.machine()
    return _cpu_facts().get("model name") or platform.machine()


def _cpu_facts() -> dict[str, str]:
    """What Linux says of the first processor; empty on other systems."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return facts


@contextmanager
def only_deterministic_algorithms() -> Iterator[None]:
    """Inside the block, torch uses deterministic algorithms. An operation that has none raises RuntimeError."""
    # cuBLAS reads this when it starts: with these workspaces, its products are the same in every run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def free_memory() -> None:
    """Free what is no longer used, after memory ran out, so that something else can have it.

    Call it outside the `except` block: until the block ends, the exception holds the tensors of the failed work.
    """
    # Frames of a traceback can refer to each other in a circle.
    gc.collect()
    if found := _accelerator():
        torch.get_device_module(found).empty_cache()


def _memory_statistics(device: torch.device) -> Any:
    """The module that knows the peak of an accelerator's memory. Neither a CPU has one nor Apple's accelerator, whose
    memory is the computer's own."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") else None


def restart_peak_memory(device: torch.device) -> None:
    """Start the measurement of peak memory again, if the system allows it."""
    if statistics := _memory_statistics(device):
        for index in range(torch.accelerator.device_count()):
            statistics.reset_peak_memory_stats(index)
        return
    # "5" resets the peak of the resident size (proc(5)). Otherwise a sweep's cell would show an earlier cell's peak.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """The largest allocations of this process on its GPUs, added up, or its largest resident size.

    In bytes since `restart_peak_memory`. With model.device_map a process has several GPUs; of others it uses nothing.
    """
    if statistics := _memory_statistics(device):
        return sum(map(statistics.max_memory_allocated, range(torch.accelerator.device_count())))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # In bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
