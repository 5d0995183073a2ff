"""The base model with an adapter's update in its weights, as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiedlora.adapter.attach import Attached
from tiedlora.errors import UserError


def to_merged(attached: Attached, tokenizer: Any, folder: Path, dtype: str = "float32") -> float:
    """Write the base model with the update in its weights. `AutoModelForCausalLM` loads it. `attached` stays merged.

    The sum is computed in float32. A narrower `dtype` rounds it: bfloat16 keeps 8 bits of a weight, so an update
    below 1/256 of its weight is mostly lost, and the outputs change.

    Args:
        attached: an adapter on a float32 model.
        tokenizer: is saved in the same folder; None saves no tokenizer.

    Returns:
        How much rounding changed the update: the relative error in the Euclidean norm, 0 for float32.

    Raises:
        UserError: the model is not float32.
    """
    model: Any = attached.model
    if next(model.parameters()).dtype != torch.float32:
        raise UserError(f"export: the base model is {model.dtype}; load it in float32, so that merging does not round")
    narrow_dtype = getattr(torch, dtype)
    base_weights = {path: _weight(attached, path).clone() for path in attached.paths}
    attached.fuse()
    squared_error, squared_norm = 0.0, 0.0
    for path, base_weight in base_weights.items():
        merged_weight = _weight(attached, path)
        update = merged_weight - base_weight
        narrow_update = merged_weight.to(narrow_dtype).float() - base_weight.to(narrow_dtype).float()
        squared_error += float((narrow_update - update).square().sum())
        squared_norm += float(update.square().sum())
    model.to(narrow_dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return (squared_error / squared_norm) ** 0.5 if squared_norm and dtype != "float32" else 0.0


def _weight(attached: Attached, path: str) -> Tensor:
    weight: Tensor = attached.model.get_submodule(path).weight.detach()  # type: ignore[operator]
    return weight
