"""The command that repeats a run. It is derived from the run's configuration, and checked by composing it."""

from __future__ import annotations

import functools
import json
import shlex
from dataclasses import replace

from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.config import compose as configuration
from tiedlora.config import explain
from tiedlora.config.identity import identity, leaves, run_id
from tiedlora.config.project import CONF
from tiedlora.config.schema import Config
from tiedlora.errors import UserError

ARGUMENTS = "tying.resolved."
"""Where the identity has the arguments of another method. The user sets them under tying.arguments."""
NOT_EXACT = "   # and the rest of config.yaml: this version of the code composes another run from it"


def command(config: Config) -> str:
    """`python train.py ...` for exactly this run, with as few overrides as the options of conf/ allow."""
    try:
        overrides = min((_overrides(config, train) for train in explain.options("train")), key=len)
        is_exact = run_id(_composed(overrides)) == run_id(_as_set(config))
    except UserError:
        overrides, is_exact = [], False
    if config.data_root:
        overrides.append("data_root=FOLDER")
    return f"python train.py {shlex.join(overrides)}".rstrip() + ("" if is_exact else NOT_EXACT)


def _overrides(config: Config, train: str) -> list[str]:
    """Options by name, and an override for each value of the identity that the options do not give.

    Args:
        train: the option of conf/train to begin with.
    """
    chosen = {"model": _model_options().get(config.model.name, ""), "task": config.task.name}
    chosen |= {"tying": config.tying.name, "objective": config.objective.name, "rank": f"r{config.rank.r}"}
    options = [
        f"{group}={name}"
        for group, name in {**chosen, "train": train}.items()
        if name in explain.options(group) and name != _defaults()[group]
    ]
    from_options = _values_of_options(tuple(options))
    values = {key: value for key, value in _identity_values(_as_set(config)).items() if from_options.get(key) != value}
    # They follow from other keys: from init_from, and from the rank.
    values.pop("train.init_digest", None)
    if values.get("rank.alpha") == _in_hydras_grammar(float(config.rank.r)):
        del values["rank.alpha"]
    differences = [
        # A key at its neutral value is not among the values. Hydra's + adds a key that the schema does not have.
        f"{'' if key in from_options or key in explain.schema_keys() else '+'}{key}={value}"
        for key, value in values.items()
        if not key.startswith(ARGUMENTS)
    ]
    if pairs := [f"{key.removeprefix(ARGUMENTS)}: {values[key]}" for key in values if key.startswith(ARGUMENTS)]:
        # Hydra's ++ changes a key of the option, and adds others.
        differences.append(f"++tying.arguments={{{', '.join(pairs)}}}")
    if config.train.init_from:
        differences.append(f"train.init_from={_in_hydras_grammar(config.train.init_from)}")
    return [*options, *differences]


@functools.cache
def _model_options() -> dict[str, str]:
    """The name of a model -> its option. In the other groups, an option is called as its name."""
    options = explain.options("model")
    return {storage.read_yaml(CONF / "model" / f"{option}.yaml")["name"]: option for option in reversed(options)}


@functools.cache
def _defaults() -> dict[str, str]:
    """Group -> its option in conf/config.yaml."""
    defaults = OmegaConf.to_object(OmegaConf.load(CONF / "config.yaml").defaults)
    assert isinstance(defaults, list)
    return {str(k): str(v) for entry in defaults if isinstance(entry, dict) for k, v in entry.items()}


@functools.lru_cache(maxsize=256)
def _values_of_options(options: tuple[str, ...]) -> dict[str, str]:
    return _identity_values(_composed(list(options)))


def _composed(overrides: list[str]) -> Config:
    return configuration.complete(_as_set(configuration.compose_typed(overrides)))


def _as_set(config: Config) -> Config:
    """The configuration with the arguments of another method as a user sets them.

    Only PEFT knows the defaults of the others. It loads torch, which a report does without.
    """
    tying = config.tying
    if tying.method is None:
        return config
    arguments = dict(tying.arguments or {})
    if tying.knob is not None and tying.resolved is not None:
        # The budget may have chosen it.
        arguments[tying.knob] = tying.resolved[tying.knob]
    return replace(config, tying=replace(tying, resolved=arguments))


def _identity_values(config: Config) -> dict[str, str]:
    """Dotted key -> value in Hydra's grammar, for every key of the identity."""
    return {key: _in_hydras_grammar(value) for key, value in leaves(identity(config)).items()}


def _in_hydras_grammar(value: object) -> str:
    """A value in Hydra's grammar. In a quoted string, only the quote can be escaped."""
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(_in_hydras_grammar, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {_in_hydras_grammar(item)}' for key, item in value.items())}}}"
    return '"' + str(value).replace('"', '\\"') + '"'
