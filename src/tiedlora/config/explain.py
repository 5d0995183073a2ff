"""Turn errors of Hydra and OmegaConf into one line for a person, with the nearest right name and what a key takes."""

from __future__ import annotations

import difflib
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from typing import Any

import yaml
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tiedlora import storage
from tiedlora.config.project import CONF, PROJECT
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.keys import Key, list_keys
from tiedlora.text import visible

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
}


@cache
def schema_keys() -> dict[str, Key]:
    """Every dotted key of the schema, sections included, with its default."""
    return {key.name: key for key in list_keys(Config())}


def allowed(key: Key) -> str:
    """The values that a key takes, in words, such as `a whole number, at least 1`."""
    if key.rules.choices:
        return f"one of {', '.join(key.rules.choices)}"
    if is_dataclass(key.value):
        return "a section of keys"
    declared = str(key.field.type)
    kind = declared.removeprefix("Optional[").removesuffix("]") if declared.startswith("Optional[") else declared
    words = TYPE_WORDS.get(kind, kind) + ("" if key.rules.low is None else f", at least {key.rules.low:g}")
    return words + (" (or null)" if kind != declared else "")


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn an error of Hydra or OmegaConf in the block into one line for a person.

    Raises:
        UserError: the block raised such an error about a configuration.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException, OverflowError) as error:
        raise UserError(explain(error)) from error
    except AttributeError as error:
        # OmegaConf's own error for a mapping that is null.
        if (key := _full_key(str(error))) is None:
            raise
        raise UserError(f"{key}: is null, and no key of it can be set{_usage(key)}") from error
    except YAMLError as error:
        raise UserError(f"a file of conf/ is not readable YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise UserError("the configuration is nested too deeply to be read") from error
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise UserError("a number has more digits than are read (4300)") from error
        if f"{os.sep}hydra{os.sep}" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        if "Config group override" not in str(error):
            # Such as of options of the command line that exclude each other.
            raise UserError(_first_sentence(str(error))) from error
        raise UserError(
            "a group takes the name of an option, not a bare number: rank=r8 selects one, rank.r=8 sets any value"
        ) from error


def explain(error: BaseException) -> str:
    """The message of Hydra or OmegaConf, which has many lines, as one line with the nearest right name."""
    # Hydra's own message names only the override. The error that caused it says what is wrong.
    messages = [
        message for cause in cause_chain(error) if not (message := str(cause)).startswith("Error merging override ")
    ]
    text = " ".join(messages)
    # "Could not load" stands in the message about a list of options, such as +grid=[papr,quick].
    if match := re.search(r"Could not (?:find|load) '([\w-]+)/(.+?)'", text):
        group, option = match.groups()
        names = options(group)
        return f"{group}={option}: no such option; choose one of {', '.join(names)}{nearest(option, names)}"
    if match := re.search(r"Could not override '([\w.]+)'|Key '([\w.]+)' (?:is )?not in '?(\w+)", text):
        key = _full_key(text) or match[1] or match[2]
        mapping = schema_keys().get(key.rpartition(".")[0])
        if mapping is not None and isinstance(mapping.value, dict):
            return f"{key}: unknown key; a key of {mapping.name} is added as +{key}=VALUE"
        return f"{key}: unknown key{nearest(key, schema_keys())}; `python train.py --cfg job` shows them all"
    if match := re.search(r"Ambiguous value for argument '(.*?)'", text):
        return f"{visible(match[1]):.80}: has several values; add --multirun for a sweep, or write a list as KEY=[A,B]"
    if isinstance(error, OverrideParseException):
        return (
            f"{visible(str(error.override)):.80}: cannot be parsed as KEY=VALUE ({visible(_first_sentence(text)):.80})"
        )
    if key := _full_key(text):
        return f"{key}: {_first_sentence(text)}{_usage(key)}"
    return _first_sentence(text)


def _usage(key: str) -> str:
    """What a key takes and what it means; empty if the schema does not have the key."""
    found = schema_keys().get(key)
    return f"; it takes {allowed(found)}. {found.help}" if found else ""


def cause_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that led to it, the last one first."""
    # Hydra and OmegaConf raise an error again while they handle it, so a chain can contain itself.
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def _full_key(text: str) -> str | None:
    match = re.search(r"full_key: ([\w.\[\]]+)", text)
    return match[1] if match else None


def _first_sentence(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "the configuration cannot be composed")


def nearest(word: str, words: Iterable[str]) -> str:
    """` (did you mean WORD?)` with the most similar of `words`; empty if none is similar."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def options(group: str) -> list[str]:
    """The options of a group of conf/, or of `grid`, whose files are in sweeps/grid/. By name."""
    folders = [root / group for root in (CONF, PROJECT / "sweeps")]
    files = [path.relative_to(folder).with_suffix("") for folder in folders for path in folder.rglob("*.yaml")]
    return sorted([*map(str, files), *(peft_options() if group == "tying" else ())])


@cache
def peft_options() -> dict[str, dict[str, Any]]:
    """`peft/NAME` -> the values of this option of `tying`, for each method of the table conf/peft_methods.yaml.

    Raises:
        UserError: the table is not readable.
    """
    file = CONF / "peft_methods.yaml"
    try:
        # Every command reads the table. libyaml takes a twentieth of the time of the loader that is written in Python.
        table = yaml.load(storage.read_bytes(file), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return {f"peft/{name}": {"name": f"peft/{name}", **values} for name, values in table.items()}
    except (YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: is no table of methods ({' '.join(str(error).split())})") from None
