"""A finished run's record, result.json, as typed values. It is built when a run ends, and checked when it is read.

To read it needs neither torch nor Hydra. The report, the sweeps and the scripts read runs through this module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from tiedlora import storage
from tiedlora.config.schema import FORGETTING, SCORED_SPLITS, SPLITS
from tiedlora.errors import UserError
from tiedlora.records.admission import Admission
from tiedlora.records.execution import CodeVersion, ContinuedFrom, Execution, with_execution
from tiedlora.records.halving import Halving
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.reading import Count, Name, Number, Text, Whole, is_number, typed
from tiedlora.records.recorded_config import ConfigRecord, Identity, with_tree
from tiedlora.text import is_name
from tiedlora.tying import PARTS

RUN_ID = re.compile(r"\w[A-Za-z0-9._-]{0,400}", re.ASCII)


def _numbers(value: Any) -> Any:
    """Check that a value and the ends of its interval are finite numbers."""
    ends = [value.get(key) for key in ("value", "low", "high")] if isinstance(value, dict) else [None]
    if isinstance(value, Interval) or all(map(is_number, ends)):
        return value
    raise PydanticCustomError("not_an_interval", f"is {NOT_A_SCORE}")


NOT_A_SCORE = "not a value with an interval, all within [-1, 1]"
ScoreInterval = Annotated[Interval, BeforeValidator(_numbers)]
Scores = dict[Name, ScoreInterval]
"""Metric -> its value with its interval: within [-1, 1], or in nats if the metric is a loss."""


@dataclass(frozen=True)
class BaseModelRecord:
    """Which base model an adapter belongs to."""

    name: Text
    revision: Text | None
    digest: Text | None
    """The sha256 of its files, or its commit on the hub. Digest and revision are None if a program made the model."""
    quantization: Text | None = None
    """nf4 or int8, if its linear layers are quantised after loading; the digest is that of the files."""

    def __str__(self) -> str:
        return f"{self.name} at {self.revision} ({self.digest}{f', {self.quantization}' if self.quantization else ''})"


@dataclass(frozen=True)
class DataRecord:
    """The rows of one split that training or validation saw."""

    digest: Text
    """sha256 of the examples' content (tasks.digest)."""
    rows: Count = 0
    shortened: Count = 0
    """Rows whose prompt was shortened to fit."""
    dropped_prompt: Count = 0
    """Rows left out because their prompt did not fit."""
    dropped_target: Count = 0
    dropped_answer: Count = 0
    """Rows left out because shortening the prompt removed the answer from it."""


@dataclass(frozen=True)
class TrainingRecord:
    """The costs and the losses of training."""

    steps: Count
    seconds: Number
    """Seconds of the training steps, without validation and checkpoints."""
    tokens_per_s: Number
    validation_loss_first: Number
    """Mean loss per target token before the first step."""
    validation_loss_last: Number
    peak_memory_bytes: Count
    """Bytes, read when training ended: the largest allocations of the first process on its GPUs, added up, or the
    process's largest resident size."""
    tokens: Count = 0
    """Real tokens; padding is not counted."""
    target_tokens: Count = 0
    clipped_share: Number = 0.0
    """Share of the steps whose gradient was clipped."""
    skipped_steps: Count = 0
    best_step: Count | None = None
    """The step of the lowest validation loss."""
    scored_step: Count | None = None
    """The step whose adapter was saved and scored."""
    halvings: list[Halving] | None = None
    """Where memory ran out, in order; None if it never did."""
    continued_from: list[ContinuedFrom] | None = None
    """How its earlier steps were made, in order, if the run then continued with other code or packages or on another
    device or processor. None if it did not, and in records before this key."""


TEXTS, ADAPTER = "texts", "adapter"
"""What a study may leave out of a run: prompts, references and texts of choices; the adapter's files."""


@dataclass(frozen=True)
class EngineRecord:
    """The program that wrote the answers of a split, if it is not this project's decoding."""

    name: Text
    """As score.engine."""
    version: Text
    compared: Count
    """So many rows of the split were also answered by this project's decoding,"""
    same: Count
    """and so many of those answers are the same texts."""

    def __str__(self) -> str:
        compared = f"{self.same} of {self.compared} compared answers are those of score.engine=transformers"
        return f"answers by {self.name} ({self.version}): {compared}"


@dataclass(frozen=True)
class SplitScores:
    """The scores of one split. All scores are fractions of 1, BLEU and chrF too. Only losses are in nats."""

    rows: Annotated[Count, Field(gt=0)]
    digest: Text
    metrics: Annotated[Scores, Field(min_length=1)]
    seconds: Number = 0.0
    """Seconds of the adapted model's answers."""
    loss_seconds: Number | None = None
    """Seconds of the adapted model's losses."""
    shortened: Count = 0
    output_tokens: Count = 0
    batch_halvings: Count | None = None
    """How often score.batch_size and score.batch_tokens were halved, for the base model too, because memory ran out."""
    engine: EngineRecord | None = None
    """Who wrote the answers, if not this project's decoding."""
    cut_targets: Count | None = None
    """Rows whose loss leaves out the end of the target, which does not fit into the context; None if there are none."""
    base: Scores | None = None
    """The base model's scores on the same rows."""
    gain: Scores | None = None
    """Adapted minus base, paired on the rows. For a loss, a negative gain is an improvement."""
    source: Text | None = None
    """Where the rows come from, if they are passages of neutral text (the value of score.forgetting)."""
    source_digest: Text | None = None
    """The sha256 of the source, if it is a text file."""
    signatures: dict[Text, Text] | None = None
    """Metric -> the implementation and settings that computed it, if its name does not say enough."""
    files: dict[Text, Text] = field(default_factory=dict)
    """Predictions file -> its sha256."""

    @property
    def first_metric(self) -> str:
        """The metric that comparisons use."""
        return next(iter(self.metrics))


@dataclass(frozen=True)
class RunRecord:
    """The content of result.json of a finished run."""

    run_id: Text
    identity: Annotated[Identity, BeforeValidator(with_tree)]
    config: Annotated[ConfigRecord, BeforeValidator(with_tree)]
    seed: Whole
    code: CodeVersion
    versions: dict[str, str]
    """Package -> installed version."""
    execution: Execution
    base: BaseModelRecord
    trainable_params: Count
    share_of_lora: Number
    """Trainable parameters divided by those of the paper's LoRA at the same rank."""
    data: dict[str, DataRecord]
    training: TrainingRecord
    adapter_bytes: Count
    scores: dict[str, SplitScores]
    status: Text
    """Always `done`: other runs have no record."""
    files: dict[str, str] = field(default_factory=dict)
    """File of the adapter -> its sha256."""
    stored_params: Count | None = None
    """Numbers in the adapter's files, frozen ones included; None if these are the trained parameters."""
    more_ends: list[Count] | None = None
    """The tokens at which answers end, besides the tokenizer's end-of-text token; None if there are no others, and in
    records of earlier versions, which knew none."""
    admission: Admission | None = None
    """The checks of an arm of another method before its first step."""
    left_out: list[Text] | None = None
    """What a study does not keep of the run's folder: TEXTS, ADAPTER. None for the run's own folder."""

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> RunRecord:
        """The record from the JSON object of result.json.

        Raises:
            UserError: a key is missing or wrong; the message names it.
        """
        record = typed(cls, with_execution(tree))
        _check(record)
        return record

    def to_json(self) -> dict[str, Any]:
        """The JSON object, with the keys that earlier versions of the code read."""
        tree: dict[str, Any] = {}
        for name, value in plain(self).items():
            if name == "execution":
                # For readers of version 0.1.
                tree["device"] = str(self.execution)
            tree[name] = value
        return {**tree, "identity": self.identity.tree, "config": self.config.tree}

    @property
    def executions(self) -> list[Execution]:
        """Where its steps were trained, in order; the last is also where it was scored."""
        return [*(earlier.execution for earlier in self.training.continued_from or ()), self.execution]

    @property
    def executions_in_words(self) -> str:
        """Where its steps were trained, for a reader: each place once, in order."""
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

    def keeps(self, what: str) -> bool:
        """Whether the folder has its texts or its adapter (TEXTS, ADAPTER). A study may leave them out."""
        return what not in (self.left_out or ())

    @property
    def lacks_adapter(self) -> bool:
        """Whether a study has left the adapter out, so that nothing more can be scored."""
        return not self.keeps(ADAPTER)

    @property
    def is_other_method(self) -> bool:
        """Whether another method than this project's own was trained."""
        return self.identity.tying.get("method") is not None

    @property
    def label(self) -> str:
        """LoRA, TABuv, ... or custom: the name that follows from the specification's values."""
        return self.run_id.split("-", 1)[0]


def plain(value: Any) -> Any:
    """Dataclasses as JSON objects. A field whose default is None is left out if its value is None."""
    if is_dataclass(value):
        present = [f for f in fields(value) if not (f.default is None and getattr(value, f.name) is None)]
        return {f.name: plain(getattr(value, f.name)) for f in present}
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def read_record(path: Path) -> RunRecord:
    """The record of a finished run.

    Raises:
        UserError: the file is not a run's record; the message names the file, and the key that is missing or wrong.
    """
    tree = storage.read_json(path)
    try:
        return RunRecord.from_json(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check(record: RunRecord) -> None:
    """Refuse a record that has the right types, but whose values cannot be those of a finished run."""
    if record.status != "done":
        raise UserError(f"its status is {record.status!r:.60}, not 'done'")
    if not RUN_ID.fullmatch(record.run_id):
        raise UserError(f"'run_id' is {record.run_id!r:.60}, which is no name of this project")
    if not is_name(record.base.name):
        raise UserError(f"'base.name' is {record.base.name!r:.60}, which is no name of this project")
    if record.base.digest is None:
        raise UserError("'base.digest' is None, which no run has")
    for part in PARTS:
        if not isinstance(record.identity.tying.get(part, {}), dict):
            raise UserError(f"'identity.tying.{part}' is not an object")
    for split in ("train", "validation"):
        if split not in record.data:
            raise UserError(f"has no 'data.{split}', so it is not a run's record of this project")
    for split in record.data:
        if split not in SPLITS:
            raise UserError(f"'data.{split:.40}' is not a split's digest")
    for split, scores in record.scores.items():
        if split not in (*SCORED_SPLITS, FORGETTING):
            raise UserError(f"'scores.{split:.40}' is not a split that is scored")
        if (scores.base is None) != (scores.gain is None):
            raise UserError(f"'scores.{split}' has only one of base and gain")
        for kind, others in (("base", scores.base), ("gain", scores.gain)):
            if others is not None and set(others) != set(scores.metrics):
                raise UserError(f"'scores.{split}.{kind}' has other metrics than 'scores.{split}.metrics'")
        for kind in ("metrics", "base", "gain"):
            for metric, interval in (getattr(scores, kind) or {}).items():
                ends = (interval.value, interval.low, interval.high)
                if not is_loss(metric) and max(map(abs, ends)) > 1 + 1e-9:
                    raise UserError(f"'scores.{split}.{kind}.{metric}' is {NOT_A_SCORE}")
