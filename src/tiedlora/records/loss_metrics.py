"""The metrics that are losses: lower is better, and the unit is nats."""

from __future__ import annotations

TARGET_LOSS = "target_loss"
"""The mean over rows of a row's mean loss per target token."""
TARGET_LOSS_BY_TOKEN = "target_loss_by_token"
"""The mean loss per target token over all rows."""
LOSSES = (TARGET_LOSS, TARGET_LOSS_BY_TOKEN)


def is_loss(metric: str) -> bool:
    """Whether a lower value of the metric is better, and its unit is nats. Every other metric is a score in [0, 1]."""
    return metric in LOSSES
