"""Whether the blocks of a model are compiled for training, and how."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.utils._triton import has_triton

from tiedlora.errors import UserError

log = logging.getLogger(__name__)

COMPILE_PAYS_FROM_FLOP = {"cpu": 4e14, "cuda": 2e16}
"""From this many FLOP of a run, compiling saves time. It takes half a minute, a few per cent of such a run."""


def decide(wish: str, device: str, weights: int, tokens: float, slow_bfloat16: bool = False) -> bool:
    """Whether to compile the blocks: `always`, `never`, or `auto` (if the run is long enough).

    The answer depends only on the configuration, the rows and the machine. So a resumed run computes as before.

    Args:
        device: cpu or cuda.
        weights: the number of those of the blocks' matrices. A token uses each twice (forward, and backward to the
            activations), with 2 FLOP each time.
        tokens: the number of tokens of the whole run.
        slow_bfloat16: as models.products.without_instructions. Compiled blocks would use torch's own slow products.

    Raises:
        UserError: train.compile=always, and what torch needs to compile for the device is missing.
    """
    if slow_bfloat16 and wish == "always":
        raise UserError(
            "train.compile=always: compiled blocks would be slow, because this CPU has no instructions for bfloat16; "
            "set train.compile=auto, or train.dtype=float32"
        )
    long_enough = 4 * weights * tokens >= COMPILE_PAYS_FROM_FLOP.get(device, float("inf"))
    if wish == "never" or slow_bfloat16 or (wish == "auto" and not long_enough):
        return False
    if not (missing := _missing_for_code(device)):
        return True
    if wish == "always":
        raise UserError(f"train.compile=always: there is no {missing} here; install it, or set train.compile=never")
    log.info("not compiling: no %s here", missing)
    return False


def _missing_for_code(device: str) -> str:
    """What torch needs to compile for the device and does not find; empty if nothing is missing."""
    if device == "cpu":
        has_compiler, compiler = shutil.which("g++") or shutil.which("clang++"), "C++ compiler (g++ or clang++)"
    elif not has_triton():
        return "Triton for this GPU"
    else:
        # Triton compiles a launcher in C for every kernel. Small container images have no compiler.
        has_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        compiler = "C compiler (gcc or clang)"
    if not has_compiler:
        return compiler
    # The code of both includes it. Ubuntu's Python comes without.
    header = Path(sysconfig.get_path("include", scheme="posix_prefix"), "Python.h")
    return "" if header.exists() else "Python.h (Python's headers, python3-dev)"


@contextmanager
def compiled(blocks: Any, embeddings: nn.Module) -> Iterator[None]:
    """Inside the context, the blocks are compiled. All share one graph, so only the first block is really compiled.

    Shapes are dynamic, because batches differ in length: to compile a graph for each length would take too long. A pass
    of a single row has a second graph. On a CPU in bfloat16, rows beyond attention.LONGEST_ROW have one more.

    Args:
        embeddings: the module whose output is the first block's input. Inside the context, the output needs a gradient
            like the other blocks' inputs. Otherwise the first block would have graphs of its own.
    """
    torch._dynamo.reset()
    for block in blocks:
        block.compile(dynamic=True)
    hook = embeddings.register_forward_hook(_needs_gradient)
    try:
        # Otherwise two sizes that are equal by chance (such as rank and batch) count as one size, and a batch of
        # another size is compiled again.
        with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            yield
    finally:
        hook.remove()
        for block in blocks:
            block._compiled_call_impl = None


def _needs_gradient(_: nn.Module, __: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()
