"""Answers to claims: the rule decides at planned looks only, and what cannot be decided says why."""

import shutil

import numpy as np
import pytest
from helpers.report_runs import scored_run, world

from tiedlora.page import write

RULES = {"keeps": "retains: 0.9", "better": "better_by: 0.0", "level": "level_within: 0.2", "old": "margin: 0.02"}
SURE = {"rows": 1000, "seed_sd": 0.002}


def claims_file(tmp_path, *, rule="keeps", method="TABuv, rank: 8", other="LoRA, at: equal_rank", tasks="[]", top=""):
    path = tmp_path / "claims.yaml"
    path.write_text(
        f"{top or 'looks: [3, 5]'}\nclaims:\n  - name: x\n    method: {{configuration: {method}}}\n"
        f"    comparator: {{configuration: {other}}}\n    {RULES.get(rule, rule)}\n    tasks: {tasks}\n"
    )
    return path


def answer(tmp_path, **claim):
    (found,) = write.build([tmp_path / "runs"], claims=claims_file(tmp_path, **claim)).answers
    return found


def of_world(tmp_path, truth, *, claim=None, **options):
    world(tmp_path / "runs", truth, **{**SURE, **options})
    return answer(tmp_path, **(claim or {}))


class TestRules:
    @pytest.mark.parametrize(
        ("rule", "lora", "tied", "verdict"),
        [
            ("keeps", 0.6, 0.62, "supported"),
            ("keeps", 0.6, 0.4, "contradicted"),
            ("better", 0.5, 0.6, "supported"),
            ("better", 0.6, 0.5, "contradicted"),
            ("level", 0.6, 0.6, "supported"),
            ("level", 0.5, 0.8, "contradicted"),
            ("old", 0.6, 0.62, "supported"),
            ("old", 0.6, 0.5, "contradicted"),
        ],
    )
    def test_clear_cases(self, tmp_path, rule, lora, tied, verdict):
        found = of_world(tmp_path, {"LoRA": lora, "TABuv": tied}, claim={"rule": rule})
        assert found.verdict == verdict
        assert found.decide == ""
        assert not found.exploratory

    def test_a_method_that_learned_nothing_is_not_comparable_where_lora_gains_little(self, tmp_path):
        """By the rule of version 0.1, two points of margin, it was."""
        truth = {"LoRA": 0.115, "TABuv": 0.1}
        old = of_world(tmp_path, truth, rows=6000, claim={"rule": "old"})
        assert old.verdict == "supported"
        keeps = answer(tmp_path)
        assert keeps.verdict != "supported"
        assert keeps.retains_at_least is None or keeps.retains_at_least < 0.5

    def test_the_least_share_that_is_kept_is_below_the_estimate(self, tmp_path):
        found = of_world(tmp_path, {"LoRA": 0.7, "TABuv": 0.4}, rows=2000)
        assert found.retained.value == pytest.approx(0.5, abs=0.05)
        assert 0.3 < found.retains_at_least < found.retained.value

    def test_a_lower_loss_is_better(self, tmp_path):
        generator = np.random.default_rng(0)
        rows = generator.gamma(4, 0.1, 300)
        for name, share in (("LoRA", 0.5), ("TABuv", 0.52)):
            for seed in range(3):
                losses = rows * share + generator.normal(0, 0.005, 300)
                scored_run(tmp_path / "runs", losses, rows * 4, metric="target_loss", name=name, seed=seed)
        found = answer(tmp_path)
        assert found.verdict == "supported"
        assert found.difference.value > 0, "a difference of losses keeps its sign"
        assert found.contrast.value > 0, "the contrast is better if it is higher"


class TestLooks:
    def test_before_the_first_look_there_is_no_verdict_however_clear(self, tmp_path):
        found = of_world(tmp_path, {"LoRA": 0.9, "TABuv": 0.2}, seeds=2)
        assert found.verdict == "undecided"
        assert found.reason.startswith("before the first look: 2 of 3 seeds")
        assert found.decide == "the look at 3 seeds: needs seeds 2 on both sides"

    def test_the_first_look_that_decides_stands(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3, **SURE)
        before = answer(tmp_path)
        for seed in (3, 4):
            for name, p in (("LoRA", 0.0), ("TABuv", 1.0)):
                scored_run(tmp_path / "runs", [p] * 1000, [0.0] * 1000, name=name, seed=seed)
        after = answer(tmp_path)
        assert before.verdict == after.verdict == "contradicted"
        assert before.contrast == after.contrast

    def test_seeds_between_two_looks_are_not_used(self, tmp_path):
        three = of_world(tmp_path, {"LoRA": 0.5, "TABuv": 0.48}, seeds=3, rows=200)
        for name in ("LoRA", "TABuv"):
            scored_run(tmp_path / "runs", [1.0] * 200, [0.0] * 200, name=name, seed=3)
        four = answer(tmp_path)
        assert three.verdict == four.verdict == "undecided"
        assert (four.look, four.seeds, four.contrast) == (0, 3, three.contrast)
        assert "needs seeds 4 on both sides; a later look decides with a chance of" in four.decide
        assert "if the two are equal, the plan decides in 4 of 5 tries where the comparator gains" in four.decide
        assert four.gain_needed > 0.4, "the comparator's gain of 0.4 was too small at these rows"

    def test_a_seed_that_diverged_is_missing_and_one_that_crashed_stops_the_look(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3, **SURE)
        (lost,) = (tmp_path / "runs").glob("TABuv-*-s2-*")
        (lost / "result.json").unlink()
        (lost / "error.txt").write_text("Traceback\nOSError: [Errno 28] No space left on device\n")
        found = answer(tmp_path)
        assert (found.verdict, found.look) == ("undecided", None), "it can be run again, and would change the look"
        (lost / "error.txt").write_text("Traceback\ntiedlora.errors.Diverged: step 3: the loss is nan\n")
        found = answer(tmp_path)
        assert found.verdict == "contradicted"
        assert "2 seeds at level" in found.reason
        assert "1 diverged" in found.reason

    def test_later_seeds_can_change_a_rate_that_nothing_has_recorded_and_the_answer_says_so(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3, **SURE)
        world(tmp_path / "runs", {"TABuv": 0.2}, seeds=3, lr=3e-2, **SURE)
        assert "later seeds" not in answer(tmp_path).reason
        scored_run(tmp_path / "runs", [1.0] * 1000, [0.0] * 1000, seed=3)
        found = answer(tmp_path)
        assert found.verdict == "contradicted"
        assert "the rate of TABuv r=8 was chosen on later seeds too" in found.reason

    @pytest.mark.parametrize(("base", "method", "verdict"), [(0.1, 0.6, "supported"), (0.5, 0.1, "contradicted")])
    def test_who_is_better_needs_no_gain_of_the_comparator(self, tmp_path, base, method, verdict):
        truth = {"LoRA": base, "TABuv": method}
        found = of_world(
            tmp_path, truth, seeds=3, rows=300, base=base, seed_sd=0.002, claim={"rule": "better", "top": "looks: [3]"}
        )
        assert found.verdict == verdict
        assert found.gain_may_be_zero

    def test_an_uninformative_claim_says_what_would_decide_it(self, tmp_path):
        found = of_world(tmp_path, {"LoRA": 0.1, "TABuv": 0.1}, seeds=5, rows=200)
        assert found.verdict == "uninformative"
        assert "on which the comparator beats the base" in found.decide

    def test_one_row_decides_nothing(self, tmp_path):
        for name, score in (("LoRA", 1.0), ("TABuv", 0.0)):
            for seed in range(3):
                scored_run(tmp_path / "runs", [score], [0.0], name=name, seed=seed)
        found = answer(tmp_path)
        assert (found.verdict, found.look) == ("undecided", None)
        assert "one row has no interval" in found.reason

    def test_sides_that_were_trained_on_other_rows_are_not_compared(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6}, seeds=3, **SURE)
        world(tmp_path / "runs", {"TABuv": 0.3}, seeds=3, changes={"data.train.digest": "other"}, **SURE)
        found = answer(tmp_path)
        assert found.verdict == "undecided"
        assert "trained on other rows" in found.reason

    def test_an_unfinished_seed_stops_the_look(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3, **SURE)
        (lost,) = (tmp_path / "runs").glob("TABuv-*-s2-*")
        shutil.rmtree(lost)
        assert answer(tmp_path).verdict == "undecided"

    def test_other_seeds_than_the_planned_ones_give_an_exploratory_verdict(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3, **SURE)
        found = answer(tmp_path, top="looks: [3, 5]\nseeds: [5, 6, 7, 8, 9]")
        assert found.verdict == "contradicted"
        assert found.exploratory
        assert "seeds 0 to 2 are not the planned ones" in found.reason

    def test_more_seeds_are_not_advised_where_they_will_not_decide(self, tmp_path):
        found = of_world(tmp_path, {"LoRA": 0.6, "TABuv": 0.55}, seeds=3, rows=60, claim={"top": "looks: [3, 4]"})
        assert found.verdict == "undecided"
        assert found.is_futile
        assert "no planned look is likely to change it" in found.decide

    def test_a_comparator_without_a_gain_is_uninformative_at_the_last_look_only(self, tmp_path):
        floor = {"LoRA": 0.1, "TABuv": 0.1}
        early = of_world(tmp_path, floor, seeds=3, rows=200)
        assert early.verdict == "undecided"
        assert "the comparator's own gain over the base may be 0" in early.reason
        shutil.rmtree(tmp_path / "runs")
        late = of_world(tmp_path, floor, seeds=5, rows=200)
        assert late.verdict == "uninformative"

    def test_without_base_scores_there_is_no_gain_to_keep(self, tmp_path):
        for name in ("LoRA", "TABuv"):
            for seed in range(3):
                scored_run(tmp_path / "runs", [1.0, 0.0] * 50, name=name, seed=seed)
        found = answer(tmp_path)
        assert found.verdict == "undecided"
        assert "the base model was not scored" in found.reason
        assert "base" not in answer(tmp_path, rule="better").reason


class TestPartners:
    """SmolLM2-135M: LoRA has 46,080 parameters at r = 1, TABuv has 41,328 at r = 8 and 46,026 at r = 11."""

    def test_equal_parameters_are_within_five_per_cent(self, tmp_path):
        truth = {("LoRA", 1): 0.5, ("TABuv", 8): 0.7, ("TABuv", 11): 0.7}
        matched = {"rule": "better", "method": "TABuv, at: equal_parameters", "other": "LoRA, rank: 1"}
        found = of_world(tmp_path, truth, seeds=3, claim=matched)
        assert found.verdict == "supported"
        assert "TABuv r=11 against LoRA r=1" in found.reason

    def test_the_rank_to_run_is_named(self, tmp_path):
        truth = {("LoRA", 1): 0.5, ("TABuv", 8): 0.7}
        matched = {"rule": "better", "method": "TABuv, at: equal_parameters", "other": "LoRA, rank: 1"}
        found = of_world(tmp_path, truth, seeds=1, rows=50, claim=matched)
        assert "nearest: r=8 with 41,328); run rank.r=11" in found.reason
        reverse = answer(tmp_path, method="TABuv, rank: 8", other="LoRA, at: equal_parameters")
        assert "no rank comes within 5 %" in reverse.reason

    def test_two_ranks_of_one_configuration_are_a_claim(self, tmp_path):
        truth = {("TABuv", 32): 0.7, ("TABuv", 8): 0.5}
        ranks = {"rule": "better", "method": "TABuv, rank: 32", "other": "TABuv, rank: 8"}
        found = of_world(tmp_path, truth, seeds=3, claim=ranks)
        assert (found.verdict, found.seeds) == ("supported", 3)

    def test_a_configuration_is_compared_with_itself_on_other_seeds(self, tmp_path):
        other = "LoRA, rank: 8, seed_offset: 5"
        control = {"rule": "level", "method": "LoRA, rank: 8", "other": other}
        found = of_world(tmp_path, {"LoRA": 0.6}, seeds=10, claim=control)
        assert (found.verdict, found.seeds) == ("supported", 3)
        assert "LoRA r=8 against LoRA (seeds from 5) r=8" in found.reason
        reverse = answer(tmp_path, rule="level", method=other, other="LoRA, rank: 8")
        assert (reverse.verdict, reverse.seeds) == ("supported", 3)
        shutil.rmtree(tmp_path / "runs")
        assert of_world(tmp_path, {"LoRA": 0.6}, seeds=5, claim=control).verdict == "undecided"

    def test_of_two_scales_the_plain_one_answers_and_without_it_all_do_by_name(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.65}, seeds=3, **SURE)
        for alpha in (16.0, 32.0):
            world(tmp_path / "runs", {"TABuv": 0.3}, seeds=3, changes={"config.rank.alpha": alpha}, **SURE)
        assert answer(tmp_path).verdict == "supported"
        for folder in (tmp_path / "runs").glob("TABuv-*"):
            if '"alpha": 8.0' in (folder / "result.json").read_text():
                shutil.rmtree(folder)
        report = write.build([tmp_path / "runs"], claims=claims_file(tmp_path))
        assert {found.task: found.verdict.value for found in report.answers} == {
            "chain_sum (TABuv (rank.alpha=16.0))": "contradicted",
            "chain_sum (TABuv (rank.alpha=32.0))": "contradicted",
        }

    def test_a_missing_comparator_or_method_is_named(self, tmp_path):
        found = of_world(tmp_path, {"TABuv": 0.5}, seeds=1, rows=50)
        assert "LoRA r=8 was not run in the same setting" in found.reason
        assert "TAB r=8 was not run on it" in answer(tmp_path, method="TAB, rank: 8").reason

    def test_a_changed_specification_answers_by_a_name_of_its_own_only(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6}, rows=50, seeds=3)
        for name in ("TABuv", "mine"):
            changes = {"config.tying.dropout": 0.1, "config.tying.name": name}
            for seed in range(3):
                scored_run(tmp_path / "runs" / name, [1.0] * 50, [0.0] * 50, seed=seed, changes=changes)
        roots = [tmp_path / "runs", tmp_path / "runs" / "TABuv"]
        (found,) = write.build(roots, claims=claims_file(tmp_path)).answers
        assert "TABuv r=8 was not run on it" in found.reason
        roots = [tmp_path / "runs", tmp_path / "runs" / "mine"]
        (found,) = write.build(roots, claims=claims_file(tmp_path, method="mine, rank: 8")).answers
        assert "custom (mine) r=8 against LoRA r=8" in found.reason

    def test_the_metric_of_a_task_is_chosen_by_name(self, tmp_path):
        found = of_world(tmp_path, {"LoRA": 0.6, "TABuv": 0.3}, rows=50, claim={"tasks": "{chain_sum: f1}"})
        assert "validation has no f1; it has exact_match_strict" in found.reason
        named = answer(tmp_path, tasks="{chain_sum: exact_match_strict}")
        assert named.measure.metric == "exact_match_strict"

    def test_unequal_search_is_marked(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, rows=50, seeds=3)
        world(tmp_path / "runs", {"TABuv": 0.2}, rows=50, seeds=3, lr=3e-2)
        assert "unequal search: 2 rates of TABuv r=8 against 1 rate of LoRA r=8" in answer(tmp_path).reason
