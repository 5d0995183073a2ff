"""The command that repeats a run. It is derived from the run's configuration, and checked by composing it."""

from __future__ import annotations

import json
import shlex

from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.config import explain
from tiedlora.config.compose import compose_config
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
        is_exact = run_id(compose_config(overrides)) == run_id(config)
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
    models = {storage.read_yaml(CONF / "model" / f"{name}.yaml")["name"]: name for name in explain.options("model")}
    chosen = {"model": models.get(config.model.name, ""), "task": config.task.name, "tying": config.tying.name}
    chosen |= {"objective": config.objective.name, "rank": f"r{config.rank.r}", "train": train}
    defaults = [entry for entry in OmegaConf.load(CONF / "config.yaml").defaults if not isinstance(entry, str)]
    options = [
        f"{group}={name}"
        for group, name in chosen.items()
        if name in explain.options(group) and {group: name} not in defaults
    ]
    from_options = _identity_values(compose_config(options))
    values = {key: value for key, value in _identity_values(config).items() if from_options.get(key) != value}
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
