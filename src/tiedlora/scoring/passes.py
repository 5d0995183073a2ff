"""Which passes over a split give the metrics that are wanted. No torch is imported: a finished run is checked fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiedlora.config.schema import FORGETTING, ScoreConfig
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import LOSS_METRICS, is_loss
from tiedlora.records.run_record import RunRecord, SplitScores
from tiedlora.scoring.passages import source_digest
from tiedlora.tasks import Task
from tiedlora.text import nearest


@dataclass(frozen=True)
class Passes:
    """The passes over the rows of a split. All metrics of a pass are recorded together."""

    answers: bool = True
    """Ask the model every row. This gives the task's own metrics."""
    losses: bool = True
    """The losses of the rows' targets, without generation."""
    needs_targets: bool = False
    """Whether rows without a target are an error. Otherwise their split gets no losses."""

    def __bool__(self) -> bool:
        return self.answers or self.losses


ALL_PASSES = Passes()


def wanted_passes(metrics: Sequence[str] | None, task: Task) -> Passes:
    """The passes for `score.metrics`. None means the task's own metrics and the losses.

    Raises:
        UserError: a name is no metric of the task.
    """
    known = (*task.metrics, *LOSS_METRICS)
    for name in metrics or ():
        if name not in known:
            raise UserError(
                f"score.metrics={name!s:.40}: no such metric of task={task.config.name}; choose from "
                f"{', '.join(known)}{nearest(name, known)}"
            )
    if metrics is not None and not metrics:
        raise UserError("score.metrics=[]: names no metric; null takes all, and score.splits=[] scores nothing")
    return _passes_of(metrics)


def _passes_of(metrics: Sequence[str] | None) -> Passes:
    if metrics is None:
        return ALL_PASSES
    losses = any(map(is_loss, metrics))
    return Passes(answers=not all(map(is_loss, metrics)), losses=losses, needs_targets=losses)


def missing_passes(metrics: Sequence[str] | None, recorded: SplitScores | None) -> Passes:
    """The wanted passes that a split's record lacks. The names of the metrics are not checked.

    With None, a record with the task's own metrics lacks nothing: runs of earlier versions, which have no losses, stay
    finished.
    """
    wanted = _passes_of(metrics)
    if recorded is None:
        return wanted
    has_losses = any(map(is_loss, recorded.metrics))
    has_answers = not all(map(is_loss, recorded.metrics))
    answers, losses = wanted.answers and not has_answers, wanted.losses and not has_losses
    return Passes(answers, losses and metrics is not None, wanted.needs_targets)


def lacks_scores(score: ScoreConfig, record: RunRecord) -> bool:
    """Whether splits, metrics or a neutral text are requested that the finished run lacks."""
    lacking = any(missing_passes(score.metrics, record.scores.get(split)) for split in score.splits)
    return lacking or forgetting_to_score(score, record) is not None


def forgetting_to_score(score: ScoreConfig, record: RunRecord) -> str | None:
    """The requested neutral text, if the finished run's losses on it are missing, or its file has changed since."""
    measured, source = record.scores.get(FORGETTING), score.forgetting
    if source is None or measured is None or measured.source != source:
        return source
    # Records of earlier versions have no digest, and a run that was moved may not have the file beside it.
    digests = (measured.source_digest, source_digest(source))
    return None if None in digests or digests[0] == digests[1] else source
