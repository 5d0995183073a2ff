"""Learning rates by arm and rank: what is suggested, and what a search has found. The table is conf/rates.yaml."""

from __future__ import annotations

from functools import cache
from typing import Any

from tiedlora import storage
from tiedlora.other_methods import TyingConfig
from tiedlora.places import CONF

NOT_SEARCHED = "not searched"
"""What tables say of a rate that no search has chosen for the model, the task and the rank."""


@cache
def _table() -> dict[str, Any]:
    return dict(storage.read_yaml(CONF / "rates.yaml"))


def _key(configuration: str, rank: int) -> str:
    return f"{configuration}@r{rank}"


def suggested_lr(tying: TyingConfig, rank: int) -> float:
    """The default of train.lr: the rate of the table for this arm and rank, or else that of the arm's option.

    Raises:
        UserError: the table is not readable.
    """
    rate: float = _table()["suggested"].get(_key(tying.name, rank), tying.suggested_lr)
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
