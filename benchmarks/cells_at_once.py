"""python benchmarks/cells_at_once.py [--alternations 5]: two cells of one thread, or one cell of two threads, on a CPU.

Both ways run the same four cells of SmolLM2-135M as `train.py --multirun` does: two processes with one thread
each, or one process with two threads. The ways alternate, each time in a fresh folder, and after one start of each that
is not counted. A figure is the time of the whole command, with its start and scoring. Use a quiet machine with two
cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import common

WAYS = {
    "two cells of one thread": ["hydra/launcher=joblib_slots", "hydra.launcher.n_jobs=2", "train.threads=1"],
    "one cell of two threads": ["train.threads=2"],
}
SWEEP = ["tying=LoRA,TABuv", "seed=0,1", "train=quick", "score.base=false", "task.rows.validation=32"]


def seconds(way: list[str], model: str, steps: int) -> float:
    """The time of one sweep, from the start of the command to its end."""
    with tempfile.TemporaryDirectory() as outputs:
        words = [*SWEEP, *way, f"train.steps={steps}", f"train.validate_every={steps}", f"outputs={outputs}"]
        started = time.perf_counter()
        command = [sys.executable, str(common.PROJECT / "train.py"), "--multirun", f"model={model}", *words]
        common.run_command(command)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a cell")
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    for way in WAYS.values():
        seconds(way, arguments.model, steps=8)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(arguments.alternations):
        for name, way in WAYS.items():
            times[name].append(seconds(way, arguments.model, arguments.steps))
    print(f"four cells of {arguments.steps} steps, seconds: median [smallest, largest] of {arguments.alternations}\n")
    print(common.table(["way", "seconds"], [[name, common.spread(values)] for name, values in times.items()]))
    common.write(arguments.json, {"steps": arguments.steps, "seconds": times})


if __name__ == "__main__":
    main()
