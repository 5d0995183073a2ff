"""How often a 95 % interval holds the truth, by simulation through the report's own functions.

The t interval over seeds expects roughly normal scores. With few seeds of a proportion near 0 or 1 the scores take a
handful of values, all seeds may agree by chance, and the interval is then too narrow: the report prints what it
covers in that case instead of claiming 95 %.
"""

from __future__ import annotations

import functools

import numpy as np

from tiedlora.report import statistics

ENOUGH = 0.93
"""An interval that covers less is named in the report with what it covers."""
DRAWS = 4000


def of_seeds_interval(examples: int, p: float, seeds: int) -> float:
    """Coverage of the t interval over seeds for a score of about `p` on so many examples.

    The seeds' scores are binomial around one true value: the case in which they take the fewest values.
    """
    # Coarse on purpose: neighbouring cells share a simulation, and 4,000 draws know no more than this.
    p = min(max(round(min(p, 1 - p), 2), 0.5 / examples), 0.5)
    return _of_seeds_interval(examples, p, seeds)


@functools.lru_cache(maxsize=512)
def _of_seeds_interval(examples: int, p: float, seeds: int) -> float:
    generator = np.random.default_rng([examples, round(1e6 * p), seeds])
    scores = generator.binomial(examples, p, (DRAWS, seeds)) / examples
    _, low, high = statistics.over_seeds(scores)
    # A hair of tolerance: where all seeds agree on the truth itself, the interval is that one number.
    return float(((low <= p + 1e-12) & (high >= p - 1e-12)).mean())
