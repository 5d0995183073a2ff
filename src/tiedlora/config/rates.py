"""Learning rates by arm and rank: what is suggested, and what a search has found. The table is conf/rates.yaml."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from tiedlora import storage
from tiedlora.other_methods import TyingConfig
from tiedlora.places import CONF
from tiedlora.tying import lora_layers, name_of

NOT_SEARCHED = "not searched"
"""What tables say of a rate that no search has chosen for the model, the task and the rank."""


@cache
def _table() -> dict[str, Any]:
    return dict(storage.read_yaml(CONF / "rates.yaml"))


def _key(configuration: str, rank: int) -> str:
    return f"{configuration}@r{rank}"


def suggested_lr(tying: TyingConfig, rank: int) -> float:
    """The default of train.lr: the rate of the table for this arm and rank, or else that of the arm's option.

    LoRA on some of the layers has one rate, whether its option, `tying.layers` or a budget chose the layers.

    Args:
        tying: its layers are numbers, or null for all of them.

    Raises:
        UserError: the table is not readable.
    """
    rate: float
    if tying.layers is not None and tying.method is None and name_of(replace(tying, layers=None)) == "LoRA":
        rate = _table()["lora_on_some_layers"]
    else:
        # LoRA_l30 is LoRA where there are 30 layers.
        name = tying.name if lora_layers(tying.name) is None else "LoRA"
        rate = _table()["suggested"].get(_key(name, rank), tying.suggested_lr)
    return rate


def searched_lr(model: str, task: str, configuration: str, rank: int) -> float | None:
    """The rate that a search has chosen; None if there was none.

    Args:
        model: the whole name of the base model (model.name).
        configuration: TrialArm.label.

    Raises:
        UserError: the table is not readable.
    """
    rate: float | None = _table()["searched"].get(model, {}).get(task, {}).get(_key(configuration, rank))
    return rate
