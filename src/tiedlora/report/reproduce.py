"""The command that repeats a run, found from its record and proven by composing it again."""

from __future__ import annotations

import functools
import json
import shlex
from typing import Any

from tiedlora import config as configuration
from tiedlora import record
from tiedlora.errors import UserError
from tiedlora.report.runs import Run


def command(run: Run) -> str:
    """`python train.py ...`, or where to look if this version of the code composes something else from it."""
    recorded = run.record["config"]
    fallback = (
        f"# this version of the code composes another run; the whole configuration is in {run.run_id}/config.yaml"
    )
    try:
        options = _options(recorded)
        if options is None:
            return fallback
        overrides = min(
            (_with_differences(run, [*options, f"train={train}"]) for train in configuration.options("train")), key=len
        )
        if _run_id(tuple(overrides)) != run.run_id:
            return fallback
    except (UserError, KeyError, TypeError, AttributeError, AssertionError):
        return fallback
    data = " data_root=FOLDER" if recorded.get("data_root") else ""
    defaults = ("model=smollm2_135m", "task=chain_sum", "train=quick", "rank=r8", "tying=TABuv")
    return f"python train.py {shlex.join(word for word in overrides if word not in defaults)}".rstrip() + data


def _options(recorded: dict[str, Any]) -> list[str] | None:
    """The options of conf/ whose names the record holds."""
    found = []
    for group in ("model", "task", "tying"):
        names = _names(group)
        if recorded[group]["name"] not in names:
            return None
        found.append(f"{group}={names[recorded[group]['name']]}")
    rank = f"r{recorded['rank']['r']}"
    return [*found, *([f"rank={rank}"] if rank in configuration.options("rank") else [])]


@functools.cache
def _names(group: str) -> dict[str, str]:
    from omegaconf import OmegaConf

    folder = configuration.CONF / group
    return {
        str(OmegaConf.select(OmegaConf.load(folder / f"{n}.yaml"), "name")): n for n in configuration.options(group)
    }


@functools.lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    found = record.identity(configuration.compose_config(list(overrides)))
    assert isinstance(found, dict)
    return found


def _run_id(overrides: tuple[str, ...]) -> str:
    return record.run_id(configuration.compose_config(list(overrides)))


def _with_differences(run: Run, options: list[str]) -> list[str]:
    """The options, and an override for each value of the identity that they do not give."""
    wanted = run.record["identity"]
    return [*options, *_differences(wanted, _composed(tuple(options)), "")]


def _differences(wanted: Any, composed: Any, prefix: str) -> list[str]:
    if isinstance(wanted, dict) and isinstance(composed, dict):
        # A key that only the composition has is neutral there, or the proof by run id fails.
        return [
            word
            for key, value in wanted.items()
            if (prefix, key) != ("rank", "alpha") or value != float(wanted["r"])
            for word in _differences(value, composed.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    if wanted == composed:
        return []
    text = "null" if wanted is None else wanted if isinstance(wanted, str) else json.dumps(wanted)
    return [f"{prefix}={text}"]
