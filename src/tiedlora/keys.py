"""How a key of the configuration is declared, and how the keys of a configuration are listed.

A key is a field of a dataclass that is declared with `key`. Its default, its allowed values and its part in a run's
identity are in that one place. The docstring below the field is its help.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any

LARGEST_COUNT = 10**9
"""Upper bound of everything that is counted (rows, steps, tokens). It is above any real run and below any overflow."""


@dataclass(frozen=True)
class KeyRules:
    """Which values of the right type a key allows. None and empty mean no rule. The value None follows every rule."""

    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    option_of: str = ""
    """The group of conf/ whose options are the choices."""
    is_name: bool = False
    """Whether the value must be a plain name, because it becomes part of a path, a file name or an address."""


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 1 to LARGEST_COUNT."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_COUNT


class _NoNeutral:
    """The mark of a key without a neutral value."""


NO_NEUTRAL = _NoNeutral()


def key(
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    option_of: str = "",
    name: bool = False,
    execution: bool = False,
    neutral: Any = NO_NEUTRAL,
) -> Any:
    """Declare a key, as the default of a dataclass's field.

    Args:
        factory: makes the default; used instead of `default` for a list, a mapping or a section.
        low, high: the allowed range, both ends included.
        choices: the allowed texts.
        option_of: the group of conf/ whose options are the allowed texts.
        name: the value must be a plain name (see `text.is_name`), because it becomes part of a path or an address.
        execution: the key says where or how a run is carried out. It is recorded, but not part of the run's identity.
        neutral: the value at which the key is left out of the identity. With it, a new key leaves old ids unchanged.
    """
    metadata = {"rules": KeyRules(low, high, choices, option_of, name), "execution": execution}
    if neutral is not NO_NEUTRAL:
        metadata["neutral"] = neutral
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def count(default: int | None, *, low: int = 1, execution: bool = False, neutral: Any = NO_NEUTRAL) -> Any:
    """Declare a key that counts something: a whole number from `low` to LARGEST_COUNT."""
    return key(default, low=low, high=LARGEST_COUNT, execution=execution, neutral=neutral)


@dataclass(frozen=True)
class Key:
    """One key of a configuration, with its value."""

    name: str
    """The dotted name, such as `train.lr`."""
    value: Any
    field: Field[Any]
    section: type
    """The dataclass that declares the key."""

    @property
    def rules(self) -> KeyRules:
        """The rules that the value must follow."""
        rules = self.field.metadata.get("rules")
        return rules if isinstance(rules, KeyRules) else KeyRules()

    @property
    def help(self) -> str:
        """The docstring below the field, on one line; empty if there is none."""
        # A section may inherit its fields: the docstring is in the class that declares this one.
        declaring = next(base for base in self.section.__mro__ if self.field.name in inspect.get_annotations(base))
        tree = ast.parse(textwrap.dedent(inspect.getsource(declaring)))
        assert isinstance(tree.body[0], ast.ClassDef)
        for statement, following in itertools.pairwise(tree.body[0].body):
            if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == self.field.name:
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    return " ".join(str(following.value.value).split())
                return ""
        return ""


def list_keys(section: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of a configuration, or of one of its sections, in the schema's order. Sections are listed too."""
    for item in fields(section):
        value = getattr(section, item.name)
        yield Key(prefix + item.name, value, item, type(section))
        if is_dataclass(value):
            yield from list_keys(value, f"{prefix}{item.name}.")
