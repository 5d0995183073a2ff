"""python tests/drills/staged.py [--model smollm2_135m] [--launchers joblib ray submitit] [--folder /tmp/staged]

A staged sweep of three configurations runs once without interruption, once with kill -9 at five moments, and once
under each launcher. All must take the same decisions (selection.json, byte for byte), with bit-identical adapters and
the same runs pruned. Then the plain grid of the same words continues the first sweep: it trains no finished cell again,
and the pruned ones go on from their checkpoints, so that both together take no step twice.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kill_sweep
from kill_sweep import results, steps, trained_after_the_end
from launchers import LAUNCHERS

GRID = ("tying=LoRA,TABuv,TAB", "train.lr=1e-4,1e-3,1e-2,1e-1", "seed=0,1,2")
CELLS, STEPS, CHECKPOINT_EVERY = 36, 8, 2
CELL = (
    *("task=chain_sum", "task.rows.validation=16", "task.max_new_tokens=8"),
    *("task.options.rows={train: 200, validation: 16, test: 16}", "train=tiny", "train.validation_rows=16"),
    *("train.validate_every=2", f"train.checkpoint_every={CHECKPOINT_EVERY}", "train.threads=1", "score.base=false"),
)
# The kills: at start-up, before a step of the search and of a repeated run, while a checkpoint is written, and while a
# chosen run is scored.
MOMENTS = ("start 1", "step 9", "checkpoint 20", "step 41", "decode 1")


def run(outputs: Path, model: str, *words: str, kill_at: str = "") -> int:
    """Start the sweep once. Returns its exit code."""
    environment = {**os.environ, "JOURNAL": f"{outputs}.journal", "KILL_AT": kill_at, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, kill_sweep.__file__, "--child", "--multirun", f"model={model}", *CELL, *GRID, *words]
    done = subprocess.run(
        [*command, f"outputs={outputs}"], env=environment, cwd=outputs.parent, capture_output=True, text=True
    )
    if done.returncode not in (0, -signal.SIGKILL):
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
    return done.returncode


def decisions(outputs: Path) -> tuple[str, list[str]]:
    """The text of selection.json, and the names of the pruned runs."""
    (file,) = outputs.glob("sweeps/*/selection.json")
    return file.read_text(), sorted(pruned.parent.name for pruned in outputs.glob("*/pruned.txt"))


def compare(expected: Path, other: Path) -> None:
    """The same decisions, and the same results."""
    assert decisions(expected) == decisions(other), f"{other.name}: other decisions than {expected.name}"
    assert results(expected) == results(other), f"{other.name}: other results than {expected.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_llama", help="smollm2_135m for the embedded one")
    parser.add_argument("--launchers", nargs="*", choices=LAUNCHERS, default=["joblib"])
    parser.add_argument("--folder", type=Path, help="where the sweeps go; a new temporary folder if left out")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="staged-"))
    folder.mkdir(parents=True, exist_ok=True)
    uninterrupted, killed = folder / "uninterrupted", folder / "killed"
    # Within the grid's rates, so that the plain grid has all cells of the staged sweep.
    staged = ("hydra/sweeper=staged", "hydra.sweeper.lowest_rate=1e-4", "hydra.sweeper.highest_rate=0.1")
    started = time.monotonic()
    assert run(uninterrupted, arguments.model, *staged) == 0
    finished, pruned = len(results(uninterrupted)), len(decisions(uninterrupted)[1])
    print(
        f"uninterrupted: {time.monotonic() - started:.0f} s, {steps(uninterrupted)} steps of the grid's "
        f"{CELLS * STEPS}; {finished} runs finished, {pruned} pruned",
        flush=True,
    )
    for moment in MOMENTS:
        assert run(killed, arguments.model, *staged, kill_at=moment) == -signal.SIGKILL, f"not killed at {moment}"
        print(f"killed at {moment:<14} {len(results(killed))} runs finished, {steps(killed)} steps so far", flush=True)
    assert run(killed, arguments.model, *staged) == 0
    compare(uninterrupted, killed)
    assert steps(killed) <= steps(uninterrupted) + len(MOMENTS) * CHECKPOINT_EVERY
    assert not trained_after_the_end(killed)
    print(f"killed {len(MOMENTS)} times: same decisions, adapters bit-identical, {steps(killed)} steps")
    for name in arguments.launchers:
        assert run(folder / name, arguments.model, *staged, *LAUNCHERS[name]) == 0
        compare(uninterrupted, folder / name)
        print(f"{name}: same decisions, adapters bit-identical", flush=True)
    decided, before = decisions(uninterrupted)[0], results(uninterrupted)
    assert run(uninterrupted, arguments.model) == 0
    after = results(uninterrupted)
    assert len(after) == CELLS
    assert all(after[name][0] == adapter for name, (adapter, _) in before.items())
    assert steps(uninterrupted) == CELLS * STEPS, "the plain grid repeats steps of the staged sweep"
    assert not trained_after_the_end(uninterrupted)
    assert decisions(uninterrupted) == (decided, []), "the plain grid changes the selection, or continues no pruned run"
    print(f"plain grid: {CELLS} cells done, {steps(uninterrupted)} steps in all, none twice")


if __name__ == "__main__":
    main()
