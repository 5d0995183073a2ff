"""What keeps a verdict honest: floors, weakest arms, LoRA's curve, worth, clusters, and Holm over all tests."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.hostile import put_in_scores
from helpers.report_runs import (
    diverge,
    make_record,
    prediction_rows,
    report_of_claim,
    score_run,
    scored_run,
    world,
    write_run,
)
from scipy import stats

from tiedlora import tying
from tiedlora.analysis import intervals
from tiedlora.analysis.answers import error_note, with_survivors
from tiedlora.analysis.claims import sizes
from tiedlora.analysis.groups import curve, group_runs, point
from tiedlora.analysis.intervals import Clusters, mean_squares
from tiedlora.analysis.runs import read_runs
from tiedlora.analysis.worth import worth_of
from tiedlora.errors import UserError
from tiedlora.page import charts, figures, readme, tables, write

SURE = {"rows": 1000, "seed_sd": 0.002, "seeds": 3}
HALF = {"config.tying.layers": tying.evenly_spaced(15, 30)}
SHUFFLED = {"config.task.shuffle_targets": True}


def trial(root, rule="retains: 0.9", comparator="configuration: LoRA, at: equal_rank", extra="", **claim):
    """The report of root/runs, with one claim about TABuv and TA as its weakest arm."""
    top = f"looks: [3]\nweakest: {{configuration: TA, rank: 8}}\n{extra}"
    return report_of_claim(root, rule, comparator=comparator, top=top, **claim)


class TestSensitivity:
    @pytest.mark.parametrize("diverged", [False, True])
    def test_a_trial_that_the_weakest_arm_passes_cannot_fail(self, tmp_path, diverged):
        world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.75, "TA": 0.74}, **SURE)
        if diverged:
            diverge(tmp_path / "runs", "TA-r8-*-s2-*")
        report = trial(tmp_path)
        (answer,) = report.answers
        assert answer.verdict == "cannot fail here"
        assert "the same is supported for TA r=8, the weakest arm at look 1" in answer.reason
        assert [verdict.verdict for verdict in report.verdicts] == ["uninformative"]

    @pytest.mark.parametrize(("weakest", "sensitivity"), [(0.2, "shown"), (0.65, "not shown")])
    def test_a_verdict_stands_where_the_weakest_arm_does_not_pass(self, tmp_path, weakest, sensitivity):
        world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.75, "TA": weakest}, **SURE)
        (answer,) = trial(tmp_path).answers
        assert (answer.verdict, answer.findings.sensitivity) == ("supported", sensitivity)

    @pytest.mark.parametrize(
        ("method", "weakest", "look", "sensitivity"),
        [
            # It passes with its later seeds; the answer stands since the first look.
            ((0.7, 0.7, 0.7, 0.7, 0.7), (0.3, 0.3, 0.3, 1.0, 1.0), 0, "shown"),
            # Both are decided at the second look.
            ((0.6, 0.52, 0.68, 0.6, 0.6), (0.4, 0.48, 0.32, 0.4, 0.4), 1, "shown"),
        ],
    )
    def test_the_weakest_arm_is_asked_at_the_look_of_the_answer(self, tmp_path, method, weakest, look, sensitivity):
        for name, values in (("LoRA", [0.5] * 5), ("TABuv", method), ("TA", weakest)):
            for seed, value in enumerate(values):
                scored_run(tmp_path / "runs", [value] * 60, [0.0] * 60, name=name, seed=seed)
        top = "looks: [3, 5]\nweakest: {configuration: TA, rank: 8}"
        (answer,) = report_of_claim(tmp_path, "better_by: 0.0", top=top).answers
        found = answer.findings
        assert (answer.verdict, found.look.number, found.sensitivity) == ("supported", look, sensitivity)
        assert f"the weakest arm at look {look + 1}" in answer.reason

    def test_a_claim_may_name_a_weakest_arm_of_its_own(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.75, "TA": 0.74, "TB": 0.2}, **SURE)
        (answer,) = trial(tmp_path, rule="retains: 0.9\n    weakest: {configuration: TB, rank: 8}").answers
        assert (answer.verdict, answer.findings.sensitivity) == ("supported", "shown")

    def test_arms_that_were_trained_from_a_reward_are_arms_of_the_same_setting(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.2, "TA": 0.1}, **SURE)
        world(tmp_path / "runs", {"TABuv": 0.75}, **SURE, changes={"config.objective.name": "reward"})
        answers = {}
        for objective in ("targets", "reward"):
            method = f"TABuv, rank: 8, objective: {objective}"
            (answers[objective],) = report_of_claim(tmp_path, "better_by: 0.0", method, top="looks: [3]").answers
        verdicts = {objective: answer.verdict for objective, answer in answers.items()}
        assert verdicts == {"targets": "contradicted", "reward": "supported"}
        assert "TABuv (reward) r=8" in str(answers["reward"].pair.method.name)

    def test_a_contradicted_claim_has_shown_that_it_can_fail(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.4, "TA": 0.75}, **SURE)
        assert [answer.verdict for answer in trial(tmp_path).answers] == ["contradicted"]

    def test_a_weakest_arm_that_was_not_run_shows_nothing(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.75}, **SURE)
        (answer,) = trial(tmp_path).answers
        assert (answer.verdict, answer.findings.sensitivity) == ("supported", "not shown")
        assert "no finished run of TA r=8" in answer.reason

    def test_an_arm_is_not_asked_about_itself(self, tmp_path):
        """TA keeps 90 % of its own gain, and that shows nothing."""
        world(tmp_path / "runs", {"TABuv": 0.75, "TA": 0.7}, **SURE)
        (answer,) = trial(tmp_path, comparator="configuration: TA, rank: 8").answers
        assert (answer.verdict, answer.findings.sensitivity) == ("supported", "not shown")
        assert "TA r=8 is a side of the comparison itself" in answer.reason

    def test_without_a_base_beside_the_weakest_arm_it_is_not_shown(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.75, "TA": 0.4}, **SURE)
        for file in (tmp_path / "runs").glob("[LT]*A-*/scores/*.jsonl"):
            put_in_scores(file, "base", "")
            put_in_scores(file, "gain", {})
        (answer,) = trial(tmp_path).answers
        assert answer.verdict == "supported"
        assert "no base was scored beside TA r=8" in answer.reason


def test_a_seed_beside_the_plan_with_other_rows_changes_no_verdict_and_no_reference(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.75, "TA": 0.2}, **SURE)
    world(tmp_path / "runs", {"LoRA": 0.5}, **SURE, changes=HALF, rank=1)
    before = trial(tmp_path, comparator="frontier: LoRA")
    for rank, changes in ((8, {}), (1, HALF)):
        more = {"rank": rank, "changes": {**changes, "data.train.digest": "other"}}
        scored_run(tmp_path / "runs", [1.0] * 1000, [0.0] * 1000, name="LoRA", seed=50, **more)
    after = trial(tmp_path, comparator="frontier: LoRA")
    assert [answer.verdict for answer in before.answers] == ["supported"]
    assert [answer.verdict for answer in after.answers] == ["supported"]
    assert [panel.reference.name for panel in before.share_panels + after.share_panels] == ["LoRA r=8"] * 2
    for name in ("TABuv", "TA"):
        scored_run(tmp_path / "runs", [1.0] * 1000, [0.0] * 1000, name=name, seed=50)
    assert [answer.verdict for answer in trial(tmp_path, comparator="frontier: LoRA").answers] == ["supported"]


class TestFloor:
    FLOOR = "floor: {configuration: LoRA, rank: 8, shuffle_targets: true}"

    def test_the_gain_is_measured_from_the_floor(self, tmp_path):
        """From the base (0.1), 0.63 keeps 88 % of 0.6; from the floor (0.5), it keeps 65 % of 0.2."""
        world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.63, "TA": 0.4}, base=0.1, **SURE)
        world(tmp_path / "runs", {"LoRA": 0.5}, base=0.1, changes=SHUFFLED, **SURE)
        (from_base,) = trial(tmp_path, "retains: 0.82").answers
        (from_floor,) = trial(tmp_path, "retains: 0.82", extra=self.FLOOR).answers
        assert from_base.verdict == "supported"
        assert from_floor.verdict == "contradicted"
        found = from_floor.findings
        assert found.kept.value == pytest.approx(found.retained.value) == pytest.approx(0.65, abs=0.05)
        assert found.share.gain == pytest.approx(0.2, abs=0.02)
        assert "(over LoRA (shuffled targets) r=8)" in from_floor.reason

    @pytest.mark.parametrize(("floors", "needs"), [(2, "2"), (1, "1, 2")])
    def test_a_floor_with_fewer_seeds_is_what_a_look_waits_for(self, tmp_path, floors, needs):
        world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.4}, **SURE)
        scored_run(tmp_path / "runs", [1.0] * 1000, [0.0] * 1000, name="LoRA", seed=3)
        scored_run(tmp_path / "runs", [0.0] * 1000, [0.0] * 1000, name="TABuv", seed=3)
        world(tmp_path / "runs", {"LoRA": 0.2}, changes=SHUFFLED, **{**SURE, "seeds": floors})
        (answer,) = trial(tmp_path, extra=self.FLOOR).answers
        assert answer.decide == f"the look at 3 seeds: needs seeds {needs} of LoRA (shuffled targets) r=8"
        assert (answer.findings.seeds, answer.findings.difference_seeds) == (floors, 4)
        assert answer.findings.difference.value == pytest.approx(-0.475, abs=0.03), "all four seeds of both sides"
        assert answer.findings.kept.value == pytest.approx(0.4, abs=0.1), "only the seeds of the floor"

    def test_without_the_floors_runs_there_is_no_verdict(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.7, "TABuv": 0.72}, **SURE)
        (answer,) = trial(tmp_path, extra=self.FLOOR).answers
        assert answer.verdict == "undecided"
        assert answer.reason == "the floor: no finished run of LoRA (shuffled targets) r=8 in the same setting"

    def test_a_rule_that_needs_no_zero_does_not_wait_for_the_floor(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.5, "TABuv": 0.7}, **SURE)
        (answer,) = trial(tmp_path, "better_by: 0.0", extra=self.FLOOR).answers
        assert answer.verdict == "supported"


class TestCurve:
    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, tmp_path_factory):
        """LoRA with 23,040, 46,080 and 368,640 parameters; TABuv with 41,328 and TA with 4,608."""
        root = tmp_path_factory.mktemp("curve")
        world(root / "runs", {("LoRA", 1): 0.6, ("LoRA", 8): 0.8, "TABuv": 0.72, "TA": 0.3}, **SURE)
        world(root / "runs", {("LoRA", 1): 0.4}, changes=HALF, **SURE)
        return root

    def test_a_size_between_two_is_their_mean_in_the_logarithm(self, root):
        groups = group_runs(read_runs([root / "runs"])[0])
        lora = curve("LoRA", groups[0].setting, groups)
        sizes = [("LoRA_l15", 23_040), ("LoRA", 46_080), ("LoRA", 368_640)]
        assert [(group.configuration, group.params) for group in lora] == sizes
        (smaller, a), (larger, b) = point("LoRA", lora, 41_328).parts
        assert (a.params, b.params) == (23_040, 46_080)
        assert (smaller, smaller + larger) == (pytest.approx(np.log(46_080 / 41_328) / np.log(2)), 1)
        assert point("LoRA", lora, 46_080).parts == ((1.0, b),)
        assert point("LoRA", lora, 23_039) is point("LoRA", lora, 368_641) is None

    def test_a_claim_against_the_curve_compares_with_lora_of_the_same_size(self, root):
        (answer,) = trial(root, "better_by: 0.0", "frontier: LoRA").answers
        assert answer.verdict == "supported"
        # LoRA of 41,328 parameters scores 0.157 * 0.4 + 0.843 * 0.6.
        assert answer.findings.difference.value == pytest.approx(0.72 - 0.569, abs=0.02)
        assert "LoRA at 41,328 parameters (between LoRA_l15 r=1 and LoRA r=1)" in answer.reason

    def test_the_figure_of_shares_takes_a_curve_before_other_comparators(self, root):
        curve = "method: {configuration: TABuv, rank: 8}, comparator: {frontier: LoRA}, better_by: 0, tasks: []"
        report = trial(root, "better_by: 0.0", "configuration: TA, rank: 8", tasks=f"[]\n  - {{name: y, {curve}}}")
        (panel,) = report.share_panels
        assert (panel.reference.name, len(panel.curve)) == ("LoRA r=8", 3)
        legend = figures.legend(charts.panels(report.rows, report.rankings, report.share_panels, report.leads))
        assert [key.name for key in legend] == ["LoRA", "TABuv", "TA"]

    def test_outside_the_measured_sizes_it_says_so(self, root):
        (answer,) = trial(root, "better_by: 0.0", "frontier: LoRA", method="TA, rank: 8").answers
        assert answer.verdict == "undecided"
        assert answer.reason == "4,608 parameters are outside the measured sizes of LoRA: 23,040, 46,080, 368,640"

    def test_a_size_that_has_just_begun_takes_no_part(self, root, tmp_path):
        shutil.copytree(root / "runs", tmp_path / "runs")
        before = {row.group.label: row.worth for row in trial(root).rows if row.group.rank == 8}
        world(tmp_path / "runs", {("LoRA", 2): 0.7}, **{**SURE, "seeds": 2})
        (answer,) = trial(tmp_path, "better_by: 0.0", "frontier: LoRA").answers
        assert "(between LoRA_l15 r=1 and LoRA r=1)" in answer.reason
        assert answer.verdict == "supported"
        assert {row.group.label: row.worth for row in trial(tmp_path).rows if row.group.rank == 8} == before

    def test_a_size_that_scores_worse_than_a_smaller_one_says_so(self, root, tmp_path):
        shutil.copytree(root / "runs", tmp_path / "runs")
        world(tmp_path / "runs", {("LoRA", 2): 0.5}, **SURE)
        weak = {row.group.name: row.notes[0] for row in trial(tmp_path).rows if "scores worse" in str(row.notes)}
        assert list(weak) == ["LoRA r=2"]
        assert weak["LoRA r=2"].startswith("scores worse than a smaller size of the curve: -10.")

    def test_a_size_with_a_lower_loss_is_not_worse(self, tmp_path):
        truth = {("LoRA", 1): 0.6, ("LoRA", 2): 0.8, ("LoRA", 8): 0.3}
        world(tmp_path / "runs", truth, metric="target_loss", **SURE)
        rows = write.build([tmp_path / "runs"]).rows
        assert [row.group.name for row in rows if "scores worse" in str(row.notes)] == ["LoRA r=2"]

    @pytest.mark.parametrize("kind", ["a diverged seed", "a failed seed", "another metric", "another split"])
    def test_a_size_takes_part_if_all_its_seeds_have_ended_with_the_metric(self, root, tmp_path, kind):
        shutil.copytree(root / "runs", tmp_path / "runs")
        metric = "target_loss" if kind == "another metric" else "exact_match_strict"
        split = "test" if kind == "another split" else "validation"
        world(tmp_path / "runs", {("LoRA", 2): 0.7}, **SURE, metric=metric, split=split)
        if kind.endswith("seed"):
            folder = diverge(tmp_path / "runs", "LoRA-r2-*-s2-*")
        if kind == "a failed seed":
            (folder / "error.txt").write_text("OSError: No space left on device\n")
        report = trial(tmp_path, comparator="frontier: LoRA", tasks="{chain_sum: exact_match_strict}")
        groups = group_runs(*read_runs([tmp_path / "runs"]))
        method = next(group for group in groups if group.label == "TABuv")
        found = [group.params for group in sizes(report.answers[0].claim, "LoRA", method, groups, "validation")]
        assert (92_160 in found) == kind.endswith("seed")

    def test_an_arm_of_the_curve_is_not_compared_with_the_curve(self, root):
        for method in ("LoRA, rank: 1", "LoRA_l15, rank: 1"):
            with pytest.raises(UserError, match="is on the curve of LoRA itself; choose another frontier or method"):
                trial(root, "better_by: 0.0", "frontier: LoRA", method=method)
        assert trial(root, "better_by: 0.0", "frontier: LoRA", method="LoRA, rank: 1, shuffle_targets: true")

    def test_a_floor_that_the_runs_show_to_be_a_side_is_named(self, tmp_path):
        world(tmp_path / "runs", {("LoRA", 1): 0.6, ("TABuv", 11): 0.7}, **SURE)
        rule = "retains: 0.9\n    floor: {configuration: LoRA, rank: 1}"
        (answer,) = trial(tmp_path, rule, "configuration: LoRA, at: equal_parameters", method="TABuv, rank: 11").answers
        assert answer.reason == "the floor is LoRA r=1, a side of the comparison itself; choose another"

    def test_only_lora_counts_in_the_column_about_lora(self, root, tmp_path):
        def column(comparator, root=root):
            rows = {row[0]: row for row in readme.TABLES["answer"](trial(root, "better_by: 0.0", comparator)).rows}
            return rows["TABuv r 8"][-1]

        shutil.copytree(root / "runs", tmp_path / "runs")
        world(tmp_path / "runs", {("TAuv", 20): 0.3}, **SURE)
        assert column("configuration: TAuv, rank: 20", tmp_path) is None, "40,920 parameters, but not LoRA's"
        assert column("frontier: LoRA") == "better *", "one test alone needs no correction"
        assert column("configuration: LoRA, rank: 1") is None, "46,080 parameters are 11 % more than 41,328"
        assert column("configuration: TA, rank: 8") is None

    def test_worth_is_the_size_that_scores_the_same(self, root):
        report = trial(root)
        worth = {row.group.label: row.worth for row in report.rows}
        # 0.72 is 0.6 of the way from 0.6 to 0.8: 46,080 * 8^0.6.
        assert worth["TABuv"].value == pytest.approx(160_000, rel=0.2)
        assert worth["TABuv"].low < 160_000 < worth["TABuv"].high
        assert worth["TA"].value == 0
        assert (str(worth["TA"]), tables.WORTH.csv(worth["TA"])[0]) == ("< 23,040", "0")
        assert worth["LoRA"] is None

    def test_worth_ends_where_the_difference_is_one_half_width_and_at_the_measured_sizes(self):
        sizes = np.geomspace(1000, 100_000, 201)
        falling = np.log(10_000) - np.log(sizes)
        found = worth_of(sizes, falling, np.full(201, np.log(2)))
        assert (found.low, found.value, found.high) == pytest.approx((5000, 10_000, 20_000), rel=1e-3)
        wide = worth_of(sizes, falling, np.full(201, 9.0))
        assert (wide.low, wide.high) == (0, np.inf)
        assert str(wide) == "10,000 [< 1,000, > 100,000]"
        above = worth_of(sizes, falling + 9, np.full(201, 0.1))
        assert (above.value, above.low, above.high, str(above)) == (np.inf, 100_000, np.inf, "> 100,000")
        below = worth_of(sizes, falling - 9, np.full(201, 0.1))
        assert (below.value, below.low, below.high, str(below)) == (0, 0, 1000, "< 1,000")

    def test_worth_ends_between_the_last_size_that_is_level_and_the_next(self):
        found = worth_of(np.array([1e3, 2e3, 4e3, 8e3]), np.array([0.3, 0.0, -0.05, -0.4]), np.full(4, 0.1))
        # |mean| - half goes from 0.2 to -0.1 below the level sizes, and from -0.05 to 0.3 above them.
        assert (found.low, found.value, found.high) == pytest.approx((1e3 * 2 ** (2 / 3), 2e3, 4e3 * 2 ** (1 / 7)))

    def test_an_arm_below_the_curve_that_a_wide_part_of_it_cannot_tell_apart(self):
        """LoRA's larger size varies more between seeds. The interval holds the estimate all the same."""
        found = worth_of(np.array([1000.0, 8000.0]), np.array([-0.2, -0.2]), np.array([0.1, 0.3]))
        assert str(found) == "< 1,000 [< 1,000, > 8,000]"


class TestClusters:
    SIZES = (16, 23, 24, 24, 25, 27, 28, 33, 36, 41, 44, 48, 52, 64, 101)

    def clusters(self):
        return Clusters(np.repeat(np.arange(len(self.SIZES)), self.SIZES))

    def test_clusters_of_one_row_are_rows(self):
        values = np.random.default_rng(0).normal(size=(3, 40))
        rows, clusters = mean_squares(values), mean_squares(values, Clusters(np.arange(40)))
        for name in ("mean", "of_seeds", "of_rows", "of_rest", "freedom"):
            assert getattr(clusters, name) == pytest.approx(getattr(rows, name)), name

    def test_the_variance_is_the_jackknifes(self):
        """Leaving out one cluster at a time: (K - 1) / K times the sum of squares of the changes of the mean."""
        clusters, values = self.clusters(), np.random.default_rng(0).gamma(2, size=sum(self.SIZES))
        without = [values[clusters.codes != number].mean() for number in range(len(self.SIZES))]
        count = len(self.SIZES)
        expected = (count - 1) / count * np.square(np.array(without) - values.mean()).sum()
        found = clusters.variance(clusters.sums(values - values.mean()))
        assert found == pytest.approx(expected, rel=1e-12)
        squares = np.square(self.SIZES, dtype=float)
        quantile = stats.t.isf(0.025, squares.sum() ** 2 / np.square(squares).sum() - 1)
        interval = intervals.clustered_mean(values, clusters)
        assert interval.high - interval.value == pytest.approx(quantile * np.sqrt(expected), rel=1e-9)

    def test_where_rows_of_a_cluster_are_alike_the_interval_over_rows_is_wrong_and_this_one_is_not(self):
        generator, clusters, draws = np.random.default_rng(0), self.clusters(), 600
        of_clusters = generator.normal(0, 0.1, (draws, 1, len(self.SIZES)))[..., clusters.codes]
        values = of_clusters + generator.normal(0, 0.3, (draws, 1, sum(self.SIZES)))
        values = values + generator.normal(0, 0.1, (draws, 3, sum(self.SIZES)))
        by_rows, by_clusters = mean_squares(values), mean_squares(values, clusters)
        wrong = [float((abs(found.mean) > found.half_width()).mean()) for found in (by_rows, by_clusters)]
        assert wrong[0] > 0.15
        # 5 % and three standard errors of 600 draws.
        assert wrong[1] <= 0.077

    def test_too_few_clusters_are_no_sample(self, tmp_path):
        names = np.repeat(["a", "b", "c"], [129, 69, 2]).tolist()
        assert Clusters.of(names) is None
        assert Clusters.of(["a"] * 50) is None
        rows = [
            dataclasses.replace(row, cluster=name)
            for row, name in zip(prediction_rows((np.arange(200) < 70).astype(float)), names, strict=True)
        ]
        record = make_record()
        write_run(tmp_path, record)
        scored = score_run(tmp_path, record, "validation", rows)["answers"]
        assert scored.metrics["exact_match_strict"].method == "wilson"
        (row,) = write.build([tmp_path]).rows
        assert "rows of only 3 clusters: intervals hold for these alone" in row.notes

    def test_rows_name_their_cluster_and_a_study_may_name_it_for_them(self, tmp_path, monkeypatch):
        scores = (np.arange(120) % 3 == 0).astype(float)
        rows = prediction_rows(scores)
        named = [dataclasses.replace(row, cluster=f"article {int(row.id) // 20}") for row in rows]
        found = {}
        for study, own in (("named", named), ("listed", rows), ("alone", rows), ("partly", named)):
            root = tmp_path / study / "runs"
            for seed in range(3):
                kept = rows if (study, seed) == ("partly", 0) else own
                record = make_record(seed=seed)
                write_run(root, record)
                score_run(root, record, "validation", kept)
            if study == "listed":
                clusters = {"chain_sum": {row.id: row.cluster for row in named}}
                (tmp_path / study / "clusters.json").write_text(json.dumps(clusters))
            (row,) = write.build([root]).rows
            found[study] = row.score.both
        assert found["named"] == found["listed"] == found["partly"]
        monkeypatch.chdir(tmp_path / "listed" / "runs")
        (row,) = write.build([Path()]).rows
        assert row.score.both == found["listed"], "a folder's own path has no parent"
        assert found["named"] != found["alone"]

    def test_a_verdict_is_over_clusters(self, tmp_path):
        found = []
        for clusters in ({}, {"chain_sum": {str(number): str(number // 20) for number in range(200)}}):
            root = tmp_path / str(len(clusters))
            world(root / "runs", {"LoRA": 0.5, "TABuv": 0.6}, seeds=3)
            (root / "clusters.json").write_text(json.dumps(clusters))
            found += trial(root, "better_by: 0.0").answers
        assert found[0].findings.contrast != found[1].findings.contrast
        assert found[0].findings.retains_at_least != found[1].findings.retains_at_least
        assert "200 rows in 10 clusters" in found[1].reason

    def test_a_runs_own_interval_is_over_clusters(self, tmp_path):
        rows = [
            dataclasses.replace(row, cluster=str(number // 20))
            for number, row in enumerate(prediction_rows((np.arange(120) < 40).astype(float)))
        ]
        found = score_run(tmp_path, make_record(), "validation", rows)["answers"].metrics["exact_match_strict"]
        assert found.method == "clusters"
        expected = intervals.clustered_mean(
            np.array([row.scores["exact_match_strict"] for row in rows]), Clusters.of([row.cluster for row in rows])
        )
        assert (found.value, found.high) == (expected.value, expected.high)
        assert found.low == max(0.0, expected.low)


def test_two_claims_about_one_difference_are_one_test_and_holm_is_over_all(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.5, "TABuv": 0.62, "TAB": 0.51}, **SURE)
    claim = (
        "  - {{name: {}, method: {{configuration: {}, rank: 8}}, "
        "comparator: {{configuration: LoRA, rank: 8}}, better_by: 0.0, tasks: []}}\n"
    )
    named = [("one", "TABuv"), ("again", "TABuv"), ("b", "TAB")]
    (tmp_path / "claims.yaml").write_text("looks: [3]\nclaims:\n" + "".join(claim.format(*one) for one in named))
    report = write.build([tmp_path / "runs"], claims=tmp_path / "claims.yaml")
    assert [answer.survives_holm for answer in report.answers] == [True, True, False]
    assert "from 2 different tests that" in error_note(report.answers)
    unclear = []
    for answer in report.answers:
        look = dataclasses.replace(answer.findings.look, supported_level=0.03)
        findings = dataclasses.replace(answer.findings, looks=(look,))
        unclear.append(dataclasses.replace(answer, findings=findings))
    assert not any(answer.survives_holm for answer in with_survivors(unclear)), "0.03 is not below 0.05 / 2"
