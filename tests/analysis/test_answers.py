"""Answers to claims: the rule decides at planned looks only, and what cannot be decided says why."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.report_runs import (
    METRIC,
    diverge,
    make_record,
    prediction_rows,
    report_of_claim,
    score_run,
    scored_run,
    world,
    write_run,
)

from tiedlora.analysis import claims, rules
from tiedlora.analysis.answers import Answer, Findings, Look, Verdict, error_note
from tiedlora.analysis.intervals import Clusters
from tiedlora.analysis.over_tasks import claim_verdicts
from tiedlora.analysis.rules import Evidence, Sides
from tiedlora.places import PROJECT
from tiedlora.records.interval import Interval

SURE = {"rows": 1000, "seed_sd": 0.002}
FILE = PROJECT / "claims" / "tied_lora.yaml"


def answer(tmp_path, rule="retains: 0.9", **claim):
    (found,) = report_of_claim(tmp_path, rule, **claim).answers
    return found


def of_world(tmp_path, truth, *, claim=None, **options):
    world(tmp_path / "runs", truth, **{**SURE, **options})
    return answer(tmp_path, **(claim or {}))


def damage(runs, pattern):
    """Change one digit in the scores of a run."""
    (path,) = runs.glob(f"{pattern}/scores/*")
    head, _, rows = path.read_text().partition("\n")
    path.write_text(f"{head}\n{rows.replace('0', '1', 1)}")


class TestRules:
    @pytest.mark.parametrize(
        ("rule", "lora", "tied", "verdict"),
        [("better_by: 0.0", 0.5, 0.6, "supported"), ("level_within: 0.2", 0.5, 0.8, "contradicted")],
    )
    def test_a_clear_difference_is_decided(self, tmp_path, rule, lora, tied, verdict):
        found = of_world(tmp_path, {"LoRA": lora, "TABuv": tied}, claim={"rule": rule})
        assert found.verdict == verdict
        assert found.decide == ""

    @pytest.mark.parametrize(("clusters", "verdict"), [(4, "undecided"), (8, "supported")])
    def test_rows_of_too_few_clusters_give_no_verdict(self, tmp_path, clusters, verdict):
        of_row = {str(row): f"text {row % clusters}" for row in range(SURE["rows"])}
        (tmp_path / "clusters.json").write_text(json.dumps({"chain_sum": of_row}))
        found = of_world(tmp_path, {"LoRA": 0.5, "TABuv": 0.8}, claim={"rule": "better_by: 0.0"})
        assert found.verdict == verdict
        assert f"{clusters} clusters" in found.reason
        assert found.findings.difference is not None

    def test_one_cluster_of_many_rows_that_stand_alone_takes_no_verdict_away(self, tmp_path):
        of_row = {str(row): "text" for row in range(SURE["rows"] // 10)}
        (tmp_path / "clusters.json").write_text(json.dumps({"chain_sum": of_row}))
        assert of_world(tmp_path, {"LoRA": 0.5, "TABuv": 0.8}, claim={"rule": "better_by: 0.0"}).verdict == "supported"

    def test_a_lower_loss_is_better(self, tmp_path):
        generator = np.random.default_rng(0)
        rows = generator.gamma(4, 0.1, 300)
        for name, share in (("LoRA", 0.5), ("TABuv", 0.52)):
            for seed in range(3):
                losses = rows * share + generator.normal(0, 0.005, 300)
                scored_run(tmp_path / "runs", losses, rows * 4, metric="target_loss", name=name, seed=seed)
        found = answer(tmp_path)
        assert found.verdict == "supported"
        assert found.findings.difference.value > 0, "a difference of losses keeps its sign"
        assert found.findings.contrast.value > 0, "the contrast is better if it is higher"
        assert found.findings.kept.value < 1, "the method's loss is higher"


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
        assert before.findings.contrast == after.findings.contrast
        damage(tmp_path / "runs", "TABuv-*-s4-*")
        damaged = answer(tmp_path)
        assert (damaged.verdict, damaged.findings.contrast) == ("contradicted", before.findings.contrast)

    def test_a_look_with_damaged_scores_is_not_taken_and_says_so(self, tmp_path):
        three = of_world(tmp_path, {"LoRA": 0.5, "TABuv": 0.48}, seeds=5, rows=200)
        assert three.findings.look.number == 1
        damage(tmp_path / "runs", "TABuv-*-s4-*")
        found = answer(tmp_path)
        assert (found.verdict, found.findings.look.number) == ("undecided", 0)
        assert found.decide.startswith("scores of the look at 5 seeds that can be compared: ")

    def test_seeds_between_two_looks_are_not_used(self, tmp_path):
        three = of_world(tmp_path, {"LoRA": 0.5, "TABuv": 0.48}, seeds=3, rows=200)
        for name in ("LoRA", "TABuv"):
            scored_run(tmp_path / "runs", [1.0] * 200, [0.0] * 200, name=name, seed=3)
        four = answer(tmp_path)
        assert three.verdict == four.verdict == "undecided"
        found = four.findings
        assert (found.look.number, found.seeds, found.contrast) == (0, 3, three.findings.contrast)
        assert "needs seeds 4 on both sides; a later look decides with a chance of" in four.decide

    def test_the_level_of_a_test_is_that_of_the_look_that_came_nearest_to_a_verdict(self, tmp_path):
        found = []
        for seeds in ([0.6, 0.52, 0.68], [0.3, 0.3]):
            for number, score in enumerate(seeds, start=3 * len(found)):
                for name, value in (("LoRA", [0.5] * 60), ("TABuv", [score - 0.1, score + 0.1] * 30)):
                    scored_run(tmp_path / "runs", value, [0.0] * 60, name=name, seed=number)
            found.append(answer(tmp_path, "better_by: 0.0"))
        assert [one.findings.look.number for one in found] == [0, 1]
        assert found[1].findings.decided_level == found[0].findings.decided_level < 1

    def test_a_seed_that_diverged_is_missing_and_one_that_crashed_stops_the_look(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3, **SURE)
        lost = diverge(tmp_path / "runs", "TABuv-*-s2-*")
        (lost / "error.txt").write_text("Traceback\nOSError: [Errno 28] No space left on device\n")
        found = answer(tmp_path)
        assert found.verdict == "undecided"
        assert not found.findings.looks, "it can be run again, and would change the look"
        (lost / "error.txt").write_text("Traceback\ntiedlora.errors.Diverged: step 3: the loss is nan\n")
        found = answer(tmp_path)
        assert found.verdict == "contradicted"
        assert "2 seeds at level" in found.reason
        assert "1 diverged" in found.reason
        shutil.rmtree(lost)
        assert answer(tmp_path).verdict == "undecided"

    def test_a_look_with_too_few_seeds_left_is_passed_over(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=5, **SURE)
        for seed in (1, 2):
            diverge(tmp_path / "runs", f"TABuv-*-s{seed}-*")
        found = answer(tmp_path)
        assert (found.verdict, found.findings.look.number, found.findings.seeds) == ("contradicted", 1, 3)
        for seed in (3, 4):
            diverge(tmp_path / "runs", f"TABuv-*-s{seed}-*")
        shutil.rmtree(next((tmp_path / "runs").glob("LoRA-*-s4-*")))
        found = answer(tmp_path)
        assert found.reason.startswith("seeds 0 to 2: fewer than 2 of them finished on both sides")
        assert found.decide == "the look at 5 seeds: needs seeds 4 of LoRA r=8"

    @pytest.mark.parametrize(("rows", "verdict"), [(41, "undecided"), (53, "supported")])
    def test_rows_that_are_all_alike_decide_only_if_there_are_many(self, tmp_path, rows, verdict):
        for seed in range(3):
            for name in ("LoRA", "TABuv"):
                scored_run(tmp_path / "runs", [1.0] * rows, [0.0] * rows, name=name, seed=seed)
        first_look = answer(tmp_path)
        assert first_look.verdict == verdict
        assert first_look.decide == ("" if rows == 53 else "the look at 5 seeds: needs seeds 3, 4 on both sides")
        for seed in (3, 4):
            for name in ("LoRA", "TABuv"):
                scored_run(tmp_path / "runs", [1.0] * rows, [0.0] * rows, name=name, seed=seed)
        last_look = answer(tmp_path)
        assert last_look.verdict == verdict
        assert last_look.decide == ("" if rows == 53 else "more rows, or clusters")
        # Articles are the sample, if there are any. The gain alone may be what is alike.
        alike, other = np.ones((3, rows)), np.ones((3, rows)) - np.eye(3, rows)
        clusters = Clusters.of([str(number // 10) for number in range(rows)])
        rule, level = rules.retains(0.9), 0.0132
        assert rule.sees_too_little(Sides(alike, alike, 0 * alike, clusters), level)
        assert rule.sees_too_little(Sides(other, alike, 0.9 * alike), level) == (rows < 53)
        assert not rules.better_by(0.0).sees_too_little(Sides(other, alike, None), level)

    def test_rows_that_are_all_alike_show_no_more_than_their_number_allows(self):
        """At the boundary of a margin of 0.02, 100 answers of 0 or 1 are all equal with a chance of 0.98^100 = 13 %."""
        equal = np.ones((3, 100))
        found = rules.better_by(0.02).evidence(Sides(equal, equal, None))
        assert found.contradicted == pytest.approx(2 * 1.02**-100)
        assert rules.better_by(0.0).evidence(Sides(equal, equal, None)) == Evidence(1.0, 1.0, None)

    @pytest.mark.parametrize("at", ["this rate", "another rate"])
    def test_a_look_waits_for_a_seed_without_scores_and_for_one_that_diverged_at_another_rate(self, tmp_path, at):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3, **SURE)
        (last,) = (tmp_path / "runs").glob("TABuv-*-s2-*")
        if at == "this rate":
            shutil.rmtree(last / "scores")
        else:
            shutil.rmtree(last)
            world(tmp_path / "runs", {"TABuv": 0.2}, seeds=3, lr=3e-2, **SURE)
            diverge(tmp_path / "runs", "TABuv-*-s2-*")
        found = answer(tmp_path)
        assert (found.findings.looks, found.decide) == ((), "the look at 3 seeds: needs seeds 2 of TABuv r=8")

    def test_what_differs_between_the_sides_beside_the_arms_is_said(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6}, seeds=3, **SURE)
        changes = {"code.commit": "b" * 40, "versions.torch": "2.14", "execution.device": "cuda"}
        world(tmp_path / "runs", {"TABuv": 0.3}, seeds=3, changes=changes, **SURE)
        reason = answer(tmp_path).reason
        for said in ("made by another commit", "made with another torch or transformers", "made on another device"):
            assert said in reason

    def test_a_claim_about_one_model_is_no_open_question_of_another(self, tmp_path):
        for model in ("org/one", "org/two"):
            world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3, model=model, **SURE)
        of_one, of_three = (f"[]\n    where: {{model.name: org/{name}}}" for name in ("one", "three"))
        (found,) = report_of_claim(tmp_path, tasks=of_one).answers
        assert (found.model, found.verdict) == ("one", "contradicted")
        assert [found.verdict for found in report_of_claim(tmp_path, tasks=of_three).answers] == ["not run"] * 2

    @pytest.mark.parametrize("planned", [0, 1000])
    def test_a_star_counts_the_tests_that_are_planned_and_have_not_run(self, tmp_path, planned):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.57}, seeds=3, rows=1000, seed_sd=0.002)
        found = report_of_claim(tmp_path, "better_by: 0.0", top=f"looks: [3]\ntests: {planned}").answers
        assert [(one.verdict, one.survives_holm) for one in found] == [("contradicted", planned == 0)]
        assert ("over the 1000 tests that are planned, 0 of" in error_note(found)) == (planned == 1000)

    def test_later_seeds_can_change_a_rate_that_nothing_has_recorded_and_the_answer_says_so(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3, **SURE)
        world(tmp_path / "runs", {"TABuv": 0.2}, seeds=3, lr=3e-2, **SURE)
        before = answer(tmp_path).reason
        assert "later seeds" not in before
        assert "the rate of LoRA r=8 was given, not searched in these folders" in before
        # A seed of the search alone, which no look has.
        scored_run(tmp_path / "runs", [1.0] * 1000, [0.0] * 1000, seed=30)
        assert "later seeds" not in answer(tmp_path).reason
        scored_run(tmp_path / "runs", [1.0] * 1000, [0.0] * 1000, seed=3)
        found = answer(tmp_path)
        assert found.verdict == "contradicted"
        assert "the rate of TABuv r=8 was chosen on later seeds too" in found.reason

    def test_who_is_better_needs_no_gain_of_the_comparator(self, tmp_path):
        claim = {"rule": "better_by: 0.0", "top": "looks: [3]"}
        found = of_world(tmp_path, {"LoRA": 0.5, "TABuv": 0.1}, seeds=3, rows=300, base=0.5, claim=claim)
        assert found.verdict == "contradicted"
        assert found.findings.look.gain_may_be_zero

    def test_a_comparator_without_a_gain_is_uninformative_at_the_last_look_only(self, tmp_path):
        floor = {"LoRA": 0.1, "TABuv": 0.1}
        early = of_world(tmp_path, floor, seeds=3, rows=200)
        assert early.verdict == "undecided"
        assert "the comparator's own gain over the base may be 0" in early.reason
        shutil.rmtree(tmp_path / "runs")
        late = of_world(tmp_path, floor, seeds=5, rows=200)
        assert late.verdict == "uninformative"
        assert "on which the comparator beats the base" in late.decide

    def test_one_row_decides_nothing(self, tmp_path):
        for name, score in (("LoRA", 1.0), ("TABuv", 0.0)):
            for seed in range(3):
                scored_run(tmp_path / "runs", [score], [0.0], name=name, seed=seed)
        found = answer(tmp_path)
        assert (found.verdict, found.findings.looks) == ("undecided", ())
        assert "one row has no interval" in found.reason

    def test_more_seeds_are_not_advised_where_they_will_not_decide(self, tmp_path):
        found = of_world(tmp_path, {"LoRA": 0.6, "TABuv": 0.55}, seeds=3, rows=60, claim={"top": "looks: [3, 4]"})
        assert found.verdict == "undecided"
        assert found.is_futile
        assert "no planned look is likely to change it" in found.decide

    def test_nothing_is_predicted_from_a_look_without_all_its_seeds(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.55}, seeds=3, rows=60, seed_sd=0.002)
        diverge(tmp_path / "runs", "TABuv-*-s2-*")
        found = answer(tmp_path, top="looks: [3, 4]")
        assert (found.verdict, found.findings.look.seeds, found.is_futile) == ("undecided", 2, False)
        assert found.decide == "the look at 4 seeds: needs seeds 3 on both sides"

    def test_without_base_scores_there_is_no_gain_to_keep(self, tmp_path):
        for name in ("LoRA", "TABuv"):
            for seed in range(3):
                scored_run(tmp_path / "runs", [1.0, 0.0] * 50, name=name, seed=seed)
        found = answer(tmp_path)
        assert found.verdict == "undecided"
        assert "the base model was not scored" in found.reason
        assert "base" not in answer(tmp_path, "better_by: 0.0").reason

    def test_sides_that_were_trained_on_other_rows_are_not_compared(self, tmp_path):
        world(tmp_path / "runs", {"LoRA": 0.6}, seeds=3, rows=50)
        world(tmp_path / "runs", {"TABuv": 0.3}, seeds=3, rows=50, changes={"data.train.digest": "other"})
        found = answer(tmp_path)
        assert found.verdict == "undecided"
        assert "trained on other rows" in found.reason

    def test_the_metric_of_a_task_is_chosen_by_name(self, tmp_path):
        found = of_world(tmp_path, {"LoRA": 0.6, "TABuv": 0.3}, rows=50, claim={"tasks": "{chain_sum: target_loss}"})
        assert "validation has no target_loss; it has exact_match_strict" in found.reason
        assert found.decide == "scripts/score.py RUN --split validation"
        named = answer(tmp_path, tasks="{chain_sum: exact_match_strict}")
        assert named.measure.metric == "exact_match_strict"

    def test_while_rates_are_searched_the_planned_seeds_are_missing_and_not_scores(self, tmp_path):
        for name in ("LoRA", "TABuv"):
            write_run(tmp_path / "runs", make_record(name=name, seed=30))
        found = answer(tmp_path)
        assert "TABuv r=8 has none of these seeds" in found.reason
        assert found.decide == "the look at 3 seeds: needs seeds 0 to 2 on both sides"


def test_a_control_whose_later_seeds_have_not_run_is_undecided_in_the_whole_report(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6}, seeds=3, rows=50)
    later = "configuration: LoRA, rank: 8, seed_offset: 5"
    report = report_of_claim(tmp_path, "better_by: 0.0", method="LoRA, rank: 8", comparator=later)
    assert [found.verdict for found in report.answers] == ["undecided"]


SUPPORTED, CONTRADICTED, UNDECIDED, FLOOR, _, NOT_RUN = Verdict


class TestOverTasks:
    @pytest.fixture(scope="class")
    @classmethod
    def claim(cls):
        return claims.read(FILE)[0]

    @staticmethod
    def answers(claim, *given):
        """Answers of tasks, each a verdict with the level at which the task contradicts the claim."""
        found = []
        for number, (verdict, level) in enumerate(given):
            look = Look(0, 3, verdict, "", "", Interval(0, 0, 0), None, None, False, 1.0, contradicted_level=level)
            findings = Findings(looks=(look,))
            found.append(Answer(claim, "model", f"task {number}", None, verdict, "", "", findings=findings))
        return found

    @pytest.mark.parametrize(
        ("given", "verdict"),
        [
            ([(SUPPORTED, 1.0), (SUPPORTED, 1.0)], "supported"),
            ([(SUPPORTED, 1.0), (FLOOR, 1.0)], "supported"),
            ([(FLOOR, 1.0), (FLOOR, 1.0)], "uninformative"),
            ([(NOT_RUN, 1.0), (NOT_RUN, 1.0)], "not run"),
            ([(SUPPORTED, 1.0), (NOT_RUN, 1.0)], "undecided"),
            ([(SUPPORTED, 1.0), (UNDECIDED, 0.4)], "undecided"),
            ([(SUPPORTED, 1.0), (CONTRADICTED, 0.001)], "contradicted"),
            # 0.03 is below 0.05, but not below 0.05 / 2: of two tasks, one must be clearer.
            ([(SUPPORTED, 1.0), (CONTRADICTED, 0.03)], "undecided"),
        ],
    )
    def test_the_verdict_over_tasks(self, claim, given, verdict):
        (found,) = claim_verdicts(self.answers(claim, *given))
        assert found.verdict == verdict
        if verdict == "contradicted":
            assert found.reason == "contradicted on task 1 (Holm over 2 tasks)"

    def test_also_one_that_another_model_has_run(self, tmp_path):
        truth, options = {"LoRA": 0.3, "TABuv": 0.6}, {"seeds": 3, "rows": 200}
        for model, task in (("org/a", "chain_sum"), ("org/a", "gsm8k"), ("org/b", "chain_sum")):
            world(tmp_path / "runs", truth, model=model, task=task, **options)
        report = report_of_claim(tmp_path, tasks="[chain_sum, gsm8k]")
        found = {verdict.model: (verdict.verdict.value, verdict.reason) for verdict in report.verdicts}
        assert found["a"] == ("supported", "2 of 2 informative tasks support it")
        assert found["b"] == ("undecided", "1 of 1 informative tasks support it; not run: gsm8k")


def test_a_seed_that_lacks_one_file_of_scores_changes_no_metric(tmp_path):
    """The claim names no metric, so it takes the task's first one. Seed 0 is not of its plan."""
    for name, right in (("LoRA", 0.9), ("TABuv", 0.5)):
        for seed in range(4):
            record = make_record(name=name, seed=seed)
            write_run(tmp_path / "runs", record)
            rows = prediction_rows([float(place < right * 80) for place in range(80)])
            rows = [replace(row, scores={**row.scores, "target_loss": 1.0}) for row in rows]
            score_run(tmp_path / "runs", record, "validation", rows)
    (folder,) = (tmp_path / "runs").glob("TABuv*-s0-*")
    (folder / "scores" / "validation.answers.jsonl").unlink()
    found = answer(tmp_path, "better_by: 0.0", top="looks: [3]\nseeds: [1, 2, 3]")
    assert found.measure.metric == METRIC
