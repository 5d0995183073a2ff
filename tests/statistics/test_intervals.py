"""Intervals cover what they claim."""

import numpy as np
import pytest
from scipy import stats

from tiedlora.statistics.intervals import bootstrap, paired_proportions, wilson


def mean_of(values):
    table = np.asarray(values)
    return lambda chosen: table[chosen].mean(axis=1)


def test_wilson_is_the_textbooks():
    # 8 of 10, by the formula: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    n, p, z = 10, 0.8, stats.norm.ppf(0.975)
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = wilson(8, 10)
    assert found.low == pytest.approx((centre - half) / (1 + z * z / n))
    assert found.high == pytest.approx((centre + half) / (1 + z * z / n))


def test_paired_proportions_is_newcombes_example():
    # Newcombe (1998), table II's first example: 36 and 12 agree, 2 against 0 differ of 50: 0.0569 to 0.3404 for
    # the split e=36, f=12, g=2, h=0 (method 10).
    ours = [1] * 36 + [1] * 12 + [0] * 2
    theirs = [1] * 36 + [0] * 12 + [1] * 2
    found = paired_proportions(ours, theirs)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


def test_the_bootstrap_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(3).beta(2, 5, 150)
    ours = bootstrap(len(values), mean_of(values), (0.0, 1.0))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.06 * width)
    assert ours == bootstrap(len(values), mean_of(values), (0.0, 1.0))


def test_the_bootstrap_covers_the_mean():
    generator, hits = np.random.default_rng(0), 0
    for seed in range(200):
        values = generator.beta(2, 5, 60)
        found = bootstrap(60, mean_of(values), (0.0, 1.0), seed)
        hits += found.low <= 2 / 7 <= found.high
    # 95 % of 200 is 190; the percentile bootstrap of 60 values is a little short of it.
    assert 180 <= hits <= 199


def test_a_paired_bootstrap_is_narrower_where_both_sides_move_together():
    generator = np.random.default_rng(1)
    base = generator.beta(2, 2, 100)
    better = np.clip(base + 0.05 + generator.normal(0, 0.01, 100), 0, 1)
    ours, theirs = mean_of(better), mean_of(base)
    paired = bootstrap(100, lambda chosen: ours(chosen) - theirs(chosen), (-1.0, 1.0))
    alone = bootstrap(100, ours, (0.0, 1.0))
    assert paired.excludes_zero()
    assert paired.high - paired.low < (alone.high - alone.low) / 4


def test_one_example_tells_nothing_and_none_is_an_error():
    found = bootstrap(1, mean_of([0.5]), (0.0, 1.0))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="needs examples"):
        bootstrap(0, mean_of([]), (0.0, 1.0))
