"""How a key that a person sets is declared, and how plain data becomes typed. pydantic checks the values.

A key is a field of a dataclass. Its annotation says which values it takes, its metadata say which part it has in a
run's identity, and the docstring below it is its help.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from tiedlora.errors import UserError
from tiedlora.text import is_name, nearest, visible

T = TypeVar("T")
LARGEST_COUNT = 10**9
"""Upper bound of everything that is counted (rows, steps, tokens). It is above any real run and below any overflow."""
MISSING = "???"
"""OmegaConf's mark of a key without a value."""
NO_VALUE = "has no value; choose an option of its group or set it"
A_LIST = "must be a list, as in [A,B]"
A_MAPPING = "must be a mapping, as in {NAME: VALUE, NAME: VALUE}"
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and halves of surrogate pairs."""
CHECKED = ConfigDict(extra="forbid", validate_default=True, revalidate_instances="always")
"""For a section of keys: a key that is not known is refused, and defaults and finished objects are checked too."""
UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
"""pydantic's errors about a key that is not known."""
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
    """Refuse texts that could rewrite a terminal, cut off a path, or not be stored. Other values stay as they are."""
    if isinstance(value, dict):
        return {_lines(name): _lines(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_lines(item) for item in value]
    if isinstance(value, str) and CONTROLS.search(re.sub("[\n\t]", "", value)):
        raise ValueError("holds a control character or half of a surrogate pair; remove it")
    return value


def _text(value: Any) -> Any:
    if value == MISSING:
        raise ValueError(NO_VALUE)
    return str(value) if isinstance(value, (bool, int, float)) else _lines(value)


def check_name(value: str) -> str:
    """Refuse a text that is no plain name."""
    if not is_name(value):
        raise ValueError("use letters, digits, '.', '_', '-' and '/' (no '..'), 96 at most")
    return value


def _distinct(values: list[T]) -> list[T]:
    if doubled := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"names {doubled[0]} twice; name each once")
    return values


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
Text = Annotated[Lines, Field(pattern=r"^[^\n\t]*$")]
Name = Annotated[Lines, AfterValidator(check_name)]
"""A plain name, because it becomes a part of a path, a file name or an address."""
Pattern = Annotated[Text, AfterValidator(_pattern)]
"""A regular expression."""
Distinct = AfterValidator(_distinct)
"""Of a list: each value stands in it once."""
Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Count = Annotated[Whole, Field(ge=1, le=LARGEST_COUNT)]
Amount = Annotated[Whole, Field(ge=0, le=LARGEST_COUNT)]
"""A count that may be 0."""


type_adapter = functools.cache(TypeAdapter)
"""pydantic's reader of a type."""


def from_person(kind: type[T], value: Any, keys: Collection[str] = (), prefix: str = "") -> T:
    """Turn plain data, or an object that is not checked yet, into the type `kind`.

    Args:
        keys: the last words of all keys, or their dotted names as `sections` has them. It is for advice: the nearest
            one to a key that is unknown, and from `sections` also the help of a key with a wrong value.
        prefix: the place of the value, such as `task.`, for the message.

    Raises:
        UserError: one line that names the key, what it has, and what is allowed.
    """
    try:
        checked: T = type_adapter(kind).validate_python(value)  # type: ignore[arg-type]
    except ValidationError as error:
        # A key that is misspelt is also missing; to say so would not help.
        found = min(error.errors(include_url=False), key=lambda found: found["type"] not in UNKNOWN)
        key = visible(prefix + dotted(found)).removesuffix(".[key]").removesuffix(".")
        if found["type"] in UNKNOWN:
            word = key if any("." in name for name in keys) else str(found["loc"][-1])
            raise UserError(f"{key}: unknown key{nearest(word, keys)}") from None
        given = "null" if found["input"] is None else visible(str(found["input"]))
        shown = "" if given == MISSING or isinstance(found["input"], dict) else f"={given:.60}"
        advice = help_of(key, keys) if isinstance(keys, Mapping) else ""
        message = f"{key}{shown}: {reason(found)}. {advice}".removeprefix(": ")
        raise UserError(message.removesuffix(". ")) from None
    return checked


def dotted(error: ErrorDetails) -> str:
    """The place of a wrong value, such as `train.lr`."""
    return ".".join(str(part)[:40] for part in error["loc"])


def reason(error: ErrorDetails) -> str:
    """Why a value is refused, and what is allowed."""
    if error["input"] == MISSING:
        return NO_VALUE
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return "is missing"
    if listed := re.search(r"'\^\(([\w|]+)\)\$'$", error["msg"]):
        choices = listed[1].split("|")
        return f"choose one of {', '.join(choices)}{nearest(str(error['input']), choices)}"
    if error["type"] in ("dataclass_type", "list_type"):
        return A_MAPPING if error["type"] == "dataclass_type" else A_LIST
    message = re.sub("^[A-Z][a-z]+ should ", "must ", error["msg"]).replace(" after validation", "")
    choices = re.findall("'(.*?)'", message) if error["type"] == "literal_error" else []
    return message + nearest(str(error["input"]), choices)


def sections(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key below a section, in order -> the section that holds it."""
    found = {}
    for item in fields(section):
        found[prefix + item.name] = section
        if is_dataclass(value := getattr(section, item.name)):
            found |= sections(value, f"{prefix}{item.name}.")
    return found


def help_of(key: str, keys: Mapping[str, Any]) -> str:
    """The docstring below the field that declares a key, or the key that holds it, on one line; empty if none does.

    Args:
        keys: as `sections` has them.
    """
    while key not in keys:
        if not key:
            return ""
        key = key.rpartition(".")[0]
    name = key.rpartition(".")[2]
    # A section may inherit its fields: the docstring is in the class that declares this one.
    declaring = next(base for base in type(keys[key]).__mro__ if name in inspect.get_annotations(base))
    return _descriptions(declaring).get(name, "")


@functools.cache
def _descriptions(section: type) -> dict[str, str]:
    """Field -> the docstring below it, on one line, for the fields that a class declares itself."""
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(declared, ast.ClassDef)
    found = {}
    for field, below in itertools.pairwise(declared.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = " ".join(text.split())
    return found
