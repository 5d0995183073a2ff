"""Put an adapter on a base model, take it off, merge it into the weights, and take it out again.

The base model keeps its modules, their names and their weights: an adapted module is given a subclass of its own
class, whose forward adds the update, so detaching gives the class back and leaves the very model there was. All
layers' updates are folded together when the forward pass of the layers' owner begins. (Hooks would do the same, but
each would be an object of its own, and a compiler would compile every layer anew.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from tiedlora.adapter import architectures, files
from tiedlora.adapter.parts import TiedAdapter
from tiedlora.errors import UserError
from tiedlora.records.run_record import BaseModelRecord
from tiedlora.tying import Architecture, Layout, Tying, named


class Adapted(nn.Module):
    """What an adapted module becomes, beside what it is: its output plus s B_l A_l x.

    With separate q, k and v modules each draws its own dropout mask, as PEFT's LoRA does.
    """

    folded_A: Tensor
    """s A_l, (r, d_in), in the weight's dtype; it and folded_B belong to one forward pass."""
    folded_B: Tensor
    adapter_dropout: float

    def forward(self, x: Tensor) -> Tensor:
        plain: Tensor = super().forward(x)
        dropped = F.dropout(x, self.adapter_dropout, self.training) if self.adapter_dropout else x
        return plain + F.linear(F.linear(dropped, self.folded_A), self.folded_B)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model folds its own; torch refuses to copy a tensor that has a history.
        return {key: value for key, value in self.__dict__.items() if key not in ("folded_A", "folded_B")}


@cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """One subclass for each class of modules, so that all layers share compiled code."""
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {})


@dataclass
class Attached:
    """An adapter on a model. `detach` when done; `merge` and `unmerge` in between.

    The adapter is also registered on the model as `tied_adapter`, so that `.to()`, `.parameters()` and
    `.train()` reach its parts.
    """

    model: nn.Module
    adapter: TiedAdapter
    paths: list[str]
    """Of the adapted modules."""
    _folding: RemovableHandle | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether the adapted modules add their update as they compute (a merged one is in the weights instead)."""
        return self._folding is not None

    @property
    def merged(self) -> bool:
        """Whether the update is in the weights now."""
        return bool(self._kept)

    def enable(self) -> None:
        """Let every adapted module add its update: once, however often this is called."""
        if self.active:
            return
        modules: dict[str, Any] = {path: self.model.get_submodule(path) for path in self.paths}
        for module in modules.values():
            module.__class__ = _adapted(type(module))  # type: ignore[arg-type]
            module.adapter_dropout = self.adapter.tying.dropout
        # Whoever calls the model, with or without its head, comes through the owner of the layers.
        owner = architectures.layout_of(self.adapter.architecture).layers.rpartition(".")[0]
        body: nn.Module = self.model.get_submodule(owner)
        self._folding = body.register_forward_pre_hook(_Fold(self.adapter, modules))

    def disable(self) -> None:
        """Leave the base model's own outputs."""
        if self._folding is None:
            return
        self._folding.remove()
        self._folding = None
        for path in self.paths:
            module = self.model.get_submodule(path)
            module.__class__ = type(module).__bases__[1]
            for name in ("folded_A", "folded_B", "adapter_dropout"):
                module.__dict__.pop(name, None)

    def save_pretrained(self, folder: Path | str, base: BaseModelRecord | None = None) -> int:
        """Write the adapter's own small folder, each part once; see `files.save`.

        Args:
            base: what the base model is; None takes what transformers calls it.

        Returns:
            Bytes of the folder.
        """
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        return files.save(self.adapter, Path(folder), base or BaseModelRecord(name, None, None))

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
        self.disable()
        del self.model.tied_adapter

    @torch.no_grad()
    def merge(self) -> None:
        """Add every update to its weight, in the weight's dtype.

        In bfloat16 that rounds small updates away (the argmax then differs at 1-1.5 % of positions),
        so scoring merges in float32 alone. A copy of each weight is kept for `unmerge`.
        """
        if self.merged:
            return
        for path, (A_l, B_l) in self.adapter.pairs(self.adapter.scale).items():
            module = self.model.get_submodule(path)
            weight: Tensor = module.weight  # type: ignore[assignment]
            self._kept[path] = weight.detach().clone()
            update = B_l @ A_l
            weight += (update.T if isinstance(module, Conv1D) else update).to(weight.dtype)
        self.disable()

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
        self.enable()


class _Fold:
    """Before each forward pass through the layers: give every adapted module its folded factors."""

    def __init__(self, adapter: TiedAdapter, modules: dict[str, Any]) -> None:
        self.adapter, self.modules = adapter, modules

    def __call__(self, *_: Any) -> None:
        dtype = next(iter(self.modules.values())).weight.dtype
        for path, pair in self.adapter.pairs(self.adapter.scale, dtype).items():
            self.modules[path].folded_A, self.modules[path].folded_B = pair


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
    model.requires_grad_(False)
    adapter.to(next(model.parameters()).device)
    model.add_module("tied_adapter", adapter)
    attached = Attached(model, adapter, adapter.paths())
    attached.enable()
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
