"""Which passes over a split give the metrics that are wanted. No torch is imported: a finished run is checked fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tiedlora.config.schema import FORGETTING, Config, ObjectiveConfig, ScoreConfig
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import DRIFT, LOSS_METRICS, is_loss
from tiedlora.records.run_record import RunRecord, SplitScores
from tiedlora.scoring.passages import check_source, source_digest
from tiedlora.tasks import Task, load_task
from tiedlora.text import nearest


@dataclass(frozen=True)
class Passes:
    """The passes over the rows of a split. All metrics of a pass are recorded together."""

    answers: bool = True
    """Ask the model every row. This gives the task's own metrics."""
    losses: bool = True
    """The losses of the rows' targets, without generation."""
    drift: bool = False
    """With the losses, the divergence of the adapted from the base model."""
    needs_targets: bool = False
    """Whether rows without a target are an error. Otherwise their split gets no losses."""

    def __bool__(self) -> bool:
        return self.answers or self.losses


ALL_PASSES = Passes()


def wanted_passes(metrics: Sequence[str] | None, task: Task, drift: bool = False) -> Passes:
    """The passes for `score.metrics` and `score.drift`. None means the task's own metrics and the losses.

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
    return _passes_of(metrics, drift)


def check_words(config: Config) -> None:
    """Check what a run is asked to score, and the options of its task, before anything is loaded.

    Raises:
        UserError: an option of the task, the name of a metric or a neutral text is wrong.
    """
    task = load_task(config.task)
    task.check_options()
    wanted_passes(config.score.metrics, task)
    if config.objective.name == "reward":
        reward_metric(config.objective, task)
    if config.score.forgetting is not None:
        check_source(config.score.forgetting)


def reward_metric(objective: ObjectiveConfig, task: Task) -> str:
    """The metric that is the reward of an answer.

    Raises:
        UserError: the task has no such metric, or it is no score of a single answer.
    """
    metric = objective.metric or task.metrics[0]
    of_one = [name for name in task.metrics if name not in task.corpus_metrics]
    if metric not in of_one:
        what = f"objective.metric={metric!s:.40}" if objective.metric else "objective=reward"
        raise UserError(
            f"{what}: the reward must be a score of a single answer, and those of task={task.config.name} are "
            f"{', '.join(of_one) or 'none'}; set objective.metric to one of them, or take another task"
        )
    return metric


def _passes_of(metrics: Sequence[str] | None, drift: bool) -> Passes:
    if metrics is None:
        return Passes(drift=drift, needs_targets=drift)
    losses = any(map(is_loss, metrics))
    return Passes(not all(map(is_loss, metrics)), losses or drift, drift, needs_targets=losses or drift)


def missing_passes(metrics: Sequence[str] | None, recorded: SplitScores | None, drift: bool = False) -> Passes:
    """The wanted passes that a split's record lacks. The names of the metrics are not checked.

    With None, a record with the task's own metrics lacks nothing: runs of earlier versions, which have no losses, stay
    finished.
    """
    wanted = _passes_of(metrics, drift)
    if recorded is None:
        return wanted
    are_losses = [is_loss(metric) for metric in recorded.metrics]
    lacks_losses = wanted.losses and metrics is not None and not any(are_losses)
    losses = lacks_losses or (drift and DRIFT not in recorded.metrics)
    # A record that has the drift keeps it when its losses are scored again.
    with_drift = losses and (drift or DRIFT in recorded.metrics)
    return Passes(wanted.answers and all(are_losses), losses, with_drift, wanted.needs_targets)


def lacks_scores(score: ScoreConfig, record: RunRecord) -> bool:
    """Whether splits, metrics or a neutral text are requested that the finished run lacks."""
    lacking = any(missing_passes(score.metrics, record.scores.get(split), score.drift) for split in score.splits)
    return lacking or forgetting_to_score(score, record) is not None


def with_recorded(score: ScoreConfig, record: RunRecord) -> ScoreConfig:
    """The requested scores and those that the record has, but for losses of neutral text, whose file may be gone."""
    recorded = {split: scores for split, scores in record.scores.items() if split != FORGETTING}
    names = [name for scores in recorded.values() for name in scores.metrics]
    metrics = None if score.metrics is None else sorted({*score.metrics, *names} - {DRIFT})
    return replace(
        score,
        splits=sorted({*score.splits, *recorded}),
        metrics=metrics,
        drift=score.drift or DRIFT in names,
        base=score.base or any(scores.base is not None for scores in recorded.values()),
    )


def forgetting_to_score(score: ScoreConfig, record: RunRecord) -> str | None:
    """The requested neutral text, if the finished run's losses on it are missing, or its file has changed since."""
    measured, source = record.scores.get(FORGETTING), score.forgetting
    if source is None or measured is None:
        return source
    # Records of earlier versions have no digest, and a run that was moved may not have the file beside it.
    digests = (measured.source_digest, source_digest(source))
    is_same = measured.source == source if None in digests else digests[0] == digests[1]
    return None if is_same else source
