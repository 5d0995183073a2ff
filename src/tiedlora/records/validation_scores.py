"""The scores on validation by which learning rates are compared: all runs by the same metric, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.run_record import RunRecord


def validation_metric(records: Iterable[RunRecord]) -> str | None:
    """The first metric on validation, by which runs can be compared; None if they do not all have the same one.

    Runs without a score on validation do not count.
    """
    firsts = {scores.first_metric for record in records if (scores := record.scores.get("validation")) is not None}
    return firsts.pop() if len(firsts) == 1 else None


def validation_scores(records: Mapping[int, RunRecord], metric: str | None) -> dict[int, float]:
    """Seed -> the score on validation by this metric, where more is better: a loss is negated.

    Args:
        metric: None gives no scores.
    """
    values = {
        seed: scores.metrics[metric].value
        for seed, record in records.items()
        if metric is not None and (scores := record.scores.get("validation")) is not None
    }
    return {seed: -value for seed, value in values.items()} if metric and is_loss(metric) else values
