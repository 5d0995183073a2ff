"""What the first screen says of claims: the matrix, the forest, and what every arm keeps of a reference's gain."""

import csv

import numpy as np
import pytest
from helpers.report_runs import report_of_claim, scored_run, world

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
    found = charts.panels(report.rows, report.answers, report.share_panels)
    return [panel for panel in found if panel.kind == kind]


def models(report):
    return {model.name: model for model in write.models(report.rows, report.verdicts, [])}


def test_cells_have_verdicts_and_differences_and_lead_to_reasons_and_the_forest_is_a_file(three_tasks, tmp_path):
    report = report_of(three_tasks)
    model = models(report)["tiny"]
    assert model.tasks == ["chain_sum", "gsm8k", "squad"]
    assert model.headline == "2 claims: 1 contradicted, 1 not run"
    cells = {task: (write.word(answer), *write.effect(answer)) for task, answer, _ in model.rows[0][1]}
    assert cells["chain_sum"][0] == "supported"
    answer = next(answer for answer in report.answers if answer.task == "squad" and answer.pair)
    verdict, effect, ends = cells["squad"]
    assert (verdict, effect) == ("contradicted", f"−{abs(100 * answer.findings.difference.value):.1f} points")
    assert ends.startswith("[−")
    assert model.rows[0][0].verdict == "contradicted"
    assert [write.word(answer) for _, answer, _ in model.rows[1][1]] == ["not asked", "not asked", "not run"]
    ids = [id_ for _, cells in model.rows for _, _, id_ in cells]
    assert len(ids) == len(set(ids)) == 6
    figures.write_files(panels(report, "forest"), tmp_path)
    assert "contradicted" in (tmp_path / "forest.svg").read_text()


def test_a_model_without_runs_of_a_claim_says_so(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.62}, seeds=2, rows=60)
    world(tmp_path / "runs", {"LoRA": 0.6}, seeds=2, rows=60, model="org/other")
    report = report_of(tmp_path)
    rows, of_tiny = models(report)["other"].rows, models(report)["tiny"].rows
    assert len(rows) == len(of_tiny), "every claim of the file"
    for _, cells in rows:
        assert {write.word(answer) for _, answer, _ in cells} - {"not asked"} == {"not run"}
    assert [panel.model for panel in panels(report, "forest")] == ["tiny"]


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
