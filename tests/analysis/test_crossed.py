"""The interval over seeds and rows: an independent mixed model agrees, and it holds its level, also a small one."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats

from tiedlora.analysis import crossed


def table(seeds, rows, *, seed=0, spread=(0.05, 0.3, 0.4), mean=0.1, draws=()):
    """Normal effects of seeds, rows and the remainder: (*draws, seeds, rows)."""
    generator = np.random.default_rng(seed)
    return (
        mean
        + generator.normal(0, spread[0], (*draws, seeds, 1))
        + generator.normal(0, spread[1], (*draws, 1, rows))
        + generator.normal(0, spread[2], (*draws, seeds, rows))
    )


class TestMixedModel:
    """statsmodels fits both random effects by restricted maximum likelihood, which knows nothing of mean squares."""

    @pytest.mark.parametrize(("seeds", "rows", "seed"), [(6, 40, 2), (8, 60, 4), (12, 30, 3)])
    def test_it_has_the_same_components_and_standard_error(self, seeds, rows, seed):
        values = table(seeds, rows, seed=seed, spread=(0.15, 0.3, 0.4))
        frame = pd.DataFrame({"score": values.ravel(), "everything": 1})
        frame["seed"], frame["row"] = np.divmod(np.arange(values.size), rows)
        effects = {"seed": "0 + C(seed)", "row": "0 + C(row)"}
        fit = smf.mixedlm("score ~ 1", frame, groups="everything", vc_formula=effects).fit(reml=True)
        components = dict(zip(fit.model.exog_vc.names, fit.vcomp, strict=True))

        found = crossed.measured_spread(values)
        assert found.seeds**2 == pytest.approx(components["seed"], rel=0.1)
        assert found.examples**2 == pytest.approx(components["row"], rel=0.1)
        assert found.rest**2 == pytest.approx(fit.scale, rel=0.1)
        assert found.of_mean(seeds, rows) == pytest.approx(fit.bse["Intercept"], rel=0.1)

        # The interval, from the fit's components alone.
        of_seeds = components["seed"] / seeds + fit.scale / (seeds * rows)
        t_seeds, t_rows = stats.t.ppf(0.975, seeds - 1), stats.t.ppf(0.975, rows - 1)
        half = np.sqrt(t_seeds**2 * of_seeds + t_rows**2 * components["row"] / rows)
        interval = crossed.both_interval(values)
        assert interval.value == pytest.approx(fit.params["Intercept"])
        assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.1)


class TestInterval:
    def test_where_only_seeds_vary_it_is_t_over_seeds(self):
        values = np.broadcast_to(np.array([0.1, 0.3, 0.4, 0.2])[:, None], (4, 50))
        seeds = crossed.seeds_interval(values.mean(1))
        assert crossed.over_both(values) == pytest.approx((seeds.value, seeds.low, seeds.high))

    def test_where_only_rows_vary_it_is_t_over_rows(self):
        values = np.broadcast_to(np.random.default_rng(0).random(50), (4, 50))
        rows = crossed.seeds_interval(values[0])
        assert crossed.over_both(values) == pytest.approx((rows.value, rows.low, rows.high))

    def test_it_is_never_narrower_than_over_the_rows(self):
        """Each seed solves another row, so the seeds agree by chance, and rows differ less than the remainder."""
        values = np.eye(3, 4)
        rows = crossed.seeds_interval(values.mean(0))
        assert crossed.over_both(values) == pytest.approx((rows.value, rows.low, rows.high))
        assert crossed.p_value(values) > 0.05

    def test_a_smaller_level_is_a_wider_interval(self):
        values = table(5, 100)
        widths = [np.ptp(crossed.over_both(values, level)[1:]) for level in (0.5, 0.05, 0.005, 0.0005)]
        assert widths == sorted(widths)
        assert crossed.over_both(values) == crossed.over_both(values, 0.05)

    def test_leading_axes_are_separate_tables(self):
        values = table(4, 30, draws=(3,))
        separate = np.array([crossed.over_both(one, 0.01) for one in values])
        np.testing.assert_allclose(np.array(crossed.over_both(values, 0.01)).T, separate)

    @pytest.mark.parametrize("values", [np.zeros((1, 5)), np.zeros((5, 1))])
    def test_one_seed_or_row_is_an_error(self, values):
        with pytest.raises(ValueError, match="needs two of each"):
            crossed.over_both(values)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_value_that_is_not_finite_is_an_error(self, bad):
        values = table(3, 5)
        values[1, 2] = bad
        with pytest.raises(ValueError, match="finite"):
            crossed.p_value(values)

    @pytest.mark.parametrize("level", [0.05, 0.006])
    @pytest.mark.parametrize("spread", [(0.05, 0.1, 0.1), (0.0, 0.3, 0.1), (0.0, 0.0, 0.4), (0.015, 0.3, 0.4)])
    @pytest.mark.parametrize("seeds", [3, 8])
    def test_at_every_level_it_is_wrong_at_most_that_often(self, seeds, spread, level):
        """8,000 tables of 100 rows: 5 % is known to within 0.5 points, and 0.6 % to within 0.17 (95 %)."""
        draws = 8000
        low, high = crossed.over_both(table(seeds, 100, spread=spread, mean=0.0, draws=(draws,)), level)[1:]
        wrong = ((low > 0) | (high < 0)).mean()
        assert wrong <= level + 3 * np.sqrt(level * (1 - level) / draws)


class TestPValue:
    @pytest.mark.parametrize("mean", [0.5, 0.05, -0.02])
    def test_the_interval_at_this_level_ends_at_zero(self, mean):
        values = table(5, 100, mean=mean)
        low, high = crossed.over_both(values, crossed.p_value(values))[1:]
        assert min(abs(low), abs(high)) < 1e-8 * (high - low)

    def test_it_shrinks_as_the_mean_leaves_zero(self):
        values = table(5, 100, mean=0.0)
        values -= values.mean()
        levels = [crossed.p_value(values + mean) for mean in (0, 0.01, 0.05, 0.2, 1, 100)]
        assert levels[0] == 1.0
        assert levels == sorted(levels, reverse=True)
        assert 0 < levels[-1] < 1e-6
        assert crossed.p_value(values + 0.05) == pytest.approx(crossed.p_value(-values - 0.05))

    def test_it_is_students_where_only_seeds_vary(self):
        of_seeds = np.array([0.1, 0.3, 0.4, 0.2, 0.25])
        values = np.broadcast_to(of_seeds[:, None], (5, 40))
        assert crossed.p_value(values) == pytest.approx(stats.ttest_1samp(of_seeds, 0).pvalue)

    def test_constant_tables(self):
        assert crossed.p_value(np.full((3, 5), 0.3)) == 0.0
        assert crossed.p_value(np.zeros((3, 5))) == 1.0
        # A contrast of equal scores: 1 - 0.9 - 0.1 is -2.8e-17.
        assert crossed.p_value(np.full((3, 5), 1 - 0.9 - 0.1)) == 1.0


def test_measured_spreads_come_back():
    found = crossed.measured_spread(table(200, 400, spread=(0.03, 0.3, 0.4)))
    assert (found.seeds, found.examples, found.rest) == pytest.approx((0.03, 0.3, 0.4), rel=0.15)
