"""Which kinds of scores are wanted, and which of them a run lacks. It imports no torch, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tiedlora import storage
from tiedlora.config.schema import FORGETTING, Config, ObjectiveConfig, ScoreConfig
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import LOSS_METRICS
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import KINDS, Kind, kind_of, read_score_record
from tiedlora.scoring.passages import check_source, source_digest
from tiedlora.tasks import Task, load_task
from tiedlora.text import nearest


@dataclass(frozen=True)
class Wanted:
    """The kinds of scores that are wanted of a split. All metrics of a kind are scored together."""

    kinds: tuple[Kind, ...]
    needs_targets: bool = False
    """Whether rows without a target are an error. Otherwise their split gets no losses."""

    def among(self, kinds: Iterable[Kind]) -> Wanted:
        """Only those of these kinds."""
        return replace(self, kinds=tuple(kind for kind in self.kinds if kind in kinds))


def wanted_scores(metrics: Sequence[str] | None, task: Task, drift: bool = False) -> Wanted:
    """The kinds for `score.metrics` and `score.drift`. None means the task's own metrics and the losses.

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
    return _wanted(metrics, drift)


def check_words(config: Config) -> None:
    """Check what a run is asked to score, and the options of its task, before anything is loaded.

    Raises:
        UserError: an option of the task, the name of a metric or a neutral text is wrong.
    """
    task = load_task(config.task)
    task.check_options()
    wanted_scores(config.score.metrics, task)
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


def _wanted(metrics: Sequence[str] | None, drift: bool) -> Wanted:
    named = {"answers", "losses"} if metrics is None else set(map(kind_of, metrics))
    if drift:
        named.add("drift")
    needs_targets = drift or (metrics is not None and "losses" in named)
    return Wanted(tuple(kind for kind in KINDS if kind in named), needs_targets)


def missing_scores(score: ScoreConfig, folder: RunFolder) -> dict[str, Wanted]:
    """Split -> the wanted kinds that a run has no file of. The names of the metrics are not checked.

    Raises:
        UserError: a file of scores is damaged.
    """
    found = {}
    for split in score.splits:
        wanted = _wanted(score.metrics, score.drift)
        lacking = {kind for kind in wanted.kinds if not storage.is_here(folder.scores_file(split, kind))}
        # Rows without a target have no losses, and null asks for losses only where there are some.
        if lacking == {"losses"} and not wanted.needs_targets:
            answers = read_score_record(folder.scores_file(split, "answers"))
            lacking = lacking if answers.has_targets else set()
        if lacking:
            found[split] = wanted.among(lacking)
    return found


def lacks_scores(score: ScoreConfig, folder: RunFolder) -> bool:
    """Whether scores or a neutral text are requested that the finished run lacks.

    Raises:
        UserError: a file of scores is damaged.
    """
    return bool(missing_scores(score, folder)) or forgetting_to_score(score, folder) is not None


def forgetting_to_score(score: ScoreConfig, folder: RunFolder) -> str | None:
    """The requested neutral text, if the run's losses on it are missing, or its file has changed since.

    Raises:
        UserError: the file of these losses is damaged.
    """
    source, path = score.forgetting, folder.scores_file(FORGETTING, "losses")
    if source is None or not storage.is_here(path):
        return source
    measured = read_score_record(path)
    now = source_digest(source)
    # A run that was moved may not have the file beside it.
    is_same = measured.source == source if now is None else measured.source_digest == now
    return None if is_same else source
