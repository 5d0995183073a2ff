"""The command that repeats a run: found from its configuration, and checked by composing it again."""

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
    """`python train.py ...` that is this very run, with as few overrides as the options of conf/ allow."""
    try:
        overrides = min((_overrides(config, train) for train in explain.options("train")), key=len)
        is_exact = run_id(configuration.compose_config(overrides)) == run_id(config)
    except UserError:
        overrides, is_exact = [], False
    if config.data_root:
        overrides.append("data_root=FOLDER")
    return f"python train.py {shlex.join(overrides)}".rstrip() + ("" if is_exact else NOT_EXACT)


def _overrides(config: Config, train: str) -> list[str]:
    """Options by their names, then an override for each value of the identity that they do not give.

    Args:
        train: the option of conf/train to begin with.
    """
    names = {"model": config.model.name, "task": config.task.name, "tying": config.tying.name}
    chosen = {group: option for group, name in names.items() if (option := _option(group, name))}
    if (rank := f"r{config.rank.r}") in explain.options("rank"):
        chosen["rank"] = rank
    chosen["train"] = train
    options = [f"{group}={name}" for group, name in chosen.items() if name != _defaults()[group]]
    from_options, target = _composed(tuple(options)), _flat(identity(config))
    differences = [
        f"{'' if key in from_options else '+'}{key}={_in_hydras_grammar(value)}"
        for key, value in target.items()
        if (key not in from_options or from_options[key] != value) and key != "train.init_digest"
    ]
    # alpha follows the rank unless it is set.
    default_alpha = f"rank.alpha={_in_hydras_grammar(float(config.rank.r))}"
    differences = [override for override in differences if override != default_alpha]
    if config.train.init_from:
        differences.append(f"train.init_from={_in_hydras_grammar(config.train.init_from)}")
    return [*options, *differences]


@functools.cache
def _option(group: str, name: str) -> str | None:
    """The option of a group whose file has this name."""
    for option in explain.options(group):
        if OmegaConf.select(OmegaConf.load(CONF / group / f"{option}.yaml"), "name") == name:
            return option
    return None


@functools.cache
def _defaults() -> dict[str, str]:
    """Group -> its option in conf/config.yaml."""
    defaults = OmegaConf.to_object(OmegaConf.load(CONF / "config.yaml").defaults)
    assert isinstance(defaults, list)
    return {str(k): str(v) for entry in defaults if isinstance(entry, dict) for k, v in entry.items()}


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


def _in_hydras_grammar(value: object) -> str:
    """A value as Hydra parses it. In a quoted string only the quote itself can be escaped."""
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(_in_hydras_grammar, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {_in_hydras_grammar(item)}' for key, item in value.items())}}}"
    return '"' + str(value).replace('"', '\\"') + '"'
