"""A running sweep that a person steers: dropped and retried cells, and a sweep that stops at the first failure."""

import pytest
from helpers.commands import sweep, wait_until

from tiedlora.errors import UserError
from tiedlora.sweeps import launching, status
from tiedlora.sweeps.control import SweepControl, matching
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.sweeps.run_cell import run_cell

FAILING = ["task.max_target_tokens=1,null", "seed=0,1,2"]
"""The three cells with the limit, which come first, have no row to train on."""


def launch_with(swept):
    """A launcher that runs the cells in this process, as train.py does."""
    return lambda cells, first_job: [run_cell(cell.config, swept.path) for cell in cells]


def states(swept) -> list[str]:
    return [cell.state for cell in status.statuses(swept)]


def test_a_dropped_cell_stops_with_its_checkpoint_and_a_retried_one_continues(tiny_run, script):
    words = tiny_run("seed=0,1", "train.steps=100000", "train.checkpoint_every=100000", "train.validate_every=0")
    swept = compose_sweep(words)
    first, second = swept.cells
    command = sweep(*words)
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
    # They stay dropped at the next start.
    launching.run_sweep(swept, lambda *_: pytest.fail("launched a dropped cell"))
    assert states(swept) == ["dropped", "dropped"]
    script("scripts/sweep.py", "retry", second.run_id, *words)
    launched = []
    launching.run_sweep(
        compose_sweep(words), lambda cells, _: launched.extend(cells) or swept.control.drop([second.run_id])
    )
    assert [cell.run_id for cell in launched] == [second.run_id]


def test_a_failed_cell_is_retried_when_the_launch_has_ended(tiny_run):
    swept = compose_sweep(tiny_run("seed=0,1"))
    launched = []

    def launch(cells, first_job):
        launched.append(([cell.config.seed for cell in cells], first_job))
        for cell in cells:
            if cell is swept.cells[0] and len(launched) == 1:
                cell.folder.path.mkdir(parents=True)
                cell.folder.error_file.write_text("UserError: no rows here\n")
                swept.control.retry([cell.run_id])
            else:
                run_cell(cell.config, swept.path)

    launching.run_sweep(swept, launch)
    assert launched == [([0, 1], 0), ([0], 2)]
    assert states(swept) == ["done", "done"]


def test_a_cell_that_was_dropped_before_the_start_runs_when_it_is_put_back(tiny_run):
    swept = compose_sweep(tiny_run("seed=0,1"))
    second = swept.cells[1]
    swept.control.drop([second.run_id])
    launched = []

    def launch(cells, first_job):
        launched.append([cell.config.seed for cell in cells])
        swept.control.retry([second.run_id])
        launch_with(swept)(cells, first_job)

    launching.run_sweep(swept, launch)
    assert launched == [[0], [1]]
    assert states(swept) == ["done", "done"]


def test_fail_fast_starts_no_cell_after_the_first_failure(tiny_run, capsys):
    swept = compose_sweep(tiny_run(*FAILING))
    with pytest.raises(SystemExit) as end:
        launching.run_sweep(swept, launch_with(swept), fail_fast=True)
    assert end.value.code == 1
    assert states(swept) == ["failed", *["missing"] * 5]
    _, err = capsys.readouterr()
    assert "1 of 6 cells failed" in err
    assert f"fail_fast: {swept.cells[0].run_id} failed" in err
    # Without it, the same sweep goes on to the last cell.
    with pytest.raises(SystemExit):
        launching.run_sweep(swept, launch_with(swept))
    assert states(swept) == [*["failed"] * 3, *["done"] * 3]


def test_fail_fast_stops_a_running_cell_with_a_checkpoint(tiny_run):
    words = tiny_run("seed=0,1", "train.steps=100000", "train.checkpoint_every=100000", "train.validate_every=0")
    swept = compose_sweep(words)
    first, second = swept.cells
    command = sweep(*words, "hydra.sweeper.fail_fast=true")
    wait_until(first.folder.metrics_file.exists)
    # As a cell in another process does when it fails.
    second.folder.path.mkdir()
    second.folder.error_file.write_text("UserError: no rows here\n")
    swept.control.failed(second.run_id)
    ended = command.ended()
    assert ended.code == 1, ended.err
    assert states(swept) == ["interrupted", "failed"]
    assert list(first.folder.checkpoints.glob("step-*"))
    assert "1 of 2 cells failed" in ended.err


def test_a_failure_without_fail_fast_leaves_no_mark(tmp_path):
    control = SweepControl(tmp_path)
    control.failed("LoRA-1")
    assert control.first_failure() is None
    assert not control.stops("LoRA-2")


def test_cells_are_named_by_patterns_of_their_ids(script, tiny_run):
    assert matching(["*-s1-*", "LoRA-r8-s0-a"], ["LoRA-r8-s0-a", "LoRA-r8-s1-b"]) == ["LoRA-r8-s1-b", "LoRA-r8-s0-a"]
    with pytest.raises(UserError, match=r"^TABuv-\*: is no cell of this sweep"):
        matching(["TABuv-*"], ["LoRA-r8-s0-a"])
    code, _, err = script("scripts/sweep.py", "drop", *tiny_run("seed=0"))
    assert code == 2
    assert "name the cells by their ids" in err
