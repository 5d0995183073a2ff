"""Refuse impossible values of a configuration in one line that names the key, before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any

from tiedlora import tying
from tiedlora.config.explain import nearest
from tiedlora.config.schema import DTYPES, MODEL_SOURCES, SPLITS, Config, LrFactors, ModelConfig
from tiedlora.errors import UserError
from tiedlora.text import is_name, visible


def check(config: Config) -> None:
    """Refuse impossible values, naming the key, what is allowed and what was given."""
    for key, low, high in _BOUNDS:
        value = _value(config, key)
        if value is not None and not low <= value <= high:
            limit = f"at most {high:,}" if value > high else f"at least {low}"
            raise UserError(f"{key}={value!s:.40}: must be {limit}")
    for key, allowed in _CHOICES.items():
        if (value := _value(config, key)) not in allowed:
            raise UserError(f"{key}={value}: choose one of {', '.join(allowed)}{nearest(str(value), allowed)}")
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


def check_texts(key: str, value: Any) -> None:
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
            check_texts(f"{key}.{name}" if key else name, inner)
            if isinstance(value, dict):
                check_texts(f"{key} (a key)", name)
    elif isinstance(value, list):
        for inner in value:
            # OmegaConf lets a list through where a text or a number belongs; a task's own options may have any.
            if isinstance(inner, (list, dict)) and not key.startswith("task.options"):
                raise UserError(f"{key}={value!r:.80}: holds a list where a single value belongs")
            check_texts(key, inner)


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
    "train.optimizer": ("adamw",),
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
