"""Put an arm on a model: a new one of another method, or a saved one of any kind."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tiedlora import storage
from tiedlora.adapter import files
from tiedlora.adapter.arms import Arm, ArmSpec
from tiedlora.adapter.attach import attach_adapter
from tiedlora.adapter.other_arm import FORMAT, read_description
from tiedlora.config.adapter_folder import DESCRIPTION
from tiedlora.config.families import architecture_of
from tiedlora.config.methods import REGISTERED
from tiedlora.config.schema import TyingConfig
from tiedlora.records.run_record import BaseModelRecord


def new_arm(model: nn.Module, spec: ArmSpec) -> Arm:
    """A new arm of another method on `model`. The base is frozen.

    Raises:
        UserError: the method is unknown, or cannot adapt this model.
    """
    method = spec.tying.method
    assert method is not None
    if method in REGISTERED:
        arm: Arm = REGISTERED[method](model, spec)
        return arm
    # PEFT is an extra, and slow to load.
    from tiedlora.adapter.peft_arm import PeftArm

    return PeftArm(model, spec)


def is_other_method(folder: Path) -> bool:
    """Whether an adapter's folder is of another method than this project's own.

    Raises:
        UserError: it has no readable adapter.json.
    """
    return storage.read_json(folder / DESCRIPTION).get("format") == FORMAT


def read_spec(folder: Path) -> tuple[ArmSpec, BaseModelRecord]:
    """What the saved arm of another method is made from, and the base model that it was trained on.

    Raises:
        UserError: adapter.json is missing or wrong.
    """
    saved = read_description(folder)
    sizes = architecture_of(saved.architecture)
    tying = TyingConfig(method=saved.method, resolved=saved.resolved, targets=list(saved.targets), layers=saved.layers)
    return ArmSpec(tying, sizes, saved.seed), saved.base


def trained_on(folder: Path) -> BaseModelRecord:
    """The base model that a saved arm of any kind was trained on.

    Raises:
        UserError: a file is damaged.
    """
    return read_spec(folder)[1] if is_other_method(folder) else files.load(folder)[1]


def attach_saved(model: nn.Module, folder: Path) -> Arm:
    """Put the saved arm of any kind on `model`.

    Raises:
        UserError: a file is damaged, or the arm was made for another architecture.
    """
    if not is_other_method(folder):
        return attach_adapter(model, files.load(folder)[0])
    arm = new_arm(model, read_spec(folder)[0])
    try:
        arm.load_values(folder)
    except BaseException:
        arm.detach()
        raise
    return arm
