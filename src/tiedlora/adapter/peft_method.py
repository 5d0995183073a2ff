"""Tied-LoRA as a method of PEFT: `get_peft_model(model, TiedLoraConfig(...))`. Needs the extra `peft`.

PEFT's calls go to the same `Attached` that this project uses everywhere, so the method has one implementation. The
import of this module registers the method with PEFT, also for `PeftModel.from_pretrained`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from typing_extensions import override

from tiedlora.adapter.attach import Attached, attach
from tiedlora.adapter.linear import execution_device
from tiedlora.errors import UserError
from tiedlora.keys import from_person
from tiedlora.tying import Layout, Tying, named

try:
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.integrations import skip_init_on_device
except ImportError:
    raise UserError("TiedLoraConfig: needs PEFT; run: pip install 'tiedlora[peft]'") from None
if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
    raise UserError("TiedLoraConfig: needs PEFT 0.21 or newer; run: pip install 'peft>=0.21'")

PEFT_TYPE = "TIED_LORA"
REGISTERED_AS = "tied_adapter"
"""The name of the base model's child that holds the parts. The keys of the parts in a file begin with it."""


@dataclass
class TiedLoraConfig(PeftConfig):
    """A Tied-LoRA adapter for PEFT.

    Raises:
        UserError: `tying` is neither a name nor a specification, or `task_type` is another one than CAUSAL_LM.
    """

    r: int = 8
    alpha: Optional[float] = None
    """It gives the scale s; None means alpha = r, so s = 1 with the standard scaling."""
    tying: Union[str, dict[str, Any], Tying] = "TABuv"
    """A name such as "TABuv", or a `tiedlora.Tying`. The latter is kept as plain data, so that it fits JSON."""
    targets: Optional[list[str]] = None
    """The adapted projections; None takes those of the specification (by default the fused QKV)."""
    dropout: Optional[float] = None
    """Dropout probability on the adapter's input while training; None takes that of the specification."""
    seed: int = 0
    """The seed of the random parts."""
    layout: Optional[dict[str, Any]] = None
    """Where the model keeps its projections, for an unknown family: the fields of `tiedlora.Layout`."""
    scaling: str = "standard"
    """standard: s = alpha / r; rslora: s = alpha / sqrt(r)."""
    layers: Optional[list[Union[int, str]]] = None
    """The adapted layers, such as [0, 5, "20-29"]; None takes those of the specification (by default all)."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PEFT_TYPE
        if self.task_type not in (None, "CAUSAL_LM"):
            # PEFT would train and save a head of the task beside the adapter. The method trains its parts alone.
            raise UserError(
                f"TiedLoraConfig.task_type={getattr(self.task_type, 'value', self.task_type)}: only a causal language "
                'model is adapted; set task_type="CAUSAL_LM"'
            )
        if isinstance(self.tying, Tying):
            self.tying = asdict(self.tying)
        if isinstance(self.layout, Layout):
            self.layout = asdict(self.layout)
        self.specification()

    def specification(self) -> Tying:
        """The complete specification, with the values of `targets`, `dropout` and `layers`.

        Raises:
            UserError: `tying` is neither a name nor a specification, or a value is wrong.
        """
        prefix = "TiedLoraConfig.tying."
        tying = named(self.tying) if isinstance(self.tying, str) else from_person(Tying, self.tying, prefix=prefix)
        given = {name: getattr(self, name) for name in ("targets", "dropout", "layers")}
        set_here = {name: value for name, value in given.items() if value is not None}
        return from_person(Tying, {**asdict(tying), **set_here}, prefix=prefix)


class _AdapterStatus(nn.Module, BaseTunerLayer):
    """Answers the questions that PEFT asks its layers: are they disabled, are they merged? This method has no layers of
    PEFT's kind, so one object answers for the whole adapter.
    """

    def __init__(self, tuner: TiedLoraModel) -> None:
        super().__init__()
        # In a list, so that torch does not register it as a submodule: the tuner contains this object.
        self.tuner = [tuner]

    @property
    def disable_adapters(self) -> bool:
        (tuner,) = self.tuner
        return not tuner.attached.active and not tuner.attached.merged

    @property
    def active_adapters(self) -> list[str]:
        return list(self.tuner[0].active_adapters)

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        return self.active_adapters if self.tuner[0].attached.merged else []

    @override
    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the parts to the device of the adapted modules. PEFT asks for it after it has assigned saved values."""
        attached = self.tuner[0].attached
        adapted = attached.model.get_submodule(attached.adapter.paths()[0])
        attached.adapter.to(device or execution_device(adapted), torch.float32)

    @override
    def _get_available_adapters(self) -> set[str]:
        return set(self.tuner[0].peft_config)


class TiedLoraModel(BaseTuner):
    """Passes PEFT's calls to an `Attached`. A model has only one; `tiedlora.AdapterSet` switches between several."""

    prefix = REGISTERED_AS
    uses_shared_state = True
    attached: Attached

    @override
    @skip_init_on_device
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach a new adapter. PEFT loads saved values into it afterwards.

        The parts have values from the start, also with `low_cpu_mem_usage=True`: they are small, and the adapter moves
        them to the base's device at once, which tensors without values cannot do.

        Raises:
            UserError: the model has a tied adapter already, or as `attach`.
        """
        if len(self.peft_config) > 1:
            self.peft_config.pop(adapter_name)
            raise UserError(
                "TiedLoraConfig: the model has a tied adapter already, and PEFT's method takes one; "
                "unload it first, or switch between several with tiedlora.AdapterSet"
            )
        config = self.peft_config[adapter_name]
        assert isinstance(config, TiedLoraConfig)
        layout = None if config.layout is None else from_person(Layout, config.layout, prefix="TiedLoraConfig.layout.")
        self.attached = attach(
            model,
            config.specification(),
            config.r,
            config.alpha,
            seed=config.seed,
            layout=layout,
            scaling=config.scaling,
        )
        self.status = _AdapterStatus(self)
        if config.inference_mode:
            self.attached.adapter.requires_grad_(False)

    @override
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Train the parts that the specification trains; with `inference_mode`, train none."""
        self.active_adapter = adapter_name
        for name, parameter in self.attached.adapter.parts().items():
            part = self.attached.adapter.specification(name)
            parameter.requires_grad_(part.trained and not inference_mode)

    @override
    def enable_adapter_layers(self) -> None:
        self.attached.enable()

    @override
    def disable_adapter_layers(self) -> None:
        self.attached.disable()

    @override
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the update to the weights. `unmerge_adapter` restores them from a copy.

        Raises:
            UserError: `adapter_names` are others than the adapter's, or as `Attached.merge`.
            ValueError: with `safe_merge`, a merged weight is no number. The weights are then as before.
        """
        if adapter_names not in (None, [*self.peft_config]):
            raise UserError(f"adapter_names={adapter_names}: the model has one adapter, {[*self.peft_config]}; name it")
        self.attached.merge()
        modules = map(self.attached.model.get_submodule, self.attached.adapter.paths())
        if safe_merge and not all(torch.isfinite(module.weight).all() for module in modules):  # type: ignore[arg-type]
            self.attached.unmerge()
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {[*self.peft_config]} seems to be broken"
            )

    @override
    def unmerge_adapter(self) -> None:
        self.attached.unmerge()

    @override
    def delete_adapter(self, adapter_name: str) -> None:
        self.attached.detach()
        self.peft_config.pop(adapter_name)
        self.active_adapter = []

    @override
    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
            self.attached.fuse()
        else:
            self.attached.detach()
        del self.model.peft_config
        model: nn.Module = self.model
        return model

    @override
    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, *, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Every part once, under its own name. (A shared part does not appear once for each layer.)"""
        return {key: value for key, value in state_dict.items() if f"{REGISTERED_AS}." in key}

    @override
    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @override
    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a tied adapter replaces no modules")


# PEFT's own function to register a method accepts only members of PEFT's enumeration.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = TiedLoraConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = TiedLoraModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = REGISTERED_AS  # type: ignore[index]
