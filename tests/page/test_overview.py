"""The overview, and runs of one setting that are scored by different metrics: some by the loss alone."""

import csv

import pytest
from helpers.report_runs import (
    diverge,
    make_record,
    prediction_rows,
    score_run,
    scored_run,
    world,
    write_config,
    write_run,
)

from tiedlora.analysis.comparison import OTHER_ENDS
from tiedlora.analysis.groups import group_runs
from tiedlora.analysis.runs import read_runs
from tiedlora.page import charts, tables, write
from tiedlora.page.tables import overview
from tiedlora.places import PROJECT

ROWS = 40


def both_metrics(root, name, rank, exact, loss, changes=None, **about):
    rows = prediction_rows([float(number < exact * ROWS) for number in range(ROWS)])
    for row in rows:
        row.scores["target_loss"] = loss
    record = make_record(changes, name=name, rank=rank, **about)
    write_run(root, record)
    assert list(score_run(root, record, "validation", rows)) == ["answers", "losses"]


def loss_only(root, name, rank, loss, changes=None, **about):
    scored_run(root, [loss] * ROWS, metric="target_loss", changes=changes, name=name, rank=rank, **about)


@pytest.fixture
def report(tmp_path):
    both_metrics(tmp_path, "LoRA", 8, exact=0.5, loss=0.2)
    both_metrics(tmp_path, "TABuv", 8, exact=0.4, loss=0.3)
    loss_only(tmp_path, "TAB", 8, loss=0.25)
    return write.build([tmp_path])


def scored_panels(rows):
    """(title, configurations) of every panel with scores."""
    panels = [panel for panel in charts.panels(rows, [], [], []) if panel.kind == "pareto"]
    return {(panel.title, tuple(sorted(group.label for group in panel.groups))) for panel in panels}


BY_LOSS = ("chain_sum, target loss", ("LoRA", "TAB", "TABuv"))
BOTH = {("chain_sum, exact match strict", ("LoRA", "TABuv")), BY_LOSS}


def test_points_and_nats_never_share_an_axis_or_a_column(report):
    assert scored_panels(report.rows) == BOTH
    (panel,) = [panel for panel in charts.panels(report.rows, [], [], []) if panel.kind == "curves"]
    assert sorted(group.label for group in panel.groups) == ["LoRA", "TAB", "TABuv"]
    (table,) = overview(report.rows, [])
    assert table.head[4:] == ["chain_sum, exact_match_strict", "chain_sum, target_loss"]
    lines = {row[0]: row[4:] for row in table.texts()}
    assert lines["TAB"] == ["–", "0.250 (n=1) (+0.050 [+0.050, +0.050])"]
    assert lines["LoRA"] == ["50.0 (n=1)", "0.200 (n=1)"]
    _, *body = csv.reader(tables.to_csv(table).splitlines())
    of_csv = {row[0]: row[4:] for row in body}
    assert of_csv["TAB"] == ["–"] * 6 + ["0.250", "1", "", "+0.050", "+0.050", "+0.050"]
    assert of_csv["LoRA"] == ["50.0", "1", "", *["–"] * 3, "0.200", "1", "", *["–"] * 3]


@pytest.mark.usefixtures("report")
def test_figures_and_overview_show_the_metric_that_the_claims_compare(tmp_path):
    claims = tmp_path / "claims.yaml"
    sides = "method: {configuration: TABuv, rank: 8}, comparator: {configuration: LoRA, rank: 8}"

    def shown(*tasks):
        entries = [f"- {{name: on {n}, {sides}, retains: 0.9, tasks: {task}}}" for n, task in enumerate(tasks)]
        claims.write_text("\n".join(["claims:", *entries]))
        rows = write.build([tmp_path], claims=claims).rows
        (table,) = overview(rows, [])
        assert len(table.head[4:]) == len(scored_panels(rows))
        return scored_panels(rows)

    assert shown("{chain_sum: target_loss}") == {BY_LOSS}
    assert shown("{gsm8k: target_loss}") == BOTH
    # The first claim decides. [] compares every task by its first metric.
    assert shown("[]", "{chain_sum: target_loss}") == BOTH
    # A group that has no such metric is shown by its own first one.
    assert shown("{chain_sum: exact_match_strict}") == BOTH


def test_a_group_without_scores_has_no_column_of_its_own(tmp_path):
    scored_run(tmp_path, [0.5] * ROWS, split="test", name="LoRA")
    scored_run(tmp_path, [0.5] * ROWS, split="validation", name="TABuv")
    (table,) = overview(write.build([tmp_path]).rows, [])
    assert table.head[4:] == ["chain_sum"]


def test_rates_are_compared_by_the_loss_if_their_scores_are_of_different_metrics(tmp_path):
    for seed in range(2):
        loss_only(tmp_path, "TABuv", 8, 0.15, {"training.validation_loss_last": 0.15}, lr=1e-2, seed=seed)
        both_metrics(tmp_path, "TABuv", 8, 0.0, 3.0, {"training.validation_loss_last": 3.0}, lr=1e-1, seed=seed)
    (group,) = group_runs(*read_runs([tmp_path]))
    assert group.lr == 1e-2
    assert any("not all runs have the same validation score" in mark for mark in group.marks)


def test_other_ends_of_answers_are_said_where_answers_are_compared(tmp_path):
    for seed in (0, 1):
        for name, ends in (("LoRA", None), ("TABuv", [7]), ("TAB", [7] if seed else None)):
            changes = {"more_ends": ends}
            scored_run(tmp_path, [0.5] * ROWS, [0.0] * ROWS, changes=changes, name=name, seed=seed)
            loss_only(tmp_path, name, 8, 1.0, changes, seed=seed, task="squad")
    built = write.build([tmp_path], claims=PROJECT / "claims" / "tied_lora.yaml")
    # A loss has no answers.
    assert {row.group.task for row in built.rows if OTHER_ENDS in "; ".join(row.notes)} == {"chain_sum"}
    retains = [answer for answer in built.answers if answer.claim.rule.needs_zero]
    assert {answer.task for answer in retains if OTHER_ENDS in answer.reason} == {"chain_sum"}
    mixed = {group.label for group in built.groups if "mixed ends of answers" in group.marks}
    assert mixed == {"TAB"}


def test_the_overview_names_failed_cells(tmp_path):
    world(tmp_path, {"LoRA": 0.5, "TABuv": 0.4}, seeds=2, rows=40)
    world(tmp_path, {"LoRA": 0.5}, seeds=2, rows=40, task="squad")
    record = make_record(task="squad")
    failed = tmp_path / record.run_id
    failed.mkdir()
    write_config(failed, record)
    (failed / "error.txt").write_text("boom")
    for seed in (0, 1):
        scored_run(tmp_path, [0.0] * 40, None, name="TAB", seed=seed)
        diverge(tmp_path, f"TAB-*-s{seed}-*")
    scored_run(tmp_path, [0.0] * 40, None, name="LoRA", model="org/Tiny")
    report = write.build([tmp_path])
    other, table = overview(report.rows, report.left_out)
    lines = {row[0]: row for row in table.rows}
    assert lines["TABuv"][table.head.index("squad")] == "failed"
    assert lines["TAB"][4:] == ["failed", None], "no run of it finished"
    assert (other.name, table.name) == ("overview-Tiny", "overview-tiny"), "one file each"
