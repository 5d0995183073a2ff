"""How often a 95 % interval holds the truth, by simulation through the report's own functions.

The t interval over seeds expects roughly normal scores. With few seeds of a proportion near 0 or 1 the scores take a
handful of values, all seeds may agree by chance, and the interval is then too narrow: the report prints what it
covers in that case instead of claiming 95 %.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from tiedlora.statistics import crossed

if TYPE_CHECKING:
    from tiedlora.report.compare import Estimate

ENOUGH = 0.93
"""An interval that covers less is named in the report with what it covers."""
DRAWS = 4000
FEW_EXAMPLES = 10
"""A bootstrap over examples of which fewer than this score at all is too narrow (83-87 % at 2 to 4 of 200)."""


def remarks(scores: Estimate, scoring_examples: int, examples: int, seeds: int) -> list[str]:
    """What a row's intervals do not reach, in words. docs/results.md has the simulations."""
    found = []
    if scores.seeds is not None:
        share = of_seeds_interval(examples, scores.value, seeds)
        if share < ENOUGH:
            found.append(f"the interval over seeds covers {100 * share:.0f} % here, not 95 %")
    if seeds == 2:
        found.append("with 2 seeds the interval over seeds and examples covers 87 to 99 %, not 95 %")
    if "bootstrap" in scores.method and scoring_examples < FEW_EXAMPLES:
        found.append(f"only {scoring_examples} examples score, so the bootstrap covers about 85 %, not 95 %")
    return found


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
    _, low, high = crossed.over_seeds(scores)
    # A hair of tolerance: where all seeds agree on the truth itself, the interval is that one number.
    return float(((low <= p + 1e-12) & (high >= p - 1e-12)).mean())
