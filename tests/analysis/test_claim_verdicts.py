"""A claim over several tasks, and what a sweep is expected to decide."""

from pathlib import Path

import pytest
from helpers.report_runs import world

from tiedlora.analysis import claims, planning
from tiedlora.analysis.answers import Answer, Verdict
from tiedlora.analysis.claim_verdicts import claim_verdicts, error_note
from tiedlora.page import write

SUPPORTED, CONTRADICTED, UNDECIDED, FLOOR = Verdict


def answers(claim, *given):
    """Answers of tasks, each a verdict with the level at which the task contradicts the claim."""
    return [
        Answer(claim, "model", f"task {number}", verdict=verdict, contradicted_level=level, look=0)
        for number, (verdict, level) in enumerate(given)
    ]


@pytest.fixture(scope="module")
def claim():
    return claims.read(Path(__file__).parents[2] / "claims" / "tied_lora.yaml")[0]


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ([(SUPPORTED, 1.0), (SUPPORTED, 1.0)], "supported"),
        ([(SUPPORTED, 1.0), (FLOOR, 1.0)], "supported"),
        ([(FLOOR, 1.0), (FLOOR, 1.0)], "uninformative"),
        ([(SUPPORTED, 1.0), (UNDECIDED, 0.4)], "undecided"),
        ([(SUPPORTED, 1.0), (CONTRADICTED, 0.001)], "contradicted"),
        # 0.03 is below 0.05, but not below 0.05 / 2: of two tasks, one must be clearer.
        ([(SUPPORTED, 1.0), (CONTRADICTED, 0.03)], "undecided"),
    ],
)
def test_the_verdict_over_tasks(claim, given, verdict):
    (found,) = claim_verdicts(answers(claim, *given))
    assert found.verdict == verdict


def test_a_task_that_was_not_run_leaves_the_claim_undecided(claim):
    not_run = Answer(claim, "model", "squad", reason="TABuv r=8 was not run on it")
    (found,) = claim_verdicts([*answers(claim, (SUPPORTED, 1.0)), not_run])
    assert found.verdict == "undecided"
    assert found.reason == "1 of 2 informative tasks support it"


def test_the_page_says_how_many_wrong_verdicts_to_expect(claim):
    note = error_note(answers(claim, (SUPPORTED, 1.0), (CONTRADICTED, 0.01), (UNDECIDED, 0.3), (UNDECIDED, 0.3)))
    assert note.startswith("Verdicts (supported or contradicted): 2. Comparisons that were tested: 4.")
    assert "(0.2)" in note
    assert error_note([]) == "No planned look has been taken yet."


def test_the_verdict_over_tasks_is_above_its_rows(tmp_path):
    for task in ("chain_sum", "gsm8k"):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=5, rows=500, seed_sd=0.002, task=task)
    report = write.build([tmp_path / "runs"], claims=Path(__file__).parents[2] / "claims" / "tied_lora.yaml")
    lines = write.write(report, tmp_path / "report")
    assert lines[1].startswith("CONTRADICTED   TABuv at rank 8 keeps 90 %")
    assert "contradicted on chain_sum, gsm8k (Holm over 2 tasks)" in lines[1]
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.index("Holm over 2 tasks") < page.index("look 2 of 4")


class TestPlanning:
    def test_a_sweep_reads_what_it_can_decide_before_it_runs(self, claim):
        keeps, better = claims.read(Path(__file__).parents[2] / "claims" / "tied_lora.yaml")
        (none,) = planning.plan([keeps], seeds=2, rows=250)
        assert "reach no planned look (the first is at 3 seeds)" in none
        (few,) = planning.plan([keeps], seeds=3, rows=300)
        assert "will hardly decide it" in few
        (many,) = planning.plan([keeps], seeds=20, rows=20_000)
        assert "looks at 3, 5, 8, 12 seeds of 20,000 rows decide it in 4 of 5 tries" in many
        (chance,) = planning.plan([better], seeds=20, rows=20_000)
        assert "with a chance of 100 % if it is true by 2 points" in chance
