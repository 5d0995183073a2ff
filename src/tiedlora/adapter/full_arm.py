"""Full fine-tuning as an arm: all weights of the base model are trained."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tiedlora.adapter.arms import Arm, ArmSpec, groups_by_pattern
from tiedlora.adapter.parts import ParameterGroup, seed_of
from tiedlora.errors import UserError
from tiedlora.tying import LrFactors

NORMS_AND_BIASES = "norm|ln_|bias"
"""What conf/tying/full.yaml excludes from weight decay."""


class FullArm(Arm):
    """The base model's weights, which the optimizer changes in float32.

    While the arm is enabled, the model's parameters hold the trained values: in a float32 model the very tensors of the
    optimizer, in a bfloat16 model their rounded copies, made before each pass. A gradient goes to its float32 weight as
    soon as it is complete. The base's own tensors are kept apart, so `disable` copies nothing.

    Raises:
        UserError: a weight is quantised or offloaded.
    """

    def __init__(self, model: nn.Module, spec: ArmSpec) -> None:
        super().__init__(model, spec)
        self._own = dict(model.named_parameters())
        if wrong := next((name for name, own in self._own.items() if not own.is_floating_point() or own.is_meta), None):
            raise UserError(f"tying.method=full: {wrong} is quantised or offloaded; load the model whole, unquantised")
        self._base = {name: own.data for name, own in self._own.items()}
        self._masters = {name: nn.Parameter(_start(base, f"{spec.seed}/{name}")) for name, base in self._base.items()}
        self._rounded = {name: self._masters[name].data.to(base.dtype) for name, base in self._base.items()}
        self._hooks: list[RemovableHandle] = []
        self._round_once = False
        self.enable()

    @override
    def parameter_groups(self, lr_factors: LrFactors) -> list[ParameterGroup]:
        tying, names = self.spec.tying, self.named_parameters()
        # The option's own pattern is for all models. OLMo's norms have no weights.
        has_none = not any(re.search(NORMS_AND_BIASES, name) for name in names)
        no_decay = [each for each in tying.no_decay or () if not (has_none and each == NORMS_AND_BIASES)]
        return groups_by_pattern(names, tying.lr_factors, no_decay)

    @override
    def named_parameters(self) -> dict[str, nn.Parameter]:
        return self._masters

    @override
    def enable(self) -> None:
        if self._hooks:
            return
        own: Any
        for name, own in self._own.items():
            # The model may have moved to another device.
            own.data = self._rounded[name].to(own.device)
            to_master = functools.partial(_move_gradient, self._masters[name])
            self._hooks.append(own.requires_grad_(True).register_post_accumulate_grad_hook(to_master))
        body: Any = self.model.base_model
        self._hooks.append(body.register_forward_pre_hook(self._round))

    @torch.no_grad()
    def _round(self, *_: Any) -> None:
        """Give the model the present values, unless it has the optimizer's own tensors, or is the base."""
        for name, own in self._own.items() if self._hooks and not self._round_once else ():
            if own.data_ptr() != self._masters[name].data_ptr():
                own.data.copy_(self._masters[name])

    @override
    @contextmanager
    def folded_once(self) -> Iterator[None]:
        self._round()
        self._round_once = True
        try:
            yield
        finally:
            self._round_once = False

    @override
    def disable(self) -> None:
        self.fuse()
        for name, own in self._own.items():
            own.data = self._base[name].to(own.device)

    detach = disable

    @override
    def fuse(self) -> None:
        self._round()
        while self._hooks:
            self._hooks.pop().remove()
        self.model.requires_grad_(False)


def _start(base: Tensor, name: str) -> Tensor:
    """Float32 values that are the base's when they are rounded, drawn evenly from those by the name.

    If they began as bfloat16 numbers, rounding would hide every update until their sum is half a step of bfloat16.
    """
    values = base.to(torch.float32, copy=True)
    if base.dtype == torch.float32:
        return values
    step = torch.ldexp(torch.full_like(values, torch.finfo(base.dtype).eps / 2), torch.frexp(values).exponent)
    shares = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed_of(name))) - 0.5
    drawn = values + step * shares.to(values.device)
    return torch.where(drawn.to(base.dtype) == base, drawn, values)


def _move_gradient(master: nn.Parameter, own: Any) -> None:
    """Add the gradient of a weight of the model to that of its float32 weight."""
    gradient, own.grad = own.grad, None
    gradient = gradient.to(master)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
