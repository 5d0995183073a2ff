"""Planned looks: levels that add up, chances that come true, and Holm's method as statsmodels has it."""

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from tiedlora.analysis import crossed, looks
from tiedlora.analysis.crossed import Spread
from tiedlora.analysis.looks import Looks, from_minimum, planned
from tiedlora.analysis.rules import Better, Retains

SIMULATED = tuple(looks.SIMULATED.values())


class TestPlan:
    @pytest.mark.parametrize("seeds", [(3, 5, 8, 12), (5,), (2, 3), (4, 8, 16, 32, 64)])
    def test_the_levels_spend_five_in_a_hundred_in_proportion_to_squares(self, seeds):
        plan = planned(seeds)
        assert sum(plan.levels) == pytest.approx(0.05)
        assert np.ptp(np.array(plan.levels) / np.array(seeds) ** 2) < 1e-12

    def test_the_default(self):
        assert planned().seeds == (3, 5, 8, 12)
        assert planned().levels == pytest.approx((0.00186, 0.00517, 0.01322, 0.02975), abs=1e-5)

    def test_the_simulated_levels_are_allowed_with_their_seeds_only(self):
        assert sum(SIMULATED) > 0.05
        assert planned(levels=SIMULATED).levels == SIMULATED
        assert planned((8, 12), SIMULATED[2:]).levels == SIMULATED[2:]
        with pytest.raises(ValueError, match=r"sum is 0\.0585"):
            planned((3, 5, 8, 13), SIMULATED)

    @pytest.mark.parametrize(
        ("seeds", "levels", "says"),
        [
            ((), (), "increasing"),
            ((1, 3), (0.01, 0.02), "increasing"),
            ((5, 5), (0.01, 0.02), "increasing"),
            ((5, 3), (0.01, 0.02), "increasing"),
            ((3, 5), (0.01,), "one number"),
            ((3, 5), (0.0, 0.05), r"in \(0, 1\)"),
            ((3, 5), (0.03, 0.03), "sum is 0.06"),
        ],
    )
    def test_an_impossible_plan_is_an_error(self, seeds, levels, says):
        with pytest.raises(ValueError, match=says):
            Looks(seeds, levels)

    def test_a_minimum_drops_earlier_looks(self):
        assert from_minimum(planned(), 3) == planned()
        assert from_minimum(planned(), 5) == planned((5, 8, 12))
        assert from_minimum(planned(), 6) == planned((8, 12))
        assert from_minimum(planned(), 20) == planned((20,))
        assert from_minimum(planned(levels=SIMULATED), 5) == planned((5, 8, 12), SIMULATED[1:])

    @pytest.mark.parametrize("plan", [planned(), planned(levels=SIMULATED), planned((3, 5), (0.01, 0.02))])
    def test_an_adjusted_level_is_compared_with_five_per_cent(self, plan):
        """Also in a plan that spends less: Holm's procedure must not contradict what the plan's own levels do not."""
        for look, level in enumerate(plan.levels):
            assert looks.adjusted(plan, look, level) == pytest.approx(looks.TOTAL)
            assert looks.adjusted(plan, look, level / 10) == pytest.approx(looks.TOTAL / 10)
        assert looks.adjusted(plan, 0, 0.9) == 1.0


class TestChanceOfDecision:
    @staticmethod
    def world(truth, generator, *, seed_sd=0.05, seeds=12, rows=40):
        row = generator.normal(0, 0.1, (1, rows))
        own = generator.normal(0, 0.1, (seeds, rows))
        return truth + generator.normal(0, seed_sd, (seeds, 1)) + row + own, np.zeros((seeds, rows))

    def test_it_comes_true(self):
        """Of populations with a predictive chance of p, the share p is decided later.

        This holds where truths and spreads are as vague as the chance takes them: uniform, and uniform on a logarithmic
        scale. About 500 of the populations are undecided; they know the mean chance to within 4.5 points (95 %).
        """
        plan, rule, generator = planned((5, 8, 12)), Better(), np.random.default_rng(1)
        chances, happened = [], []
        for _ in range(1500):
            seed_sd = 0.03 * 10 ** generator.random()
            method, comparator = self.world(generator.uniform(-1.5, 1.5), generator, seed_sd=seed_sd)
            if any(rule.decisions(method[:5], comparator[:5], None, plan.levels[0])):
                continue
            chances.append(looks.chance_of_decision(rule, method[:5], comparator[:5], None, plan, 0))
            later = zip(plan.seeds[1:], plan.levels[1:], strict=True)
            happened.append(any(any(rule.decisions(method[:n], comparator[:n], None, level)) for n, level in later))
        chances, happened = np.array(chances), np.array(happened)
        assert len(chances) > 300
        assert chances.mean() == pytest.approx(happened.mean(), abs=0.05)
        assert happened[chances > 0.8].mean() > 0.8
        assert happened[chances < 0.2].mean() < 0.2

    def test_the_mean_varies_as_the_formula_says(self):
        """s^2 (1/n_now - 1/n_later), times the spread of Student's t: 3 for 4 degrees of freedom is 4 / (4 - 2)."""
        of_seeds = np.random.default_rng(0).normal(0, 1, (9, 1))
        final = looks._predicted_seeds(of_seeds, 12)[:, :, 0].mean(1)
        expected = of_seeds.var(ddof=1) * (1 / 9 - 1 / 12) * 8 / (8 - 2)
        # The variance of 4,000 draws is known to within 5 % (95 %), and a little less for Student's t.
        assert final.var() == pytest.approx(expected, rel=0.08)
        assert final.mean() == pytest.approx(of_seeds.mean(), abs=4 * np.sqrt(expected / looks.DRAWS))

    def test_a_clear_difference_is_decided_and_none_is_futile(self):
        method, comparator = self.world(0.5, np.random.default_rng(0))
        assert looks.chance_of_decision(Better(), method[:3], comparator[:3], None, planned(), 0) > 0.99
        nothing = method[:8] - method[:8].mean()
        assert looks.is_futile(looks.chance_of_decision(Better(), nothing, comparator[:8], None, planned(), 2))

    def test_no_gain_makes_a_claim_to_retain_it_futile(self):
        generator = np.random.default_rng(0)
        method, comparator = self.world(0.5, generator)
        base = comparator[0] + 0.1 + generator.normal(0, 0.05, comparator.shape[1])
        assert looks.chance_of_decision(Retains(0.9), method[:5], comparator[:5], base, planned(), 1) == 0.0

    def test_after_the_last_look_nothing_comes(self):
        method, comparator = self.world(0.5, np.random.default_rng(0))
        assert looks.chance_of_decision(Better(), method, comparator, None, planned(), 3) == 0.0

    def test_other_seeds_than_the_looks_are_an_error(self):
        method, comparator = self.world(0.5, np.random.default_rng(0))
        with pytest.raises(ValueError, match="look 1 has 3 seeds; the scores have 4"):
            looks.chance_of_decision(Better(), method[:4], comparator[:4], None, planned(), 0)


class TestPlanning:
    SPREAD = Spread(seeds=0.015, examples=0.2, rest=0.4)

    def test_the_chance_at_each_look_comes_true(self):
        """600 tables of 500 rows: a chance of 50 % is known to within 4 points (95 %)."""
        generator, distance, plan = np.random.default_rng(5), 0.03, planned()
        values = distance + generator.normal(0, self.SPREAD.seeds, (600, 12, 1))
        values = values + generator.normal(0, self.SPREAD.examples, (600, 1, 500))
        values += generator.normal(0, self.SPREAD.rest, (600, 12, 500))
        decided, shares = np.zeros(600, dtype=bool), []
        for n, level in zip(plan.seeds, plan.levels, strict=True):
            decided |= crossed.over_both(values[:, :n], level)[1] > 0
            shares.append(decided.mean())
        chances = looks.chance_at_looks(distance, self.SPREAD, 500, plan)
        assert chances == sorted(chances)
        assert chances[0] < 0.2
        assert chances[-1] > 0.4
        assert chances == pytest.approx(shares, abs=0.06)

    def test_more_rows_and_larger_differences_decide_more(self):
        few, many = (looks.chance_at_looks(0.03, self.SPREAD, rows, planned())[-1] for rows in (200, 2000))
        small, large = (looks.chance_at_looks(distance, self.SPREAD, 500, planned())[-1] for distance in (0.01, 0.1))
        assert few < many
        assert small < large
        assert looks.chance_at_looks(-0.1, self.SPREAD, 500, planned())[-1] == large

    def test_the_gain_that_is_needed_is_decided_four_times_in_five(self):
        gain = looks.gain_needed_at_last_look(0.9, self.SPREAD, 500, planned())
        chance = looks.chance_at_looks(0.1 * gain, self.SPREAD, 500, planned())[-1]
        assert chance == pytest.approx(0.8, abs=0.01)
        assert looks.gain_needed_at_last_look(1.0, self.SPREAD, 500, planned()) == np.inf
        level = looks.gain_needed_at_last_look(0.9, self.SPREAD, 500, planned(), both_sides=True)
        assert level > gain, "two contrasts must be clear, not one"
        chances = looks.chance_at_looks(0.1 * level, self.SPREAD, 500, planned(), both_sides=True)
        assert chances[-1] == pytest.approx(0.8, abs=0.01)
        assert looks.gain_needed_at_last_look(0.5, self.SPREAD, 500, planned()) == pytest.approx(gain / 5)


class TestHolm:
    def test_it_is_statsmodels(self):
        generator = np.random.default_rng(0)
        for n in (1, 2, 5, 12, 40):
            p_values = generator.random(n) ** 4
            expected = multipletests(p_values, 0.05, method="holm")[0]
            assert looks.holm(p_values.tolist()) == expected.tolist()

    def test_by_hand(self):
        # 0.005 <= 0.05 / 4, 0.01 <= 0.05 / 3, 0.03 > 0.05 / 2.
        assert looks.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]

    def test_none_of_none(self):
        assert looks.holm([]) == []
