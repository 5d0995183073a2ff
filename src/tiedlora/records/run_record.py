"""The record of a finished run's training, result.json, as typed values. Its scores have other files (scores.py).

Reading it needs neither torch nor Hydra. The report, the sweeps and the scripts read runs through this module.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from tiedlora.config.schema import SPLITS, Split
from tiedlora.config.trial_arm import TrialArm, trial_arm
from tiedlora.description import BaseModelRecord
from tiedlora.errors import UserError
from tiedlora.reading import (
    Flag,
    StoredCount,
    StoredName,
    StoredNumber,
    StoredText,
    StoredWhole,
    plain,
    read_typed,
    typed,
)
from tiedlora.records.provenance import CodeVersion, ContinuedFrom, Execution
from tiedlora.text import is_name

RunId = Annotated[StoredText, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,400}$")]
Sha256 = Annotated[StoredText, Field(pattern="^[0-9a-f]{64}$")]
AdapterFile = Annotated[StoredText, Field(pattern=r"^adapter/[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


@dataclass(frozen=True)
class Named:
    """A model, a task or a tying. Only a task has a kind."""

    name: StoredName
    kind: StoredText = ""


@dataclass(frozen=True)
class RankValues:
    """`rank` of a recorded configuration."""

    r: StoredWhole
    alpha: StoredNumber | None = None
    scaling: StoredText = "standard"


@dataclass(frozen=True)
class TrainValues:
    """`train` of a recorded configuration, as far as readers use it."""

    lr: StoredNumber
    lr_factor: dict[StoredText, StoredNumber] | None = None


def with_tree(value: Any) -> Any:
    """The object with itself as its `tree`. Anything else is left to the check of types."""
    return {**value, "tree": value} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Identity:
    """The values that a run's id is a hash of. The attributes are those that tables show; `tree` holds every value."""

    model: Named
    task: Named
    rank: RankValues
    train: TrainValues
    tying: dict[str, Any]
    score: dict[str, Any]
    tree: dict[str, Any]
    objective: dict[str, Any] = field(default_factory=dict)

    @property
    def shuffles_targets(self) -> bool:
        """Whether it trained on shuffled targets, so that it can have learned only the form of an answer."""
        return bool(self.tree["task"].get("shuffle_targets"))


@dataclass(frozen=True)
class ConfigRecord:
    """The whole resolved configuration, facts of execution included. As in `Identity`, `tree` holds every value."""

    tying: Named
    tree: dict[str, Any]


Values = TypeVar("Values", Identity, ConfigRecord)


def from_tree(kind: type[Values], tree: dict[str, Any]) -> Values:
    """The values that config.identity.identity or config_tree returns, as a record has them."""
    return typed(kind, with_tree(tree))


@dataclass(frozen=True)
class DataRecord:
    """The rows of one split that training or validation saw."""

    digest: StoredText
    """sha256 of the examples' content (tasks.digest)."""
    rows: StoredCount = 0
    shortened: StoredCount = 0
    """Rows whose prompt was shortened to fit."""
    dropped_prompt: StoredCount = 0
    """Rows left out because their prompt did not fit."""
    dropped_target: StoredCount = 0
    dropped_answer: StoredCount = 0
    """Rows left out because shortening the prompt removed the answer from it."""


@dataclass(frozen=True)
class Halving:
    """Memory ran out, and from then on passes were at most half as large. The gradients are the same sums."""

    step: StoredCount
    """The optimizer step, counted from 1; 0 for the validation before it."""
    during: StoredText
    """`training` or `validation`; `sampling` of the answers that objective=reward scores."""
    tokens: StoredCount
    """Most tokens of a pass from then on, with its padding. A row that has more is a pass of its own. While
    sampling, the number of answers in a batch, times the longest prompt and answer of the step."""


@dataclass(frozen=True)
class TrainingRecord:
    """The costs and the losses of training."""

    steps: StoredCount
    seconds: StoredNumber
    """Seconds of the training steps, without validation and checkpoints."""
    tokens_per_s: StoredNumber
    validation_loss_first: StoredNumber
    """Mean loss per target token before the first step."""
    validation_loss_last: StoredNumber
    peak_memory_bytes: StoredCount
    """Bytes, read when training ended: the largest allocations of the first process on its GPUs, added up, or the
    process's largest resident size."""
    tokens: StoredCount = 0
    """Real tokens; padding is not counted."""
    target_tokens: StoredCount = 0
    clipped_share: StoredNumber = 0.0
    """Share of the steps whose gradient was clipped."""
    skipped_steps: StoredCount = 0
    best_step: StoredCount | None = None
    """The step of the lowest validation loss."""
    scored_step: StoredCount | None = None
    """The step whose adapter was saved and scored."""
    halvings: list[Halving] | None = None
    """Where memory ran out, in order; None if it never did."""
    continued_from: list[ContinuedFrom] | None = None
    """How its earlier steps were made, in order, if the run then continued with other code or packages or on another
    device or processor. None if it did not, and in records before this key."""


ROUNDING = 1e-3
"""The largest difference of logits, relative to the largest logit, that counts as rounding."""


@dataclass(frozen=True)
class Admission:
    """The checks of an arm on a few rows. Differences are the largest ones of any logit, relative to the largest logit
    of the base model.
    """

    start: StoredNumber
    """Between the base model and the arm before training."""
    moves: Flag
    """Whether one step of training changes a logit."""
    later_tokens: StoredNumber
    """At a position, when only tokens after it change."""
    other_rows: StoredNumber
    """In a row, when only the other rows of its batch change."""
    reload: StoredNumber
    """Between the arm and the arm that is read from its files."""

    @property
    def is_causal(self) -> bool:
        """Whether the logits at a position depend on that position and earlier ones only."""
        return self.later_tokens == 0

    @property
    def keeps_rows_apart(self) -> bool:
        """Whether the logits of a row do not depend on the other rows of its batch."""
        return self.other_rows == 0

    def marks(self) -> dict[str, str]:
        """What a reader of scores must know: a mark of a few words -> the sentence that explains it."""
        failed = {
            "off the base": (self.start > ROUNDING, "starts with other logits than the base model"),
            "does not move": (not self.moves, "does not move at its first step"),
            "not causal": (not self.is_causal, "not causal: answers depend on later tokens"),
            "mixes rows": (not self.keeps_rows_apart, "answers depend on the other rows of a batch"),
            "not reloaded": (self.reload > ROUNDING, "gives other logits after it is saved and loaded"),
        }
        return {mark: sentence for mark, (is_failed, sentence) in failed.items() if is_failed}


@dataclass(frozen=True)
class RunRecord:
    """The content of result.json of a finished run: its training."""

    run_id: RunId
    identity: Annotated[Identity, BeforeValidator(with_tree)]
    config: Annotated[ConfigRecord, BeforeValidator(with_tree)]
    seed: StoredWhole
    code: CodeVersion
    versions: dict[str, str]
    """Package -> installed version."""
    execution: Execution
    base: BaseModelRecord
    trainable_params: Annotated[StoredCount, Field(gt=0)]
    share_of_lora: StoredNumber
    """Trainable parameters divided by those of the paper's LoRA at the same rank."""
    data: dict[Split, DataRecord]
    training: TrainingRecord
    adapter_bytes: StoredCount
    status: Literal["done"]
    """Always `done`: other runs have no record."""
    files: dict[AdapterFile, Sha256] = field(default_factory=dict)
    """File of the adapter -> its sha256."""
    stored_params: StoredCount | None = None
    """Numbers in the adapter's files, frozen ones included; None if these are the trained parameters."""
    more_ends: list[StoredCount] | None = None
    """The tokens at which answers end, besides the tokenizer's end-of-text token; None if there are no others."""
    admission: Admission | None = None
    """The checks of an arm of another method before its first step."""
    keeps_texts: Flag = True
    """Whether the folder has the rows' texts. A study leaves them out, and may leave out the adapter's files."""

    def to_json(self) -> dict[str, Any]:
        """The content of result.json. Configurations are written as they were read, with all their keys."""
        return {**plain(self), "arm": asdict(self.arm), "identity": self.identity.tree, "config": self.config.tree}

    @property
    def executions(self) -> list[Execution]:
        """Where its steps were trained, in order."""
        return [*(earlier.execution for earlier in self.training.continued_from or ()), self.execution]

    @property
    def executions_in_words(self) -> str:
        """As `executions`, for a reader: each place once."""
        return ", then ".join(dict.fromkeys(map(str, self.executions)))

    @property
    def code_versions(self) -> list[CodeVersion]:
        """The code that made the run, in order: more than one if it continued with other code."""
        earlier = [earlier.code for earlier in self.training.continued_from or () if earlier.code is not None]
        return list(dict.fromkeys([*earlier, self.code]))

    @property
    def all_versions(self) -> list[dict[str, str]]:
        """The versions of the packages that made the run, in order."""
        return [*(earlier.versions for earlier in self.training.continued_from or ()), self.versions]

    def rounds_as(self, other: Execution) -> bool:
        """Whether all its steps were trained on the same kind of device. False if a processor is not recorded."""
        return all(execution.rounds_as(other) for execution in self.executions)

    @cached_property
    def arm(self) -> TrialArm:
        """What was trained. It follows from the identity, so that a name of the table is never an old one.

        Raises:
            UserError: a value of the identity is impossible.
        """
        return trial_arm(self.identity.tree, self.config.tying.name)


def read_record(path: Path) -> RunRecord:
    """The record of a finished run.

    Raises:
        UserError: the file is not a run's record; the message names the file, and the key that is missing or wrong.
    """
    record = read_typed(path, RunRecord)
    try:
        assert record.arm
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if fault := _fault(record):
        raise UserError(f"{path}: {fault}")
    return record


def _fault(record: RunRecord) -> str | None:
    """What is wrong with a record that has the right types, but whose values cannot be those of a finished run."""
    if not is_name(record.base.name):
        return f"'base.name' is {record.base.name!r:.60}, which is no name of this project"
    if record.base.digest is None:
        return "'base.digest' is None, which no run has"
    for split in SPLITS[:2]:
        if split not in record.data:
            return f"has no 'data.{split}', so it is not a run's record of this project"
    return None
