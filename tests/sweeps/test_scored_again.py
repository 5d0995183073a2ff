"""A finished run that a sweep scores further, and cells on which another process of the sweep works."""

import threading
import time
from contextlib import contextmanager

import pytest

from tiedlora.errors import UserError
from tiedlora.runs import add_scores, run
from tiedlora.sweeps import launching
from tiedlora.sweeps.control import BUSY
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.sweeps.run_cell import run_cell
from tiedlora.sweeps.staged import StageLaunches


@contextmanager
def held(folder, seconds=1.5):
    """The run's lock is held by somebody else for a while."""
    taken = threading.Event()

    def hold():
        with folder.locked():
            taken.set()
            time.sleep(seconds)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    yield
    thread.join()


@pytest.fixture
def unscored(tiny_run):
    """A sweep whose only run is trained, and lacks the scores that are asked for."""
    words = tiny_run("train.steps=2")
    run.main(compose_sweep([*words, "score.splits=[]"]).cells[0].config)
    return compose_sweep(words)


def test_its_state_says_what_happens_to_its_scores(unscored):
    (cell,) = unscored.cells
    assert cell.state() == "interrupted"
    with held(cell.folder):
        assert cell.state() == "running"
    cell.folder.error_file.write_text("UserError: no rows here\n")
    assert cell.state() == "failed"


def test_the_reason_why_it_could_not_be_scored_is_kept_and_printed(unscored, monkeypatch, capsys):
    (cell,) = unscored.cells
    calls = []

    def fail(*_, **__):
        calls.append(1)
        raise UserError("test.jsonl: is missing")

    monkeypatch.setattr(add_scores, "add_scores", fail)
    with pytest.raises(SystemExit) as end:
        launching.run_sweep(unscored, lambda cells, _: [run_cell(cell.config, unscored.path) for cell in cells])
    assert end.value.code == 1
    assert calls == [1], "it is not tried again"
    assert f"{cell.run_id}: UserError: test.jsonl: is missing" in capsys.readouterr().err
    assert "test.jsonl: is missing" in cell.folder.error_file.read_text()
    monkeypatch.undo()
    launching.run_sweep(unscored, lambda cells, _: [run_cell(cell.config, unscored.path) for cell in cells])
    assert cell.state() == "done"
    assert not cell.folder.error_file.exists()


def test_a_sweep_waits_for_a_process_that_scores_it(unscored):
    """It was once launched again and again meanwhile."""
    (cell,) = unscored.cells
    launches = []

    def launch(cells, _):
        launches.append(time.monotonic())
        if len(launches) == 1:
            # As a worker does that finds the run busy.
            unscored.control.note_start(cell.run_id, BUSY)
        else:
            run_cell(cell.config, unscored.path)

    with held(cell.folder, 3):
        launching.run_sweep(unscored, launch)
    assert cell.state() == "done"
    first, second = launches
    assert second - first > 2, "it is launched again when the other process has ended"


def test_an_error_of_this_command_stays_new_when_another_command_begins(tiny_run):
    swept = compose_sweep(tiny_run())
    (cell,), ours, theirs = swept.cells, swept.control, swept.control
    ours.start(fail_fast=False)
    time.sleep(0.02)
    cell.folder.path.mkdir(parents=True)
    cell.folder.error_file.write_text("tiedlora.errors.Diverged: step 3: the loss is nan\n")
    time.sleep(0.02)
    theirs.start(fail_fast=False)
    assert ours.is_new(cell.folder.error_file)
    assert not theirs.is_new(cell.folder.error_file)
    assert not swept.control.is_new(cell.folder.error_file), "a worker asks the latest command"


def test_a_cell_that_has_failed_elsewhere_since_the_start_is_not_run_again(tiny_run, monkeypatch):
    swept = compose_sweep(tiny_run("train.steps=2"))
    (cell,) = swept.cells
    carried_out = []
    monkeypatch.setattr(run, "main", carried_out.append)
    cell.folder.path.mkdir(parents=True)
    cell.folder.error_file.write_text("UserError: of an earlier command\n")
    time.sleep(0.02)
    swept.control.start(fail_fast=False)
    run_cell(cell.config, swept.path)
    assert len(carried_out) == 1, "an earlier error is tried again"
    assert cell.folder.error_file.exists(), "it stays until the run has its lock"
    time.sleep(0.02)
    cell.folder.error_file.write_text("UserError: of another command beside this one\n")
    run_cell(cell.config, swept.path)
    assert len(carried_out) == 1


def test_a_worker_that_dies_before_its_run_starts_does_not_end_with_an_earlier_error(tiny_run, capsys):
    swept = compose_sweep(tiny_run())
    (cell,) = swept.cells
    cell.folder.path.mkdir(parents=True)
    cell.folder.error_file.write_text("UserError: of an earlier command\n")
    time.sleep(0.02)
    with pytest.raises(SystemExit):
        launching.run_sweep(swept, lambda cells, _: None)
    assert "The worker ended 2 times without a result" in capsys.readouterr().err


def test_a_search_waits_for_a_cell_that_another_command_runs_again(tiny_run):
    swept = compose_sweep(tiny_run())
    (cell,) = swept.cells
    launches = StageLaunches(swept, lambda cells, _: [run_cell(cell.config, swept.path) for cell in cells], False)
    asked = [cell.until(2, [])]
    assert launches.run(asked, "one cell")
    assert asked[0].state() == "paused"
    with held(cell.folder):
        started = time.monotonic()
        assert launches.run(asked, "the same"), "the search decides again"
        assert time.monotonic() - started > 1
    assert not launches.run(asked, "the same")
