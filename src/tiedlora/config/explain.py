"""Turn errors of Hydra and OmegaConf into one line for a person, with the nearest right name and what a key takes."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tiedlora import storage
from tiedlora.config.own_model import GGUF
from tiedlora.config.schema import ROWS_FILES, Config
from tiedlora.errors import UserError
from tiedlora.keys import A_LIST, A_MAPPING, help_of, sections
from tiedlora.places import CONF, DATA, own_options
from tiedlora.text import nearest, visible
from tiedlora.tying import RENAMED


@cache
def schema_keys() -> dict[str, Any]:
    """Every dotted key of the schema, sections included -> the section that holds it, with its defaults."""
    return sections(Config())


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
    causes = list(cause_chain(error))
    if own := [str(cause) for cause in causes if isinstance(cause, UserError)]:
        return own[0]
    # Hydra's own message names only the override. The error that caused it says what is wrong.
    text = " ".join(message for message in map(str, causes) if not message.startswith("Error merging override "))
    # "Could not load" stands in the message about a list of options, such as +grid=[papr,quick].
    if match := re.search(r"Could not (?:find|load) '([\w-]+)/(.*?)'", text):
        return _unknown_option(match[1], match[2])
    if match := re.search(r"Could not override '([\w.]+)'|Key '([\w.]+)' (?:is )?not in '?(\w+)", text):
        return _unknown_key(_full_key(text) or match[1] or match[2])
    if match := re.search(r"Ambiguous value for argument '(.*?)'", text):
        return f"{visible(match[1]):.80}: has several values; only train.py --multirun takes them; a list is KEY=[A,B]"
    if isinstance(error, OverrideParseException):
        word = visible(str(error.override))
        return f"{word:.80}: cannot be parsed as KEY=VALUE ({visible(_first_sentence(text)):.80}){_grammar(word)}"
    key, sentence = _full_key(text), _first_sentence(text)
    if "Cannot merge DictConfig with ListConfig" in sentence and key in schema_keys():
        # It is the same sentence for a list in the place of a mapping.
        default = getattr(schema_keys()[key], key.rpartition(".")[2])
        sentence = A_LIST if isinstance(default, (list, tuple)) else A_MAPPING
    return f"{key}: {sentence}. {help_of(key, schema_keys())}".removesuffix(". ") if key else sentence


def _grammar(word: str) -> str:
    """What to say of an override that Hydra cannot parse, for the mistakes that its grammar makes likely."""
    if re.search(r"=~", word):
        return "; write $HOME in place of ~, which a shell replaces only at the start of a word"
    if re.search(r"\{[^{}:,]*\}", word):
        return "; a template has quotes of its own inside the shell's: 'KEY=\"{field}\"'"
    return "; a mapping is 'KEY={NAME: VALUE, NAME: VALUE}'" if "{" in word else ""


def _unknown_option(group: str, option: str) -> str:
    """What to say of GROUP=OPTION. Hydra names hydra/launcher=NAME as the option launcher/NAME of the group hydra."""
    if group == "tying" and option in RENAMED:
        return f"tying={option}: {RENAMED[option]}"
    names = []
    if group == "hydra":
        inner, _, option = option.partition("/")
        group, names = f"hydra/{inner}", ["basic"] if inner == "launcher" else []
    own = own_options()
    names += [*options(group), *(_names(group, own) if own else ())]
    if group == "model" and (os.sep in option or option.lower().endswith(GGUF) or os.path.exists(option)):
        key = (
            "model.name" if re.fullmatch(r"[^./~][^/]*/[^/]+", option) and not os.path.exists(option) else "model.path"
        )
        return f"model={option}: no such option; a model of your own is {key}={option}, without model="
    if group == "task" and option.lower().endswith(ROWS_FILES):
        return f"task={option}: no such option; rows of your own are task=rows task.files={option}"
    choose = f"; choose one of {', '.join(names)}" if names else ""
    hint = ", or set any number as rank.r=NUMBER" if group == "rank" else nearest(option, names)
    return f"{group}={option}: no such option{choose}{hint}"


def _unknown_key(key: str) -> str:
    """What to say of a key that neither the schema nor the chosen options have."""
    if key == "grid":
        return "grid: unknown key; a grid is added as +grid=NAME, and several as '+grid=[NAME,NAME]'"
    if key == "arms":
        return "arms: unknown key; arms of different rank are an axis: arm=LoRA@r1,TABuv@r8"
    if key.startswith("hydra."):
        group, name = f"hydra/{key.split('.')[1]}", key.rpartition(".")[2]
        files = sorted((CONF / group).glob("*.yaml"))
        having = [file.stem for file in files if re.search(rf"^ *{name}:", file.read_text(), re.MULTILINE)]
        needs = f"; {name} needs {group}={' or '.join(having)}" if having else ""
        return f"{key}: unknown key of the chosen options{needs}"
    mapping = key.rpartition(".")[0]
    if mapping == "task.files" and key in schema_keys():
        return files_beside_one(key)
    if isinstance(getattr(schema_keys().get(mapping), mapping.rpartition(".")[2], None), dict):
        return f"{key}: unknown key; a key of {mapping} is added as +{key}=VALUE"
    return f"{key}: unknown key{nearest(key, schema_keys())}; `python train.py --cfg job` shows them all"


def files_beside_one(key: str) -> str:
    """What to say of task.files.SPLIT=FILE beside task.files=FILE."""
    return (
        f"{key}: task.files=FILE is the only file, from which validation and test are cut; with others, each is named: "
        f"task.files.train=FILE {key.replace('.train', '.test')}=FILE"
    )


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


@cache
def options(group: str) -> list[str]:
    """The options of a group of conf/, or of `grid`, whose files are in sweeps/grid/. By name."""
    return sorted([*_names(group, CONF, DATA / "sweeps"), *(peft_options() if group == "tying" else ())])


def _names(group: str, *roots: Path) -> list[str]:
    folders = [root / group for root in roots]
    return [str(path.relative_to(folder).with_suffix("")) for folder in folders for path in folder.rglob("*.yaml")]


@cache
def peft_options() -> dict[str, dict[str, Any]]:
    """`peft/NAME` -> the values of this option of `tying`, for each method of the table conf/peft_methods.yaml.

    Raises:
        UserError: the table is not readable.
    """
    file = CONF / "peft_methods.yaml"
    try:
        return {f"peft/{name}": {"name": f"peft/{name}", **values} for name, values in storage.read_yaml(file).items()}
    except TypeError as error:
        raise UserError(f"{file}: is no table of methods ({error})") from None
