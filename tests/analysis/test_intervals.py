"""Intervals equal those of textbooks and of other libraries, and cover what docs/statistics.md says."""

import functools
import itertools
import re

import numpy as np
import pytest
from scipy import stats

from tiedlora.analysis import intervals
from tiedlora.analysis.intervals import (
    bootstrap_corpus,
    bootstrap_mean,
    level_above,
    mean_squares,
    outlying,
    paired_proportions,
)
from tiedlora.places import PROJECT
from tiedlora.records.rows import ValidationLosses


class TestProportions:
    def test_paired_proportions_are_newcombes_example(self):
        # Newcombe (1998), table II's first example: 36 and 12 agree, 2 against 0 differ of 50: 0.0569 to 0.3404 for
        # the split e=36, f=12, g=2, h=0 (method 10).
        interval = paired_proportions(np.repeat([1, 1, 0], (36, 12, 2)), np.repeat([1, 0, 1], (36, 12, 2)))
        assert (interval.value, interval.low, interval.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


class TestBootstrap:
    def test_it_is_scipys_percentile_bootstrap(self):
        values = np.random.default_rng(3).beta(2, 5, 150)
        ours = bootstrap_mean(values, (0.0, 1.0))
        scipys = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999).confidence_interval
        width = scipys.high - scipys.low
        assert ours.value == pytest.approx(values.mean())
        assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=0.06 * width)
        assert ours == bootstrap_mean(values, (0.0, 1.0))

    def test_of_several_seeds_it_is_over_their_means_also_of_rights_and_wrongs(self):
        ours, theirs = (np.random.default_rng(seed).random((3, 300)) < p for seed, p in ((0, 0.5), (1, 0.4)))
        found = intervals.over_examples(ours.astype(float), theirs.astype(float))
        assert numbers(found) == ends(bootstrap_mean(ours.mean(0) - theirs.mean(0), (-1.0, 1.0)))

    def test_one_example_tells_nothing_and_none_is_an_error(self):
        interval = bootstrap_mean([0.5], (0.0, 1.0))
        assert (interval.value, interval.low, interval.high) == (0.5, 0.0, 1.0)
        with pytest.raises(ValueError, match="needs examples"):
            bootstrap_mean([], (0.0, 1.0))

    def test_means_and_corpus_scores_and_tables_of_seeds_share_their_resamples(self):
        """A mean is the corpus score of (score, 1) pairs; equal seeds average to one of them."""
        values, other = (np.random.default_rng(seed).beta(2, 5, 80) for seed in (4, 5))

        def ratio(sums):
            return float(sums[0] / sums[1])

        def corpus(*sides):
            tables = [np.stack([side, np.ones(len(side))], 1) for side in sides]
            found = bootstrap_corpus(tables, ratio, (-1.0, 1.0))
            return found.value, found.low, found.high

        for sides, expected in (
            ((values,), intervals.over_examples(np.stack([values, values]))),
            ((values, other), bootstrap_mean(values - other, (-1.0, 1.0))),
        ):
            assert corpus(*sides) == pytest.approx((expected.value, expected.low, expected.high), abs=1e-12)


def table(seeds, rows, *, seed=0, spread=(0.05, 0.3, 0.4), mean=0.1, draws=()):
    """Normal effects of seeds, rows and the remainder: (*draws, seeds, rows)."""
    generator = np.random.default_rng(seed)
    return (
        mean
        + generator.normal(0, spread[0], (*draws, seeds, 1))
        + generator.normal(0, spread[1], (*draws, 1, rows))
        + generator.normal(0, spread[2], (*draws, seeds, rows))
    )


def ends(interval):
    return pytest.approx((interval.value, interval.low, interval.high))


def numbers(interval):
    return interval.value, interval.low, interval.high


class TestSeedsAndRows:
    def test_where_only_seeds_vary_it_is_students_over_seeds(self):
        of_seeds = np.array([0.1, 0.3, 0.4, 0.2])
        values = np.broadcast_to(of_seeds[:, None], (4, 50))
        assert numbers(intervals.both_interval(values)) == ends(intervals.seeds_interval(of_seeds))
        assert level_above(values) == pytest.approx(stats.ttest_1samp(of_seeds, 0).pvalue)

    def test_it_is_never_narrower_than_over_the_rows(self):
        """Each seed solves another row, so the seeds agree by chance, and rows differ less than the remainder."""
        values = np.eye(3, 4)
        assert numbers(intervals.both_interval(values)) == ends(intervals.seeds_interval(values.mean(0)))
        assert level_above(values) > 0.05

    @pytest.mark.parametrize(
        ("values", "says"),
        [(np.zeros((1, 5)), "two of each"), (np.zeros((5, 1)), "two of each"), (np.full((3, 5), np.inf), "finite")],
    )
    def test_one_seed_or_row_or_a_value_that_is_not_finite_is_an_error(self, values, says):
        with pytest.raises(ValueError, match=says):
            mean_squares(values)

    @pytest.mark.parametrize("level", [0.05, 0.006])
    @pytest.mark.parametrize("spread", [(0.05, 0.1, 0.1), (0.0, 0.0, 0.4), (0.015, 0.3, 0.4)])
    @pytest.mark.parametrize("seeds", [3, 8])
    def test_at_every_level_it_is_wrong_at_most_that_often(self, seeds, spread, level):
        draws = 800
        squares = mean_squares(table(seeds, 100, spread=spread, mean=0.0, draws=(draws,)))
        wrong = (np.abs(squares.mean) > squares.half_width(level)).mean()
        assert wrong <= level + 3 * np.sqrt(level * (1 - level) / draws)

    @pytest.mark.parametrize("mean", [0.5, 0.05, 0.02])
    def test_the_interval_at_the_level_above_zero_ends_there(self, mean):
        values = table(5, 100, mean=mean)
        found = intervals.both_interval(values, level_above(values))
        assert abs(found.low) < 1e-8 * (found.high - found.low)
        assert level_above(-values) == 1.0

    def test_a_table_of_one_number_is_above_zero_or_is_zero_itself(self):
        assert level_above(np.full((3, 5), 0.3)) == pytest.approx(2 * 1.3**-5)
        # A contrast of equal scores: 1 - 0.9 - 0.1 is -2.8e-17.
        assert level_above(np.full((3, 5), 1 - 0.9 - 0.1)) == 1.0


def test_the_losses_of_rows_count_by_their_tokens():
    first, second = (ValidationLosses(0, [loss, 2.0], [1, 3]) for loss in (1.0, 0.0))
    assert intervals.mean_loss(first) == 1.75
    assert intervals.paired_difference(first, second) == (0.25, 0.375)


# What the intervals cover. The true value p is known; examples (and seeds) are drawn again each time.

GRID = [
    *itertools.product([200], (0.01, 0.1, 0.5)),
    *(pytest.param(1000, p, marks=pytest.mark.slow) for p in (0.01, 0.1, 0.5)),
]
DRAWS = 600
DOCUMENTED_DRAWS = 4000


@functools.cache
def documented() -> dict[tuple[str, int, float, int], float]:
    """The table of docs/statistics.md: what each interval covers, by interval, rows, p and seeds."""
    found = {}
    for line in (PROJECT / "docs" / "statistics.md").read_text().splitlines():
        if row := re.fullmatch(r"\| ([\w ]+) \| ([\d,]+) \| ([\d.]+) \|(.*)\|", line):
            for seeds, cell in zip((1, 2, 3, 5), row[4].split("|"), strict=True):
                if cell.strip():
                    key = (row[1], int(row[2].replace(",", "")), float(row[3]), seeds)
                    found[key] = float(cell.strip().removesuffix(" %")) / 100
    assert len(found) == 17
    return found


def covered(found, truth) -> float:
    """How many of the intervals hold the truth. The tolerance is for one that is a single number, but for rounding."""
    return float(np.mean([one.low <= truth + 1e-12 and one.high >= truth - 1e-12 for one in found]))


@functools.cache
def newcombe(both, ours, theirs, rows):
    counts = both, ours, theirs, rows - both - ours - theirs
    return paired_proportions(np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts))


def newcombe_coverage(rows, p, _):
    """Two methods on the same examples: p and 1.5 p, correlated through the example (as base and adapted are)."""
    other = 1.5 * p
    both = p * other + 0.5 * (p - p * other)
    chances = [both, p - both, other - both, 1 - p - other + both]
    counts = np.random.default_rng([rows, round(1000 * p)]).multinomial(rows, chances, DRAWS)
    return covered([newcombe(int(a), int(b), int(c), rows) for a, b, c, _ in counts], p - other)


def bootstrap_coverage(rows, p, _):
    """Scores like F1: 0 for most examples, between 0 and 1 for some; their mean is p."""
    generator = np.random.default_rng([rows, round(1000 * p)])
    scores = generator.random((DRAWS, rows)) * (generator.random((DRAWS, rows)) < min(1.0, 2 * p))
    return covered([bootstrap_mean(own, (0.0, 1.0)) for own in scores], min(1.0, 2 * p) / 2)


def paired_bootstrap_coverage(rows, p, _):
    """Differences of two such scores on the same examples, averaged over 3 seeds."""
    generator = np.random.default_rng([rows, round(1000 * p), 3])
    answerable = generator.random((DRAWS, 1, rows)) < min(1.0, 2 * p)
    scores = generator.random((2, DRAWS, 3, rows)) * answerable
    differences = (scores[0] * 0.9 - scores[1]).mean(1)
    return covered([bootstrap_mean(own, (-1.0, 1.0)) for own in differences], min(1.0, 2 * p) * (0.45 - 0.5))


def seeds_coverage(rows, p, seeds):
    """Seeds with one true score. They differ only by chance in the examples."""
    generator = np.random.default_rng([rows, seeds])
    scores = generator.binomial(rows, p, (DOCUMENTED_DRAWS, seeds)) / rows
    return covered(map(intervals.seeds_interval, scores), p)


def paired_seeds_coverage(rows, p, seeds):
    """Per-seed differences of two methods, with the same examples and independent chance."""
    generator = np.random.default_rng([rows, round(1000 * p), seeds])
    scores = generator.binomial(rows, p, (2, DOCUMENTED_DRAWS, seeds)) / rows
    return covered(map(intervals.seeds_interval, scores[0] - scores[1]), 0.0)


def both_coverage(rows, p, seeds):
    """Differences with random effects of seeds (a tenth of p) and of examples; both are drawn again each time."""
    generator = np.random.default_rng([rows, round(1000 * p), seeds])
    inside = []
    for _ in range(4):
        draws = DRAWS // 4
        hard = generator.random((draws, 1, rows))
        luck = 1 + generator.normal(0, 0.1, (2, draws, seeds, 1))
        # Half of an example's outcome is its own (shared by all seeds, differently by the two methods).
        taste = np.where(generator.random((2, draws, 1, rows)) < 0.5, hard, generator.random((2, draws, 1, rows)))
        own = generator.random((2, draws, seeds, rows))
        drawn = np.where(generator.random((2, draws, seeds, rows)) < 0.5, taste, own) < p * luck
        squares = mean_squares(drawn[0].astype(float) - drawn[1].astype(float))
        inside.append(np.abs(squares.mean) <= squares.half_width() + 1e-12)
    return float(np.mean(inside))


COVERAGES = {
    "Newcombe": (newcombe_coverage, (1,)),
    "bootstrap": (bootstrap_coverage, (1,)),
    "paired bootstrap": (paired_bootstrap_coverage, (1,)),
    "t over seeds": (seeds_coverage, (2, 3, 5, 10)),
    "paired t over seeds": (paired_seeds_coverage, (2, 3, 5, 10)),
    "seeds and examples": (both_coverage, (2, 3, 5, 10)),
}
"""Interval -> what simulates its coverage from rows, p and seeds, and the numbers of seeds."""


@pytest.mark.parametrize(("name", "seeds"), [(name, seeds) for name, (_, own) in COVERAGES.items() for seeds in own])
@pytest.mark.parametrize(("rows", "p"), GRID)
def test_the_coverage_is_the_documented_one(name, seeds, rows, p):
    """It is 93 to 97 %, or that of the documents, up to three standard errors of the simulation."""
    share, said = COVERAGES[name][0](rows, p, seeds), documented().get((name, rows, p, seeds))
    about = 0.95 if said is None else said
    error = 3 * np.sqrt(about * (1 - about) * (1 / DRAWS + 1 / DOCUMENTED_DRAWS))
    low, high = (0.93, 0.97) if said is None else (said, said)
    assert low - error <= share <= high + error, f"{name}, n={rows}, p={p}, {seeds} seeds covers {100 * share:.1f} %"


class TestOutliers:
    @pytest.mark.parametrize(("seeds", "stated"), [(5, 0.018), (8, 0.022), (12, 0.017)])
    def test_false_alarms_are_as_rare_as_the_docstring_says(self, seeds, stated):
        draws = 800
        cells = np.random.default_rng(seeds).normal(0.5, 1, (draws, seeds))
        # The docstring's own figure is of 6,000 cells.
        error = 3 * np.sqrt(stated * (1 - stated) * (1 / draws + 1 / 6000))
        assert np.mean([bool(outlying(cell)) for cell in cells]) == pytest.approx(stated, abs=error)

    @pytest.mark.parametrize(
        ("scores", "expected"),
        [
            ([0.50, 0.51, 0.49, 0.50, 0.02], [4]),
            ([0.02, 0.51, 0.49, 0.50, 0.03, 0.505, 0.495, 0.50], [0, 4]),
            ([0.50, 0.51, 0.49, 0.50, 0.47], []),
            ([0.50, 0.51, 0.49, 0.02], []),
            ([0.50, 0.50, 0.50, 0.50, 0.505], []),
            ([0.5000, 0.5005, 0.4995, 0.5002, 0.4925], []),
            ([50.00, 50.05, 49.95, 50.02, 49.25], [4]),
            ([], []),
        ],
    )
    def test_seeds_far_from_the_others_are_flagged(self, scores, expected):
        assert outlying(np.array(scores)) == expected
