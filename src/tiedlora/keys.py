"""How a key that a person sets is declared, and how plain data becomes typed. pydantic checks the values.

A key is a field of a dataclass. Its annotation says which values it takes, its metadata say which part it has in a
run's identity, and the docstring below it is its help.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from tiedlora.errors import UserError
from tiedlora.text import is_name, nearest, visible

T = TypeVar("T")
LARGEST_COUNT = 10**9
"""Upper bound of everything that is counted (rows, steps, tokens). It is above any real run and below any overflow."""
MISSING = "???"
"""OmegaConf's mark of a key that has no default."""
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and halves of surrogate pairs."""
CHECKED = ConfigDict(extra="forbid", validate_default=True, revalidate_instances="always")
"""For a section of keys: a key that is not known is refused, and defaults and finished objects are checked too."""
UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
"""pydantic's errors about a key that is not known."""
WORDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "valid integer": "whole number",
    "valid string": "text",
    "valid boolean, unable to interpret input": "flag, true or false",
    "valid dictionary": "mapping",
    " after validation": "",
}
"""Words of pydantic's messages -> ours."""
EXECUTION = {"execution": True}
"""Metadata of a key that says where or how a run is carried out. It is recorded, but not part of the identity."""


def neutral(value: object) -> dict[str, object]:
    """Metadata of a key that is left out of the identity at this value, so that a new key leaves old ids unchanged."""
    return {"neutral": value}


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 1 to LARGEST_COUNT."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_COUNT


def _whole(value: Any) -> Any:
    # pydantic takes 5.0 as 5, and true as 1.
    if isinstance(value, (bool, float)):
        raise ValueError("must be a whole number")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _lines(value: Any) -> Any:
    """Refuse texts that could rewrite a terminal, cut off a path, or not be stored. YAML's numbers become texts."""
    if isinstance(value, dict):
        return {_lines(name): _lines(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_lines(item) for item in value]
    if isinstance(value, str) and CONTROLS.search(re.sub("[\n\t]", "", value)):
        raise ValueError("holds a control character or half of a surrogate pair; remove it")
    return value


def _text(value: Any) -> Any:
    if value == MISSING:
        raise ValueError("has no value; choose an option of its group or set it")
    return str(value) if isinstance(value, (bool, int, float)) else _lines(value)


def _one_line(value: str) -> str:
    if CONTROLS.search(value):
        raise ValueError("holds a line feed or a tab; remove it")
    return value


def _name(value: str) -> str:
    if not is_name(value):
        raise ValueError("use letters, digits, '.', '_', '-' and '/' (no '..'), 96 at most")
    return value


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression ({error})") from None
    return value


Free = Annotated[Any, BeforeValidator(_lines)]
"""Any value. Its texts hold no control characters."""
Lines = Annotated[str, BeforeValidator(_text)]
"""A text of several lines."""
Text = Annotated[Lines, AfterValidator(_one_line)]
Name = Annotated[Lines, AfterValidator(_name)]
"""A plain name, because it becomes a part of a path, a file name or an address."""
Pattern = Annotated[Text, AfterValidator(_pattern)]
"""A regular expression."""
Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Count = Annotated[Whole, Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[Whole, Field(ge=0, le=LARGEST_COUNT)]


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """pydantic's reader of a type."""
    return TypeAdapter(kind)


def _no_usage(key: str) -> str:
    return ""


def from_person(
    kind: type[T], value: Any, keys: Collection[str] = (), prefix: str = "", usage: Callable[[str], str] = _no_usage
) -> T:
    """Turn plain data, or an object that is not checked yet, into the type `kind`.

    Args:
        keys: the names of all keys, if the type forbids others, to name the nearest one. They are dotted, or the
            last words.
        prefix: the place of the value, such as `task.`, for the message.
        usage: what is said about a key whose value is wrong, such as its help.

    Raises:
        UserError: one line that names the key, what it has, and what is allowed.
    """
    try:
        checked: T = adapter(kind).validate_python(value)  # type: ignore[arg-type]
    except ValidationError as error:
        # A key that is misspelt is also missing; to say so would not help.
        found = min(error.errors(include_url=False), key=lambda found: found["type"] not in UNKNOWN)
        key = visible(prefix + dotted(found)).removesuffix(".[key]")
        if found["type"] in UNKNOWN:
            word = key if any("." in name for name in keys) else str(found["loc"][-1])
            raise UserError(f"{key}: unknown key{nearest(word, keys)}") from None
        given = "null" if found["input"] is None else visible(str(found["input"]))
        shown = "" if given == MISSING or isinstance(found["input"], dict) else f"={given:.60}"
        raise UserError(f"{key}{shown}: {reason(found)}{usage(key)}".removeprefix(": ")) from None
    return checked


def dotted(error: ErrorDetails) -> str:
    """The place of a wrong value, such as `train.lr`."""
    return ".".join(str(part)[:40] for part in error["loc"])


def reason(error: ErrorDetails) -> str:
    """Why a value is refused, and what is allowed."""
    message = re.sub("^[A-Z][a-z]+ should ", "must ", error["msg"])
    for words, ours in WORDS.items():
        message = message.replace(words, ours)
    match error["type"]:
        case "value_error":
            return str(error["ctx"]["error"])
        case "missing":
            return "is missing"
        case "dataclass_type":
            return "must be a mapping of keys"
        case "literal_error":
            return message + nearest(str(error["input"]), re.findall("'(.*?)'", message))
        case _:
            return message
