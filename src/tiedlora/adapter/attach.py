"""Put an adapter on a base model, take it off, merge it into the weights, and take it out again.

The base model keeps its modules and their names: an update is a forward hook on each adapted module,
so detaching leaves the very model there was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from tiedlora.adapter import architectures, files
from tiedlora.adapter.architectures import Site
from tiedlora.adapter.parts import TargetParts, TiedAdapter
from tiedlora.errors import UserError
from tiedlora.tying import Architecture, Layout, Tying, named


class Update:
    """The forward hook of one site: output + s B_l A_l x, in the dtype of x.

    With separate q, k and v modules each draws its own dropout mask, as PEFT's LoRA does.
    """

    def __init__(self, parts: TargetParts, layer: int, site: Site, scale: float, dropout: float) -> None:
        self.parts, self.layer, self.site, self.scale, self.dropout = parts, layer, site, scale, dropout

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        A_l, B_l = self.parts.folded(self.layer, self.site.rows)
        x = F.dropout(args[0], self.dropout, module.training) if self.dropout else args[0]
        # Folding is float32; only the folded factors are rounded to the activations' dtype.
        return output + F.linear(F.linear(x, (self.scale * A_l).to(x.dtype)), self.site.place(B_l).to(x.dtype))


@dataclass
class Attached:
    """An adapter on a model. `detach` when done; `merge` and `unmerge` in between.

    The adapter is also registered on the model as `tied_adapter`, so that `.to()`, `.parameters()` and
    `.train()` reach its parts.
    """

    model: nn.Module
    adapter: TiedAdapter
    sites: list[tuple[TargetParts, int, Site]]
    handles: list[RemovableHandle] = field(default_factory=list)
    _kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """Whether the update is in the weights now."""
        return bool(self._kept)

    def hook(self) -> None:
        """Let every adapted module add its update: once, however often this is called."""
        if self.handles:
            return
        dropout = self.adapter.tying.dropout
        for parts, layer, site in self.sites:
            update = Update(parts, layer, site, self.adapter.scale, dropout)
            module = self.model.get_submodule(site.module_path)
            self.handles.append(module.register_forward_hook(update))

    def unhook(self) -> None:
        """Leave the base model's own outputs."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def save_pretrained(self, folder: Path | str, base: dict[str, Any] | None = None) -> int:
        """Write the adapter's own small folder, each part once; see `files.save`.

        Args:
            base: what the base model is; None takes what transformers calls it.

        Returns:
            Bytes of the folder.
        """
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        record = base or {"name": name, "revision": None, "digest": None}
        return files.save(self.adapter, Path(folder), record)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: Path | str) -> Attached:
        """Put a saved adapter on `model`.

        Raises:
            UserError: the folder is damaged, or the adapter was made for another architecture.
        """
        return attach_adapter(model, files.load(Path(folder))[0])

    def detach(self) -> None:
        """Take the adapter off: the base model is bit for bit what it was."""
        self.unmerge()
        self.unhook()
        del self.model.tied_adapter

    @torch.no_grad()
    def merge(self) -> None:
        """Add every update to its weight, in the weight's dtype.

        In bfloat16 that rounds small updates away (the argmax then differs at 1-1.5 % of positions),
        so scoring merges in float32 alone. A copy of each weight is kept for `unmerge`.
        """
        if self.merged:
            return
        for parts, layer, site in self.sites:
            module = self.model.get_submodule(site.module_path)
            weight: Tensor = module.weight  # type: ignore[assignment]
            if site.module_path not in self._kept:
                self._kept[site.module_path] = weight.detach().clone()
            A_l, B_l = parts.folded(layer, site.rows)
            update = self.adapter.scale * (site.place(B_l) @ A_l)
            weight += (update.T if isinstance(module, Conv1D) else update).to(weight.dtype)
        self.unhook()

    def fuse(self) -> None:
        """Merge for good: the adapter leaves the model, its update stays in the weights, no copy is kept."""
        self.merge()
        self._kept.clear()
        del self.model.tied_adapter

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the kept weights bit for bit (subtracting the update would restore only most entries)."""
        if not self.merged:
            return
        for path, kept in self._kept.items():
            self.model.get_submodule(path).weight.copy_(kept)  # type: ignore[operator]
        self._kept.clear()
        self.hook()


def attach(
    model: nn.Module,
    tying: Tying | str,
    rank: int = 8,
    alpha: float | None = None,
    seed: int = 0,
    layout: Layout | None = None,
) -> Attached:
    """Put a fresh adapter on `model`, freezing the base. The update is exactly zero until it is trained.

    Args:
        model: a causal language model of transformers, of a family in architectures.FAMILIES.
        tying: a specification, or the name of one of the paper's: "LoRA", "TABuv", ...
        alpha: None means `rank`, so the scale is 1.
        seed: draws the random parts.
        layout: where the model keeps its projections, for a family that is not known.

    Raises:
        UserError: unknown family or target, a specification that cannot train, or an adapter already there.
    """
    tying = named(tying) if isinstance(tying, str) else tying
    _refuse_sharded(model)
    architecture = architectures.read(model, layout)
    return attach_adapter(model, TiedAdapter(tying, rank, rank if alpha is None else alpha, architecture, seed))


def attach_adapter(model: nn.Module, adapter: TiedAdapter) -> Attached:
    """Put an existing adapter (a loaded one) on `model`, freezing the base.

    Raises:
        UserError: the adapter was made for another architecture, or the model has an adapter.
    """
    if hasattr(model, "tied_adapter"):
        raise UserError("attach: the model has an adapter already; detach it first")
    _refuse_sharded(model)
    architecture = architectures.read(model, adapter.architecture.layout)
    _same_architecture(adapter.architecture, architecture)
    architectures.check(model, architecture, adapter.tying.targets)
    sites = [
        (adapter.targets[target], layer, site)
        for target in adapter.tying.targets
        for layer in range(architecture.layers)
        for site in architectures.sites(architecture, target, layer)
    ]
    model.requires_grad_(False)
    adapter.to(next(model.parameters()).device)
    model.add_module("tied_adapter", adapter)
    attached = Attached(model, adapter, sites)  # type: ignore[arg-type]
    attached.hook()
    return attached


def _same_architecture(expected: Architecture, found: Architecture) -> None:
    for name in ("family", "layers", "hidden", "heads", "kv_heads", "head_dim"):
        if getattr(expected, name) != getattr(found, name):
            raise UserError(
                f"attach: the adapter is for a model with {name}={getattr(expected, name)}, "
                f"this model has {name}={getattr(found, name)}"
            )


def _refuse_sharded(model: nn.Module) -> None:
    """A tied factor belongs to every layer, and FSDP gives each layer's parameters to one shard."""
    sharded = any(type(parameter).__name__ in ("DTensor", "FlatParameter") for parameter in model.parameters())
    if sharded or type(model).__name__ == "FullyShardedDataParallel":
        raise UserError(
            "attach: the model is sharded (FSDP or tensor parallel), which tied factors do not support; "
            "load it whole on each device and start the run with torchrun (data parallel)"
        )
