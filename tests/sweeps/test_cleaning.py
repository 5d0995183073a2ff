"""Freeing the checkpoints of pruned cells."""

from tiedlora.sweeps.cleaning import Freed, free_pruned
from tiedlora.sweeps.expand import compose_sweep


def with_checkpoint(cell, pruned: bool):
    folder = cell.folder
    (folder.checkpoints / "step-00000004").mkdir(parents=True)
    (folder.checkpoints / "step-00000004" / "state.safetensors").write_bytes(bytes(1000))
    folder.metrics_file.write_text("{}\n")
    if pruned:
        folder.pruned_file.write_text("behind at step 4\n")
    return folder


def test_only_pruned_cells_that_nobody_works_on_lose_their_checkpoints(tiny_run, script):
    words = tiny_run("seed=0,1,2,3")
    swept = compose_sweep(words)
    pruned, stopped, busy, done = (
        with_checkpoint(cell, is_pruned) for cell, is_pruned in zip(swept.cells, (True, False, True, True), strict=True)
    )
    done.result_file.write_text("{}")
    with busy.locked():
        would = free_pruned(swept, dry_run=True)
        assert would == Freed((pruned.path.name,), 1000)
        assert pruned.checkpoint_step() == 4
        assert free_pruned(swept) == would
    assert [folder.checkpoint_step() for folder in (pruned, stopped, busy, done)] == [0, 4, 4, 4]
    # Its decision and its curve stay.
    assert pruned.state() == "pruned"
    assert pruned.metrics_file.exists()
    done.result_file.unlink()
    code, out, err = script("scripts/sweep.py", "clean", "--dry-run", *words)
    assert code == 0, err
    assert "would free 0.0 MB: the checkpoints of 2 pruned cells" in out


def test_a_rate_outside_the_grid_is_cleaned_too(tiny_run):
    swept = compose_sweep(tiny_run("train.lr=1e-3"))
    (outside,) = compose_sweep(tiny_run("train.lr=3e-3")).cells
    folder = with_checkpoint(outside, pruned=True)
    assert free_pruned(swept) == Freed((), 0)
    (swept.path / "cells").mkdir(parents=True)
    (swept.path / "cells" / f"{outside.run_id}.json").write_text("{}")
    assert free_pruned(swept).run_ids == (outside.run_id,)
    assert folder.checkpoint_step() == 0
