"""python benchmarks/between_cells.py [--model smollm2_135m]: seconds from one cell's last step to the next one's first.

Three cells of a basic sweep on one base model. Scoring is left out (it belongs to the cell it scores); what remains
is the last validation and checkpoint, the record, taking the adapter off, and everything before the next first step.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
STEPS, CELLS = 4, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m")
    arguments = parser.parse_args()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    import torch

    times: list[tuple[float, float]] = []
    original = torch.optim.AdamW.step

    def step(*given, **keywords):
        started = time.perf_counter()
        made = original(*given, **keywords)
        times.append((started, time.perf_counter()))
        return made

    torch.optim.AdamW.step = step
    with tempfile.TemporaryDirectory() as outputs:
        overrides = [f"model={arguments.model}", "train=tiny", f"train.steps={STEPS}", "train.validation_rows=4"]
        overrides += ["score.splits=[]", f"seed={','.join(map(str, range(CELLS)))}", f"outputs={outputs}"]
        sys.argv = [str(PROJECT / "train.py"), "--multirun", *overrides]
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert len(times) == CELLS * STEPS
    for cell in range(1, CELLS):
        first, step_before = cell * STEPS, times[cell * STEPS - 1]
        # The first step's forward and backward pass is the step's own: take off what a middle step takes.
        gap = times[first][0] - step_before[1]
        own = times[first + 1][0] - times[first][1]
        print(f"cell {cell} to {cell + 1}: {gap:.2f} s to the first step's update, {gap - own:.2f} s without that step")


if __name__ == "__main__":
    main()
