"""Intervals equal those of textbooks, and have the coverage that they claim."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from tiedlora.analysis import crossed
from tiedlora.analysis.bootstrap import bootstrap_corpus, bootstrap_mean, bootstrap_means
from tiedlora.analysis.intervals import is_binary, paired_proportions, wilson


def test_wilson_is_the_textbooks():
    # 8 of 10, by the formula: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    n, p, z = 10, 0.8, stats.norm.ppf(0.975)
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = wilson(8, 10)
    assert interval.low == pytest.approx((centre - half) / (1 + z * z / n))
    assert interval.high == pytest.approx((centre + half) / (1 + z * z / n))
    assert interval.method == "wilson"


def test_paired_proportions_is_newcombes_example():
    # Newcombe (1998), table II's first example: 36 and 12 agree, 2 against 0 differ of 50: 0.0569 to 0.3404 for
    # the split e=36, f=12, g=2, h=0 (method 10).
    ours = [1] * 36 + [1] * 12 + [0] * 2
    theirs = [1] * 36 + [0] * 12 + [1] * 2
    interval = paired_proportions(ours, theirs)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


class TestStatsmodels:
    @pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 200), (37, 100), (500, 1000), (1000, 1000)])
    def test_wilson(self, successes, trials):
        interval = wilson(successes, trials)
        assert (interval.low, interval.high) == pytest.approx(
            proportion_confint(successes, trials, method="wilson"), abs=1e-12
        )

    def test_paired_proportions_without_correlation_are_newcombes_independent_ones(self):
        # 30 of 100 and 60 of 100 with 18 in common: 0.18 = 0.3 * 0.6, so that the correlation is 0.
        ours = [1] * 18 + [1] * 12 + [0] * 42 + [0] * 28
        theirs = [1] * 18 + [0] * 12 + [1] * 42 + [0] * 28
        interval = paired_proportions(ours, theirs)
        independent = confint_proportions_2indep(30, 100, 60, 100, method="newcomb", compare="diff")
        assert (interval.low, interval.high) == pytest.approx(independent, abs=1e-12)

    def test_many_paired_proportions_have_the_normal_interval_of_their_differences(self):
        generator = np.random.default_rng(2)
        difficulty = generator.random(20_000)
        ours, theirs = ((difficulty < rate + 0.3 * generator.random(20_000)).astype(float) for rate in (0.3, 0.4))
        interval = paired_proportions(ours.tolist(), theirs.tolist())
        low, high = DescrStatsW(ours - theirs).zconfint_mean()
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02 * (high - low))


def test_binary_scores_are_zeros_and_ones_alone():
    assert is_binary([0, 1.0, 1])
    assert not is_binary([0, 0.5, 1])


class TestBootstrap:
    def test_it_is_scipys_percentile_bootstrap(self):
        values = np.random.default_rng(3).beta(2, 5, 150)
        ours = bootstrap_mean(values, (0.0, 1.0))
        scipys = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999).confidence_interval
        width = scipys.high - scipys.low
        assert ours.value == pytest.approx(values.mean())
        assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=0.06 * width)
        assert ours == bootstrap_mean(values, (0.0, 1.0))

    def test_it_covers_the_mean(self):
        generator, hits = np.random.default_rng(0), 0
        for seed in range(200):
            values = generator.beta(2, 5, 60)
            interval = bootstrap_mean(values, (0.0, 1.0), seed)
            hits += interval.low <= 2 / 7 <= interval.high
        # 95 % of 200 is 190; the percentile bootstrap of 60 values is a little short of it.
        assert 180 <= hits <= 199

    def test_a_paired_one_is_narrower_where_both_sides_move_together(self):
        generator = np.random.default_rng(1)
        base = generator.beta(2, 2, 100)
        better = np.clip(base + 0.05 + generator.normal(0, 0.01, 100), 0, 1)
        paired = bootstrap_mean(better - base, (-1.0, 1.0))
        alone = bootstrap_mean(better, (0.0, 1.0))
        assert paired.low > 0 or paired.high < 0
        assert paired.high - paired.low < (alone.high - alone.low) / 4

    def test_one_example_tells_nothing_and_none_is_an_error(self):
        interval = bootstrap_mean([0.5], (0.0, 1.0))
        assert (interval.value, interval.low, interval.high) == (0.5, 0.0, 1.0)
        with pytest.raises(ValueError, match="needs examples"):
            bootstrap_mean([], (0.0, 1.0))

    def test_means_and_corpus_scores_and_tables_of_seeds_share_their_resamples(self):
        """A mean is the corpus score of (score, 1) pairs; equal seeds average to one of them."""
        values = np.random.default_rng(4).beta(2, 5, 80)
        other = np.random.default_rng(5).beta(2, 5, 80)
        mean = bootstrap_mean(values, (0.0, 1.0))
        corpus = bootstrap_corpus([[value, 1.0] for value in values], lambda sums: float(sums[0] / sums[1]))
        table = crossed.score_over_examples(np.stack([values, values]))
        leading = [float(part[0]) for part in bootstrap_means(values[None])]
        for interval in (corpus, table):
            assert (interval.value, interval.low, interval.high) == pytest.approx(
                (mean.value, mean.low, mean.high), abs=1e-12
            )
        assert leading == pytest.approx([mean.value, mean.low, mean.high], abs=1e-12)
        pairs = ([[value, 1.0] for value in side] for side in (values, other))
        difference = bootstrap_corpus(next(pairs), lambda sums: float(sums[0] / sums[1]), next(pairs))
        expected = bootstrap_mean(values - other, (-1.0, 1.0))
        assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
