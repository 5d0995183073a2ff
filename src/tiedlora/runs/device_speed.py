"""How fast this device multiplies matrices: two seconds of measurement, for a forecast."""

from __future__ import annotations

import statistics
import time

import torch

from tiedlora.config.schema import Config
from tiedlora.models.arithmetic import DeviceSpeed
from tiedlora.models.device import execution_on, resolve_device

TOKENS = 2048
"""Rows of the product. More do not make it faster on a CPU."""
AT_ONCE = {"cpu": 1, "cuda": 100}
"""Products of one time. On a GPU one takes a few microseconds, less than to start it and to wait for its end."""


def measure(config: Config, seconds: float) -> DeviceSpeed:
    """The rate of the product of tokens with a feed-forward weight, in the number type of the run: a median.

    Raises:
        UserError: train.device is not here.
    """
    device, a = resolve_device(config.train.device), config.model.architecture
    if device.type == "cpu" and config.train.threads:
        torch.set_num_threads(config.train.threads)
    dtype = getattr(torch, config.train.dtype)
    x = torch.randn(TOKENS, a.hidden).to(device, dtype)
    weight = torch.randn(a.intermediate or 4 * a.hidden, a.hidden).to(device, dtype)
    times: list[float] = []
    at_once = AT_ONCE[device.type]
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        started = time.perf_counter()
        for _ in range(at_once):
            torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    flop = 2 * at_once * x.shape[0] * weight.numel()
    return DeviceSpeed(str(execution_on(device)), device.type == "cuda", flop / statistics.median(times))
