"""Where each family of models keeps its projections, as data.

A target such as `qkv` is one module, three modules, or a part of a fused one (adapter/architectures.py uses the table).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiedlora.errors import UserError
from tiedlora.tying import Architecture, Layout

# These families differ only outside the projections: in biases, norms of q and k, norms after the sublayers, and capped
# logits. The update of a projection's output does not depend on these.
_SEPARATE = Layout(
    layers="model.layers",
    sites={
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "q": ["self_attn.q_proj"],
        "k": ["self_attn.k_proj"],
        "v": ["self_attn.v_proj"],
        "o": ["self_attn.o_proj"],
        "gate": ["mlp.gate_proj"],
        "up": ["mlp.up_proj"],
        "down": ["mlp.down_proj"],
    },
)

FAMILIES: dict[str, Layout] = {
    **{
        family: _SEPARATE
        for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3")
    },
    "gpt2": Layout(
        layers="transformer.h",
        sites={
            "qkv": ["attn.c_attn"],
            "q": ["attn.c_attn:q"],
            "k": ["attn.c_attn:k"],
            "v": ["attn.c_attn:v"],
            "o": ["attn.c_proj"],
            "up": ["mlp.c_fc"],
            "down": ["mlp.c_proj"],
        },
        transposed=True,
    ),
    "phi3": Layout(
        layers="model.layers",
        sites={
            "qkv": ["self_attn.qkv_proj"],
            "q": ["self_attn.qkv_proj:q"],
            "k": ["self_attn.qkv_proj:k"],
            "v": ["self_attn.qkv_proj:v"],
            "o": ["self_attn.o_proj"],
            "gate": ["mlp.gate_up_proj:gate"],
            "up": ["mlp.gate_up_proj:up"],
            "down": ["mlp.down_proj"],
        },
    ),
    "gpt_neox": Layout(
        layers="gpt_neox.layers",
        sites={
            "qkv": ["attention.query_key_value"],
            "q": ["attention.query_key_value:q"],
            "k": ["attention.query_key_value:k"],
            "v": ["attention.query_key_value:v"],
            "o": ["attention.dense"],
            "up": ["mlp.dense_h_to_4h"],
            "down": ["mlp.dense_4h_to_h"],
        },
        interleaved=True,
    ),
}

CANDIDATES_SHOWN = 12
"""How many modules an error message lists at most."""


def architecture_of(tree: Mapping[str, Any]) -> Architecture:
    """The sizes of a model from plain data, as `dataclasses.asdict` gives them.

    Raises:
        TypeError: a key is unknown.
    """
    return Architecture(**{**tree, "layout": Layout(**tree["layout"])})


def layout_of(architecture: Architecture) -> Layout:
    """Where a model keeps its projections: the layout that the user gave, or that of the family.

    Raises:
        UserError: the family is unknown; the message names the known ones.
    """
    if architecture.layout.layers:
        return architecture.layout
    if architecture.family not in FAMILIES:
        raise UserError(unknown_family(architecture.family, []))
    return FAMILIES[architecture.family]


def unknown_family(family: str, names: Sequence[str]) -> str:
    """The message about a family that is not in the table. `names` are modules that may be its projections."""
    listed = f"its linear layers are {', '.join(names[:CANDIDATES_SHOWN])}; " if names else ""
    return (
        f"model.architecture.family={family}: its layout is unknown; known are {', '.join(sorted(FAMILIES))}; {listed}"
        "name its projections by hand: +model.architecture.layout='{layers: model.layers, sites: {qkv: "
        "[self_attn.q_proj, self_attn.k_proj, self_attn.v_proj]}}', or layout=tiedlora.Layout(...) from Python"
    )
