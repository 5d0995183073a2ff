"""Tables of a report inside a README."""

import pytest
from helpers.report_runs import report_of_claim, world

from tiedlora.errors import UserError
from tiedlora.page import readme, write
from tiedlora.records.interval import Unit

TEXT = """# A study

<!-- report: verdicts -->
an old table
<!-- end of report -->

Words between the tables stay.

<!-- report: scores -->
<!-- end of report -->
<!-- report: runs -->
<!-- end of report -->
<!-- report: cost -->
<!-- end of report -->
"""


def test_the_tables_stand_between_the_marks_and_a_verdict_has_the_number_and_the_seeds_of_its_look(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.9, "TABuv": 0.1}, seeds=5, rows=200)
    report = report_of_claim(tmp_path)
    file = tmp_path / "README.md"
    file.write_text(TEXT)
    assert readme.write(report, file) == ["verdicts", "scores", "runs", "cost"]
    text = file.read_text()
    assert "an old table" not in text
    assert "Words between the tables stay." in text
    (answer,) = report.answers
    assert (answer.findings.seeds, answer.findings.difference_seeds, answer.survives_holm) == (3, 5, True)
    kept = answer.findings.look.share.kept
    cell = f"| contradicted \\*: {100 * kept.value:.0f} % \\[{100 * kept.low:.0f}, {100 * kept.high:.0f}\\], 3 seeds |"
    assert cell.replace("-", "−") in text
    for row in report.rows:
        assert text.count(Unit.POINTS.text(row.score.widest).replace("[", "\\[").replace("]", "\\]")) == 1
    assert report.summary() in text
    assert "peak memory GiB" in text
    assert readme.filled(text, report) == text


def test_two_models_and_two_settings_are_never_in_one_cell(tmp_path):
    truth = {"LoRA": 0.9, "TABuv": 0.5}
    for about in ({}, {"changes": {"config.train.steps": 300}}, {"model": "org/big"}):
        world(tmp_path / "runs", truth, seeds=3, **about)
    text = readme.filled(TEXT, report_of_claim(tmp_path))
    tables = [[line for line in block.splitlines() if line.startswith("|")] for block in text.split("<!-- report: ")]
    verdicts, scores = tables[1:3]
    settings = "chain\\_sum (train.steps=100)", "chain\\_sum (train.steps=300)"
    assert [line.split(" | ")[0] for line in verdicts[2:]] == ["| big", "| tiny"]
    assert all(f"| {setting} |" in verdicts[0] for setting in settings)
    assert len(scores) == 2 + 6
    assert sum("| tiny |" in line and settings[0] in line for line in scores) == 2


ANSWER = "<!-- report: answer{} -->\n<!-- end of report -->\n"


def test_claims_without_runs_are_a_line_below_the_verdicts_and_not_rows(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.9, "TABuv": 0.5}, seeds=3)
    report_of_claim(tmp_path, top="looks: [3]")
    sides = "method: {configuration: TAB, rank: 8}, comparator: {configuration: LoRA, rank: 8}, better_by: 0"
    with (tmp_path / "claims.yaml").open("a") as file:
        file.writelines(f"  - {{name: {name}, {sides}, tasks: [chain_sum]}}\n" for name in ("first_one", "second"))
    text = readme.filled(TEXT, write.build([tmp_path / "runs"], claims=tmp_path / "claims.yaml"))
    verdicts = text.split("<!-- report: ")[1]
    assert "\nNot run: first\\_one; second.\n" in verdicts
    assert sum(line.startswith("|") for line in verdicts.splitlines()) == 3
    # A claim that one model has run is in the table, whatever another model has.
    world(tmp_path / "runs", {"TAB": 0.5, "LoRA": 0.9}, seeds=3, model="org/big")
    text = readme.filled(TEXT, write.build([tmp_path / "runs"], claims=tmp_path / "claims.yaml"))
    assert "Not run" not in text.split("<!-- report: ")[1]


def test_a_claim_without_runs_is_not_in_the_table_of_answers(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.9, "TABuv": 0.5}, seeds=3)
    report_of_claim(tmp_path, top="looks: [3]")
    with (tmp_path / "claims.yaml").open("a") as file:
        sides = "method: {configuration: TABuv, rank: 8, seed_offset: 5}, comparator: {configuration: LoRA, rank: 8}"
        file.write(f"  - {{name: y, {sides}, better_by: 0, tasks: []}}\n")
    report = write.build([tmp_path / "runs"], claims=tmp_path / "claims.yaml")
    assert "| TABuv r 8 |" in readme.filled(ANSWER.format(""), report)


@pytest.mark.parametrize(("truth", "says"), [(0.1, "worse \\*"), (0.9, "better \\*"), (0.5, "not shown")])
def test_the_table_of_answers_says_if_an_arm_is_better_than_lora_of_its_size(tmp_path, truth, says):
    world(tmp_path / "runs", {("LoRA", 1): 0.5, ("TABuv", 11): truth}, seeds=3)
    report = report_of_claim(tmp_path, "better_by: 0", "TABuv, rank: 11", "configuration: LoRA, rank: 1")
    table = readme.filled(ANSWER.format(""), report).splitlines()
    (score,) = [row.score.value for row in report.rows if row.group.label == "TABuv"]
    assert table[-2] == f"| TABuv r 11 | 46,026 | {100 * score:.1f} | {says} |"
    # The mark may name the arms.
    assert readme.filled(ANSWER.format(" TABuv r 11"), report).splitlines()[3:] == table[-2:]
    with pytest.raises(UserError, match=r"answer: there are no runs of TAB r 3; choose from .*TABuv r 11"):
        readme.filled(ANSWER.format(" LoRA r 1, TAB r 3"), report)


def test_an_empty_report_says_so(tmp_path):
    assert readme.filled(TEXT, write.build([tmp_path])).count("There are no runs for this table yet.") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# No marks", r"has no marks; write <!-- report: NAME --> .*; NAME is runs, verdicts, answer, scores, cost"),
        ("<!-- report: cost LoRA r 8 -->\n<!-- end of report -->\n", r"cost LoRA r 8 -->: NAME must be one of runs"),
        ("<!-- report: veredicts -->\n<!-- end of report -->\n", r"veredicts -->: NAME must be one of runs, verd"),
        (TEXT.replace("<!-- end of report -->\n\nWords", "Words"), "each mark needs its own end"),
    ],
)
def test_wrong_marks_are_named(tmp_path, text, message):
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        readme.check(file)
