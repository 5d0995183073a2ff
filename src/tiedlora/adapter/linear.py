"""The linear module that an adapter is added to: its sizes, its dtype, where it runs, and whether it can be merged.

Besides plain linear layers there are two special kinds:

- bitsandbytes keeps a weight in 4 or 8 bits, as integers whose shape is not that of the matrix;
- accelerate (device_map) sets `forward` on the instance, and may keep the weight elsewhere until the module runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiedlora.errors import UserError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN_WEIGHTS = ("Parameter", "Tensor", "DTensor")
"""The classes of weights that hold the numbers of their dtype. Those of torchao and quanto have floats as their dtype
too, but keep 4 or 8 bits. By name, because DTensor is slow to import."""


def is_quantised(module: nn.Module) -> bool:
    """Whether bitsandbytes keeps the module's weight in 4 or 8 bits."""
    # By name, because bitsandbytes is optional.
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def is_plain(module: nn.Module) -> bool:
    """Whether the module's weight is of floats that can be multiplied as they are. 8-bit floats cannot."""
    weight = getattr(module, "weight", None)
    return type(weight).__name__ in PLAIN_WEIGHTS and weight.dtype in FLOATS  # type: ignore[union-attr]


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the weight's matrix: (d_out, d_in), or (d_in, d_out) for a Conv1D."""
    if is_quantised(module):
        return module.out_features, module.in_features  # type: ignore[return-value]
    return tuple(module.weight.shape)  # type: ignore[arg-type]


def execution_device(module: nn.Module) -> torch.device:
    """The device on which the module runs. An offloaded weight is on the meta device until then."""
    hook: Any = getattr(module, "_hf_hook", None)
    for single in getattr(hook, "hooks", (hook,)):
        device = getattr(single, "execution_device", None)
        if device is not None:
            return torch.device(device)
    device = module.weight.device
    assert isinstance(device, torch.device)
    return device


def use_class_forward(module: nn.Module, path: str) -> None:
    """Make calls of the module reach the forward of its present class.

    Raises:
        UserError: another library has set a forward of its own on the instance, which would hide the adapter.
    """
    forward = type(module).forward.__get__(module)
    if "_old_forward" in module.__dict__:
        # accelerate's forward moves inputs and weights, and then calls this one.
        module._old_forward = forward
        return
    own = module.__dict__.get("forward")
    if own is None:
        return
    if getattr(own, "__func__", own) not in [vars(kind).get("forward") for kind in type(module).__mro__]:
        raise UserError(
            f"attach: {path} has a forward of its own ({own!r:.80}), which hides the adapter; "
            "attach the adapter before another library changes the model"
        )
    # accelerate leaves the class's own forward on the instance when its hooks are removed.
    del module.__dict__["forward"]


def cannot_merge(module: nn.Module, path: str) -> str | None:
    """Why an update cannot be added to the module's weight, in words; None if it can."""
    if is_quantised(module):
        return (
            f"{path} is quantised, and 4 or 8 bits would lose the update; keep the adapter apart, or load the base "
            "model unquantised (model.quantization=null)"
        )
    if type(module.weight).__name__ == "DTensor":
        return f"the weight of {path} is shared by several processes; start one process, with train.shard=false"
    if module.weight.device.type == "meta":
        return f"the weight of {path} is offloaded; load the base model whole (model.device_map=null)"
    return None


def keep_gradients(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU with AVX512-bf16.

    Its first evaluation pass would repack them for good. After that, no gradient passes through them, without a word.

    Raises:
        UserError: a weight is repacked already.
    """
    for path, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise UserError(
                    f"attach: bitsandbytes has repacked {path} in an evaluation pass, and no gradient passes through "
                    "it; load the model again, and attach the adapter before the first pass"
                )
