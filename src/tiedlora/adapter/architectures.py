"""Where each family of models keeps its projections.

A new architecture is one entry in FAMILIES. A target such as `qkv` is the concatenation, in order, of
its sites; a site is a whole module, or the part of a fused module that computes q, k or v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tiedlora.errors import UserError
from tiedlora.tying import Architecture, target_shape


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers names things."""

    layers: str
    """Path of the list of layers inside the causal language model."""
    sites: Mapping[str, tuple[str, ...]]
    """Target -> module paths inside a layer; `path:q` is the q part of a fused [Q; K; V] module."""


_SEPARATE = Family(
    layers="model.layers",
    sites={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "q": ("self_attn.q_proj",),
        "k": ("self_attn.k_proj",),
        "v": ("self_attn.v_proj",),
        "o": ("self_attn.o_proj",),
        "gate": ("mlp.gate_proj",),
        "up": ("mlp.up_proj",),
        "down": ("mlp.down_proj",),
    },
)

FAMILIES: dict[str, Family] = {
    "llama": _SEPARATE,
    "mistral": _SEPARATE,
    "qwen2": _SEPARATE,
    "qwen3": _SEPARATE,
    "gpt2": Family(
        layers="transformer.h",
        sites={
            "qkv": ("attn.c_attn",),
            "q": ("attn.c_attn:q",),
            "k": ("attn.c_attn:k",),
            "v": ("attn.c_attn:v",),
            "o": ("attn.c_proj",),
            "up": ("mlp.c_fc",),
            "down": ("mlp.c_proj",),
        },
    ),
}


@dataclass(frozen=True)
class Site:
    """One module of one layer that a target's update is added to."""

    module_path: str
    """Path inside the whole model."""
    rows: slice
    """Rows of the target's B and v that belong to this module."""
    outputs: slice
    """Outputs of the module that they are added to (all of them unless the module is fused)."""


def read(model: nn.Module) -> Architecture:
    """The numbers of a loaded model, from its transformers configuration.

    Raises:
        UserError: the family is not in FAMILIES.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    family_of(config.model_type)
    heads = config.num_attention_heads
    return Architecture(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        # GPT-2 calls it n_inner, and leaves it out where it is four times the hidden size.
        intermediate=getattr(config, "intermediate_size", getattr(config, "n_inner", None)) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
    )


def family_of(model_type: str) -> Family:
    """The layout of a family.

    Raises:
        UserError: naming the families there are.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model.architecture.family={model_type}: its layout is unknown; known are {', '.join(sorted(FAMILIES))} "
            "(a new one is one entry in src/tiedlora/adapter/architectures.py)"
        )
    return FAMILIES[model_type]


def sites(architecture: Architecture, target: str, layer: int) -> list[Site]:
    """The modules that one target of one layer is made of, with their rows of B and v.

    Raises:
        UserError: the family has no such projection.
    """
    family = family_of(architecture.family)
    if target not in family.sites:
        raise UserError(
            f"tying.targets: {architecture.family} has no '{target}' projection; choose from {', '.join(family.sites)}"
        )
    names = family.sites[target]
    # A target of several modules is [Q; K; V]; its rows follow the widths of q, k and v.
    parts = ("q", "k", "v") if len(names) == 3 else (target,)
    found, row = [], 0
    for name, part in zip(names, parts, strict=True):
        path, _, fused_part = name.partition(":")
        width = target_shape(architecture, part)[1]
        before = "qkv"[: "qkv".index(fused_part)] if fused_part else ""
        start = sum(target_shape(architecture, earlier)[1] for earlier in before)
        found.append(Site(f"{family.layers}.{layer}.{path}", slice(row, row + width), slice(start, start + width)))
        row += width
    return found
