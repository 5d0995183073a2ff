"""How often a 95 % interval contains the true value. It is simulated with the functions that the report uses.

The t interval over seeds assumes roughly normal scores. But a proportion near 0 or 1 with few seeds takes only a few
values, and all seeds may agree by chance. The interval is then too narrow, and the report says how much it covers.
"""

from __future__ import annotations

import functools

import numpy as np

from tiedlora.analysis import crossed

ENOUGH = 0.93
"""The report has a note on an interval that covers less than this."""
DRAWS = 4000
FEW_EXAMPLES = 10
"""If fewer examples than this score above zero, or fewer below one, a bootstrap over examples is too narrow. It covers
83 to 87 % if 2 to 4 of 200 examples do."""
ROUNDING = 1e-12
"""An interval can be a single number, which equals the true value up to rounding."""


def remarks(score: float, *, seeds: int, examples: int, scoring_examples: int, by_bootstrap: bool) -> list[str]:
    """Notes on the intervals of one score that cover less than 95 %. docs/results.md has the simulations.

    Args:
        score: the mean over seeds, a fraction of 1.
        scoring_examples: how many examples have a score that is not 0 with any seed, or one that is not 1: the fewer.
        by_bootstrap: whether the interval over examples is a bootstrap.
    """
    notes = []
    if seeds > 1:
        share = seeds_interval_coverage(examples, score, seeds)
        if share < ENOUGH:
            notes.append(f"the interval over seeds covers {100 * share:.0f} % here, not 95 %")
    if by_bootstrap and scoring_examples < FEW_EXAMPLES:
        which = "score" if score <= 0.5 else "do not have the full score"
        notes.append(f"only {scoring_examples} examples {which}, so the bootstrap covers about 85 %, not 95 %")
    return notes


def seeds_interval_coverage(examples: int, p: float, seeds: int) -> float:
    """The coverage of the t interval over seeds, for a score of about `p` on so many examples.

    The scores of the seeds are binomial with one true value. This is the case in which they take the fewest values.
    """
    # Rounded, so that similar scores share a simulation: 4,000 draws cannot tell them apart.
    p = min(max(round(min(p, 1 - p), 2), 0.5 / examples), 0.5)
    return simulated_coverage(examples, p, seeds)


@functools.lru_cache(maxsize=512)
def simulated_coverage(examples: int, p: float, seeds: int) -> float:
    """The share of t intervals over seeds that contain `p`, in DRAWS simulations."""
    generator = np.random.default_rng([examples, round(1e6 * p), seeds])
    scores = generator.binomial(examples, p, (DRAWS, seeds)) / examples
    _, low, high = crossed.over_seeds(scores)
    return float(((low <= p + ROUNDING) & (high >= p - ROUNDING)).mean())
