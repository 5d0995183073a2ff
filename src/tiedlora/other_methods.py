"""Other methods than this project's own: what tying.method names, and its arguments with all their defaults.

A method is a configuration class of PEFT, or a kind that a program has registered. PEFT is imported inside functions,
because it loads torch: only a configuration with one of its methods waits for it.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from tiedlora.errors import UserError
from tiedlora.families import layout_of
from tiedlora.keys import EXECUTION, Free, Pattern, Text, neutral
from tiedlora.tying import Architecture, Rate, Tying, adapted_layers

FULL = "full"
"""The value of tying.method for full fine-tuning: all weights of the base are trained."""
REGISTERED: dict[str, Any] = {}
"""Kind -> how it is made. adapter/arms.py has the type, and the function that registers one."""
SEED_ARGUMENTS = ("projection_prng_key", "projection_seed", "proj_seed", "random_loc_seed", "random_seed")
"""PEFT's names for the seed of a method's frozen random parts. The run's seed is taken, unless the user sets one: with
PEFT's defaults, all seeds of a comparison would share the same random parts."""
NOT_ARGUMENTS = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
)
"""Fields of PEFT's configurations that say nothing about the method."""
REFUSED = {
    "AdaLoraConfig": "changes its ranks in a step of its own after each optimizer step",
    "AdamssConfig": "has a schedule of its own in the training loop",
    "PolyConfig": "needs the number of a task with every row",
    "ShadowConfig": "has a loss of its own",
    "TrainableTokensConfig": "trains the embedding, which is also the head",
    "XLoraConfig": "mixes adapters that are trained already",
}
"""Classes of PEFT that need more than a loss and a gradient -> what they need."""
LORA_STARTS = ("true", "false", "gaussian", "orthogonal")
"""The values of PEFT's init_lora_weights that an arm may have. Others give the base other weights, so that base and
adapted model could not be compared, or take their start from rows of data, in a step that this loop does not do."""
PEFT_FILE = "adapter_config.json"


@dataclass
class TyingConfig(Tying):
    """The adapter: this project's own parts (see Tying), or another method."""

    method: Text | None = field(default=None, metadata=neutral(None))
    """Another method instead of A, B, u and v: a configuration class of PEFT, such as VeraConfig, or a kind that a
    program has registered (docs/arena.md). null is this project's own method. A, B, u, v and rank then have no
    meaning. full is full fine-tuning: every weight of the base is trained."""
    arguments: dict[Text, Free] | None = field(default=None, metadata=EXECUTION)
    """The method's arguments that differ from its defaults."""
    resolved: dict[Text, Free] | None = field(default=None, metadata=neutral(None))
    """All arguments of the method, defaults included. The program fills them in, so a changed default is another
    run."""
    knob: Text | None = field(default=None, metadata=EXECUTION)
    """The argument that `budget` changes."""
    lr_factors: dict[Pattern, Rate] | None = field(default=None, metadata=neutral(None))
    """Factors on the learning rate: a regular expression for names of parameters -> factor. Two that
    match one parameter must have the same factor."""
    no_decay: list[Pattern] | None = field(default=None, metadata=neutral(None))
    """Regular expressions for names of parameters without weight decay: those that start at 1, or at a size of the
    base's weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # An empty mapping means null. Hydra begins with an empty one (see compose.register).
        self.arguments, self.lr_factors = self.arguments or None, self.lr_factors or None


def resolve(method: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method's full name, and its arguments with all defaults that are not None, as plain data.

    Raises:
        UserError: the method or an argument is unknown, or PEFT is missing.
    """
    if method == FULL and arguments:
        raise UserError("tying.arguments: full fine-tuning has none; leave them out")
    if method == FULL or method in REGISTERED:
        return method, dict(arguments)
    kind = peft_class(method)
    instance = _instance(kind, arguments)
    values = json.loads(json.dumps(asdict(instance), default=_plain))
    for name in (*NOT_ARGUMENTS, *(seed for seed in SEED_ARGUMENTS if seed not in arguments)):
        values.pop(name, None)
    if values.get("modules_to_save"):
        raise UserError("tying.arguments.modules_to_save: whole layers would be trained; leave it out")
    if values.get("generator_seed") is not None:
        raise UserError(
            "tying.arguments.generator_seed: no checkpoint has the state of its generator, so a continued run would "
            "differ; leave it out"
        )
    if (start := str(values.get("init_lora_weights", True)).lower()) not in LORA_STARTS:
        raise UserError(
            f"tying.arguments.init_lora_weights={start:.40}: changes the base's weights, or needs rows of data; "
            f"choose one of {', '.join(LORA_STARTS)}"
        )
    return kind.__name__, {name: value for name, value in sorted(values.items()) if value is not None}


def peft_class(method: str) -> type[Any]:
    """The configuration class of PEFT that `method` names: VeraConfig, Vera or VERA.

    Raises:
        UserError: there is no such class, it does not change layers, or PEFT is missing.
    """
    classes = {name.lower().removesuffix("config"): kind for name, kind in peft_classes().items()}
    kind = classes.get(method.lower().removesuffix("config"))
    if kind is None:
        names = ", ".join(sorted(each.__name__ for each in classes.values() if each.__name__ not in REFUSED))
        raise UserError(
            f"tying.method={method}: is no method of PEFT that changes a model's layers; choose from {names}"
        )
    if needs := REFUSED.get(kind.__name__):
        raise UserError(f"tying.method={method}: {kind.__name__} {needs}; the training loop here does not do that")
    return kind


def peft_classes() -> dict[str, type[Any]]:
    """Name -> the configuration class, for the methods of PEFT that change a model's layers.

    Raises:
        UserError: PEFT is missing.
    """
    try:
        # PEFT is an extra, and loads torch, and bitsandbytes, which warns of faster kernels that nobody here asked for.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING  # noqa: PLC0415
        from peft.tuners.tuners_utils import BaseTuner  # noqa: PLC0415
    except ImportError:
        raise UserError("tying.method: needs PEFT; install it with pip install 'tiedlora[peft]'") from None
    found: dict[str, type[Any]] = {}
    for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(name)
        if inspect.isclass(tuner) and issubclass(tuner, BaseTuner):
            found[kind.__name__] = kind
    return found


def peft_config(tying: TyingConfig, architecture: Architecture, seed: int) -> Any:
    """PEFT's configuration object of a completed `tying`.

    Args:
        seed: the run's seed, for the method's frozen random parts.

    Raises:
        UserError: the method cannot adapt these targets or layers, or PEFT is missing.
    """
    assert tying.method is not None
    assert tying.resolved is not None
    kind = peft_class(tying.method)
    names = set(inspect.signature(kind).parameters)
    values = dict(tying.resolved)
    for name in SEED_ARGUMENTS:
        if name in names:
            values.setdefault(name, seed)
    if tying.layers is not None and "layers_to_transform" not in names:
        raise UserError(f"tying.layers: {tying.method} adapts all layers; set tying.layers=null")
    in_layer, by_hand = module_names(tying, architecture), architecture.layout.layers
    if by_hand and "target_modules" not in values:
        # PEFT takes every module whose path ends so. Of a model that also reads images, these may be in other layers.
        # It asks for no layers where it finds a whole path.
        layers = adapted_layers(tying, architecture)
        values["target_modules"] = [f"{by_hand}.{layer}.{name}" for layer in layers for name in in_layer]
    elif tying.layers is not None:
        values["layers_to_transform"] = adapted_layers(tying, architecture)
        values["layers_pattern"] = layout_of(architecture).layers.rpartition(".")[2]
    values.setdefault("target_modules", in_layer)
    return _instance(kind, {**values, "task_type": "CAUSAL_LM"})


def module_names(tying: TyingConfig, architecture: Architecture) -> list[str]:
    """The modules that `tying.targets` names, as paths inside a layer, in order.

    Raises:
        UserError: a target is unknown, or a part of a fused module: PEFT adapts whole modules.
    """
    layout, names = layout_of(architecture), []
    for target in tying.targets:
        if target not in layout.sites:
            raise UserError(
                f"tying.targets: {architecture.family} has no '{target}' projection; "
                f"choose from {', '.join(layout.sites)}"
            )
        for path in layout.sites[target]:
            if ":" in path:
                raise UserError(
                    f"tying.targets: '{target}' is a part of {path.partition(':')[0]}, and {tying.method} adapts whole "
                    "modules; choose targets that are modules, such as [qkv]"
                )
            names.append(path)
    return names


def _instance(kind: type[Any], arguments: Mapping[str, Any]) -> Any:
    known = set(inspect.signature(kind).parameters)
    for name in arguments:
        if name not in known:
            allowed = ", ".join(sorted(known - set(NOT_ARGUMENTS)))
            raise UserError(f"tying.arguments.{name}: {kind.__name__} has no such argument; it has {allowed}")
    try:
        with warnings.catch_warnings():
            # They are about missing targets and the like, which are filled in later.
            warnings.simplefilter("ignore")
            return kind(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise UserError(f"tying.arguments: {kind.__name__} refuses them: {reason:.300}") from None


def _plain(value: Any) -> Any:
    """A value as JSON has it. Sets are sorted, because their order is not the same in every process.

    Raises:
        TypeError: JSON has no such value.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} is no value of JSON")
