"""The adapted modules, and the hook that gives them their factors before each pass.

The hook is on the module that owns the list of layers and folds the factors of all layers. The adapted modules
themselves have no hooks. Each hook would be a separate object, so torch.compile would compile every layer separately.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiedlora.adapter import linear
from tiedlora.adapter.parts import TiedAdapter
from tiedlora.config.families import layout_of
from tiedlora.errors import UserError
from tiedlora.tying import FACTORS, part_of


class Adapted(nn.Module):
    """Added to the class of an adapted module: its output becomes W_l x + s B_l A_l x.

    Where q, k and v are separate modules, each draws its own dropout mask, as in PEFT's LoRA.
    """

    folded_A: Tensor
    """s diag(u_l) A, (r, d_in), in the weight's dtype, for the present forward pass."""
    folded_B: Tensor
    """diag(v_l) B, (d_out, r), in the weight's dtype, for the present forward pass."""
    adapter_dropout: float

    def forward(self, x: Tensor) -> Tensor:
        plain: Tensor = super().forward(x)
        dropped = F.dropout(x, self.adapter_dropout, self.training) if self.adapter_dropout else x
        return plain + F.linear(F.linear(dropped, self.folded_A), self.folded_B)

    def __getstate__(self) -> dict[str, Any]:
        # torch refuses to copy a tensor that is part of a graph. A copy of the model folds its own factors.
        return {key: value for key, value in self.__dict__.items() if key not in ("folded_A", "folded_B")}


@cache
def adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module class that adds the update. There is one per class, so layers share compiled code."""
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {})


class FoldFactors:
    """The forward pre-hook: before each pass through the layers it gives every adapted module its folded factors."""

    once = False
    """Whether to fold only before the first pass: see Attached.folded_once."""
    done = False

    def __init__(self, model: nn.Module, adapter: TiedAdapter, modules: dict[str, nn.Module]) -> None:
        self.model, self.adapter, self.modules = model, adapter, modules

    def __call__(self, called: nn.Module, *_: Any) -> None:
        if getattr(called, "_is_replica", False):
            raise UserError(
                "nn.DataParallel copies the model without the adapter's factors, so it cannot train one; show the "
                "program one GPU (CUDA_VISIBLE_DEVICES=0), or start a process for each GPU with torchrun"
            )
        self._refuse_reentrant_checkpoints()
        if self.once and self.done:
            return
        self.done = True
        dtype = linear.activation_dtype(self.model, next(iter(self.modules.values())))
        for path, (A_l, B_l) in self.adapter.pairs(self.adapter.scale, dtype).items():
            module = self.modules[path]
            device = linear.execution_device(module)
            if A_l.is_meta and device.type != "meta":
                raise UserError(
                    "the adapter's parts were offloaded to the meta device (accelerate's cpu_offload or disk_offload), "
                    "so they are lost; offload the model first, then attach the adapter"
                )
            module.folded_A, module.folded_B = A_l.to(device), B_l.to(device)

    def _refuse_reentrant_checkpoints(self) -> None:
        """Refuse them where a vector scales the factors: the scaled factors of all layers come from one product.

        Each reentrant checkpoint runs a backward pass of its own, and the first of these passes frees that product.
        """
        layer: Any = self.model.get_submodule(layout_of(self.adapter.architecture).layers)[0]  # type: ignore[index]
        if not (torch.is_grad_enabled() and layer.training and getattr(layer, "gradient_checkpointing", False)):
            return
        reentrant = getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
        vectors = sorted({part_of(name) for name in self.adapter.parts()} - set(FACTORS))
        if reentrant and vectors:
            raise UserError(
                "gradient checkpointing with use_reentrant=True does not work for an adapter with "
                f"{' or '.join(vectors)}, because the layers share one product; "
                'set gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
