"""Compose a configuration from conf/, type it, and check it: what is wrong is one line that names the key."""

from __future__ import annotations

import difflib
import os
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
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from omegaconf.resolvers import oc
from yaml import YAMLError

from tiedlora import storage, tying
from tiedlora.config import adapter_folder as adapters
from tiedlora.config.schema import DTYPES, MODEL_SOURCES, Config, LrFactors, ModelConfig
from tiedlora.errors import UserError
from tiedlora.records.run_record import SPLITS, is_name
from tiedlora.text import visible

PROJECT = Path(__file__).resolve().parents[3]
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
    with readable_errors(), _own_variables_alone():
        # Through plain data: a key that was added with + would otherwise come along unseen.
        values = OmegaConf.to_container(composed, resolve=True)
        typed = OmegaConf.merge(OmegaConf.structured(Config), values)
        missing = sorted(OmegaConf.missing_keys(typed))
        if missing:
            raise UserError(f"{missing[0]}: has no value; choose an option of its group or set it")
        config = OmegaConf.to_object(typed)
    assert isinstance(config, Config)
    if config.train.lr is None:
        config.train.lr = config.tying.suggested_lr
    for key in ("outputs", "cache", "data_root"):
        value = getattr(config, key)
        setattr(config, key, value and str(Path(os.path.expanduser(value)).absolute()))
    _check_texts("", config)
    if config.train.init_from and config.train.init_digest is None:
        folder = adapters.adapter_folder(config.train.init_from).absolute()
        config.train.init_from, config.train.init_digest = str(folder), adapters.digest(folder)
    check(config)
    if config.rank.alpha is None:
        config.rank.alpha = float(config.rank.r)
    return config


def compose_config(overrides: list[str]) -> Config:
    """What `train.py OVERRIDES` would run; for scripts and tests."""
    register()
    with readable_errors():
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            composed = compose(config_name="config", overrides=overrides)
    return load(composed)


def saved(path: Path) -> Config:
    """The configuration that a config.yaml holds.

    Raises:
        UserError: the file is missing or no YAML, or one line that names the key.
    """
    register()
    return load(storage.read_yaml(path))


@contextmanager
def _own_variables_alone() -> Iterator[None]:
    """Interpolations may read TIEDLORA_... of the environment and nothing else: what they give is recorded."""

    def variable(name: str, *default: str | None) -> str | None:
        if not str(name).startswith("TIEDLORA_"):
            raise UserError(
                f"${{oc.env:{name}}}: a configuration is recorded, so it may read TIEDLORA_... of the environment alone"
            )
        return oc.env(name, *default)

    OmegaConf.register_new_resolver("oc.env", variable, replace=True)
    try:
        yield
    except InterpolationResolutionError as error:
        for cause in _chain(error):
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
        raise
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def options(group: str) -> list[str]:
    """The options of a group of conf/, by name."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def check(config: Config) -> None:
    """Refuse impossible values, naming the key, what is allowed and what was given."""
    for key, low, high in _BOUNDS:
        value = _value(config, key)
        if value is not None and not low <= value <= high:
            limit = f"at most {high:,}" if value > high else f"at least {low}"
            raise UserError(f"{key}={value!s:.40}: must be {limit}")
    for key, allowed in _CHOICES.items():
        if (value := _value(config, key)) not in allowed:
            raise UserError(f"{key}={value}: choose one of {', '.join(allowed)}{_nearest(str(value), allowed)}")
    for key in _NAMES:
        if (value := _value(config, key)) is not None and not is_name(value):
            raise UserError(f"{key}={value!r}: use letters, digits, '.', '_', '-' and '/' (no '..'), 96 at most")
    if unknown := sorted(set(config.task.hub.splits) - set(SPLITS)):
        raise UserError(f"task.hub.splits: has {unknown[0]!r}; its keys are {', '.join(SPLITS)}")
    check_device("train.device", config.train.device)
    if bad := [tag for tag in config.tracking.tags if not 1 <= len(tag) <= 64]:
        raise UserError(f"tracking.tags={bad[0]!r:.80}: W&B takes 1 to 64 characters a tag")
    if "" in config.task.stop:
        raise UserError("task.stop: holds an empty text, at which every answer would end; remove it")
    for split in config.score.splits:
        if split not in ("validation", "test"):
            raise UserError(f"score.splits={split}: choose validation, test or both")
    if len(config.train.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in config.train.betas):
        raise UserError(f"train.betas={config.train.betas}: needs two numbers in [0, 1)")
    for field_ in fields(LrFactors):
        factor = getattr(config.train.lr_factor, field_.name)
        if not 0.0 <= factor <= 1e6:
            raise UserError(f"train.lr_factor.{field_.name}={factor}: must be between 0 and 1e6")
    if not any(getattr(config.train.lr_factor, p) > 0 for p in tying.PARTS if getattr(config.tying, p).trained):
        raise UserError("train.lr_factor: is 0 for every trained part, so nothing would move; raise one of them")
    if config.train.warmup_steps > config.train.steps:
        raise UserError(
            f"train.warmup_steps={config.train.warmup_steps}: is more than train.steps={config.train.steps}"
        )
    tying.check(config.tying)
    _check_sizes(config.model)
    d_in, d_out = tying.target_shape(config.model.architecture, config.tying.targets[0])
    if config.model.architecture.layers and config.rank.r > min(d_in, d_out):
        raise UserError(f"rank.r={config.rank.r}: is more than the projection's {min(d_in, d_out)}; use a lower rank")


def check_device(key: str, name: str) -> None:
    """Refuse what torch would not know as a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name, re.ASCII):
        raise UserError(f"{key}={name}: choose auto, cpu, cuda or cuda:NUMBER")


def _check_sizes(model: ModelConfig) -> None:
    """Sizes that fit each other, and a random model that fits a memory: nothing is loaded that says how large it is."""
    a = model.architecture
    if a.heads % a.kv_heads:
        raise UserError(f"model.architecture.kv_heads={a.kv_heads}: must divide heads={a.heads}")
    if model.source != "random":
        return
    if a.family == "gpt2" and a.hidden != a.heads * a.head_dim:
        raise UserError(f"model.architecture.hidden={a.hidden}: must be heads x head_dim={a.heads * a.head_dim}")
    if a.head_dim % 2:
        raise UserError(f"model.architecture.head_dim={a.head_dim}: must be even (rotary embeddings turn pairs)")
    inside = a.layers * (2 * (a.heads + a.kv_heads) * a.head_dim + 3 * a.intermediate)
    if (numbers := a.hidden * (2 * a.vocabulary + model.context + inside)) > LARGEST_RANDOM:
        raise UserError(
            f"model.architecture: a random model of about {numbers:,} parameters; they are for tests, "
            f"{LARGEST_RANDOM:,} at most"
        )


def _check_texts(key: str, value: Any) -> None:
    """No text may hold what rewrites a terminal, ends a path or cannot be written down; prompts may have lines."""
    if isinstance(value, str):
        # Of the marks that direct text, right-to-left languages need the two that end with it.
        text = re.sub("[\n\t\u200e\u200f]", "", value) if key.startswith("task.") else value
        if visible(text) != text:
            raise UserError(f"{key}={value!r:.80}: holds a control character or half of a surrogate pair; remove it")
        if len(value) > LONGEST_TEXT:
            raise UserError(f"{key}: has {len(value):,} characters, at most {LONGEST_TEXT:,} are allowed")
    elif is_dataclass(value) or isinstance(value, dict):
        items = value.items() if isinstance(value, dict) else ((f.name, getattr(value, f.name)) for f in fields(value))
        for name, inner in items:
            _check_texts(f"{key}.{name}" if key else name, inner)
            if isinstance(value, dict):
                _check_texts(f"{key} (a key)", name)
    elif isinstance(value, list):
        for inner in value:
            # OmegaConf lets a list through where a text or a number belongs; a task's own options may have any.
            if isinstance(inner, (list, dict)) and not key.startswith("task.options"):
                raise UserError(f"{key}={value!r:.80}: holds a list where a single value belongs")
            _check_texts(key, inner)


LARGEST_RANDOM = 10**9
"""Parameters of a random model."""
LONGEST_TEXT = 100_000
"""Characters of any text in a configuration: a prompt's template is the longest."""
_NAMES = (
    *("model.name", "model.revision", "model.architecture.family", "tying.name"),
    *("task.name", "task.kind", "task.folder", "task.hub.id", "task.hub.revision"),
    *("tracking.project", "tracking.entity"),
)
"""What becomes part of a path, of a file's name or of the hub's address."""

_MANY = 10**9
"""More than anyone runs, and far from where numbers overflow."""
_BOUNDS: list[tuple[str, float, float]] = [
    ("rank.r", 1, _MANY),
    ("rank.alpha", 1e-12, 1e12),
    ("train.steps", 1, _MANY),
    ("train.batch_size", 1, _MANY),
    ("train.batch_tokens", 1, _MANY),
    ("train.microbatch_size", 1, _MANY),
    ("train.microbatch_tokens", 1, _MANY),
    ("train.lr", 1e-12, 1e3),
    ("train.min_lr", 0, 1e3),
    ("train.warmup_steps", 0, _MANY),
    ("train.eps", 1e-30, 1),
    ("train.weight_decay", 0, 1e3),
    ("train.clip", 1e-12, 1e12),
    ("train.skip_nonfinite", 0, _MANY),
    ("train.validate_every", 0, _MANY),
    ("train.validation_rows", 1, _MANY),
    ("train.checkpoint_every", 1, _MANY),
    ("train.log_every", 1, _MANY),
    ("train.threads", 1, 4096),
    ("score.batch_size", 1, 65536),
    ("score.batch_tokens", 1, _MANY),
    ("task.version", 1, _MANY),
    ("task.max_new_tokens", 1, 65536),
    ("task.max_prompt_tokens", 1, _MANY),
    ("task.max_target_tokens", 1, _MANY),
    ("task.rows.train", 1, _MANY),
    ("task.rows.validation", 1, _MANY),
    ("task.rows.test", 1, _MANY),
    ("task.validation_from_train", 0, _MANY),
    ("model.architecture.layers", 1, 10_000),
    ("model.architecture.hidden", 1, 10**6),
    ("model.architecture.heads", 1, 10**6),
    ("model.architecture.kv_heads", 1, 10**6),
    ("model.architecture.head_dim", 1, 10**6),
    ("model.architecture.intermediate", 0, 10**7),
    ("model.architecture.vocabulary", 0, 10**8),
    ("model.context", 1, _MANY),
    ("task.split_seed", 0, _MANY),
    ("seed", 0, 2**63 - 1),
]

_CHOICES: dict[str, tuple[str, ...]] = {
    "model.source": MODEL_SOURCES,
    "train.dtype": DTYPES,
    "train.schedule": ("cosine", "constant"),
    "train.compile": ("auto", "always", "never"),
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
    except (HydraException, OmegaConfBaseException, OverflowError) as error:
        raise UserError(explain(error)) from error
    except YAMLError as error:
        raise UserError(f"a file of conf/ is not readable YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise UserError("the configuration is nested too deeply to be read") from error
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise UserError("a number has more digits than are read (4300)") from error
        if "Config group override" not in str(error):
            raise
        raise UserError(
            "a group takes the name of an option, not a bare number: rank=r8 selects one, rank.r=8 sets any value"
        ) from error


def explain(error: BaseException) -> str:
    """One line of what Hydra or OmegaConf says in many, with the nearest right name."""
    # Hydra says first which override it was, and only its cause says what is wrong with it.
    parts = [said for part in _chain(error) if not (said := str(part)).startswith("Error merging override ")]
    text = " ".join(parts)
    if match := re.search(r"Could not find '([\w-]+)/(.+?)'", text):
        group, option = match.groups()
        names = options(group)
        return f"{group}={option}: no such option; choose one of {', '.join(names)}{_nearest(option, names)}"
    if match := re.search(r"Could not override '([\w.]+)'|Key '([\w.]+)' (?:is )?not in '?(\w+)", text):
        key = match[1] or _full_key(text) or match[2]
        return f"{key}: unknown key{_nearest(key, known_keys())}; `python train.py --cfg job` shows them all"
    if isinstance(error, OverrideParseException):
        return (
            f"{visible(str(error.override)):.80}: cannot be parsed as KEY=VALUE ({visible(_first_sentence(text)):.80})"
        )
    if key := _full_key(text):
        return f"{key}: {_first_sentence(text)}"
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
    # Hydra and OmegaConf raise errors again while they handle them, so that a chain may bite its tail.
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


def _nearest(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
