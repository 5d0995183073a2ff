"""python benchmarks/between_cells.py [--model smollm2_135m]: seconds from one cell's last step to the next one's first.

It runs three configurations in a basic sweep on one base model. For each gap between two cells, it prints the time of
the cells' own work: the final validation and the scoring of the first cell, and the first validation and the first step
of the next cell. The rest is the sweep's work: the checkpoint, the record, detaching the adapter, and everything before
the next first step.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tiedlora.runs import trainer
from tiedlora.scoring.split import Scorer

PROJECT = Path(__file__).resolve().parents[1]
STEPS, CELLS = 4, ("LoRA", "TABuv", "Tuv")
LIMIT = 3.0
"""Seconds of a gap without scoring, whose time depends on how many rows are scored."""

Span = tuple[float, float]


def timed(function: Callable[..., Any], spans: list[Span]) -> Callable[..., Any]:
    """The function, wrapped so that the start and the end of each call are added to `spans`."""

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments, **keywords)
        spans.append((started, time.perf_counter()))
        return result

    return wrapped


def run_sweep(model: str) -> tuple[list[Span], list[Span], list[Span]]:
    """The spans of optimizer steps, of validations and of scorings."""
    steps: list[Span] = []
    validations: list[Span] = []
    scorings: list[Span] = []
    torch.optim.AdamW.step = timed(torch.optim.AdamW.step, steps)
    trainer.row_losses = timed(trainer.row_losses, validations)
    Scorer.score_split = timed(Scorer.score_split, scorings)
    with tempfile.TemporaryDirectory() as outputs:
        overrides = [f"model={model}", "train=tiny", f"train.steps={STEPS}", f"tying={','.join(CELLS)}"]
        overrides += ["train.threads=1", "task.rows.validation=8", "task.max_new_tokens=8", "tracking=none"]
        sys.argv = [str(PROJECT / "train.py"), "--multirun", *overrides, f"outputs={outputs}"]
        os.environ["HYDRA_FULL_ERROR"] = "1"
        runpy.run_path(sys.argv[0], run_name="__main__")
    return steps, validations, scorings


def seconds_within(spans: list[Span], start: float, end: float) -> float:
    """The total seconds of the spans that begin between `start` and `end`."""
    return sum(span_end - span_start for span_start, span_end in spans if start <= span_start < end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m")
    arguments = parser.parse_args()
    steps, validations, scorings = run_sweep(arguments.model)
    assert len(steps) == len(CELLS) * STEPS

    for cell in range(1, len(CELLS)):
        gap_start, gap_end = steps[cell * STEPS - 1][1], steps[cell * STEPS][0]
        validation = seconds_within(validations, gap_start, gap_end)
        scoring = seconds_within(scorings, gap_start, gap_end)
        # The span of a step is only its update. The forward and backward pass of the first step come before it. They
        # take about as long as those of the second step.
        first_step = steps[cell * STEPS + 1][0] - steps[cell * STEPS][1]
        gap = gap_end - gap_start - scoring
        own = gap - validation - first_step
        print(
            f"{CELLS[cell - 1]} to {CELLS[cell]}: {gap:.2f} s without scoring ({scoring:.2f} s for 8 rows): "
            f"{validation:.2f} s two validations, {first_step:.2f} s the first step, {own:.2f} s the sweep's own"
        )
        assert gap <= LIMIT, f"more than {LIMIT} s"


if __name__ == "__main__":
    main()
