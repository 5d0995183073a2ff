"""The schema's description of one key, for messages and help."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from functools import cache

from tiedlora.config.schema import Config
from tiedlora.keys import Key, list_keys

TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "list[str]": "a list of texts",
    "list[float]": "a list of numbers",
    "dict[str, str]": "a mapping of texts",
    "dict[str, Any]": "a mapping",
    "Union[int, str]": "a whole number or a text",
    "Union[float, int, str]": "a number or a text",
    "list[Any]": "a list",
    "section": "a section of keys",
}


@dataclass(frozen=True)
class KeyDescription:
    """One key of the schema: the values it takes, its default and its meaning."""

    name: str
    type: str
    """The type in the schema, such as `Optional[int]`; `section` for a key that contains other keys."""
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    default: object
    help: str

    def allowed(self) -> str:
        """The allowed values in words, such as `a whole number, at least 1`."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        type_name = self.type.removeprefix("Optional[").removesuffix("]") if self.is_optional else self.type
        words = TYPE_WORDS.get(type_name, type_name)
        words += "" if self.low is None else f", at least {self.low:g}"
        return words + (" (or null)" if self.is_optional else "")

    @property
    def is_optional(self) -> bool:
        """Whether null is allowed."""
        return self.type.startswith("Optional[")


@cache
def schema_keys() -> dict[str, Key]:
    """Every dotted key of the schema, sections included, with its default."""
    return {key.name: key for key in list_keys(Config())}


def describe_key(name: str) -> KeyDescription | None:
    """The description of a dotted key; None if the schema has no such key."""
    key = schema_keys().get(name)
    if key is None:
        return None
    rules = key.rules
    type_name = "section" if is_dataclass(key.value) else str(key.field.type)
    return KeyDescription(name, type_name, rules.low, rules.high, rules.choices, key.value, key.help)
