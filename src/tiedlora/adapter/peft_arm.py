"""A method of PEFT as an arm. Needs the extra `peft`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tiedlora.adapter.arms import Arm, ArmSpec
from tiedlora.description import BaseModelRecord
from tiedlora.errors import UserError
from tiedlora.other_methods import PEFT_FILE, peft_classes, peft_config

peft_classes()  # It says how to install PEFT, and keeps bitsandbytes quiet.
from peft import (  # noqa: E402  (only after that)
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402  (only after that)

NAME = "default"
"""PEFT's name for the one adapter of a model. The names of its parameters contain it."""


class PeftArm(Arm):
    """A method of PEFT on a base model.

    Its initial values and frozen random parts are drawn from the run's seed. The state of torch's global generator is
    the same before and after.

    Raises:
        UserError: PEFT refuses the method for this model.
    """

    tensors_file = "adapter_model.safetensors"

    def __init__(self, model: nn.Module, spec: ArmSpec) -> None:
        super().__init__(model, spec)
        config = peft_config(spec.tying, spec.architecture, spec.seed)
        model.requires_grad_(False)
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._attributes = set(vars(model))
        ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        # The present values of each parameter (no copy: they share their memory) and their sum.
        base = [(parameter, parameter.detach(), _sum(parameter)) for parameter in model.parameters()]
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(spec.seed)
            try:
                self.peft: Any = get_peft_model(model, config)
            except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
                # Put back the modules that PEFT has replaced.
                for path, module in list(model.named_modules()):
                    if isinstance(module, BaseTunerLayer):
                        parent, _, name = path.rpartition(".")
                        setattr(model.get_submodule(parent), name, module.get_base_layer())
                raise UserError(
                    f"tying.method={spec.tying.method}: PEFT refuses it: {' '.join(str(error).split()):.300}"
                ) from None
        # PEFT's new modules are in training mode, whatever the model's is. Some draw random numbers in it.
        model.train(model.training)
        if ends != (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
            self._refuse("it adapts the embedding or the head, which the losses read without an adapter")
        if _put_back(base):
            self._refuse("it changes weights of the base")
        self._is_trained = {name: parameter.requires_grad for name, parameter in self.named_parameters().items()}
        if any(parameter.requires_grad for parameter in model.parameters() if id(parameter) in self._own):
            self._refuse("it trains weights of the base itself")
        if not self.trained_parts():
            self._refuse("nothing is trained")
        self._at_start = {name: (id(tensor), tensor._version) for name, tensor in self.buffers().items()}

    def _refuse(self, reason: str) -> None:
        self.detach()
        raise UserError(f"tying.method={self.spec.tying.method}: {reason}; take other arguments, or another method")

    @override
    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {_short(name): value for name, value in self.peft.named_parameters() if id(value) not in self._own}

    @override
    def buffers(self) -> dict[str, Tensor]:
        return {_short(name): value for name, value in self.peft.named_buffers() if id(value) not in self._own}

    @override
    def changed_buffers(self) -> dict[str, Tensor]:
        at_start = self._at_start
        return {name: each for name, each in self.buffers().items() if at_start.get(name) != (id(each), each._version)}

    @override
    def tensors(self) -> dict[str, Tensor]:
        with _quiet():
            return dict(get_peft_model_state_dict(self.peft, save_embedding_layers=False))

    @override
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        with _quiet():
            set_peft_model_state_dict(self.peft, dict(tensors))

    @override
    def enable(self) -> None:
        self.peft.base_model.enable_adapter_layers()
        # PEFT lets every parameter of the adapter be trained again, also those that its method freezes.
        for name, parameter in self.named_parameters().items():
            parameter.requires_grad_(self._is_trained[name])

    @override
    def disable(self) -> None:
        self.peft.base_model.disable_adapter_layers()

    @override
    def detach(self) -> None:
        with _quiet():
            self.peft.unload()
        for name in set(vars(self.model)) - self._attributes:
            delattr(self.model, name)
        self.model.requires_grad_(False)

    @override
    def files_beside(self, base: BaseModelRecord) -> dict[str, object]:
        values = self.peft.peft_config[NAME].to_dict().items()
        tree = {name: sorted(value) if isinstance(value, set) else value for name, value in values}
        about_base = {"base_model_name_or_path": base.name, "revision": base.version}
        return {PEFT_FILE: {**tree, **about_base, "inference_mode": True}}


def _sum(parameter: Tensor) -> float:
    # Apple's accelerator has no float64.
    dtype = torch.float32 if parameter.device.type == "mps" else torch.float64
    return 0.0 if parameter.is_meta else float(parameter.detach().sum(dtype=dtype))


def _put_back(base: list[tuple[nn.Parameter, Tensor, float]]) -> bool:
    """Whether PEFT has changed a weight. One whose data it has replaced gets them back.

    One that it has changed in place cannot be put back. Then the caller must load the base again.
    """
    changed = False
    for parameter, values, total in base:
        changed |= _sum(parameter) != total
        if parameter.data_ptr() != values.data_ptr():
            parameter.data = values
    return changed


def _short(name: str) -> str:
    """A parameter's name without PEFT's wrappers: `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return re.sub(rf"\.{NAME}(?=\.|$)", "", name.removeprefix("base_model.").removeprefix("model."))


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of choices that this project makes on purpose, once for each layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
