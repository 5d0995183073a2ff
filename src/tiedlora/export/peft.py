"""An adapter as a standard PEFT LoRA folder.

A_l = diag(u_l) A and B_l = diag(v_l) B are an ordinary LoRA pair, so the export of any specification is exact. Only the
tying is lost: PEFT's format needs a pair for every layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiedlora import storage
from tiedlora.adapter.parts import TiedAdapter
from tiedlora.config.families import layout_of
from tiedlora.tying import adapted_layers, scale

PEFT_TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class _PeftConfig:
    """The content of adapter_config.json. The names are those of PEFT's LoraConfig."""

    base_model_name_or_path: str
    revision: str | None
    r: int
    lora_alpha: float
    """Always written: PEFT's scale follows from it and from r, and its default of lora_alpha is 8 at every rank."""
    lora_dropout: float
    fan_in_fan_out: bool
    target_modules: list[str]
    rank_pattern: dict[str, int]
    """Module -> its rank, if it is not `r`: several targets of one fused module are stacked."""
    alpha_pattern: dict[str, float]
    """Module -> its alpha, for the modules of `rank_pattern`, so that their scale stays the same."""
    use_rslora: bool
    """Whether PEFT's scale is lora_alpha / sqrt(r)."""
    layers_to_transform: list[int] | None
    """The adapted layers; None if all are."""
    layers_pattern: str | None
    """The name of the list of layers, which PEFT needs beside `layers_to_transform`."""
    peft_type: str = "LORA"
    task_type: str = "CAUSAL_LM"
    inference_mode: bool = True
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None


def to_peft(adapter: TiedAdapter, folder: Path, base: str, revision: str | None = None) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads and that gives the same outputs.

    Args:
        base: the name or path of the base model, for programs that load it themselves.
        revision: the revision of the base model on the hub.
    """
    pairs = lora_pairs(adapter)
    tensors = {}
    for path, (A, B) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / PEFT_TENSORS, metadata={"format": "pt"})
    ranks = {path: len(A) for path, (A, _) in pairs.items()}
    storage.write_json(folder / PEFT_CONFIG, asdict(_peft_config(adapter, ranks, base, revision)))


@torch.no_grad()
def lora_pairs(adapter: TiedAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """As TiedAdapter.pairs, but in float32 on the CPU. Each tensor is a copy, because safetensors refuses tensors that
    share memory, such as the layers of a tied A.
    """
    return {
        path: (A.float().cpu().clone(), B.float().cpu().clone(memory_format=torch.contiguous_format))
        for path, (A, B) in adapter.pairs().items()
    }


def _peft_config(adapter: TiedAdapter, ranks: dict[str, int], base: str, revision: str | None) -> _PeftConfig:
    layout = layout_of(adapter.architecture)
    # A path inside a layer means this module in every layer. The last name is not enough: GPT-2 has two c_proj.
    in_layer = {path.removeprefix(f"{layout.layers}.").partition(".")[2]: rank for path, rank in ranks.items()}
    stacked = {path: rank for path, rank in in_layer.items() if rank != adapter.rank}
    layers = adapter.tying.layers
    return _PeftConfig(
        base_model_name_or_path=base,
        revision=revision,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.tying.dropout,
        fan_in_fan_out=layout.transposed,
        target_modules=sorted(in_layer),
        rank_pattern=stacked,
        alpha_pattern={path: adapter.scale / scale(1.0, rank, adapter.scaling) for path, rank in stacked.items()},
        use_rslora=adapter.scaling == "rslora",
        layers_to_transform=None if layers is None else adapted_layers(adapter.tying, adapter.architecture),
        layers_pattern=None if layers is None else layout.layers.rpartition(".")[2],
    )
