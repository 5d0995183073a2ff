"""The status of a sweep's cells: counts, time left, reasons of failures."""

import json

import pytest

from tiedlora.config.compose import compose_config
from tiedlora.runs import run
from tiedlora.sweeps import planned_rows, status
from tiedlora.sweeps.cells import STATES
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.tasks import load_examples, load_task

CELL_KEYS = [
    *("run_id", "overrides", "model", "task", "configuration", "rank", "lr", "seed", "trainable", "state"),
    *("metric", "score", "validation_loss", "error", "seconds"),
]
"""The output of `scripts/sweep.py status --json`."""


def test_status_counts_and_estimates(tiny_run, capsys):
    sweep = compose_sweep(tiny_run("tying=LoRA,TABuv", "seed=0,1"))
    assert status.seconds_left(status.statuses(sweep)) is None
    run.main(sweep.cells[0].config)
    cells = status.statuses(sweep)
    assert status.counts(cells) == {**dict.fromkeys(STATES, 0), "done": 1, "missing": 3}
    assert status.seconds_left(cells) == pytest.approx(3 * cells[0].seconds)
    with sweep.cells[1].folder.locked():
        assert status.statuses(sweep)[1].state == "running"
    sweep.cells[2].folder.path.mkdir()
    sweep.cells[2].folder.error_file.write_text("Traceback\ntiedlora.errors.UserError: no\n")
    assert status.statuses(sweep)[2].error == "UserError: no"
    tree = json.loads(status.to_json(sweep, status.statuses(sweep)))
    assert list(tree) == ["sweep", "counts", "seconds_left", "cells"]
    assert [list(cell) for cell in tree["cells"]] == [CELL_KEYS] * 4
    assert [cell["state"] for cell in tree["cells"]] == ["done", "interrupted", "failed", "missing"]


def test_the_table_has_a_column_for_each_swept_key(tiny_run):
    sweep = compose_sweep(tiny_run("train.eps=1e-8,1e-6", "seed=0,1"))
    head, *lines = status.table(status.statuses(sweep)).splitlines()
    assert len(lines) == 4
    assert head.split().count("seed") == 1
    assert "train.eps" in head
    assert sum("1e-06" in line or "1e-6" in line for line in lines) == 2


def test_a_finished_run_that_lacks_a_split_of_the_sweep_is_not_done(tiny_run):
    (cell,) = compose_sweep(tiny_run("seed=0", "score.splits=[validation]")).cells
    run.main(cell.config)
    assert (cell.finished(), cell.state()) == (True, "done")
    # The same run, in a sweep that asks for test as well: it has to be run again, which scores what is missing.
    (wider,) = compose_sweep(tiny_run("seed=0", "score.splits=[validation,test]")).cells
    assert wider.run_id == cell.run_id
    assert (wider.finished(), wider.state()) == (False, "interrupted")
    run.main(wider.config)
    assert (wider.finished(), wider.state()) == (True, "done")


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        (["task=gsm8k"], 1_319),
        (["task=gsm8k", "task.rows.test=7"], 7),
        (["task=squad"], 8_570),
        (["task=squad", "task.hub.splits.test=validation"], 10_570),
        (["task=hellaswag"], 8_042),
        (["task=dialogsum"], 500),
        (["task=iwslt2017"], 8_079),
        (["task=gsm8k", "task.hub.id=my/own"], None),
        (["task=gsm8k", "data_root=/no/such/folder"], None),
    ],
)
def test_the_test_rows_of_a_plan_are_the_tasks(overrides, rows):
    assert planned_rows.split_rows(compose_config(overrides), "test") == rows


def test_generated_test_rows_are_counted(tiny_config):
    config = tiny_config()
    assert config.task.rows.test is None
    assert planned_rows.split_rows(config, "test") == len(load_examples(load_task(config.task), "test", None)) <= 12
