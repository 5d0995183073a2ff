"""The status of a sweep's cells: counts, time left, reasons of failures."""

import json

import pytest
from helpers.sweeping import held

from tiedlora.records.run_folder import State
from tiedlora.runs import run
from tiedlora.sweeps import status
from tiedlora.sweeps.expand import compose_sweep

CELL_KEYS = [
    *("run_id", "overrides", "model", "task", "configuration", "rank", "lr", "seed", "trainable", "state"),
    *("metric", "score", "validation_loss", "error", "seconds"),
]
"""The output of `scripts/sweep.py status --json`."""


def statuses(sweep):
    return status.statuses(sweep.cells, sweep.control)


def test_status_counts_and_estimates(tiny_run, finish):
    sweep = compose_sweep(tiny_run("tying=LoRA,TABuv", "seed=0,1"))
    assert status.time_left(statuses(sweep)) == {}
    assert json.loads(status.to_json(sweep, statuses(sweep)))["seconds_left"] is None
    finish(sweep.cells[0].config)
    cells = statuses(sweep)
    assert status.counts(cells) == {**dict.fromkeys(State, 0), "done": 1, "missing": 3}
    assert list(status.time_left(cells).values()) == [pytest.approx(cells[0].seconds)] * 3
    with held(sweep.cells[1].folder):
        assert statuses(sweep)[1].state == "running"
    sweep.cells[2].folder.path.mkdir()
    sweep.cells[2].folder.error_file.write_text("Traceback\ntiedlora.errors.UserError: no\n")
    assert statuses(sweep)[2].error == "UserError: no"
    tree = json.loads(status.to_json(sweep, statuses(sweep)))
    assert list(tree) == ["sweep", "counts", "seconds_left", "cells"]
    assert [list(cell) for cell in tree["cells"]] == [CELL_KEYS] * 4
    assert [cell["state"] for cell in tree["cells"]] == ["done", "interrupted", "failed", "missing"]


def test_a_damaged_result_is_a_failed_cell(tiny_run):
    (cell,) = (sweep := compose_sweep(tiny_run("seed=0"))).cells
    cell.folder.path.mkdir(parents=True)
    cell.folder.result_file.write_text('{"run_id": 3}')
    (shown,) = statuses(sweep)
    assert shown.state == "failed"
    assert shown.error.startswith(f"{cell.folder.result_file}: ")


def test_before_a_cell_is_done_its_own_speed_gives_the_time_left(tiny_run):
    first, second = (sweep := compose_sweep(tiny_run("seed=0,1"))).cells
    first.folder.path.mkdir(parents=True)
    first.folder.metrics_file.write_text('{"step": 2, "train/loss": 2.0, "train/seconds": 3.0}\n{"step": 3, "tra')
    assert status.time_left(statuses(sweep)) == {first.run_id: 6.0, second.run_id: 6.0}


def test_the_table_has_a_column_for_each_swept_key(tiny_run):
    sweep = compose_sweep(tiny_run("train.eps=1e-8,1e-6", "seed=0,1"))
    head, *lines = status.table(statuses(sweep)).splitlines()
    assert len(lines) == 4
    assert head.split().count("seed") == 1
    assert "train.eps" in head
    assert sum("1e-06" in line or "1e-6" in line for line in lines) == 2


def test_a_finished_run_that_lacks_a_split_of_the_sweep_is_not_done(tiny_run, finish):
    (cell,) = compose_sweep(tiny_run("seed=0", "score.splits=[validation]")).cells
    finish(cell.config)
    assert (cell.finished(), cell.state()) == (True, "done")
    # The same run, in a sweep that asks for test as well: it has to be run again, which scores what is missing.
    (wider,) = compose_sweep(tiny_run("seed=0", "score.splits=[validation,test]")).cells
    assert wider.run_id == cell.run_id
    assert (wider.finished(), wider.state()) == (False, "interrupted")
    run.main(wider.config)
    assert (wider.finished(), wider.state()) == (True, "done")
