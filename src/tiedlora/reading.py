"""From the plain data of a file to typed values, and back. pydantic checks the types; its first error becomes one line
that names the key.

What a file of this project holds is Stored...; keys.py has the types of what a person sets.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, Strict, ValidationError
from pydantic_core import ErrorDetails

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.keys import check_name, dotted, reason, type_adapter
from tiedlora.text import visible

T = TypeVar("T")
LARGEST = 2**63
"""Every number of a record has a smaller absolute value, so arithmetic and tables need no further checks."""


def is_number(value: object) -> bool:
    """Whether `value` is a finite number that a record may hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


StoredText = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
StoredNumber = Annotated[float, Strict(), Field(gt=-LARGEST, lt=LARGEST, allow_inf_nan=False)]
"""A finite number, whole or not."""
StoredWhole = Annotated[int, Strict(), Field(gt=-LARGEST, lt=LARGEST)]
StoredCount = Annotated[int, Strict(), Field(ge=0, lt=LARGEST)]
StoredName = Annotated[str, Strict(), AfterValidator(check_name)]
"""A name as conf/ allows it for a model, a task or a configuration."""


def typed(kind: type[T], value: Any, what: str = "a run's record of this project") -> T:
    """Turn plain data, as JSON or YAML holds it, into the type `kind`. Unknown keys are ignored.

    Args:
        what: the name of what the file should be, for the message of an error.

    Raises:
        UserError: a key is missing or has a wrong value. The message names the first one; the caller adds the file.
    """
    try:
        checked: T = type_adapter(kind).validate_python(value)  # type: ignore[arg-type]
    except ValidationError as error:
        raise UserError(_in_words(error.errors(include_url=False)[0], what)) from None
    return checked


def read_typed(path: Path, kind: type[T], what: str = "a run's record of this project") -> T:
    """The JSON object of a file as the type `kind`; see `typed`.

    Raises:
        UserError: the file cannot be read, or a key is missing or wrong; the message names the file and the key.
    """
    tree = storage.read_json(path)
    try:
        return typed(kind, tree, what)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def plain(value: Any) -> Any:
    """Dataclasses as JSON objects. A field whose default is None is left out if its value is None."""
    if is_dataclass(value):
        present = [f for f in fields(value) if not (f.default is None and getattr(value, f.name) is None)]
        return {f.name: plain(getattr(value, f.name)) for f in present}
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _in_words(error: ErrorDetails, what: str) -> str:
    key = visible(dotted(error))
    if not key:
        return f"is not {what}: it is no object"
    if error["type"] == "missing":
        return f"has no '{key}', so it is not {what}"
    return f"'{key}' is {error['input']!r:.60}, which cannot be a value of {what}: {reason(error)}"
