"""The overview: what is missing or failed, and when there is an average."""

from helpers.report_runs import scored_run, world

from tiedlora.page import tables, write

GOOD = [1.0, 0.0] * 25
BASE = [0.0] * 50


def test_the_overview_names_missing_and_failed_cells_and_its_average(tmp_path):
    world(tmp_path, {"LoRA": 0.5, "TABuv": 0.4}, seeds=2, rows=40)
    world(tmp_path, {"LoRA": 0.5}, seeds=2, rows=40, task="squad")
    failed = tmp_path / "TABuv-r8-squad-tiny-s0-0123456789"
    failed.mkdir()
    (failed / "error.txt").write_text("boom")
    report = write.build([tmp_path])
    (table,) = tables.overview(report.rows, report.left_out)
    lines = {row[0]: row for row in table.rows}
    texts = {row[0]: row for row in table.texts()}
    squad, average = table.head.index("squad"), table.head.index("average")
    assert lines["TABuv"][squad] == "failed"
    assert lines["TABuv"][average] is None
    assert lines["LoRA"][average].seeds == 2
    assert "(n=2)" in texts["LoRA"][average]
    assert "chain_sum, squad" in table.caption


def test_a_task_in_two_settings_has_no_average(tmp_path):
    scored_run(tmp_path, GOOD, BASE)
    scored_run(tmp_path, GOOD, BASE, changes={"config.train.steps": 300})
    (table,) = tables.overview(write.build([tmp_path]).rows, [])
    assert "average" not in table.head
    assert any("train.steps=300" in name for name in table.head)
