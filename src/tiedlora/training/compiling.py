"""When and how the blocks of a model are compiled for training."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.experimental._config

from tiedlora.errors import UserError

log = logging.getLogger(__name__)

COMPILE_PAYS_FROM_FLOP = {"cpu": 4e14, "cuda": 2e16}
"""FLOP of a run from which compiling pays: it takes half a minute, a few per cent of such a run."""


def decide(wish: str, device: str, weights: int, tokens: float) -> bool:
    """Whether to compile: `always`, `never`, or `auto`, which asks whether the run is long enough.

    The answer depends on the configuration, the rows and the machine alone, so a resumed run computes as it began.

    Args:
        device: cpu or cuda.
        weights: numbers in the blocks. A token passes each number twice (forward, and backward to the activations),
            at 2 FLOP each time.
        tokens: of the whole run.

    Raises:
        UserError: compiling is asked for and there is no C++ compiler, which torch needs for code on the CPU.
    """
    if wish == "never" or (wish == "auto" and 4 * weights * tokens < COMPILE_PAYS_FROM_FLOP.get(device, float("inf"))):
        return False
    if device != "cpu" or shutil.which("g++") or shutil.which("clang++"):
        return True
    if wish == "always":
        raise UserError("train.compile=always: there is no C++ compiler here; install g++, or set train.compile=never")
    log.info("not compiling: no C++ compiler here (g++ or clang++)")
    return False


@contextmanager
def compiled(blocks: Any) -> Iterator[None]:
    """Compile each block while the context lasts. All share one graph, so the first one's compilation is the only one.

    Shapes are dynamic: batches differ in length, and a graph for each would never be repaid.
    """
    torch._dynamo.reset()
    for block in blocks:
        block.compile(dynamic=True)
    try:
        # Else sizes that happen to be equal, such as rank and batch, count as one, and another batch compiles anew.
        with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def eager() -> Any:
    """A context in which compiled blocks run as they were written: another mode or shape would be compiled anew."""
    return torch.compiler.set_stance("force_eager")
