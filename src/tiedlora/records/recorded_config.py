"""The configuration as a record holds it: what its id is a hash of, and all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiedlora.records.reading import Name, Number, Text, Whole, typed


@dataclass(frozen=True)
class NamedModel:
    name: Name


@dataclass(frozen=True)
class NamedTask:
    name: Name
    kind: Text = ""


@dataclass(frozen=True)
class RankValues:
    r: Whole
    alpha: Number | None = None
    scaling: Text = "standard"


@dataclass(frozen=True)
class TrainValues:
    lr: Number


@dataclass(frozen=True)
class NamedTying:
    name: Name


def with_tree(value: Any) -> Any:
    """The object with itself as its `tree`. Anything else is left to the check of types."""
    return {**value, "tree": value} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Identity:
    """The values that a run's id is a hash of. The attributes are those that tables show; `tree` holds every value."""

    model: NamedModel
    task: NamedTask
    rank: RankValues
    train: TrainValues
    tying: dict[str, Any]
    score: dict[str, Any]
    tree: dict[str, Any]

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Identity:
        """The values that config.identity.identity returns."""
        return typed(cls, with_tree(tree))


@dataclass(frozen=True)
class ConfigRecord:
    """The whole resolved configuration, facts of execution included, as `Identity`."""

    task: NamedTask
    rank: RankValues
    tying: NamedTying
    tree: dict[str, Any]

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> ConfigRecord:
        """The values that config.identity.config_tree returns."""
        return typed(cls, with_tree(tree))
