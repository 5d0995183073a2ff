"""Where each family of models keeps its projections, as data.

A target such as `qkv` is one module, three modules, or a part of a fused one (adapter/architectures.py uses the table).
"""

from __future__ import annotations

from collections.abc import Sequence

from tiedlora.errors import UserError
from tiedlora.tying import Architecture, Layout


def _fused(module: str) -> dict[str, list[str]]:
    """The sites of one module that computes q, k and v."""
    return {"qkv": [module], **{part: [f"{module}:{part}"] for part in "qkv"}}


# These families differ only outside the projections: in biases, norms of q and k, norms after the sublayers, and capped
# logits. The update of a projection's output does not depend on these.
_SEPARATE = Layout(
    layers="model.layers",
    sites={
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        **{part: [f"self_attn.{part}_proj"] for part in "qkvo"},
        **{part: [f"mlp.{part}_proj"] for part in ("gate", "up", "down")},
    },
)

FAMILIES: dict[str, Layout] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3"), _SEPARATE
    ),
    "gpt2": Layout(
        layers="transformer.h",
        sites={**_fused("attn.c_attn"), "o": ["attn.c_proj"], "up": ["mlp.c_fc"], "down": ["mlp.c_proj"]},
        transposed=True,
    ),
    "phi3": Layout(
        layers="model.layers",
        sites={
            **_fused("self_attn.qkv_proj"),
            "o": ["self_attn.o_proj"],
            "gate": ["mlp.gate_up_proj:gate"],
            "up": ["mlp.gate_up_proj:up"],
            "down": ["mlp.down_proj"],
        },
    ),
    "gpt_neox": Layout(
        layers="gpt_neox.layers",
        sites={
            **_fused("attention.query_key_value"),
            "o": ["attention.dense"],
            "up": ["mlp.dense_h_to_4h"],
            "down": ["mlp.dense_4h_to_h"],
        },
        interleaved=True,
    ),
}

CANDIDATES_SHOWN = 12
"""How many modules an error message lists at most."""


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
        f"name its projections by hand: {by_hand('model.layers', _SEPARATE)}"
    )


def by_hand(layers: str, layout: Layout) -> str:
    """What to write so that the fused QKV of a layout is adapted in the layers of this path."""
    sites = ", ".join(layout.sites["qkv"])
    return (
        f"+model.architecture.layout='{{layers: {layers}, sites: {{qkv: [{sites}]}}}}', or layout=tiedlora.Layout(...) "
        "from Python"
    )
