"""Where each family of models keeps its projections.

A target such as `qkv` is one or more sites, concatenated in order. A site is a whole module, or some of the outputs of
a fused module. Three layouts cover the families of the table:

- q, k and v are three modules (Llama and its relatives);
- one fused module whose outputs are the blocks [Q; K; V] (GPT-2, Phi-3);
- one fused module whose outputs are ordered head by head, [q_1; k_1; v_1; q_2; ...] (GPT-NeoX).

The rows of B and v are always in the order [Q; K; V], also where the module's outputs have another order. So the same
adapter means the same update everywhere. A new architecture is one entry in FAMILIES, or a `Layout` from the user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tiedlora.adapter import linear
from tiedlora.errors import UserError
from tiedlora.families import CANDIDATES_SHOWN, FAMILIES, by_hand, layout_of, unknown_family
from tiedlora.tying import Architecture, Layout, Tying, adapted_layers, target_shape

_QKV = ("q", "k", "v")
_FUSED_BLOCKS = {"q": _QKV, "k": _QKV, "v": _QKV, "gate": ("gate", "up"), "up": ("gate", "up")}
"""Target -> the blocks of the fused module that contains it, in order."""


@dataclass(frozen=True)
class Site:
    """One module of every layer, to whose outputs a target's update is added."""

    layers: str
    """The path of the list of layers."""
    path: str
    """The module's path inside a layer."""
    rows: slice
    """The rows of the target's B and v that belong to this module."""
    outputs: slice
    """The outputs of the module to which those rows are added. With `heads`, the blocks of each head."""
    width: int
    """The number of all outputs of the module. It is more than the rows if the module also computes something else."""
    heads: int = 0
    """The heads of a fused module whose outputs are heads x (q, k, v) x head_dim. The rows are in the order [Q; K; V]
    also there."""

    def in_layer(self, layer: int) -> str:
        """The module's path inside the whole model."""
        return f"{self.layers}.{layer}.{self.path}"

    def place(self, B: Tensor) -> Tensor:
        """Spread B (... x rows x r) over all outputs of the module (... x width x r), with zeros for the others.

        This is far cheaper than to spread the update itself, which has tokens x width numbers.
        """
        first, last = self.outputs.start, self.outputs.stop
        if not self.heads:
            return B if B.shape[-2] == self.width else F.pad(B, (0, 0, first, self.width - last))
        # Padding, and no index of the outputs: an index on the CPU would be copied to the GPU at every forward pass.
        by_block = B.reshape(*B.shape[:-2], last - first, self.heads, -1, B.shape[-1]).transpose(-4, -3)
        return F.pad(by_block, (0, 0, 0, 0, first, 3 - last)).flatten(-4, -2)


def read(model: nn.Module, layout: Layout | None = None) -> Architecture:
    """The sizes of a loaded model, from its transformers configuration.

    Args:
        layout: where the projections are, for a family that is not in FAMILIES.

    Raises:
        UserError: it is no causal language model, its family is unknown (the message lists modules that may be
            projections), or its configuration lacks a size.
    """
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "get_text_config"):
        raise UserError(not_causal(model))
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    layout = layout or Layout()
    if not layout.layers:
        _refuse_other_inputs(model, config.model_type)
        if getattr(config, "is_encoder_decoder", False) or not _has_head(model):
            raise UserError(not_causal(model))
        if config.model_type not in FAMILIES:
            raise UserError(unknown_family(config.model_type, candidates(model)))
    try:
        heads = config.num_attention_heads
        # Falcon 7B's kind says so by this alone.
        one_kv = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
        return Architecture(
            family=config.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=1 if one_kv else _kv_heads(config) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            # GPT-2 calls it n_inner. None means four times the hidden size.
            intermediate=getattr(config, "intermediate_size", getattr(config, "n_inner", None))
            or 4 * config.hidden_size,
            vocabulary=config.vocab_size,
            layout=layout,
        )
    except AttributeError as error:
        raise UserError(
            f"model: its configuration ({config.model_type}) lacks a number that is needed: {error}"
        ) from None


def _kv_heads(config: Any) -> int | None:
    # Falcon 40B's kind has another name for it.
    name = "num_kv_heads" if getattr(config, "new_decoder_architecture", False) else "num_key_value_heads"
    return getattr(config, name, None)


def _refuse_other_inputs(model: nn.Module, family: str) -> None:
    """Refuse a model of a known family that also reads images or sound: its layers are deeper inside (Gemma 3 4B)."""
    inside = (path for path, _ in model.named_modules() if path.endswith("language_model.layers"))
    if family in FAMILIES and (layers := next(inside, None)):
        raise UserError(
            f"attach: {type(model).__name__} has its {family} in {layers}; name its projections by hand: "
            f"{by_hand(layers, FAMILIES[family])}"
        )


def _has_head(model: nn.Module) -> bool:
    """Whether a model is a causal language model, by the name of its class or of one that it is made from.

    A classifier of a known family has another head, which would stay frozen, random and unsaved.
    """
    kinds = type(getattr(model, "_orig_mod", model)).__mro__  # torch.compile wraps a model
    return any(word in kind.__name__ for kind in kinds for word in ("CausalLM", "LMHead"))


def not_causal(model: object) -> str:
    """The message for what no adapter can be attached to."""
    return (
        f"attach: {type(model).__name__} is no causal language model of transformers; load one with "
        "AutoModelForCausalLM.from_pretrained(NAME), or name the projections of another one with "
        "layout=tiedlora.Layout(...)"
    )


def sites(architecture: Architecture, target: str) -> list[Site]:
    """The modules that contain one target of a layer, with their rows of B and v.

    Raises:
        UserError: the family is unknown, has no such projection, or the user's layout is wrong for it.
    """
    layout = layout_of(architecture)
    if target not in layout.sites:
        raise UserError(
            f"tying.targets: {architecture.family} has no '{target}' projection; choose from {', '.join(layout.sites)}"
        )
    names = layout.sites[target]
    # A target of three modules is [Q; K; V]. Each module has as many rows as q, k or v has outputs.
    parts = _QKV if len(names) == 3 else (target,)
    if len(names) != len(parts):
        raise UserError(f"model.architecture.layout.sites.{target}: needs one module path, or those of q, k and v")
    target_sites, row = [], 0
    for name, part in zip(names, parts, strict=True):
        path, _, block = name.partition(":")
        height = target_shape(architecture, part)[1]
        placed = _outputs(architecture, layout, part, block)
        target_sites.append(Site(layout.layers, path, slice(row, row + height), *placed))
        row += height
    return target_sites


def _outputs(architecture: Architecture, layout: Layout, part: str, block: str) -> tuple[slice, int, int]:
    """The values `outputs`, `width` and `heads` of the site of `part`.

    Args:
        block: which block of a fused module is `part`; empty if the whole module is `part`.
    """
    if layout.interleaved and (block in _QKV or part == "qkv"):
        heads, first = architecture.heads, _QKV.index(block) if block else 0
        return slice(first, first + 1 if block else 3), 3 * heads * architecture.head_dim, heads
    if not block:
        width = target_shape(architecture, part)[1]
        return slice(0, width), width, 0
    if block not in _FUSED_BLOCKS:
        raise UserError(
            f"model.architecture.layout.sites: '{block}' is not a block of a fused module; "
            f"choose from {', '.join(_FUSED_BLOCKS)}"
        )
    blocks = _FUSED_BLOCKS[block]
    widths = {name: target_shape(architecture, name)[1] for name in blocks}
    start = sum(widths[name] for name in blocks[: blocks.index(block)])
    return slice(start, start + widths[block]), sum(widths.values()), 0


def check(model: nn.Module, architecture: Architecture, tying: Tying) -> None:
    """Compare every module that will be adapted with what its layout says.

    Raises:
        UserError: a module is missing, is not a linear layer, or has another size.
    """
    transposed = layout_of(architecture).transposed
    for target in tying.targets:
        d_in = target_shape(architecture, target)[0]
        for site in sites(architecture, target):
            for layer in adapted_layers(tying, architecture):
                _check_module(model, site.in_layer(layer), target, (site.width, d_in), transposed)


def _check_module(model: nn.Module, path: str, target: str, shape: tuple[int, int], transposed: bool) -> None:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        names = ", ".join(candidates(model)[:CANDIDATES_SHOWN])
        known = f"its candidates are {names}" if names else "it has no linear layers"
        raise UserError(f"attach: the model has no module {path}, where '{target}' should be; {known}") from None
    # bitsandbytes replaces a Conv1D by a linear layer.
    is_quantised = linear.is_quantised(module)
    is_linear = isinstance(module, Conv1D if transposed and not is_quantised else nn.Linear)
    if not is_linear or not (is_quantised or linear.is_plain(module)):
        raise UserError(
            f"attach: {path} is a {type(module).__name__}, not a plain linear layer; "
            "load the model unquantised or with model.quantization, or correct its layout"
        )
    expected = shape[::-1] if isinstance(module, Conv1D) else shape
    if linear.weight_shape(module) != expected:
        raise UserError(
            f"attach: {path} has a weight of {linear.weight_shape(module)}, "
            f"the layout of '{target}' says {expected}; correct model.architecture"
        )


def candidates(model: nn.Module) -> list[str]:
    """The linear modules in layers, such as `layers.*.self_attn.q_proj (64 x 64)`; those of images and sound last."""
    described: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and hasattr(module, "weight"):
            pattern = re.sub(r"\.\d+\.", ".*.", path, count=1)
            if pattern != path:
                described.setdefault(pattern, f"{pattern} ({' x '.join(map(str, linear.weight_shape(module)))})")
    return sorted(described.values(), key=lambda text: "vision" in text or "audio" in text)
