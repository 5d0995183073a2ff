"""What the page says of claims, by subject, and what every arm keeps of a reference's gain."""

import csv

import numpy as np
import pytest
from helpers.report_runs import report_of_claim, scored_run, world

from tiedlora.analysis.tested import number_tested
from tiedlora.page import charts, figures, write

CLAIMS = """looks: [3, 5]
claims:
  - {name: keeps, method: {configuration: TABuv, rank: 8}, comparator: {configuration: LoRA, at: equal_rank},
     retains: 0.9, tasks: []}
  - {name: of another rank, method: {configuration: TABuv, rank: 128},
     comparator: {configuration: LoRA, at: equal_rank}, retains: 0.9, tasks: [squad]}
"""


@pytest.fixture(scope="module")
def three_tasks(tmp_path_factory):
    root = tmp_path_factory.mktemp("matrix")
    world(root / "runs", {"LoRA": 0.6, "TABuv": 0.62}, rows=1000, seed_sd=0.002)
    world(root / "runs", {"LoRA": 0.6, "TABuv": 0.3}, rows=1000, seed_sd=0.002, task="squad")
    world(root / "runs", {"LoRA": 0.11, "TABuv": 0.1}, rows=200, task="gsm8k")
    return root


def report_of(root):
    (root / "claims.yaml").write_text(CLAIMS)
    return write.build([root / "runs"], claims=root / "claims.yaml")


def panels(report, kind):
    found = charts.panels(report.rows, report.rankings, report.share_panels, report.leads)
    return [panel for panel in found if panel.kind == kind]


def models(report):
    return {model.name: model for model in write.models(report, [])}


def test_claims_stand_by_subject_with_what_their_rule_tests_and_those_without_runs_are_counted(three_tasks):
    report = report_of(three_tasks)
    model = models(report)["tiny"]
    assert model.headline == "2 claims: 1 contradicted, 1 not run"
    ((subject, (verdict,)),) = model.subjects
    assert subject == "TABuv r=8"
    assert verdict.verdict == "contradicted"
    assert [claim.claim.name for claim in model.not_run] == ["of another rank"]
    answers = {answer.task: answer for answer in verdict.answers}
    assert {task: answer.verdict for task, answer in answers.items()} == {
        "chain_sum": "supported",
        "squad": "contradicted",
        "gsm8k": "uninformative",
    }
    squad = answers["squad"]
    kept = squad.findings.look.share.kept
    assert (
        write.found_in_words(squad)
        == f"{100 * kept.value:.0f} % [{100 * kept.low:.0f}, {100 * kept.high:.0f}], 3 seeds"
    )
    drawn = write.claim_tracks(report.answers)
    assert "var(--bad)" in drawn(squad)
    assert "var(--zone)" in drawn(squad)
    assert drawn(answers["gsm8k"]) == ""


def test_every_number_of_a_line_is_in_the_csv_file(three_tasks, tmp_path):
    report = report_of(three_tasks)
    write.write(report, tmp_path)
    with open(tmp_path / "claims.csv", newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file) if row["claim"] == "keeps"}
    for answer in report.answers:
        if number_tested(answer) is not None:
            row, kept = rows[answer.task], number_tested(answer).interval
            own = [row[f"share kept at the look's level{ending}"] for ending in ("", " low", " high")]
            assert own == [f"{100 * end:.2f}" for end in (kept.value, kept.low, kept.high)]
            assert row["seeds"] == str(answer.findings.seeds)
            assert row["seeds of the difference"] == str(answer.findings.difference_seeds)


def test_a_model_without_runs_of_a_claim_says_so(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.62}, seeds=2, rows=60)
    world(tmp_path / "runs", {"LoRA": 0.6}, seeds=2, rows=60, model="org/other")
    found = models(report_of(tmp_path))
    assert [verdict.claim.name for verdict in found["other"].not_run] == ["keeps", "of another rank"]
    assert found["other"].subjects == []
    assert len(found["tiny"].verdicts) == 2, "every claim of the file"


@pytest.mark.parametrize(("lora", "base"), [([0.0] * 50, [0.0] * 50), ([1.0] * 50, None)])
def test_without_a_gain_or_a_base_there_is_no_panel_of_shares(tmp_path, lora, base):
    for name, scores in (("LoRA", lora), ("TABuv", [1.0] * 50)):
        for seed in (0, 1):
            scored_run(tmp_path / "runs", scores, base, name=name, seed=seed)
    report = report_of_claim(tmp_path)
    assert report.share_panels == panels(report, "shares") == []


def test_shares_are_files_and_first_on_the_page_and_no_arm_is_lost_beyond_the_axis(tmp_path):
    for seed in (0, 1):
        for name, right in (("LoRA", 10), ("TABuv", 9), ("TA", 40)):
            scores = list(np.repeat([1.0, 0.0], [right, 40 - right]))
            scored_run(tmp_path / "runs", scores, [0.0] * 40, name=name, seed=seed)
    report = report_of_claim(tmp_path)
    (panel,) = panels(report, "shares")
    assert panel.title == "chain_sum, exact match strict (2 seeds)"
    assert [key.name for key in figures.legend([panel])] == ["LoRA", "TABuv", "TA"]
    write.write(report, tmp_path / "report")
    svg = (tmp_path / "report" / "shares.svg").read_text()
    assert "share of the gain of LoRA r 8" in svg
    assert "400 %" in svg
    with open(tmp_path / "report" / "shares.csv", newline="") as file:
        shares = {row["configuration"]: row["share of its gain"] for row in csv.DictReader(file)}
    assert shares == {"LoRA": "100.00", "TABuv": "90.00", "TA": "400.00"}
    html = (tmp_path / "report" / "index.html").read_text()
    assert html.index("<h3>Share of the gain against") < html.index("<h3>Score against")
    assert html.index('<section class="ranked"') < html.index("<h3>Share of the gain against")
