"""Claims: wrong verdicts on runs with known true scores are rare, and a score at the floor gives no verdict."""

import itertools

import numpy as np
import pytest
from helpers.report_runs import world

from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError
from tiedlora.report import claims, write
from tiedlora.report.answers import verdict
from tiedlora.statistics import crossed
from tiedlora.statistics.crossed import Spread
from tiedlora.statistics.interval import Interval

FILE = PROJECT / "claims" / "tied_lora.yaml"


def answers(root, truth, **options):
    world(root, truth, **options)
    report = write.build([root], claims=FILE)
    return {answer.claim.at: answer for answer in report.answers}


class TestVerdicts:
    def test_the_four_answers(self, tmp_path):
        sure = {"rows": 2000, "seeds": 8, "seed_sd": 0.002}
        equal = {"LoRA": 0.6, "TABuv": 0.65, ("LoRA", 1): 0.5}
        found = answers(tmp_path / "supported", equal, **sure)
        assert found["equal_rank"].verdict == found["equal_parameters"].verdict == "supported"
        assert found["equal_rank"].decide == ""
        worse = answers(tmp_path / "contradicted", {"LoRA": 0.6, "TABuv": 0.4, ("LoRA", 1): 0.5}, **sure)
        assert worse["equal_rank"].verdict == worse["equal_parameters"].verdict == "contradicted"
        close = answers(tmp_path / "undecided", {"LoRA": 0.6, "TABuv": 0.58}, rows=200)
        assert close["equal_rank"].verdict == "undecided"
        assert "seeds of" in close["equal_rank"].decide
        floor = answers(tmp_path / "floor", {"LoRA": 0.1, "TABuv": 0.1}, base=0.1, rows=200)
        assert floor["equal_rank"].verdict == "uninformative"
        assert "at the floor" in floor["equal_rank"].reason

    def test_no_verdict_under_five_seeds_however_clear(self, tmp_path):
        found = answers(tmp_path, {"LoRA": 0.9, "TABuv": 0.2}, seeds=4, rows=500)
        assert found["equal_rank"].verdict == "undecided"
        assert "4 of at least 5 seeds" in found["equal_rank"].reason

    def test_a_missing_comparator_is_named_with_the_rank_to_run(self, tmp_path):
        found = answers(tmp_path, {"LoRA": 0.6, "TABuv": 0.5})
        assert found["equal_parameters"].verdict == "undecided"
        assert "run rank.r=1" in found["equal_parameters"].reason

    def test_retained_gain_is_the_share_of_loras_gain(self, tmp_path):
        found = answers(tmp_path, {"LoRA": 0.7, "TABuv": 0.4}, base=0.1, rows=2000, seed_sd=0.002)
        kept = found["equal_rank"].retained
        assert kept.value == pytest.approx(0.5, abs=0.05)
        assert kept.low < kept.value < kept.high

    @pytest.mark.parametrize(("low", "high", "expected"), [(-0.01, 0.1, "supported"), (-0.1, -0.03, "contradicted")])
    def test_a_verdict_reads_the_interval_beside_the_margin(self, low, high, expected):
        assert verdict(Interval(0, low, high), 0.02) == expected
        assert verdict(Interval(0, -0.1, 0.1), 0.02) == "undecided"

    @pytest.mark.parametrize(("seeds", "rows", "p"), itertools.product((5, 10), (200, 1000), (0.1, 0.5)))
    def test_wrong_verdicts_are_at_most_five_in_a_hundred(self, seeds, rows, p):
        """The hardest case: the method is worse by exactly the margin, so both verdicts are wrong.

        Examples and seeds are drawn again for each population. There are 600, so that 5 % is known to within 1.8.
        """
        generator = np.random.default_rng([seeds, rows, round(100 * p)])
        margin, wrong, worlds = 0.02, 0, 600
        for _ in range(worlds // 50):
            difficulty = generator.normal(0, 0.05, (50, 1, rows))
            taste = generator.normal(0, 0.05, (50, 1, rows))
            luck = generator.normal(0, 0.01, (2, 50, seeds, 1))
            drawn = generator.random((2, 50, seeds, rows))
            lora = drawn[0] < np.clip(p + difficulty + luck[0], 0, 1)
            tied = drawn[1] < np.clip(p + difficulty + taste + luck[1], 0, 1)
            true = mean_clipped(p, 0.05, 0.05, 0.01) - mean_clipped(p, 0.05, 0.0, 0.01)
            found = crossed.over_both(tied.astype(float) - lora.astype(float))
            for value, low, high in zip(*found, strict=True):
                # Shifted, so that the true difference is exactly -margin.
                shift = -margin - true
                interval = Interval(value + shift, low + shift, high + shift)
                wrong += verdict(interval, margin) != "undecided"
        assert wrong / worlds <= 0.05 + 0.018


def mean_clipped(p, *spreads):
    """The mean of a normal chance clipped to [0, 1], by quadrature."""
    sd = np.sqrt(sum(spread**2 for spread in spreads))
    grid = np.linspace(-6, 6, 4001)
    weight = np.exp(-(grid**2) / 2)
    return float((np.clip(p + sd * grid, 0, 1) * weight).sum() / weight.sum())


class TestPlanning:
    def test_what_is_said_to_be_enough_decides_four_times_in_five(self):
        """Simulated at the numbers that `needed_seeds_and_rows` returns."""
        spread = Spread(seeds=0.015, examples=0.2, rest=0.4)
        seeds, rows = crossed.needed_seeds_and_rows(0.04, spread, 500, 5)
        generator = np.random.default_rng(5)
        decided = 0
        for _ in range(300):
            values = (
                generator.normal(0, spread.seeds, (seeds, 1))
                + generator.normal(0, spread.examples, (1, rows))
                + generator.normal(0, spread.rest, (seeds, rows))
            )
            _, low, _ = crossed.over_both(values)
            decided += bool(low > -0.04)
        assert 0.72 <= decided / 300 <= 0.95

    def test_more_seeds_than_anyone_runs_turn_into_rows_and_then_into_none(self):
        seeds, rows = crossed.needed_seeds_and_rows(0.02, Spread(0.005, 0.5, 0.5), 100, 5)
        assert rows > 100
        assert seeds >= 5
        assert crossed.needed_seeds_and_rows(0.0001, Spread(0.05, 0.5, 0.5), 100, 5) is None

    def test_measured_spreads_come_back(self):
        generator = np.random.default_rng(0)
        values = generator.normal(0, 0.03, (200, 1)) + generator.normal(0, 0.3, (1, 400))
        values = values + generator.normal(0, 0.4, (200, 400))
        found = crossed.measured_spread(values)
        assert (found.seeds, found.examples, found.rest) == pytest.approx((0.03, 0.3, 0.4), rel=0.15)

    def test_a_sweep_reads_what_it_can_decide_before_it_runs(self):
        few = claims.plan(claims.read(FILE), seeds=2, rows=250)
        many = claims.plan(claims.read(FILE), seeds=20, rows=20_000)
        assert all("will probably not decide" in line and "needs" in line for line in few)
        assert all("is enough to decide" in line for line in many)


class TestFile:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (("margin: 0.02", "margin: 2"), r"claims\[0\].margin=2: must be in"),
            (("minimum_seeds: 5", "minimum_seeds: 3"), "must be 5 or more"),
            (("at: equal_rank", "at: equal_size"), "equal_rank, equal_parameters"),
            (("rank: 8", "rank: big"), "rank, a whole number"),
            (("    tasks: []\n", ""), "needs exactly the keys"),
            (("claims:", "claim:"), "needs the keys paper and claims"),
            (("paper:", "paper: ["), "not readable YAML"),
        ],
    )
    def test_mistakes_name_the_key(self, tmp_path, change, says):
        path = tmp_path / "claims.yaml"
        path.write_text(FILE.read_text().replace(*change))
        with pytest.raises(UserError, match=says):
            claims.read(path)

    def test_another_papers_claim_is_another_file(self, tmp_path):
        path = tmp_path / "other.yaml"
        path.write_text(
            "paper: VeRA\nclaims:\n  - name: Tuv keeps up\n    method: {configuration: Tuv, rank: 8}\n"
            "    comparator: {configuration: LoRA, at: equal_rank}\n    margin: 0.05\n    tasks: [squad]\n"
            "    minimum_seeds: 6\n"
        )
        world(tmp_path / "runs", {"LoRA": 0.5, "Tuv": 0.5}, seeds=2, rows=50)
        (answer,) = write.build([tmp_path / "runs"], claims=path).answers
        assert (answer.task, answer.verdict) == ("squad", "undecided")
        assert "was not run" in answer.reason
