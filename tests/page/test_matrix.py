"""The matrix and the forest: what the first screen says about each answer, and the files of the figure."""

import pytest
from helpers.report_runs import world

from tiedlora.page import charts, page, write

CLAIMS = """looks: [3, 5]
claims:
  - name: keeps
    method: {configuration: TABuv, rank: 8}
    comparator: {configuration: LoRA, at: equal_rank}
    retains: 0.9
    tasks: []
  - name: of another rank
    method: {configuration: TABuv, rank: 128}
    comparator: {configuration: LoRA, at: equal_rank}
    retains: 0.9
    tasks: []
"""


def report_of(tmp_path, claims=CLAIMS):
    (tmp_path / "claims.yaml").write_text(claims)
    return write.build([tmp_path / "runs"], claims=tmp_path / "claims.yaml")


@pytest.fixture
def two_tasks(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.62}, rows=1000, seed_sd=0.002)
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, rows=1000, seed_sd=0.002, task="squad")
    world(tmp_path / "runs", {"LoRA": 0.11, "TABuv": 0.1}, rows=200, task="gsm8k")
    return report_of(tmp_path)


def models(report):
    return {model.name: model for model in page.models(report.rows, report.verdicts, [])}


def test_a_cell_has_the_verdict_and_the_difference(two_tasks):
    model = models(two_tasks)["tiny"]
    assert model.tasks == ["chain_sum", "gsm8k", "squad"]
    assert model.headline == "2 claims: 1 contradicted, 1 undecided"
    cells = {task: (page.word(answer), *page.effect(answer)) for task, answer, _ in model.rows[0].cells}
    assert cells["chain_sum"][0] == "supported"
    answer = next(answer for answer in two_tasks.answers if answer.task == "squad" and answer.pair)
    verdict, effect, ends = cells["squad"]
    assert (verdict, effect) == ("contradicted", f"−{abs(100 * answer.difference.value):.1f} points")
    assert ends.startswith("[−")
    assert model.rows[0].over_tasks.verdict == "contradicted"


def test_a_task_that_a_claim_is_not_about_is_not_asked(two_tasks, tmp_path):
    model = models(report_of(tmp_path, CLAIMS.replace("tasks: []", "tasks: [squad]", 1)))["tiny"]
    verdicts = {task: page.word(answer) for task, answer, _ in model.rows[0].cells}
    assert verdicts == {"chain_sum": "not asked", "gsm8k": "not asked", "squad": "contradicted"}


def test_equal_reasons_are_one_group_and_every_cell_leads_to_its_reason(two_tasks):
    rows = models(two_tasks)["tiny"].rows
    (group,) = rows[1].reasons
    assert group.tasks == ["chain_sum", "gsm8k", "squad"]
    assert "was not run on it" in group.answer.reason
    for row in rows:
        assert {reason for _, _, reason in row.cells} == {group.id for group in row.reasons}
    ids = [group.id for row in rows for group in row.reasons]
    assert len(ids) == len(set(ids))


def test_a_model_without_runs_of_a_claim_says_so(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.62}, seeds=2, rows=60)
    world(tmp_path / "runs", {"LoRA": 0.6}, seeds=2, rows=60, model="org/other")
    report = report_of(tmp_path)
    rows = models(report)["other"].rows
    assert [page.word(answer) for row in rows for _, answer, _ in row.cells] == ["not run"] * len(rows)
    panels = charts.panels(report.rows, report.answers, report.sizes)
    assert [panel.model for panel in panels if panel.kind == "forest"] == ["tiny"]


def test_the_forest_is_a_file_too(two_tasks, tmp_path):
    write.write(two_tasks, tmp_path / "report")
    svg = (tmp_path / "report" / "forest.svg").read_text()
    assert "contradicted" in svg
    assert "chain_sum" in svg
    assert (tmp_path / "report" / "forest.png").stat().st_size > 5000
