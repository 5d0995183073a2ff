"""Attach an adapter to a base model, detach it, merge it into the weights, restore the weights, and switch adapters.

The base model keeps its modules, their names and their weights. An adapted module gets a subclass of its own class,
whose forward adds the update. Detaching gives the module its own class again, so the base model is as it was before.

A hook on the module that owns the list of layers folds the factors of all layers before each pass. The adapted modules
themselves have no hooks. Each hook would be a separate object, so torch.compile would compile every layer separately.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from tiedlora.adapter import architectures, arms, files, linear
from tiedlora.adapter.arms import Arm, ArmSpec
from tiedlora.adapter.full_arm import FullArm
from tiedlora.adapter.parts import ParameterGroup, TiedAdapter
from tiedlora.description import BaseModelRecord
from tiedlora.errors import UserError
from tiedlora.families import layout_of
from tiedlora.keys import from_person
from tiedlora.other_methods import FULL, REGISTERED
from tiedlora.tying import FACTORS, Layout, LrFactors, Tying, named, part_of

log = logging.getLogger(__name__)


class Adapted(nn.Module):
    """Added to the class of an adapted module: its output becomes W_l x + s B_l A_l x.

    Where q, k and v are separate modules, each draws its own dropout mask, as in PEFT's LoRA.
    """

    folded_A: Tensor
    """s diag(u_l) A, (r, d_in), in the weight's dtype, for the present forward pass."""
    folded_B: Tensor
    """diag(v_l) B, (d_out, r), in the weight's dtype, for the present forward pass."""
    adapter_dropout: float

    def forward(self, x: Tensor) -> Tensor:
        """The module's output plus the update, for inputs of any leading shape."""
        plain: Tensor = super().forward(x)
        dropped = F.dropout(x, self.adapter_dropout, self.training) if self.adapter_dropout else x
        return plain + F.linear(F.linear(dropped, self.folded_A), self.folded_B)

    def __getstate__(self) -> dict[str, Any]:
        # torch refuses to copy a tensor that is part of a graph. A copy of the model folds its own factors.
        return {key: value for key, value in self.__dict__.items() if key not in ("folded_A", "folded_B")}

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle looks a class up by its name, and that of an adapted module is made while the program runs.
        return _new_adapted, (type(self).__bases__[1],), self.__getstate__()


@cache
def adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module class that adds the update. There is one per class, so layers share compiled code."""
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {})


def _new_adapted(kind: type[nn.Module]) -> nn.Module:
    """An adapted module without its state, for copies and pickle."""
    adapted = adapted_class(kind)  # type: ignore[arg-type]
    return adapted.__new__(adapted)


@dataclass
class Attached(Arm):
    """An adapter on a model. `merge` moves the update into the weights, `unmerge` restores them, `detach` removes it.

    The adapter is also a submodule of the model, `tied_adapter`, so that `.to()`, `.parameters()` and `.train()`
    reach its parts.
    """

    model: nn.Module
    adapter: TiedAdapter
    _fold_hook: RemovableHandle | None = None
    """Before each pass through the layers, it gives every adapted module its folded factors."""
    _modules: dict[str, nn.Module] = field(default_factory=dict)
    """While the hook is there: module path -> the adapted module."""
    _fold_once: bool = False
    _is_folded: bool = False
    """In `folded_once`: whether the factors are folded already."""
    _had_gradients: bool = False
    """Whether there was a pass with gradients. Its backward pass may come at any time, and compute blocks again."""
    _base_weights: dict[str, Tensor] = field(default_factory=dict)
    """While the update is merged: module path -> the weight without the update."""

    @override
    def __repr__(self) -> str:
        parameters = sum(part.numel() for part in self.trained_parts().values())
        state = "merged" if self.merged else "active" if self.active else "disabled"
        name, rank, model = self.adapter.tying.name, self.adapter.rank, type(self.model).__name__
        return f"<{name} r={rank} on {model}: {parameters:,} trained parameters, {state}>"

    @property
    def active(self) -> bool:
        """Whether the adapted modules add the update in a forward pass. False while the update is merged."""
        return self._fold_hook is not None

    @property
    def merged(self) -> bool:
        """Whether the weights contain the update now. Then they can be restored."""
        return bool(self._base_weights)

    def enable(self) -> None:
        """Make every adapted module add its update. If it does already, or the weights contain it, nothing changes.

        Raises:
            UserError: the adapter has left the model.
        """
        self._must_be_here("enable")
        if self.active or self.merged:
            return
        self._modules = {path: self.model.get_submodule(path) for path in self.adapter.paths()}
        for path, module in self._modules.items():
            module.__class__ = adapted_class(type(module))  # type: ignore[arg-type]
            linear.use_class_forward(module, path)
            module.adapter_dropout = self.adapter.tying.dropout  # type: ignore[assignment]
        # Every call of the model, with or without its head, goes through the module that owns the layers.
        owner_path = layout_of(self.adapter.architecture).layers.rpartition(".")[0]
        owner: nn.Module = self.model.get_submodule(owner_path)
        self._fold_hook, self._is_folded = owner.register_forward_pre_hook(self._before_pass), False
        if self._had_gradients:
            self._fold()

    def _before_pass(self, called: nn.Module, *_: Any) -> None:
        """Refuse a pass whose gradients would be wrong, and fold the factors for it."""
        if getattr(called, "_is_replica", False):
            raise UserError(
                "nn.DataParallel copies the model without the adapter's factors, so it cannot train one; show the "
                "program one GPU (CUDA_VISIBLE_DEVICES=0), or start a process for each GPU with torchrun"
            )
        if torch.is_grad_enabled():
            self._had_gradients = True
            self._refuse_narrow_parts()
            self._refuse_reentrant_checkpoints()
        if not (self._fold_once and self._is_folded):
            self._fold()

    def _fold(self) -> None:
        """Give every adapted module its factors. This is where a layer gets its (A_l, B_l).

        After a pass with gradients they carry gradients, also for passes without. A gradient checkpoint computes its
        block again in the backward pass, and must find what the forward pass found, whatever passes were in between.
        """
        self._is_folded = True
        # The dtype of an adapted module's input and output. A quantised weight has another one.
        first = next(iter(self._modules.values()))
        weights = self.model.parameters() if linear.is_quantised(first) else first.parameters()
        dtype = next(weight.dtype for weight in weights if weight.is_floating_point())
        with torch.inference_mode(False), torch.set_grad_enabled(self._had_gradients):
            for path, (A_l, B_l) in self.adapter.pairs(self.adapter.scale, dtype).items():
                module = self._modules[path]
                device = linear.execution_device(module)
                if A_l.is_meta and device.type != "meta":
                    raise UserError(
                        "the adapter's parts were offloaded to the meta device (accelerate's cpu_offload or "
                        "disk_offload), so they are lost; offload the model first, then attach the adapter"
                    )
                module.folded_A, module.folded_B = A_l.to(device), B_l.to(device)

    def _refuse_narrow_parts(self) -> None:
        """Refuse to train parts that another program has cast. `TiedAdapter` itself keeps float32 when a model is cast.

        TRL's trainers set `parameter.data` of a model in 4 or 8 bits. Near u = 1, bfloat16 has steps of 1/128.
        """
        for name, part in self.adapter.trained_parts().items():
            if part.dtype.itemsize < 4:
                raise UserError(
                    f"{name}: is {part.dtype}, which would round its steps away; after the trainer is made, call "
                    "trainer.model.base_model.attached.adapter.float() (without PEFT: attached.adapter.float())"
                )

    def _refuse_reentrant_checkpoints(self) -> None:
        """Refuse them where a vector scales the factors: the scaled factors of all layers come from one product.

        Each reentrant checkpoint runs a backward pass of its own, and the first of these passes frees that product.
        """
        layer: Any = self.model.get_submodule(layout_of(self.adapter.architecture).layers)[0]  # type: ignore[index]
        if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
            return
        # True is the default of torch.
        keywords = getattr(layer._gradient_checkpointing_func, "keywords", {"use_reentrant": False})
        sharing = sorted({part_of(name) for name in self.adapter.parts()} - set(FACTORS))
        sharing += ["tying.terms"] if self.adapter.tying.terms else []
        if keywords.get("use_reentrant", True) and sharing:
            raise UserError(
                "gradient checkpointing with use_reentrant=True does not work for an adapter with "
                f"{' or '.join(sharing)}, because the layers share one product; "
                'set activation_checkpointing_kwargs={"use_reentrant": False}'
            )

    def disable(self) -> None:
        """Make the model give the base model's outputs. Merged weights are restored."""
        self.unmerge()
        self._stop_adding()

    def _stop_adding(self) -> None:
        if self._fold_hook is not None:
            self._fold_hook.remove()
            self._fold_hook = None
        for path, module in self._modules.items():
            module.__class__ = type(module).__bases__[1]
            linear.use_class_forward(module, path)
            for name in ("folded_A", "folded_B", "adapter_dropout"):
                module.__dict__.pop(name, None)
        self._modules = {}

    compiles = True

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`target.part` -> its parameter, trained or frozen."""
        return self.adapter.parts()

    @override
    def parameter_groups(self, lr_factors: LrFactors) -> list[ParameterGroup]:
        return self.adapter.parameter_groups(lr_factors)

    @override
    def tensors(self) -> dict[str, Tensor]:
        return dict(files.stored_parts(self.adapter))

    def save(self, folder: Path | str, base: BaseModelRecord | None = None) -> int:
        """Write the adapter's folder, with each part once; see `files.save`.

        Args:
            base: which base model this is; None takes the name that transformers gives it.

        Returns:
            The size of the folder in bytes.
        """
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        return files.save(self.adapter, Path(folder), base or BaseModelRecord(name, None, None))

    save_pretrained = save

    def load_values(self, folder: Path | str) -> None:
        """Take the values of another adapter of the same specification from its folder.

        Raises:
            UserError: the folder holds no adapter, a damaged one, or one of another specification.
        """
        saved, own = files.load(Path(folder))[0].parts(), self.adapter.parts()
        if _shapes(saved) != _shapes(own):
            raise UserError(f"{folder}: its parts have other names or shapes than those of this adapter")
        for name, parameter in own.items():
            parameter.data.copy_(saved[name])

    @contextmanager
    def folded_once(self) -> Iterator[None]:
        """Inside the block, the factors are folded only before the first pass. The adapter must not change there."""
        self._fold_once, self._is_folded = True, False
        try:
            yield
        finally:
            self._fold_once = False

    def detach(self) -> None:
        """Remove the adapter, if it is there. The base weights are then bit for bit as before, and stay frozen."""
        self.disable()
        if getattr(self.model, "tied_adapter", None) is self.adapter:
            del self.model.tied_adapter

    def _must_be_here(self, action: str) -> None:
        if getattr(self.model, "tied_adapter", None) is not self.adapter:
            raise UserError(f"{action}: the adapter is not in the model any more; attach it to a fresh base model")

    def cannot_merge(self) -> str | None:
        """Why the update cannot be added to the weights, in words; None if it can."""
        reasons = (linear.cannot_merge(self.model.get_submodule(path), path) for path in self.adapter.paths())
        return next((reason for reason in reasons if reason), None)

    @torch.no_grad()
    def merge(self) -> None:
        """Add every update to its weight, in the weight's dtype.

        bfloat16 rounds small updates away (the argmax then differs at 1-1.5 % of positions), so scoring merges only
        in float32. A copy of each weight is kept for `unmerge`. If memory runs out halfway, nothing is merged.

        Raises:
            UserError: a weight is quantised or offloaded, or the adapter has left the model.
        """
        self._must_be_here("merge")
        if self.merged:
            return
        if reason := self.cannot_merge():
            raise UserError(f"merge: {reason}")
        try:
            for path, (A_l, B_l) in self.adapter.pairs(self.adapter.scale).items():
                module = self.model.get_submodule(path)
                weight: Tensor = module.weight  # type: ignore[assignment]
                self._base_weights[path] = weight.detach().clone()
                update = B_l @ A_l
                weight += (update.T if isinstance(module, Conv1D) else update).to(weight)
        except BaseException:
            # The modules go on adding the update, so no weight may have it too.
            self._restore_weights()
            raise
        self._stop_adding()

    def fuse(self) -> None:
        """Merge permanently: the update stays in the weights, no copy is kept, and the adapter leaves the model.

        Until all weights have it there is a copy of each, so that a failure can be undone exactly.

        Raises:
            UserError: as `merge`.
        """
        self.merge()
        self._base_weights.clear()
        del self.model.tied_adapter

    def unmerge(self) -> None:
        """Restore the weights bit for bit, from the copies. (Subtracting the update would not restore every number.)"""
        if self.merged:
            self._restore_weights()
            self.enable()

    @torch.no_grad()
    def _restore_weights(self) -> None:
        for path, weight in self._base_weights.items():
            self.model.get_submodule(path).weight.copy_(weight)  # type: ignore[operator]
        self._base_weights.clear()


def _shapes(parts: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The name of each part -> its shape."""
    return {name: tuple(part.shape) for name, part in parts.items()}


def attach(
    model: nn.Module,
    tying: Tying | str | Mapping[str, Any],
    rank: int = 8,
    alpha: float | None = None,
    *,
    seed: int = 0,
    layout: Layout | Mapping[str, Any] | None = None,
    scaling: str = "standard",
) -> Attached:
    """Attach a new adapter to `model` and freeze the base. The update is exactly zero until the adapter is trained.

    Args:
        model: a causal language model of transformers, of a family in families.FAMILIES.
        tying: a specification, its fields, or a name that tying.named knows ("LoRA", "TABuv", "LoRA_l15", ...).
        alpha: gives the update's scale (see `scaling`); None means `rank`.
        seed: the seed of the random parts.
        layout: where the model keeps its projections, or the fields of this, for a family that is not in
            families.FAMILIES.
        scaling: standard (the scale is alpha / rank) or rslora (alpha / sqrt(rank)).

    Raises:
        UserError: the model is no causal language model, the family or a target is unknown, the specification cannot
            train, or the model is sharded or has an adapter already.
    """
    if isinstance(tying, str):
        tying = named(tying)
    elif isinstance(tying, Mapping):
        tying = from_person(Tying, tying, prefix="tying.")
    if isinstance(layout, Mapping):
        layout = from_person(Layout, layout, prefix="layout.")
    alpha = rank if alpha is None else alpha
    architecture = architectures.read(model, layout)
    return attach_adapter(model, TiedAdapter(tying, rank, alpha, architecture, seed=seed, scaling=scaling))


def attach_adapter(model: nn.Module, adapter: TiedAdapter, sharded: bool = False) -> Attached:
    """Attach an existing adapter to `model` and freeze the base.

    Args:
        sharded: whether the model may be sharded. The caller then sums the adapter's gradients over the processes.

    Raises:
        UserError: the adapter was made for another architecture, the model is sharded, or it has an adapter already.
    """
    if hasattr(model, "tied_adapter"):
        raise UserError("attach: the model has an adapter already; detach it first")
    expected, actual = adapter.architecture, architectures.read(model, adapter.architecture.layout)
    # FSDP and tensor parallelism split parameters, but a tied factor serves every layer.
    kinds = {type(each).__name__ for each in (model, *model.parameters())}
    if not sharded and kinds & {"DTensor", "FlatParameter", "FullyShardedDataParallel"}:
        raise UserError(
            "attach: the model is sharded (FSDP or tensor parallel), which tied factors do not support; "
            "load it whole on each device, or start train.py with torchrun and train.shard=true"
        )
    if other := files.other_architecture(expected, actual):
        raise UserError(f"attach: {other}")
    architectures.check(model, adapter.architecture, adapter.tying)
    linear.keep_gradients(model)
    modules = {path: model.get_submodule(path) for path in adapter.paths()}
    for path, module in modules.items():
        linear.use_class_forward(module, path)
    model.requires_grad_(False)
    adapter.to(linear.execution_device(next(iter(modules.values()))))
    model.add_module("tied_adapter", adapter)
    attached = Attached(model, adapter)
    attached.enable()
    return attached


def attach_saved(model: nn.Module, folder: Path, base: BaseModelRecord | None = None) -> Arm:
    """Put the saved arm of any kind on `model`.

    Args:
        base: what is known of `model`. It is compared with the base model that the arm was trained on, if that is known
            too: `Attached.save` knows no digest. Then only the architecture is compared.

    Raises:
        UserError: a file is damaged, or the arm was made for another architecture or base model.
    """
    saved, trained_on = arms.read(folder)
    if base is not None and base != trained_on and trained_on.digest is None:
        log.warning(files.UNKNOWN_BASE, folder, trained_on.name)
    elif base not in (None, trained_on):
        raise UserError(f"{folder}: was trained on {trained_on}, the base model here is {base}")
    if isinstance(saved, TiedAdapter):
        return attach_adapter(model, saved)
    arm = new_arm(model, saved)
    try:
        arm.load_values(folder)
    except BaseException:
        arm.detach()
        raise
    return arm


def new_arm(model: nn.Module, spec: ArmSpec) -> Arm:
    """A new arm of another method on `model`. The base is frozen.

    Raises:
        UserError: the method is unknown, or cannot adapt this model.
    """
    method = spec.tying.method
    assert method is not None
    if method == FULL:
        return FullArm(model, spec)
    if method in REGISTERED:
        arm: Arm = REGISTERED[method](model, spec)
        return arm
    # PEFT is an extra, and slow to load.
    from tiedlora.adapter.peft_arm import PeftArm  # noqa: PLC0415

    return PeftArm(model, spec)


class AdapterSet:
    """Named adapters that take turns on one base model.

        adapters = AdapterSet(model)
        adapters.add("sums", adapter)
        adapters.use("sums")
        adapters.use(None)      # the base model itself

    A switch changes the classes of the adapted modules and copies no weights, so it takes about a millisecond.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        """The name of the active adapter; None if the model is the base."""
        self._adapters: dict[str, TiedAdapter] = {}
        self._attached: Attached | None = None

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order in which they were added."""
        return list(self._adapters)

    def add(self, name: str, adapter: TiedAdapter) -> None:
        """Keep an adapter under a name. `use` makes it active.

        Raises:
            UserError: another adapter has the name, or it is none of this project.
        """
        if not isinstance(adapter, TiedAdapter):
            raise UserError(f"adapters: '{name}' is of {type(adapter).__name__}; give a TiedAdapter (attached.adapter)")
        if name in self._adapters:
            raise UserError(f"adapters: '{name}' is taken; remove it first, or choose another name")
        self._adapters[name] = adapter

    def use(self, name: str | None) -> Attached | None:
        """Make one adapter active, or none (then the model is the base, bit for bit).

        Returns:
            The adapter on the model; None without a name.

        Raises:
            UserError: there is no such name, or the adapter is for another architecture (the model is then the base).
        """
        adapter = None if name is None else self._named(name)
        if self._attached is not None:
            self._attached.detach()
        self._attached, self.active = None, None
        if adapter is not None:
            self._attached, self.active = attach_adapter(self.model, adapter), name
        return self._attached

    def remove(self, name: str) -> None:
        """Forget an adapter. If it is active, the model is the base again.

        Raises:
            UserError: there is no such name.
        """
        self._named(name)
        if name == self.active:
            self.use(None)
        del self._adapters[name]

    def _named(self, name: str) -> TiedAdapter:
        if name not in self._adapters:
            raise UserError(f"adapters: there is no '{name}'; there are {', '.join(self._adapters) or 'none'}")
        return self._adapters[name]
