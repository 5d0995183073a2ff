"""What a worker does with each cell: it carries it out, leaves it to another worker, or leaves it alone."""

import fcntl
import os
import threading
import time
import weakref

import pytest
import torch
from helpers.commands import Command, wait_until
from helpers.sweeping import Here, compose_sweep, fail, held, search_options

from tiedlora import storage
from tiedlora.errors import Diverged, UserError
from tiedlora.models import device
from tiedlora.runs import add_scores, run
from tiedlora.sweeps import launching, status
from tiedlora.sweeps.cells import SweepCell, SweepControl
from tiedlora.sweeps.launching import Unfit, run_cell, work
from tiedlora.sweeps.staged import StagedSweep


@pytest.fixture
def frozen(tiny_run):
    """A sweep whose cells can be worked on."""

    def make(*words):
        swept = compose_sweep(tiny_run(*words))
        swept.freeze()
        swept.control.start(fail_fast=False)
        return swept

    return make


def goals(swept):
    return [cell.goal for cell in swept.cells]


def states(swept) -> list[str]:
    return [status.status_of(cell, swept.control).state for cell in swept.cells]


def test_it_takes_every_cell_that_is_free_and_has_not_ended(frozen, monkeypatch):
    swept = frozen("seed=0,1,2,3,4")
    done, dropped, failed, busy, free = swept.cells
    run.main(done.config)
    swept.control.drop([dropped.run_id])
    time.sleep(0.02)
    fail(failed)
    carried_out = []
    monkeypatch.setattr(run, "main", lambda config, _folder: carried_out.append(config))
    with held(busy.folder):
        work(swept.path, goals(swept))
    assert [config.seed for config in carried_out] == [free.config.seed]
    # At the next command an earlier failure counts no more. The file stays until the run has started.
    time.sleep(0.02)
    swept.control.start(fail_fast=False)
    work(swept.path, goals(swept)[2:3])
    assert [config.seed for config in carried_out] == [4, 2]
    assert failed.folder.error_file.exists()


def test_it_holds_the_lock_from_the_start_to_the_end(frozen, monkeypatch):
    (cell,) = (swept := frozen("seed=0")).cells
    seen = []

    def main(_config, _folder):
        other = threading.Thread(target=lambda: seen.append(cell.state()))
        other.start()
        other.join()

    monkeypatch.setattr(run, "main", main)
    work(swept.path, goals(swept))
    assert (seen, cell.state()) == (["running"], "interrupted")
    # A user who may not write there.
    monkeypatch.setattr(storage, "locked", lambda *_: os.stat("/no/such/place"))
    with open(cell.folder.path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cell.state() == "running"
    assert cell.state() == "interrupted"


def test_a_killed_worker_costs_its_cell_one_retry(frozen, monkeypatch, caplog):
    swept = frozen("seed=0,1")
    once, twice = swept.cells
    # What a killed worker leaves.
    swept.control.note_start(once.run_id)
    for _ in range(2):
        swept.control.note_start(twice.run_id)
    carried_out = []
    monkeypatch.setattr(run, "main", lambda config, _folder: carried_out.append(config))
    work(swept.path, goals(swept))
    assert [config.seed for config in carried_out] == [0]
    assert caplog.text.count("once more, because its worker was killed") == 1
    assert "The worker ended 2 times without a result or an error" in twice.folder.error_file.read_text()
    assert swept.control.starts(once.run_id) == 0
    # The next command starts to count again.
    time.sleep(0.02)
    swept.control.start(fail_fast=False)
    work(swept.path, goals(swept)[1:])
    assert [config.seed for config in carried_out] == [0, 1]


def test_a_failure_that_cannot_be_written_ends_the_sweep(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "main", lambda *_: 1 / 0)
    monkeypatch.setattr(storage, "write_bytes", lambda *_: os.stat("/no/such/place"))
    with pytest.raises(UserError, match=r"error\.txt: cannot be written, so the sweep ends \(ZeroDivisionError"):
        run_cell(SweepCell((), tiny_config()), SweepControl(tmp_path))


def test_a_worker_that_only_fails_leaves_the_cells_to_one_that_trains(frozen, monkeypatch):
    swept = frozen("seed=0,1,2,3,4,5")
    *_, busy = swept.cells
    monkeypatch.setattr(launching, "_process", launching._OfProcess())

    def fails(config, _folder):
        raise Diverged("the loss is nan") if config.seed == 1 else OSError("no such device")

    monkeypatch.setattr(run, "main", fails)
    busy.folder.path.mkdir(parents=True)
    busy.folder.metrics_file.touch()
    with held(busy.folder):
        for _ in range(2):
            with pytest.raises(Unfit, match=r"has failed at 3 cells in a row while another one trains, so it takes no"):
                work(swept.path, goals(swept))
            # A diverged run is a result.
            assert states(swept) == [*["failed"] * 4, "interrupted", "running"]
        # A success shows that the worker is well.
        monkeypatch.setattr(launching._process, "failures", 2)
        monkeypatch.setattr(run, "main", lambda *_: None)
        run_cell(swept.cells[4], swept.control)
        assert launching._process.failures == 0


def test_a_worker_that_is_alone_tries_every_cell(frozen, monkeypatch):
    """Then the cells may be wrong, and not the worker."""
    swept = frozen("seed=0,1,2,3,4")
    *_, loading = swept.cells
    monkeypatch.setattr(launching, "_process", launching._OfProcess())
    monkeypatch.setattr(run, "main", lambda *_: 1 / 0)
    # Another one that has not come to train yet may fail as well.
    with held(loading.folder):
        work(swept.path, goals(swept))
    assert states(swept) == [*["failed"] * 4, "interrupted"]


def test_a_failed_cells_tensors_are_gone_when_its_memory_is_freed(tiny_config, tmp_path, monkeypatch):
    tensors, alive = [], []

    def fail(*_):
        tensor = torch.zeros(1)
        tensors.append(weakref.ref(tensor))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run, "main", fail)
    monkeypatch.setattr(device, "free_memory", lambda: alive.append(tensors[0]()))
    run_cell(SweepCell((), tiny_config()), SweepControl(tmp_path))
    assert alive == [None]


def test_a_run_that_could_not_be_scored_has_failed_until_the_next_command(tiny_run, monkeypatch, capsys):
    words = tiny_run("train.steps=2")
    run.main(compose_sweep([*words, "score.splits=[]"]).cells[0].config)
    swept = compose_sweep(words)
    (cell,) = swept.cells
    assert cell.state() == "interrupted"
    with held(cell.folder):
        assert cell.state() == "running"
    calls = []

    def missing_rows(*_, **__):
        calls.append(1)
        raise UserError("test.jsonl: is missing")

    monkeypatch.setattr(add_scores, "add_scores", missing_rows)
    with pytest.raises(SystemExit) as end:
        launching.run_sweep(swept, work)
    assert end.value.code == 1
    assert (calls, cell.state()) == ([1], "failed"), "it is not tried again"
    assert f"{cell.run_id}: UserError: test.jsonl: is missing" in capsys.readouterr().err
    monkeypatch.undo()
    launching.run_sweep(swept, work)
    assert cell.state() == "done"
    assert not cell.folder.error_file.exists()


def test_an_error_of_this_command_stays_new_when_another_command_begins(frozen):
    swept = frozen("seed=0")
    (cell,), ours, theirs = swept.cells, swept.control, swept.control
    ours.start(fail_fast=False)
    time.sleep(0.02)
    fail(cell)
    time.sleep(0.02)
    theirs.start(fail_fast=False)
    assert ours.is_new(cell.folder.error_file)
    assert not theirs.is_new(cell.folder.error_file)
    assert not swept.control.is_new(cell.folder.error_file), "a worker asks the latest command"


class TestOthers:
    """Another command works on the same cells."""

    def test_a_sweep_waits_for_a_cell_and_then_needs_it_no_more_or_continues_it(self, frozen):
        swept = frozen("seed=0,1")
        first, second = swept.cells
        here = Here()
        run.main(first.config)
        with held(second.folder, 2):
            launching.run_sweep(swept, here)
        assert here.run_ids() == [[second.run_id]]
        assert states(swept) == ["done", "done"]

    def test_a_search_waits_for_a_cell_that_another_command_runs_again(self, tiny_run):
        swept = compose_sweep(tiny_run())
        launches = StagedSweep(swept, search_options(), work)
        asked = [swept.cells[0].until(2, [])]
        assert launches.run(asked, "one cell")
        assert asked[0].state() == "paused"
        with held(asked[0].folder, 1.5):
            started = time.monotonic()
            assert launches.run(asked, "the same"), "the search decides again"
            assert time.monotonic() - started > 1
        assert not launches.run(asked, "the same")


class TestControl:
    """A person steers a running sweep."""

    @pytest.mark.slow
    def test_a_dropped_cell_stops_with_its_checkpoint_and_stays_dropped(self, tiny_run, script):
        words = tiny_run("seed=0,1", "train.steps=100000", "train.checkpoint_every=100000", "train.validate_every=0")
        swept = compose_sweep(words)
        first, second = swept.cells
        command = Command("--multirun", *words)
        wait_until(first.folder.metrics_file.exists)
        code, out, err = script("scripts/sweep.py", "drop", "*-s0-*", *words)
        assert (code, out.split()) == (0, [first.run_id]), err
        wait_until(second.folder.metrics_file.exists)
        assert states(swept)[0] == "dropped"
        assert list(first.folder.checkpoints.glob("step-*"))
        assert not first.folder.error_file.exists()
        script("scripts/sweep.py", "drop", second.run_id, *words)
        ended = command.ended()
        assert ended.code == 0, ended.err
        assert "2 cells: 2 dropped" in ended.out
        launching.run_sweep(swept, lambda *_: pytest.fail("launched a dropped cell"))

    def test_a_retried_cell_runs_when_the_launch_has_ended(self, frozen):
        swept = frozen("seed=0,1,2")
        failed, dropped, free = (cell.run_id for cell in swept.cells)
        swept.control.drop([dropped])

        def before() -> None:
            if len(here.launches) == 1:
                time.sleep(0.02)
                fail(swept.cells[0])
                swept.control.retry([failed, dropped])

        here = Here(before)
        launching.run_sweep(swept, here)
        assert here.run_ids() == [[failed, free], [failed, dropped]]
        assert states(swept) == ["done"] * 3

    def test_fail_fast_starts_no_cell_after_the_first_failure(self, tiny_run, capsys):
        # The three cells with the limit, which come first, have no row to train on.
        swept = compose_sweep(tiny_run("task.max_target_tokens=1,null", "seed=0,1,2"))
        with pytest.raises(SystemExit) as end:
            launching.run_sweep(swept, work, fail_fast=True)
        assert end.value.code == 1
        assert states(swept) == ["failed", *["missing"] * 5]
        _, err = capsys.readouterr()
        assert "1 of 6 cells failed" in err
        assert f"fail_fast: {swept.cells[0].run_id} failed" in err
        # Without it, the same sweep goes on to the last cell, and names all failures.
        with pytest.raises(SystemExit):
            launching.run_sweep(swept, work)
        assert states(swept) == [*["failed"] * 3, *["done"] * 3]
        named = capsys.readouterr().err.split("3 of 6 cells failed")[1]
        for cell in swept.cells[:3]:
            assert cell.run_id in named
            assert "Traceback" in cell.folder.error_file.read_text()

    def test_cells_are_named_by_patterns_of_their_ids(self, tiny_run):
        swept = compose_sweep(tiny_run("seed=0,1"))
        first, second = (cell.run_id for cell in swept.cells)
        assert swept.matching(["*-s1-*", first]) == [second, first]
