"""The command that repeats a run, found from its configuration and proven by composing it again."""

from __future__ import annotations

import functools
import json
import shlex
from typing import Any

from omegaconf import OmegaConf

from tiedlora.config import compose as configuration
from tiedlora.config import explain
from tiedlora.config.identity import identity, run_id
from tiedlora.config.project import CONF
from tiedlora.config.schema import Config
from tiedlora.errors import UserError

NOT_EXACT = "   # and the rest of config.yaml: this version of the code composes another run from it"


def command(config: Config) -> str:
    """`python train.py ...` that is this very run, with as few words as the options of conf/ allow."""
    try:
        words = min((_words(config, train) for train in explain.options("train")), key=len)
        exact = run_id(configuration.compose_config(words)) == run_id(config)
    except UserError:
        words, exact = [], False
    if config.data_root:
        words.append("data_root=FOLDER")
    return f"python train.py {shlex.join(words)}".rstrip() + ("" if exact else NOT_EXACT)


def _words(config: Config, train: str) -> list[str]:
    """Options by their names, then a word for each value of the identity that they do not give."""
    named = {"model": config.model.name, "task": config.task.name, "tying": config.tying.name}
    chosen = {group: option for group, name in named.items() if (option := _option(group, name))}
    if (rank := f"r{config.rank.r}") in explain.options("rank"):
        chosen["rank"] = rank
    chosen["train"] = train
    options = [f"{group}={name}" for group, name in chosen.items() if name != _defaults()[group]]
    known, wanted = _composed(tuple(options)), _flat(identity(config))
    differences = [
        f"{'' if key in known else '+'}{key}={_value(value)}"
        for key, value in wanted.items()
        if known.get(key, _NONE) != value and key != "train.init_digest"
    ]
    # alpha follows the rank unless it is given.
    differences = [w for w in differences if w != f"rank.alpha={_value(float(config.rank.r))}"]
    start = [f"train.init_from={_value(config.train.init_from)}"] if config.train.init_from else []
    return [*options, *differences, *start]


_NONE = object()


@functools.cache
def _option(group: str, name: str) -> str | None:
    """The option of a group whose file gives this name."""
    for option in explain.options(group):
        if OmegaConf.select(OmegaConf.load(CONF / group / f"{option}.yaml"), "name") == name:
            return option
    return None


@functools.cache
def _defaults() -> dict[str, str]:
    """Group -> the option that conf/config.yaml takes."""
    listed = OmegaConf.to_object(OmegaConf.load(CONF / "config.yaml").defaults)
    assert isinstance(listed, list)
    return {str(k): str(v) for entry in listed if isinstance(entry, dict) for k, v in entry.items()}


@functools.lru_cache(maxsize=256)
def _composed(options: tuple[str, ...]) -> dict[str, Any]:
    return _flat(identity(configuration.compose_config(list(options))))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _value(value: Any) -> str:
    """A value in Hydra's grammar, in which a quoted string knows no escape but that of the quote."""
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {_value(item)}' for key, item in value.items())}}}"
    return '"' + str(value).replace('"', '\\"') + '"'
