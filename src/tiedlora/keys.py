"""How a key of the configuration is declared, and how the keys of a configuration are listed.

A key is a field of a dataclass that is made with `key`: its default, its allowed values and what it means for a run's
identity stand in one place, and the docstring below the field is its help.
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
"""Upper bound of everything that is counted (rows, steps, tokens): far above any real run, far below an overflow."""


@dataclass(frozen=True)
class KeyRules:
    """Which values of the right type a key allows. None and empty mean no rule; a key's value None passes all rules."""

    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    option_of: str = ""
    """The group of conf/ whose options are the choices."""
    is_name: bool = False
    """Whether the value becomes part of a path, of a file's name or of an address, and so must be a plain name."""


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
        factory: makes the default, instead of `default`, where it is a list, a mapping or a section.
        low, high: the allowed range, both ends included.
        choices: the allowed texts.
        option_of: the group of conf/ whose options are the allowed texts.
        name: the value must be a plain name (see `text.is_name`), because it becomes part of a path or an address.
        execution: a fact of where and how a run is carried out: recorded, but not part of the run's identity.
        neutral: the value at which a key that was added later is left out of the identity, so that old ids stay.
    """
    metadata = {"rules": KeyRules(low, high, choices, option_of, name), "execution": execution}
    if neutral is not NO_NEUTRAL:
        metadata["neutral"] = neutral
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def count(default: int | None, *, low: int = 1, execution: bool = False, neutral: Any = NO_NEUTRAL) -> Any:
    """Declare a key that counts something: a whole number from `low` to a thousand million."""
    return key(default, low=low, high=LARGEST_COUNT, execution=execution, neutral=neutral)


@dataclass(frozen=True)
class Key:
    """One key of a configuration, with its value there."""

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
        """The docstring below the field, on one line; empty where there is none."""
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
    """Every key of a configuration or of one of its sections, sections themselves included, in the schema's order."""
    for item in fields(section):
        value = getattr(section, item.name)
        yield Key(prefix + item.name, value, item, type(section))
        if is_dataclass(value):
            yield from list_keys(value, f"{prefix}{item.name}.")
