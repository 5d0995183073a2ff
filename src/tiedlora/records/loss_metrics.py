"""The metrics of given texts in nats per token: held-out losses, and the drift from the base model. Lower is better.

Every other metric is a score in [0, 1], and higher is better.
"""

from __future__ import annotations

from collections.abc import Iterable

TARGET_LOSS = "target_loss"
"""The mean over rows of each row's mean cross-entropy per target token."""
TARGET_LOSS_BY_TOKEN = "target_loss_by_token"
"""The mean cross-entropy per target token over all rows. A row's statistics are [sum in nats, target tokens]."""
LOSS_METRICS = (TARGET_LOSS, TARGET_LOSS_BY_TOKEN)
DRIFT = "drift"
"""The mean over rows of the mean divergence of the adapted from the base model at a row's target tokens."""
LARGEST_LOSS = 1000.0
"""In nats per token: no model in use has such a loss. It is the end of an interval that one row cannot give."""


def is_loss(metric: str) -> bool:
    """Whether the metric is a loss or the drift: its unit is nats, and lower is better."""
    return metric in LOSS_METRICS or metric == DRIFT


def loss_scores(total: float, tokens: int) -> dict[str, float | list[float]]:
    """The scores of one row: metric -> its mean per token, or its statistics.

    Args:
        total: the sum of the cross-entropy over the row's target tokens, in nats.
    """
    return {TARGET_LOSS: total / tokens, TARGET_LOSS_BY_TOKEN: [total, float(tokens)]}


def mean_per_token(statistics: Iterable[float]) -> float:
    """The mean loss per token, from the sums of rows' statistics."""
    total, tokens = statistics
    return float(total / tokens)
