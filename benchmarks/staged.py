"""python benchmarks/staged.py: the cost of the staged search and the rates that it picks, on recorded curves of a grid.

The curves are those of the embedded model: three configurations, seven rates, three seeds (benchmarks/data/). Every
ordered pair of seeds searches once, so there are 18 searches. It ends with an error if a search takes more than 30 % of
the steps of the full grid with five seeds, or if more than one of them picks a rate whose loss is more than one paired
standard error above that of the full grid's rate.

python benchmarks/staged.py --record trains the runs that are missing (an hour or two on one CPU core) and writes the
file. It continues where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiedlora import errors, storage
from tiedlora.analysis.intervals import mean_loss, paired_difference
from tiedlora.analysis.rate_choice import RateTrial, choose_rate
from tiedlora.places import PROJECT
from tiedlora.records.rows import ValidationLosses, read_validation_losses
from tiedlora.sweeps.cells import SweepCell
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.sweeps.launching import run_cell
from tiedlora.sweeps.staged_search import Observation, Request, SearchPlan, SearchStage, rung_steps
from tiedlora.text import aligned

CURVES = PROJECT / "benchmarks/data/staged_curves.jsonl"
SEEDS = (0, 1, 2)
WORDS = (
    "tying=LoRA,TABuv_b0,TAB",
    "train.lr=1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1",
    "seed=0,1,2",
    "train.steps=32",
    "train.batch_size=4",
    "train.warmup_steps=4",
    "train.validate_every=8",
    "train.checkpoint_every=32",
    "train.validation_rows=24",
    "train.threads=1",
    "train.compile=never",
    # Sums of two terms: short rows.
    "task.options.parameters.max_terms=2",
    "score.splits=[]",
)
FULL_SEEDS = 5
LARGEST_SHARE = 0.30
"""Of the full grid's steps."""
MISSES_ALLOWED = 1


@dataclass(frozen=True)
class Curve:
    """One recorded run."""

    configuration: str
    lr: float
    seed: int
    steps: int
    evaluations: dict[int, ValidationLosses]
    diverged: bool

    @property
    def last(self) -> ValidationLosses:
        return self.evaluations[self.steps]


class RecordedRuns:
    """Observes the recorded runs of one configuration as far as the search has asked for, and counts their steps."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.curves = {(curve.lr, curve.seed): curve for curve in curves}
        self.steps = curves[0].steps
        self.reached: dict[tuple[float, int], int] = {}

    def __call__(self, lr: float, seed: int) -> Observation:
        curve, reached = self.curves[lr, seed], self.reached.get((lr, seed), 0)
        seen = {step: losses for step, losses in curve.evaluations.items() if step <= reached}
        if reached == self.steps and curve.diverged:
            return Observation(seen, diverged=True)
        return Observation(seen, mean_loss(curve.last) if reached == self.steps else None, scored=reached == self.steps)

    def run(self, requests: Sequence[Request]) -> None:
        """Let the runs come as far as requested."""
        for request in requests:
            reached = self.reached.get((request.lr, request.seed), 0)
            self.reached[request.lr, request.seed] = max(reached, request.until or self.steps)

    def steps_taken(self) -> int:
        """Optimizer steps over all runs. A run that diverged counts as if it had come to its end."""
        return sum(self.reached.values())


@dataclass(frozen=True)
class Pick:
    """One search, and how its rate compares with the full grid's."""

    configuration: str
    seeds: tuple[int, int]
    lr: float
    full_lr: float
    behind: float
    """Its mean loss over all seeds, minus that of the full grid's rate."""
    standard_error: float
    """Of `behind`, paired on the validation rows."""
    share: float
    """Optimizer steps with five seeds, as a share of the full grid's."""

    @property
    def is_miss(self) -> bool:
        return self.behind > self.standard_error


def searches(curves: Sequence[Curve], validate_every: int, fractions: Sequence[float]) -> list[Pick]:
    """The searches of one configuration, one for each ordered pair of seeds."""
    rates = tuple(sorted({curve.lr for curve in curves}))
    trials = []
    for lr in rates:
        own = [curve for curve in curves if curve.lr == lr]
        losses = {curve.seed: mean_loss(curve.last) for curve in own if not curve.diverged}
        trials.append(RateTrial(lr, losses, failed=frozenset(curve.seed for curve in own if curve.diverged)))
    full = choose_rate(trials, by="loss")
    assert full is not None
    steps = curves[0].steps
    picks = []
    for first, second in itertools.permutations(SEEDS, 2):
        others = tuple(seed for seed in SEEDS if seed not in (first, second))
        # The bounds are those of the grid: rates beyond it were not recorded.
        rungs = rung_steps(steps, validate_every, fractions)
        plan = SearchPlan(rates, (first, second, *others), rungs, lowest=rates[0], highest=rates[-1])
        runs = RecordedRuns(curves)
        while (stage := SearchStage(plan, runs)).requests:
            runs.run(stage.requests)
        assert stage.chosen is not None
        lr, best = stage.chosen.lr, full.lr
        behind, error = paired_difference(_over_seeds(curves, lr), _over_seeds(curves, best))
        # The seeds that were not recorded run once each, at the chosen rate.
        taken = runs.steps_taken() + (FULL_SEEDS - len(SEEDS)) * steps
        share = taken / (len(rates) * FULL_SEEDS * steps)
        picks.append(Pick(curves[0].configuration, (first, second), lr, best, behind, error, share))
    return picks


def _over_seeds(curves: Sequence[Curve], lr: float) -> ValidationLosses:
    """Each validation row's mean loss over the seeds, at one rate."""
    last = [curve.last for curve in curves if curve.lr == lr and not curve.diverged]
    return ValidationLosses(last[0].step, np.mean([losses.losses for losses in last], axis=0).tolist(), last[0].tokens)


def record(outputs: Path) -> None:
    """Train the runs that are missing, and write their evaluations."""
    sweep = compose_sweep([*WORDS, "tracking=none", f"outputs={outputs}"])
    for cell in sweep.cells:
        if cell.state() not in ("done", "failed"):
            run_cell(cell, sweep.control)
    storage.write_json_lines(CURVES, [_to_json(cell) for cell in sweep.cells])


def _to_json(cell: SweepCell) -> dict[str, object]:
    rows = read_validation_losses(cell.folder.validation_losses_file)
    named = cell.name
    return {
        "configuration": named.configuration,
        "lr": named.lr,
        "seed": named.seed,
        "steps": cell.config.train.steps,
        "diverged": not cell.finished(),
        "tokens": rows[0].tokens,
        "losses": {row.step: [round(loss, 4) for loss in row.losses] for row in rows},
    }


def read_curves(path: Path) -> list[Curve]:
    """The recorded runs."""
    curves = []
    for line in path.read_text().splitlines():
        run = json.loads(line)
        evaluations = {
            int(step): ValidationLosses(int(step), losses, run["tokens"]) for step, losses in run["losses"].items()
        }
        named = run["configuration"], run["lr"], run["seed"]
        curves.append(Curve(*named, run["steps"], evaluations, run["diverged"]))
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="train the runs that are missing, and write the file")
    parser.add_argument("--outputs", type=Path, default=PROJECT / "outputs/staged_curves", help="the recorded runs")
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.outputs.absolute())
    curves = read_curves(CURVES)
    every = sorted(curves[0].evaluations)[1]
    picks: list[Pick] = []
    for name in dict.fromkeys(curve.configuration for curve in curves):
        picks += searches([curve for curve in curves if curve.configuration == name], every, (0.25, 0.5))
    lines = [["configuration", "seeds", "lr", "full grid's", "behind", "standard error", "steps", ""]]
    for pick in picks:
        numbers = [f"{pick.lr:g}", f"{pick.full_lr:g}", f"{pick.behind:.4f}", f"{pick.standard_error:.4f}"]
        seeds = f"{pick.seeds[0]}, {pick.seeds[1]}"
        lines.append([pick.configuration, seeds, *numbers, f"{100 * pick.share:.1f} %", "miss" if pick.is_miss else ""])
    print(aligned(lines))
    share, most = float(np.mean([pick.share for pick in picks])), max(pick.share for pick in picks)
    misses = sum(pick.is_miss for pick in picks)
    same = sum(pick.lr == pick.full_lr for pick in picks)
    print(
        f"\n{len(picks)} searches: {100 * share:.1f} % of the full grid's steps on average (at most "
        f"{100 * most:.1f} %), {same} pick the full grid's rate, {misses} miss"
    )
    if most > LARGEST_SHARE or misses > MISSES_ALLOWED:
        sys.exit(f"above {100 * LARGEST_SHARE:.0f} % of the steps, or more than {MISSES_ALLOWED} miss")


if __name__ == "__main__":
    with errors.exit_codes():
        main()
