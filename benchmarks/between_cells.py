"""python benchmarks/between_cells.py [--model smollm2_135m]: seconds from one cell's last step to the next one's first.

Three configurations in a basic sweep on one base model. Of each gap it says what is the cells' own work: the last
cell's final validation and its scoring, the next one's first validation and its first step. The rest is the sweep's:
the checkpoint, the record, taking the adapter off, and everything before the next first step.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
STEPS, CELLS = 4, ("LoRA", "TABuv", "Tuv")
LIMIT = 3.0
"""Seconds, of the whole gap but scoring, which is as long as one asks for rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m")
    arguments = parser.parse_args()
    import torch

    from tiedlora.scoring import decoding, scoring

    spans: dict[str, list[tuple[float, float]]] = {"step": [], "validation": [], "scoring": []}

    def timed(owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def wrapped(*given: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            made = original(*given, **keywords)
            spans[kind].append((started, time.perf_counter()))
            return made

        setattr(owner, name, wrapped)

    timed(torch.optim.AdamW, "step", "step")
    timed(decoding, "mean_loss", "validation")
    timed(scoring, "score_split", "scoring")
    with tempfile.TemporaryDirectory() as outputs:
        overrides = [f"model={arguments.model}", "train=tiny", f"train.steps={STEPS}", f"tying={','.join(CELLS)}"]
        overrides += ["train.threads=1", "task.rows.validation=8", "task.max_new_tokens=8", f"outputs={outputs}"]
        sys.argv = [str(PROJECT / "train.py"), "--multirun", *overrides]
        os.environ["HYDRA_FULL_ERROR"] = "1"
        runpy.run_path(sys.argv[0], run_name="__main__")
    steps = spans["step"]
    assert len(steps) == len(CELLS) * STEPS

    for cell in range(1, len(CELLS)):
        end, begin = steps[cell * STEPS - 1][1], steps[cell * STEPS][0]
        inside = {kind: sum(b - a for a, b in spans[kind] if end <= a < begin) for kind in ("validation", "scoring")}
        # The first step's forward and backward pass comes before its update: what the next step takes.
        first = steps[cell * STEPS + 1][0] - steps[cell * STEPS][1]
        gap = begin - end - inside["scoring"]
        own = gap - inside["validation"] - first
        print(
            f"{CELLS[cell - 1]} to {CELLS[cell]}: {gap:.2f} s without scoring ({inside['scoring']:.2f} s for 8 rows): "
            f"{inside['validation']:.2f} s two validations, {first:.2f} s the first step, {own:.2f} s the sweep's own"
        )
        assert gap <= LIMIT, f"more than {LIMIT} s"


if __name__ == "__main__":
    main()
