"""What a report says on the terminal: one screen by default, with everything on request."""

import re
from pathlib import Path

import pytest
from helpers.report_runs import GOOD, diverge, report_of_claim, scored_run, world
from rich.console import Console

from tiedlora import screen
from tiedlora.analysis import shares
from tiedlora.analysis.tested import number_tested
from tiedlora.page import terminal, write

OUT = Path("report")


@pytest.fixture
def terminal_of(monkeypatch):
    """A function that takes a width: standard output is then a terminal of so many columns."""

    def take(width: int) -> None:
        def console() -> Console:
            return Console(width=width, force_terminal=True, highlight=False, markup=False, emoji=False)

        monkeypatch.setattr(screen, "console", console)

    return take


def said(report: write.Report, **about) -> list[str]:
    """The lines, without colours."""
    text = screen.text(*terminal.parts(report, OUT, **about))
    return re.sub(r"\x1b\[[0-9;]*m", "", text).split("\n")


@pytest.fixture
def report(tmp_path):
    """TABuv r 8 keeps LoRA's gain; TA r 8 does not."""
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.62, "TA": 0.2}, seeds=3)
    return report_of_claim(tmp_path, rule="retains: 0.5")


def test_a_row_has_the_adapter_its_size_score_difference_and_verdict(report):
    (row,) = [line for line in said(report) if "LoRA r 8" in line and "TABuv" in line]
    (answer,) = report.answers
    unit, kept = answer.measure.unit, number_tested(answer)
    assert kept.is_share
    (scores,) = [one for one in report.rows if one.group == answer.pair.method and one.primary]
    assert answer.verdict == "supported"
    assert re.split(r"  +", row) == [
        "chain_sum",
        "exact_match_strict",
        "TABuv r 8",
        "41,328",
        unit.number(scores.score.value),
        "LoRA r 8",
        shares.share_in_words(kept.interval, kept.zone),
        "keeps 50 % *",
    ]


def test_a_claim_without_one_of_its_sides_does_not_hide_the_ranking_and_says_which_side_is_missing(tmp_path):
    world(tmp_path / "runs", {("LoRA", 1): 0.6, ("TABuv", 8): 0.3}, seeds=3)
    lines = said(report_of_claim(tmp_path))
    assert any("LoRA r 1" in line for line in lines)
    assert any("1: no finished run of LoRA r=8 in the same setting" in line for line in lines)


def test_arms_that_no_claim_compares_are_counted_and_all_ranks_them(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.62, "TA": 0.2}, seeds=3, rows=40)
    found = report_of_claim(tmp_path)
    assert any("1 adapter that no claim compares (--all)" in line for line in said(found))
    assert not any("TA r 8" in line for line in said(found))
    assert any("TA r 8" in line for line in said(found, everything=True))


def test_several_models_are_named_in_each_row_and_title_and_one_run_has_its_score(tmp_path):
    scored_run(tmp_path / "runs", GOOD, name="TAB")
    (title,) = [line for line in said(write.build([tmp_path / "runs"])) if "ranked" in line]
    assert title.startswith("chain_sum, ")
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.62}, seeds=3, rows=40, model="org/other")
    lines = said(report_of_claim(tmp_path))
    assert any(line.startswith("tiny, chain_sum, ") for line in lines)
    assert any("other" in line and "TABuv r 8" in line for line in lines)


def test_a_difference_has_the_level_and_the_seeds_of_its_verdict(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=4)
    report = report_of_claim(tmp_path, rule="better_by: 0")
    (answer,) = report.answers
    assert answer.findings.look.seeds == 3
    assert answer.findings.difference_seeds == 4
    (row,) = [line for line in said(report) if "TABuv r 8" in line]
    assert answer.measure.unit.text(answer.findings.contrast, "+") in row
    assert answer.measure.unit.text(answer.findings.difference.widest, "+") not in row


def test_a_contradicted_and_an_undecided_answer_read_as_words(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3)
    assert any(line.endswith("worse *") for line in said(report_of_claim(tmp_path, rule="better_by: 0")))
    assert any(line.endswith("keeps < 90 % *") for line in said(report_of_claim(tmp_path)))
    assert any(line.endswith("not level *") for line in said(report_of_claim(tmp_path, rule="level_within: 0.1")))
    late = report_of_claim(tmp_path, rule="better_by: 0", top="looks: [5, 8]")
    assert any(line.endswith("better?") for line in said(late))


def test_what_is_undecided_names_the_runs_and_their_time(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.55}, seeds=3)
    lines = said(report_of_claim(tmp_path, rule="better_by: 0", top="looks: [5, 8]"))
    assert "Undecided: 1 of 1 answers. What would decide them, and how likely it does:" in lines
    # Two seeds on both sides; each run of these tests has trained for ten seconds.
    assert "  4 runs, 0:40 of training (seeds 3, 4 of TABuv r 8 and LoRA r 8): chain_sum TABuv r 8 better" in lines


@pytest.mark.parametrize("width", [60, 80, 140])
def test_no_line_is_wider_than_the_terminal_and_no_verdict_is_lost(report, terminal_of, width):
    terminal_of(width)
    lines = said(report)
    assert max(map(len, lines)) <= width
    assert sum("keeps 50 % *" in line for line in lines) == 1
    assert lines[-1] == "open report/index.html"


def test_the_room_of_a_wide_terminal_is_used(tmp_path, terminal_of):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, seeds=3)
    report = report_of_claim(tmp_path, rule="better_by: 0")
    terminal_of(80)
    assert not any("[" in line for line in said(report))
    terminal_of(140)
    assert any("[" in line for line in said(report))


def test_colours_are_for_a_terminal_alone_and_no_color_is_kept(report, monkeypatch):
    assert "\x1b" not in screen.text(*terminal.parts(report, OUT))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[32mkeeps" in screen.text(*terminal.parts(report, OUT))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in screen.text(*terminal.parts(report, OUT))


def test_a_real_number_of_claims_fits_one_screen_and_all_has_the_rest(tmp_path):
    for task in ("chain_sum", "gsm8k", "squad"):
        world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.5, "TAuv": 0.5, "TAB": 0.4}, seeds=3, rows=30, task=task)
    claims = "".join(
        f"  - {{name: {name} {rank}, method: {{configuration: {name}, rank: 8}}, "
        f"comparator: {{configuration: {other}, rank: 8}}, better_by: 0.0{rank}, tasks: []}}\n"
        for name in ("TABuv", "TAuv", "TAB")
        for other in ("LoRA", "TABuv", "TAuv", "TAB")
        for rank in (1, 2)
        if other != name
    )
    (tmp_path / "claims.yaml").write_text("looks: [3, 5]\nclaims:\n" + _unique(claims))
    report = write.build([tmp_path / "runs"], claims=tmp_path / "claims.yaml")
    assert len(report.answers) == 3 * 18
    short, whole = said(report), said(report, everything=True)
    assert len(short) <= 40
    assert "5 more pairs: --all shows them" in short
    for answer in report.answers:
        assert sum(answer.reason in line for line in whole) >= 1


def _unique(claims: str) -> str:
    """Claims with a number behind each name."""
    lines = claims.splitlines()
    return "\n".join(line.replace("{name: ", f"{{name: c{number} ", 1) for number, line in enumerate(lines)) + "\n"


def test_folders_that_are_left_out_are_counted_and_failed_ones_named(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.6}, seeds=3, rows=40)
    scored_run(tmp_path / "runs", GOOD, name="TAB")
    folder = diverge(tmp_path / "runs", "TAB-*")
    named = [line for line in said(report_of_claim(tmp_path)) if line.startswith(f"Left out: {folder.name}: failed: ")]
    assert [line.endswith("Diverged: step 3: the loss is nan") for line in named] == [True]
    for number in range(5):
        (tmp_path / "runs" / f"empty{number}").mkdir()
    lines = said(report_of_claim(tmp_path))
    assert "Not shown: 6 other folders (--all)" in lines
    assert sum("empty" in line for line in lines) == 0
    assert sum("empty" in line for line in said(report_of_claim(tmp_path), everything=True)) == 5


def test_hostile_text_stays_text(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.6}, seeds=3, rows=40)
    folder = tmp_path / "runs" / "[bold]x\x1b[2J\u202e"
    folder.mkdir()
    (folder / "error.txt").write_text("Traceback\nerror: \x1b]0;title\x07 [red]x[/]")
    text = screen.text(*terminal.parts(report_of_claim(tmp_path), OUT))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]x[/]" in text
