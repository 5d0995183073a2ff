"""The scores of runs for each example, read once from predictions/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tiedlora.analysis.crossed import Array
from tiedlora.analysis.runs import Run
from tiedlora.config.schema import TaskConfig
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import TARGET_LOSS_BY_TOKEN, mean_per_token
from tiedlora.records.rows import Score
from tiedlora.tasks import load_task

TOLERANCE = 1e-6
"""The allowed difference, by rounding, of a recorded metric from the mean over its examples."""


@dataclass(frozen=True)
class ExampleScores:
    """The content of one predictions file: the scores of every example."""

    ids: tuple[str, ...]
    values: dict[str, Array] = field(default_factory=dict)
    """Metric -> one number per example, whose mean is the metric."""


class Scorebook:
    """The scores of runs for each example. Each predictions file is read once."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str, bool], ExampleScores | UserError] = {}

    def scores(self, run: Run, split: str, metric: str, base: bool = False) -> tuple[tuple[str, ...], Array]:
        """(ids, one number per example) whose mean is the metric.

        Raises:
            UserError: predictions are missing or damaged, or disagree with result.json.
        """
        key = (str(run.path), split, base)
        if key not in self._files:
            self._files[key] = _read(run, split, base)
        scores = self._files[key]
        if isinstance(scores, UserError):
            raise scores
        recorded = (run.splits[split].base or {}) if base else run.splits[split].metrics
        if metric not in scores.values or metric not in recorded:
            raise UserError(f"predictions/{split} has no per-example {metric}")
        values = scores.values[metric]
        if abs(float(values.mean()) - recorded[metric].value) > TOLERANCE:
            raise UserError(f"predictions/{split} disagrees with result.json on {metric}; scripts/verify.py says where")
        return scores.ids, values

    def table(self, runs: Sequence[Run], split: str, metric: str, ids: tuple[str, ...] | None = None) -> Array:
        """(runs, examples): the scores of several runs on the same examples.

        Args:
            ids: the examples that every run must have; None takes those of the first run.

        Raises:
            UserError: as `scores`, or the runs' predictions are of different examples.
        """
        columns = []
        for run in runs:
            own_ids, values = self.scores(run, split, metric)
            ids = own_ids if ids is None else ids
            if own_ids != ids:
                raise UserError(f"{run.run_id}: its predictions are of other examples")
            columns.append(values)
        return np.stack(columns)


def _read(run: Run, split: str, base: bool) -> ExampleScores | UserError:
    try:
        rows = run.rows(split, base)
    except UserError as error:
        return error
    values = {}
    for metric in run.splits[split].metrics:
        scores = [row.scores.get(metric) for row in rows]
        try:
            if (column := _column(run, metric, scores)) is not None:
                values[metric] = column
        except UserError as error:
            return error
        except (KeyError, TypeError, ValueError, ArithmeticError, ImportError) as error:
            return UserError(f"predictions/{split}: its scores of {metric} cannot be read ({error!r:.60})")
    return ExampleScores(tuple(row.id for row in rows), values)


def _column(run: Run, metric: str, scores: Sequence[Score | None]) -> Array | None:
    """One number per example; None if an example lacks the metric."""
    if None in scores:
        return None
    if all(isinstance(score, list) for score in scores):
        return pseudo_values(np.array(scores, dtype=np.float64), corpus_score(run, metric))
    return np.array(scores, dtype=np.float64)


def corpus_score(run: Run, metric: str) -> Callable[[Array], float]:
    """The function from summed statistics to a corpus-level metric such as BLEU. The run's task defines it.

    Raises:
        UserError: this version of the code has no such task, or the task has no such metric.
    """
    if metric == TARGET_LOSS_BY_TOKEN:
        return mean_per_token
    identity = run.record.identity
    options = identity.tree["task"].get("options", {})
    task = load_task(TaskConfig(name=run.task, kind=identity.task.kind, options=options))
    if metric not in task.corpus_metrics:
        raise UserError(f"task {run.task}: this version of the code has no corpus score for {metric}")
    return lambda sums: float(task.corpus_score(metric, sums))


def pseudo_values(statistics: Array, score: Callable[[Array], float]) -> Array:
    """One number per example for a metric that is not a mean. So every interval of a mean works for it too.

    These are Tukey's jackknife pseudo-values (Ann. Math. Statist. 29, 1958, p. 614), shifted so that their mean is the
    corpus score. To first order, the spread of their mean is the spread of the score when examples are resampled.

    Args:
        statistics: (examples, statistics). `score` takes their sum over examples.
    """
    total, count = statistics.sum(0), len(statistics)
    full_score = score(total)
    without_one = np.array([score(total - row) for row in statistics])
    values = count * full_score - (count - 1) * without_one
    return np.asarray(values - values.mean() + full_score)
