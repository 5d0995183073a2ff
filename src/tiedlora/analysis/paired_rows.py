"""The difference of two mean losses over the same rows, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowLosses:
    """The losses of one model on rows of text."""

    losses: Sequence[float]
    """Each row's mean loss per token."""
    tokens: Sequence[int]
    """Each row's number of tokens."""

    def mean(self) -> float:
        """The mean loss per token over all rows, as training and its records compute it."""
        return float(np.average(self.losses, weights=self.tokens))


def paired_difference(first: RowLosses, second: RowLosses) -> tuple[float, float]:
    """The mean loss per token of `first` minus that of `second`, and the standard error over the choice of rows.

    The mean is a ratio of two sums over rows. So its standard error is that of the linearised ratio (Cochran, Sampling
    Techniques, chapter 6): sqrt(R / (R - 1) * sum((tokens_r * (d_r - D))^2)) / sum(tokens), for R rows with differences
    d_r and their mean D. It covers the rows only, and not the seeds of training. It is infinite for a single row.

    Raises:
        ValueError: the rows are not the same.
    """
    tokens = np.asarray(first.tokens, float)
    if len(first.losses) != len(second.losses) or not np.array_equal(tokens, np.asarray(second.tokens, float)):
        raise ValueError("the losses are not those of the same rows")
    differences = np.asarray(first.losses, float) - np.asarray(second.losses, float)
    mean = float(np.average(differences, weights=tokens))
    if len(tokens) < 2:
        return mean, math.inf
    scale = len(tokens) / (len(tokens) - 1)
    error = float(np.sqrt(scale * np.square(tokens * (differences - mean)).sum()) / tokens.sum())
    return mean, error
