"""How fast this device is with one block of the base model: a second or two of measurement, for a forecast."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tiedlora.config.schema import Config
from tiedlora.models import products
from tiedlora.models.arithmetic import DeviceSpeed, block_weights
from tiedlora.models.device import execution_on
from tiedlora.training.device import set_up_device
from tiedlora.tying import Architecture

PASS_TOKENS, LEAST_TOKENS = 2048, 64
"""The most tokens of a measured pass (more do not make it faster on a CPU), and the fewest."""
CPU_WEIGHTS = 20_000_000
"""The most weights of a block that is measured on a CPU. A larger one is measured in half its widths, or a quarter."""
LEAST_TIMES = 2
"""How often a pass is measured at least."""
AT_ONCE = {"cpu": 1, "cuda": 100}
"""Products of one time. On a GPU one takes a few microseconds, less than to start it and to wait for its end."""
RANK = 8
"""The rank of the block's adapter: products of few columns cost the same at any small rank."""


def products_rate(config: Config, seconds: float) -> float:
    """The rate of the product of tokens with a feed-forward weight, in the number type of the run: FLOP a second.

    Raises:
        UserError: train.device is not here.
    """
    device, dtype = set_up_device(config.train.device, config.train.threads), getattr(torch, config.train.dtype)
    a, _ = _measurable(config.model.architecture, device)
    x = torch.randn(PASS_TOKENS, a.hidden).to(device, dtype)
    weight = torch.full((a.intermediate or 4 * a.hidden, a.hidden), 0.01, device=device, dtype=dtype)
    at_once = AT_ONCE[device.type]

    def products(rows: int) -> None:
        for _ in range(at_once):
            F.linear(x[:rows], weight)

    # On a slow device, fewer rows.
    rows = _rows_within(seconds / 5, _median_seconds(lambda: products(LEAST_TOKENS), device, 0) / LEAST_TOKENS)
    return 2 * at_once * rows * weight.numel() / _median_seconds(lambda: products(rows), device, seconds)


def measure(config: Config, seconds: float, prompt: float, row: float) -> DeviceSpeed:
    """The speed of one block with random activations, and of the products alone.

    Args:
        seconds: the time of the measurement.
        prompt: tokens of a prompt.
        row: tokens of a training row.

    Raises:
        UserError: train.device is not here.
    """
    device = set_up_device(config.train.device, config.train.threads)
    with products.on_any_cpu(device, config.train.dtype):
        return _measure(config, device, seconds, prompt, row)


def _measure(config: Config, device: torch.device, seconds: float, prompt: float, row: float) -> DeviceSpeed:
    a, times = _measurable(config.model.architecture, device)
    rate = products_rate(config, seconds / 5)
    # A pass takes at most a tenth of the time, if it reaches a fifth of the products' rate.
    affordable = _rows_within(seconds / 10, 4 * block_weights(a) / a.layers / (rate / 5))
    length = max(1, min(round(row), affordable))
    rows = min(config.train.batch_size, config.train.microbatch_size or PASS_TOKENS, affordable // length)
    block = _Block(a, device, getattr(torch, config.train.dtype))
    x = block.activations(rows, length).requires_grad_()

    def train() -> None:
        block(x).sum().backward()  # type: ignore[no-untyped-call]

    training = _median_seconds(train, device, seconds / 2) / (rows * length)
    answered = min(config.score.batch_size, affordable)
    token = block.activations(answered, 1)
    cache = block.cache(answered, max(1, round(prompt + (row - prompt) / 2)))

    def answer() -> None:
        with torch.no_grad():
            block(token, cache)

    answering = _median_seconds(answer, device, seconds * 3 / 10) / answered
    return DeviceSpeed(str(execution_on(device)), device.type == "cuda", rate, times * training, times * answering)


def _measurable(a: Architecture, device: torch.device) -> tuple[Architecture, float]:
    """The sizes to measure, and how many times as many weights a block of the whole model has."""
    weights, halvings = block_weights(a) / a.layers, 0
    if device.type == "cpu":
        halvings = max(0, math.ceil(math.log(weights / CPU_WEIGHTS, 4)))
    heads, kv_heads = (max(1, count >> halvings) for count in (a.heads, a.kv_heads))
    smaller = replace(
        a,
        hidden=a.hidden >> halvings,
        heads=kv_heads * max(1, heads // kv_heads),
        kv_heads=kv_heads,
        intermediate=(a.intermediate or 4 * a.hidden) >> halvings,
    )
    return smaller, weights / (block_weights(smaller) / a.layers)


def _rows_within(seconds: float, seconds_per_row: float) -> int:
    return max(LEAST_TOKENS, min(PASS_TOKENS, int(seconds / seconds_per_row)))


def _median_seconds(work: Callable[[], None], device: torch.device, seconds: float) -> float:
    """The median time of the work, which is repeated for so many seconds. The first time is not counted."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) <= LEAST_TIMES or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


class _Block:
    """A block of a Llama with an adapter on q, k and v, in the sizes of the base model. Its weights are constant."""

    def __init__(self, a: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        def matrix(d_out: int, d_in: int) -> Tensor:
            return torch.full((d_out, d_in), 0.01, device=device, dtype=dtype)

        self.a, self.device, self.dtype = a, device, dtype
        inside = a.intermediate or 4 * a.hidden
        heads = (a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim)
        self.qkv = [matrix(d_out, a.hidden) for d_out in heads]
        self.o, self.down = matrix(a.hidden, a.heads * a.head_dim), matrix(a.hidden, inside)
        self.gate, self.up = matrix(inside, a.hidden), matrix(inside, a.hidden)
        self.norm = torch.ones(a.hidden, device=device, dtype=dtype)
        self.A = matrix(RANK, a.hidden).requires_grad_()
        self.B = [matrix(d_out, RANK).requires_grad_() for d_out in heads]

    def activations(self, rows: int, tokens: int) -> Tensor:
        """Random hidden states, (rows, tokens, hidden)."""
        return torch.randn(rows, tokens, self.a.hidden).to(self.device, self.dtype)

    def cache(self, rows: int, tokens: int) -> Tensor:
        """Random keys or values of earlier tokens, (rows, key heads, tokens, head size)."""
        return torch.randn(rows, self.a.kv_heads, tokens, self.a.head_dim).to(self.device, self.dtype)

    def __call__(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        """The block's output for hidden states x, (rows, tokens, hidden), after the cached tokens."""
        h = self._normed(x)
        q, k, v = (
            (F.linear(h, weight) + F.linear(F.linear(h, self.A), B))
            .reshape(*x.shape[:2], -1, self.a.head_dim)
            .transpose(1, 2)
            for weight, B in zip(self.qkv, self.B, strict=True)
        )
        q, k = _rotated(q), _rotated(k)
        if cache is not None:
            k, v = torch.cat((cache, k), 2), torch.cat((cache, v), 2)
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=cache is None, enable_gqa=self.a.kv_heads != self.a.heads
        )
        x = x + F.linear(attended.transpose(1, 2).flatten(2), self.o)
        h = self._normed(x)
        return x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.up), self.down)

    def _normed(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(self.dtype)


def _rotated(x: Tensor) -> Tensor:
    """As much work as rotary positions, (rows, heads, tokens, head size)."""
    first, second = x.chunk(2, -1)
    return x * 0.8 + torch.cat((-second, first), -1) * 0.6
