"""Decision rules: each agrees with its definition in words, and nothing is supported where nothing is gained."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiedlora.analysis import crossed
from tiedlora.analysis.rules import Better, Level, Retains, WithinMargin, gain_needed, retained_at_least

RULES = [Retains(0.9), Retains(0.5), Better(), Better(0.02), Level(0.2), WithinMargin(0.02)]


def scores(method, comparator, base=0.2, *, seeds=5, rows=400, seed_sd=0.01, noise=0.1, seed=0):
    """Tables of method and comparator (seeds, rows), and the base's (rows,), with these true means."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(0, 0.3, rows)

    def table(mean):
        return mean + difficulty + generator.normal(0, seed_sd, (seeds, 1)) + generator.normal(0, noise, (seeds, rows))

    return table(method), table(comparator), base + difficulty + generator.normal(0, noise, rows)


def conclusion(rule, *tables, level=0.05):
    found = rule.evidence(*tables)
    assert not (found.supported <= level and found.contradicted <= level)
    if found.supported <= level:
        return "supported"
    return "contradicted" if found.contradicted <= level else "undecided"


class TestMeaning:
    # The comparator gains 0.4 over the base, 0.2.
    @pytest.mark.parametrize(
        ("rule", "method", "expected"),
        [
            (Retains(0.9), 0.60, "supported"),
            (Retains(0.9), 0.50, "contradicted"),
            (Retains(0.9), 0.56, "undecided"),
            (Retains(0.5), 0.50, "supported"),
            (Retains(0.5), 0.20, "contradicted"),
            (Better(), 0.65, "supported"),
            (Better(), 0.55, "contradicted"),
            (Better(), 0.60, "undecided"),
            (Better(0.05), 0.70, "supported"),
            (Better(0.05), 0.62, "contradicted"),
            (Level(0.2), 0.60, "supported"),
            (Level(0.2), 0.45, "contradicted"),
            (Level(0.2), 0.75, "contradicted"),
            (Level(0.2), 0.52, "undecided"),
            (WithinMargin(0.05), 0.60, "supported"),
            (WithinMargin(0.05), 0.50, "contradicted"),
            (WithinMargin(0.05), 0.55, "undecided"),
        ],
    )
    def test_the_conclusion_is_that_of_the_words(self, rule, method, expected):
        assert conclusion(rule, *scores(method, 0.6)) == expected

    @pytest.mark.parametrize("rule", [rule for rule in RULES if rule.needs_base])
    @pytest.mark.parametrize("comparator", [0.2, 0.1])
    @pytest.mark.parametrize("method", [0.1, 0.2, 0.5])
    def test_without_a_gain_there_is_no_conclusion(self, rule, comparator, method):
        assert conclusion(rule, *scores(method, comparator)) == "undecided"

    def test_better_needs_no_gain_but_reports_it(self):
        method, comparator, base = scores(0.3, 0.2)
        assert conclusion(Better(), method, comparator, base) == "supported"
        assert Better().evidence(method, comparator, base).gain > 0.05
        assert Better().evidence(method, comparator, None).gain is None

    @pytest.mark.parametrize("rule", [rule for rule in RULES if rule.needs_base])
    def test_missing_base_scores_are_an_error(self, rule):
        method, comparator, _ = scores(0.6, 0.6)
        with pytest.raises(ValueError, match="needs the base model's scores"):
            rule.evidence(method, comparator, None)

    @pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
    def test_a_score_that_is_not_finite_is_an_error(self, bad):
        method, comparator, base = scores(0.6, 0.6)
        method[1, 3] = bad
        for rule in RULES:
            with pytest.raises(ValueError, match="finite"):
                rule.evidence(method, comparator, base)

    def test_a_margin_called_nothing_learned_comparable_and_retaining_does_not(self):
        """LoRA gains 1.5 points, and TABuv is exactly the base: within 2 points of LoRA, but it retains nothing."""
        tables = scores(0.300, 0.315, 0.300, rows=6000, seed_sd=0.002)
        assert conclusion(WithinMargin(0.02), *tables) == "supported"
        assert conclusion(Retains(0.9), *tables) == "contradicted"

    def test_the_contrast_has_the_interval_of_the_conclusion(self):
        for rule in RULES:
            for method in (0.45, 0.6, 0.75):
                tables = scores(method, 0.6)
                interval = crossed.both_interval(rule.contrast(*tables))
                assert (conclusion(rule, *tables) == "supported") == (interval.low > 0)

    def test_levels_less_favourable_contrast_is_shown(self):
        worse, better = scores(0.5, 0.6), scores(0.7, 0.6)
        assert Level(0.2).contrast(*worse).mean() == pytest.approx(Level(0.2).contrasts(*worse)[0].mean())
        assert Level(0.2).contrast(*better).mean() == pytest.approx(Level(0.2).contrasts(*better)[1].mean())


class TestDecisions:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("level", [0.5, 0.05, 0.002])
    def test_many_tables_at_once_are_decided_as_one_by_one(self, rule, level):
        tables = [scores(0.4 + 0.02 * i, 0.5 + 0.01 * i, 0.3, seeds=3, rows=50, seed=i) for i in range(20)]
        method, comparator, base = (np.stack(part) for part in zip(*tables, strict=True))
        supported, contradicted = rule.decisions(method, comparator, base[:, None, :], level)
        evidence = [rule.evidence(*one) for one in tables]
        assert supported.tolist() == [found.supported <= level for found in evidence]
        assert contradicted.tolist() == [found.contradicted <= level for found in evidence]

    @given(shift=st.floats(-5, 5), scale=st.floats(0.01, 100))
    @settings(max_examples=25, deadline=None)
    def test_the_unit_of_the_score_does_not_matter(self, shift, scale):
        tables = scores(0.5, 0.6, seeds=3, rows=60)
        moved = [shift + scale * table for table in tables]
        for rule in (Retains(0.9), Level(0.2), Better()):
            ours, theirs = rule.evidence(*tables), rule.evidence(*moved)
            assert (ours.supported, ours.contradicted) == pytest.approx((theirs.supported, theirs.contradicted), 1e-4)

    def test_the_bases_scores_may_be_repeated_for_each_seed(self):
        method, comparator, base = scores(0.58, 0.6)
        for rule in RULES:
            repeated = rule.evidence(method, comparator, np.broadcast_to(base, method.shape))
            assert repeated == rule.evidence(method, comparator, base)


class TestRetainedAtLeast:
    @pytest.mark.parametrize("level", [0.05, 0.002])
    def test_it_is_the_largest_share_that_is_supported(self, level):
        tables = scores(0.5, 0.6)
        share = retained_at_least(*tables, level)
        assert 0 < share < 0.75
        assert Retains(share - 1e-4).evidence(*tables).supported <= level
        assert Retains(share + 1e-4).evidence(*tables).supported > level

    def test_a_better_method_retains_more_than_all(self):
        assert retained_at_least(*scores(0.9, 0.6), 0.05) > 1

    @pytest.mark.parametrize(("method", "comparator"), [(0.2, 0.6), (0.1, 0.6), (0.6, 0.2)])
    def test_none_if_nothing_is_retained_or_nothing_gained(self, method, comparator):
        assert retained_at_least(*scores(method, comparator), 0.05) is None

    def test_it_is_below_the_truth_in_all_but_two_and_a_half_of_a_hundred(self):
        """600 populations with a true share of 0.75: 2.5 % is known to within 1.3 points (95 %)."""
        shares = [retained_at_least(*scores(0.5, 0.6, seeds=4, rows=40, seed=i), 0.05) for i in range(600)]
        assert np.mean([share is not None and share > 0.75 for share in shares]) <= 0.025 + 0.013


class TestGainNeeded:
    def test_it_decides_four_times_in_five(self):
        """30 seeds of rows without noise: 2,000 populations know 80 % to within 1.8 points (95 %)."""
        generator, seeds, seed_sd = np.random.default_rng(0), 30, 0.02
        rule, gain = Retains(0.9), gain_needed(0.9, math.sqrt(1 + 0.9**2) * seed_sd / math.sqrt(seeds))
        method, comparator = gain + generator.normal(0, seed_sd, (2, 2000, seeds, 1)) + np.zeros(5)
        supported, _ = rule.decisions(method, comparator, np.zeros(5), 0.05)
        # Student's t at 29 degrees of freedom costs 2 points of the normal approximation's power.
        assert supported.mean() == pytest.approx(0.78, abs=0.03)

    def test_the_formula(self):
        assert gain_needed(0.9, 0.01) == pytest.approx(0.28, abs=0.001)
        assert gain_needed(1.0, 0.01) == math.inf


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Retains(0.0), "rho=0.0: must be above 0"),
        (lambda: Retains(1.1), "rho=1.1"),
        (lambda: Better(-0.1), "margin=-0.1"),
        (lambda: WithinMargin(math.nan), "margin=nan"),
        (lambda: Level(0.0), "delta=0.0"),
        (lambda: Level(1.0), "delta=1.0"),
    ],
)
def test_impossible_rules_are_errors(make, says):
    with pytest.raises(ValueError, match=says):
        make()
