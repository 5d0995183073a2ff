"""Compose a configuration from conf/, type it, and check it: what is wrong is one line that names the key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiedlora import saved, tying
from tiedlora.errors import UserError
from tiedlora.schema import DTYPES, MODEL_SOURCES, Config, LrFactors

PROJECT = Path(__file__).resolve().parents[2]
"""The checkout: train.py, conf/ and, unless told otherwise, outputs/ and .cache/ live here."""
CONF = PROJECT / "conf"


def register() -> None:
    """Hand the schema and the `project` resolver to Hydra. Calling it twice is harmless."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("project", lambda: str(PROJECT), replace=True)


def load(composed: DictConfig) -> Config:
    """The composed configuration as typed, resolved and checked objects.

    Everything that can be wrong in a configuration alone is found here, before anything is loaded.

    Raises:
        UserError: one line that names the key.
    """
    with readable_errors():
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(f"{missing[0]}: has no value; choose an option of its group or set it")
        # Through plain data: a key that was added with + would otherwise come along unseen.
        values = OmegaConf.to_container(composed, resolve=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    assert isinstance(config, Config)
    if config.rank.alpha is None:
        config.rank.alpha = float(config.rank.r)
    if config.train.lr is None:
        config.train.lr = config.tying.suggested_lr
    for key in ("outputs", "cache", "data_root"):
        value = getattr(config, key)
        setattr(config, key, value and str(Path(value).expanduser().absolute()))
    if config.train.init_from and config.train.init_digest is None:
        folder = saved.adapter_folder(config.train.init_from).absolute()
        config.train.init_from, config.train.init_digest = str(folder), saved.digest(folder)
    check(config)
    return config


def compose_config(overrides: list[str]) -> Config:
    """What `train.py OVERRIDES` would run; for scripts and tests."""
    register()
    with readable_errors():
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            composed = compose(config_name="config", overrides=overrides)
    return load(composed)


def options(group: str) -> list[str]:
    """The options of a group of conf/, by name."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def check(config: Config) -> None:
    """Refuse impossible values, naming the key, what is allowed and what was given."""
    for key, low, high in _BOUNDS:
        value = _value(config, key)
        if value is not None and not low <= value <= high:
            limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"{key}={value}: must be {limit}")
    for key, allowed in _CHOICES.items():
        if (value := _value(config, key)) not in allowed:
            raise UserError(f"{key}={value}: choose one of {', '.join(allowed)}{_nearest(str(value), allowed)}")
    for key in ("model.name", "task.name", "task.kind", "tying.name"):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,95}", value := _value(config, key)) or ".." in value:
            raise UserError(f"{key}={value!r}: use letters, digits, '.', '_', '-' and '/' (no '..'), 96 at most")
    for split in config.score.splits:
        if split not in ("validation", "test"):
            raise UserError(f"score.splits={split}: choose validation, test or both")
    if len(config.train.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in config.train.betas):
        raise UserError(f"train.betas={config.train.betas}: needs two numbers in [0, 1)")
    for field_ in fields(LrFactors):
        factor = getattr(config.train.lr_factor, field_.name)
        if not 0.0 <= factor < math.inf:
            raise UserError(f"train.lr_factor.{field_.name}={factor}: must be 0 or more")
    if not any(getattr(config.train.lr_factor, p) > 0 for p in tying.PARTS if getattr(config.tying, p).trained):
        raise UserError("train.lr_factor: is 0 for every trained part, so nothing would move; raise one of them")
    if config.train.warmup_steps > config.train.steps:
        raise UserError(
            f"train.warmup_steps={config.train.warmup_steps}: is more than train.steps={config.train.steps}"
        )
    tying.check(config.tying)
    d_in, d_out = tying.target_shape(config.model.architecture, config.tying.targets[0])
    if config.model.architecture.layers and config.rank.r > min(d_in, d_out):
        raise UserError(f"rank.r={config.rank.r}: is more than the projection's {min(d_in, d_out)}; use a lower rank")


_BOUNDS: list[tuple[str, float, float]] = [
    ("rank.r", 1, math.inf),
    ("rank.alpha", 1e-12, 1e12),
    ("train.steps", 1, math.inf),
    ("train.batch_size", 1, math.inf),
    ("train.microbatch_size", 1, math.inf),
    ("train.lr", 1e-12, 1e3),
    ("train.min_lr", 0, 1e3),
    ("train.warmup_steps", 0, math.inf),
    ("train.eps", 1e-30, 1),
    ("train.weight_decay", 0, 1e3),
    ("train.clip", 1e-12, 1e12),
    ("train.skip_nonfinite", 0, math.inf),
    ("train.validate_every", 0, math.inf),
    ("train.validation_rows", 1, math.inf),
    ("train.checkpoint_every", 1, math.inf),
    ("train.log_every", 1, math.inf),
    ("train.threads", 1, 4096),
    ("score.batch_size", 1, 65536),
    ("task.version", 1, math.inf),
    ("task.max_new_tokens", 1, 65536),
    ("task.max_prompt_tokens", 1, math.inf),
    ("task.max_target_tokens", 1, math.inf),
    ("task.rows.train", 1, math.inf),
    ("task.rows.validation", 1, math.inf),
    ("task.rows.test", 1, math.inf),
    ("task.validation_from_train", 0, math.inf),
    ("model.architecture.layers", 1, 10_000),
    ("model.architecture.hidden", 1, math.inf),
    ("model.architecture.heads", 1, math.inf),
    ("model.architecture.kv_heads", 1, math.inf),
    ("model.architecture.head_dim", 1, math.inf),
    ("model.context", 1, math.inf),
    ("seed", 0, 2**63 - 1),
]

_CHOICES: dict[str, tuple[str, ...]] = {
    "model.source": MODEL_SOURCES,
    "train.dtype": DTYPES,
    "train.schedule": ("cosine", "constant"),
    "score.checkpoint": ("last", "best"),
    "tracking.backend": ("none", "wandb"),
}


def _value(config: Config, key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name)
    return node


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors about a configuration into one line for a person."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        raise UserError(
            "a group takes the name of an option, not a bare number: rank=r8 selects one, rank.r=8 sets any value"
        ) from error


def explain(error: BaseException) -> str:
    """One line of what Hydra or OmegaConf says in many, with the nearest right name."""
    text = " ".join(str(part) for part in _chain(error))
    if match := re.search(r"Could not find '([\w-]+)/(.+?)'", text):
        group, option = match.groups()
        names = options(group)
        return f"{group}={option}: no such option; choose one of {', '.join(names)}{_nearest(option, names)}"
    if match := re.search(r"Could not override '([\w.]+)'|Key '([\w.]+)' (?:is )?not in '?(\w+)", text):
        key = match[1] or _full_key(text) or match[2]
        return f"{key}: unknown key{_nearest(key, known_keys())}; `python train.py --cfg job` shows them all"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be parsed as KEY=VALUE ({_first_sentence(text)})"
    if key := _full_key(text):
        return f"{key}: {re.sub('Error merging override [^ ]* ', '', _first_sentence(text))}"
    return _first_sentence(text)


def known_keys() -> list[str]:
    """Every dotted key of the schema."""

    def walk(cls: Any, prefix: str) -> Iterator[str]:
        for item in fields(cls):
            yield prefix + item.name
            if is_dataclass(item.default_factory):
                yield from walk(item.default_factory, f"{prefix}{item.name}.")
            elif item.name in tying.PARTS:
                yield from walk(tying.Factor if item.name in "AB" else tying.Part, f"{prefix}{item.name}.")

    return list(walk(Config, ""))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _full_key(text: str) -> str | None:
    match = re.search(r"full_key: ([\w.\[\]]+)", text)
    return match[1] if match else None


def _first_sentence(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "the configuration cannot be composed")


def _nearest(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
