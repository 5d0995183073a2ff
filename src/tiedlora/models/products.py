"""bfloat16 matrix products on a CPU without instructions for them: computed in float32, and rounded once.

Without AVX512 torch uses a plain loop. On a core of an AMD EPYC with AVX2, for (1024, 576) @ (576, 1536), the loop
reaches 8.7 GFLOP/s, and 1.9 for the product of the backward pass. In float32, with the conversions, both reach 76.
With AVX512 but without its bfloat16 instructions, torch's kernels reach 26 (an Intel Xeon of the Skylake generation),
and float32, with the conversions, 121. The kernels of all CPUs add in float32 and round the sum, so results differ
only by the order of the additions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        # In inference mode these are not split into the products above.
        aten.linear.default,
        aten.matmul.default,
        # The forward pass of this kernel is as fast in bfloat16.
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    }
)


def without_instructions(device: torch.device, dtype: str) -> bool:
    """Whether the run computes in bfloat16 on a CPU for which torch has no fast bfloat16 products."""
    if device.type != "cpu" or dtype != "bfloat16":
        return False
    has_kernels = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (has_kernels and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return True
    # With AVX512 alone, the kernels convert each number, which is slower than a product in float32.
    is_converted = not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.cpu._is_avx512_supported() and is_converted


def on_any_cpu(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """A context for all passes of a run, forward and backward. Where bfloat16 products are fast, it does nothing.

    torch.compile compiles nothing inside it, and compiled code would not pass through it.
    """
    return InFloat32() if without_instructions(device, dtype) else nullcontext()  # type: ignore[no-untyped-call]


class InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the context, this thread's bfloat16 products on the CPU are computed in float32 and rounded."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operator not in PRODUCTS or not _is_bfloat16_on_cpu(args[0]):
            return operator(*args, **kwargs)
        result = operator(*map(_widened, args), **kwargs)
        # Several gradients, or one product.
        return tuple(map(Tensor.bfloat16, result)) if isinstance(result, tuple) else result.bfloat16()


def _is_bfloat16_on_cpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _widened(value: Any) -> Any:
    return value.float() if _is_bfloat16_on_cpu(value) else value
