"""An adapter in the forms that other programs read: a standard PEFT LoRA folder, and merged weights.

A_l = diag(u_l) A and B_l = diag(v_l) B are an ordinary LoRA pair, so any configuration is written exactly.
What is lost is the tying: the file has every layer's own pair, as PEFT's format wants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiedlora import storage
from tiedlora.adapter import architectures
from tiedlora.adapter.attach import Attached
from tiedlora.adapter.parts import TiedAdapter
from tiedlora.errors import UserError

PEFT_TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@torch.no_grad()
def lora_pairs(adapter: TiedAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """As TiedAdapter.pairs, float32 on the CPU, nothing shared: safetensors refuses the shared memory of a tied A."""
    return {
        path: (A.float().cpu().clone(), B.float().cpu().clone(memory_format=torch.contiguous_format))
        for path, (A, B) in adapter.pairs().items()
    }


def to_peft(adapter: TiedAdapter, folder: Path, base: str, revision: str | None = None) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads and that gives the same outputs.

    Args:
        base: name or path of the base model, for programs that load it themselves.
        revision: of the base on the hub.
    """
    pairs = lora_pairs(adapter)
    tensors = {}
    for path, (A, B) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / PEFT_TENSORS, metadata={"format": "pt"})
    storage.write_json(folder / PEFT_CONFIG, _peft_config(adapter, pairs, base, revision))


def _peft_config(
    adapter: TiedAdapter, pairs: dict[str, tuple[Tensor, Tensor]], base: str, revision: str | None
) -> dict[str, Any]:
    layout = architectures.layout_of(adapter.architecture)
    # The path inside a layer names a module in all of them; its last name alone would not (GPT-2 has two c_proj).
    ranks = {path.removeprefix(f"{layout.layers}.").partition(".")[2]: len(A) for path, (A, _) in pairs.items()}
    stacked = {path: rank for path, rank in ranks.items() if rank != adapter.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": adapter.rank,
        # PEFT's default is 8 whatever the rank, and its scale lora_alpha / r: both are written out.
        "lora_alpha": adapter.alpha,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": adapter.tying.dropout,
        "bias": "none",
        "fan_in_fan_out": layout.transposed,
        "target_modules": sorted(ranks),
        "modules_to_save": None,
        "rank_pattern": stacked,
        # Stacked pairs have a higher rank and must keep the scale.
        "alpha_pattern": {path: adapter.scale * rank for path, rank in stacked.items()},
    }


def to_merged(attached: Attached, tokenizer: Any, folder: Path, dtype: str = "float32") -> float:
    """Write the base model with the update in its weights; `AutoModelForCausalLM` loads it. The model stays merged.

    The sum is taken in float32. A narrower `dtype` rounds it: bfloat16 keeps 8 bits of a weight, so the
    part of an update below 1/256 of its weight is lost at random, and outputs move.

    Args:
        attached: on a float32 model.
        tokenizer: saved beside, if not None.

    Returns:
        How much of the update the rounding changed: its relative error in the Euclidean norm, 0 for float32.

    Raises:
        UserError: the model is not float32.
    """
    model: Any = attached.model
    if next(model.parameters()).dtype != torch.float32:
        raise UserError(f"export: the base model is {model.dtype}; load it in float32, so that merging does not round")
    before = {path: _weight(attached, path).clone() for path in attached.paths}
    attached.fuse()
    wrong, whole = 0.0, 0.0
    narrow = getattr(torch, dtype)
    for path, old in before.items():
        new = _weight(attached, path)
        wrong += float((new.to(narrow).float() - old.to(narrow).float() - (new - old)).square().sum())
        whole += float((new - old).square().sum())
    model.to(narrow).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return (wrong / whole) ** 0.5 if whole and dtype != "float32" else 0.0


def _weight(attached: Attached, path: str) -> Tensor:
    weight: Tensor = attached.model.get_submodule(path).weight.detach()  # type: ignore[operator]
    return weight
