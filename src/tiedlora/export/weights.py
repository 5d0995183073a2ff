"""An adapter in forms that other programs load: a standard PEFT LoRA folder, and the base model with the update in it.

A_l = diag(u_l) A and B_l = diag(v_l) B are an ordinary LoRA pair, so PEFT's folder is exact for any specification. Only
the tying is lost: PEFT's format needs a pair for every layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tiedlora import storage
from tiedlora.adapter.attach import Attached
from tiedlora.adapter.parts import TiedAdapter
from tiedlora.config.families import layout_of
from tiedlora.config.methods import PEFT_FILE
from tiedlora.errors import UserError
from tiedlora.tying import scale

PEFT_TENSORS = "adapter_model.safetensors"


@torch.no_grad()
def to_peft(adapter: TiedAdapter, folder: Path, base: str, revision: str | None = None) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads and that gives the same outputs.

    Args:
        base: the name or path of the base model, for programs that load it themselves.
        revision: the revision of the base model on the hub.
    """
    tensors, ranks = {}, {}
    for path, (A, B) in adapter.pairs().items():
        # Copies, because safetensors refuses tensors that share memory, such as the layers of a tied A.
        tensors[f"base_model.model.{path}.lora_A.weight"] = A.float().cpu().clone()
        tensors[f"base_model.model.{path}.lora_B.weight"] = B.float().cpu().clone(memory_format=torch.contiguous_format)
        ranks[path] = len(A)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / PEFT_TENSORS, metadata={"format": "pt"})
    storage.write_json(folder / PEFT_FILE, _peft_config(adapter, ranks, base, revision))


def _peft_config(adapter: TiedAdapter, ranks: dict[str, int], base: str, revision: str | None) -> dict[str, object]:
    """The content of adapter_config.json. The names are those of PEFT's LoraConfig."""
    layout = layout_of(adapter.architecture)
    # A path inside a layer means this module in every layer. The last name is not enough: GPT-2 has two c_proj.
    in_layer = {path.removeprefix(f"{layout.layers}.").partition(".")[2]: rank for path, rank in ranks.items()}
    # Several targets of one fused module, and several terms, are stacked: the module has another rank, and another
    # alpha so that its scale stays.
    stacked = {path: rank for path, rank in in_layer.items() if rank != adapter.rank}
    some_layers = len(adapter.layers) < adapter.architecture.layers
    return {
        "base_model_name_or_path": base,
        "revision": revision,
        "r": adapter.rank,
        # Always written: PEFT's scale follows from it and from r, and its default of lora_alpha is 8 at every rank.
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.tying.dropout,
        "fan_in_fan_out": layout.transposed,
        "target_modules": sorted(in_layer),
        "rank_pattern": stacked,
        "alpha_pattern": {path: adapter.scale / scale(1.0, rank, adapter.scaling) for path, rank in stacked.items()},
        "use_rslora": adapter.scaling == "rslora",
        "layers_to_transform": adapter.layers if some_layers else None,
        # PEFT needs the name of the list of layers beside layers_to_transform.
        "layers_pattern": layout.layers.rpartition(".")[2] if some_layers else None,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
    }


def to_merged(attached: Attached, tokenizer: Any, folder: Path, dtype: str = "float32") -> None:
    """Write the base model with the update in its weights. `AutoModelForCausalLM` loads it. `attached` stays merged.

    The sum is computed in float32. A narrower `dtype` rounds it: bfloat16 keeps 8 bits of a weight, so an update
    below 1/256 of its weight is mostly lost, and the outputs change.

    Args:
        attached: an adapter on a float32 model.
        tokenizer: is saved in the same folder; None saves no tokenizer.

    Raises:
        UserError: the model is not float32.
    """
    model: Any = attached.model
    if next(model.parameters()).dtype != torch.float32:
        raise UserError(f"export: the base model is {model.dtype}; load it in float32, so that merging does not round")
    attached.fuse()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
