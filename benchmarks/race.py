"""python benchmarks/race.py [--draws 300]: what a race of rates costs, and how much worse its choice is than the best.

Each population is an arm of a study: a parabola of the loss over the logarithm of the rate, with the best rate anywhere
between the grid's, and noise between seeds and between validation rows. The width of the parabola and the noise are
those of the records of both first studies, task by task: they follow from the two best rates of each arm, which ran at
the same two seeds, and from all seeds of its chosen rate. Every way to search meets the same populations, by the code
of the sweeps. The regret is the true loss of the chosen rate minus that of the best rate of the grid; *to the optimum*
is minus that of the best rate at all.

It ends with an error if the race with the default level and six seeds has an expected regret above 0.01 nats on a task,
if on average it takes more than 40 % more steps than the search at two seeds with the runs of a look at three, or if
the regret is above its 95 % bound in more than 5 % of the arms (up to two standard errors of the simulation).
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import common
import numpy as np

from tiedlora import errors
from tiedlora.analysis.intervals import Array, mean_loss, mean_squares
from tiedlora.analysis.rate_choice import RegretBound, rate_contrast, regret_bound
from tiedlora.analysis.runs import read_runs
from tiedlora.records.rows import ValidationLosses, read_validation_losses
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.study_files import runs_folder
from tiedlora.sweeps.staged_search import RACE_LEVEL, RACE_WITHIN, Observation, Request, SearchPlan, SearchStage
from tiedlora.text import aligned

STUDIES = ("tied-lora-smollm2", "sharing-against-lora")
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
STEPS, RUNGS = 64, (16, 32)
LOOK = (10, 11, 12)
"""The seeds at which the chosen rate runs."""
ROWS = 128
LARGEST_REGRET, LARGEST_COST, LARGEST_MISS = 0.01, 0.40, 0.05


@dataclass(frozen=True)
class World:
    """How the rates of an arm of one task differ, as its records show it. All in nats."""

    task: str
    width: float
    """What half a decade beside the best rate costs."""
    seed_sds: tuple[float, ...]
    """Between the seeds of one rate, of its mean over the rows, for each recorded arm. A simulated arm draws one."""
    row_sd: float
    """Between rows, of the difference of two neighbouring rates in all seeds."""
    rest_sd: float
    """Between rows, of a rate in one seed."""
    gain: float
    """By how much the loss falls from its start. A search stops only what is behind by a part of it."""
    disagree: float
    """The share of the recorded arms in which the two seeds name different rates."""


def recorded_worlds() -> list[World]:
    """The world of each task, from the arms whose two best rates ran at two seeds."""
    last: dict[tuple[str, str], dict[float, dict[int, ValidationLosses]]] = defaultdict(lambda: defaultdict(dict))
    gains: dict[str, list[float]] = defaultdict(list)
    for study in STUDIES:
        runs, _ = read_runs([runs_folder(common.PROJECT / "studies" / study)])
        for run in runs:
            # The form of an answer alone is another kind of task.
            if not run.arm.trained_for:
                rows = read_validation_losses(RunFolder(run.path).validation_losses_file)
                last[run.task, run.search][run.lr][run.seed] = rows[-1]
                gains[run.task].append(mean_loss(rows[0]) - mean_loss(rows[-1]))
    recorded: dict[str, list[tuple[Array, float]]] = defaultdict(list)
    for (task, _), rates in last.items():
        both = {lr: {seed: own[seed] for seed in (0, 1)} for lr, own in rates.items() if {0, 1} <= set(own)}
        if len(both) > 1:
            best, second = sorted(both, key=lambda lr: sum(map(mean_loss, both[lr].values())))[:2]
            table = rate_contrast(both[second], both[best])
            assert table is not None
            # The difference of two rates has twice the variance of one, and one degree of freedom.
            seeds = max(rates.values(), key=len).values()
            squares = table.mean(1).var(ddof=1) / 2 + (len(seeds) - 1) * np.var([*map(mean_loss, seeds)], ddof=1)
            recorded[task].append((table, math.sqrt(squares / len(seeds))))
    return [_world(task, own, gains[task]) for task, own in sorted(recorded.items())]


def _world(task: str, arms: Sequence[tuple[Array, float]], gains: Sequence[float]) -> World:
    """Variances are means over the arms, without what the noise of the means adds to them."""
    squares = [mean_squares(table) for table, _ in arms]
    rows = squares[0].rows
    of_seeds, of_rows, rest, differences = (
        float(np.mean([getattr(own, name) ** power for own in squares]))
        for name, power in (("of_seeds", 1), ("of_rows", 1), ("of_rest", 1), ("mean", 2))
    )
    noise = (of_seeds + max(0.0, of_rows - rest)) / (2 * rows)
    # The difference of the two best rates of a parabola is uniform between 0 and its width, which has the mean square
    # width^2 / 3, if the best rate lies anywhere between them.
    return World(
        task,
        width=math.sqrt(3 * max(0.0, differences - noise)),
        seed_sds=tuple(seed_sd for _, seed_sd in arms),
        row_sd=math.sqrt(max(0.0, of_rows - rest) / 2),
        rest_sd=math.sqrt(rest / 2),
        gain=float(np.median(gains)),
        disagree=float(np.mean([table.mean(1).min() < 0 for table, _ in arms])),
    )


class Arm:
    """One simulated arm: the true loss at every rate, and what its runs show."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        generator = np.random.default_rng([number])
        self.best = generator.uniform(-1.5, 1.5)
        self.width = world.width * generator.uniform(0.5, 1.5)
        self.slopes = generator.normal(0, world.row_sd, ROWS)
        # The mean of the rest over the rows is a part of what seeds differ by.
        of_rest = world.rest_sd**2 / ROWS
        self.seed_sd = math.sqrt(max(0.0, generator.choice(world.seed_sds) ** 2 - of_rest))
        self.reached: dict[tuple[float, int], int] = {}
        self.known: dict[tuple[float, int, int], ValidationLosses] = {}

    def mean(self, lr: float) -> float:
        """The true loss at a rate, above that of the best rate."""
        return float(self.width * (half_decades(lr) - self.best) ** 2)

    def losses(self, lr: float, seed: int, step: int) -> ValidationLosses:
        """The losses of a run's rows."""
        key = lr, seed, step
        if key not in self.known:
            generator = np.random.default_rng([self.number, round(1e9 * lr), seed])
            of_seed = generator.normal(0, self.seed_sd)
            rest = generator.normal(0, self.world.rest_sd, ROWS)
            rows = 1.0 + self.mean(lr) + of_seed + half_decades(lr) * self.slopes + rest
            self.known[key] = ValidationLosses(step, rows.tolist(), [1] * ROWS)
        return self.known[key]

    def __call__(self, lr: float, seed: int) -> Observation:
        reached = self.reached.get((lr, seed), 0)
        start = ValidationLosses(0, [1.0 + self.world.gain] * ROWS, [1] * ROWS)
        seen = {0: start} | {step: self.losses(lr, seed, step) for step in (*RUNGS, STEPS) if step <= reached}
        loss = mean_loss(seen[STEPS]) if reached == STEPS else None
        return Observation(seen, loss, scored=reached == STEPS)

    def run(self, requests: Sequence[Request]) -> None:
        for request in requests:
            key = request.lr, request.seed
            self.reached[key] = max(self.reached.get(key, 0), request.until or STEPS)


def half_decades(lr: float) -> float:
    """The distance of a rate from 1e-2."""
    return 2 * math.log10(lr / 1e-2)


class WithoutFiner(SearchStage):
    """A race that tries no rate between the last two."""

    def _add_finer(self) -> bool:
        return False


@dataclass(frozen=True)
class Way:
    """A way to search."""

    seeds: int
    level: float = RACE_LEVEL
    finer: bool = True
    within: float = RACE_WITHIN

    def __str__(self) -> str:
        if self.seeds == 2:
            return "two seeds"
        finer = "" if self.finer else ", without a finer rate"
        return f"race, {self.seeds} seeds, level {self.level:g}, within {self.within:g}{finer}"


DEFAULT = Way(6)
WAYS = [
    Way(2),
    Way(3, 0.3),
    *(Way(4, level) for level in (0.1, 0.3, 0.5)),
    *(Way(6, level) for level in (0.1, 0.2, 0.3, 0.5)),
    *(Way(6, within=within) for within in (0.0, 0.01)),
    Way(6, finer=False),
]


@dataclass(frozen=True)
class Outcome:
    """How one search has ended."""

    wrong: bool
    """Whether a rate of the grid is better than the chosen one."""
    regret: float
    """The true loss of the chosen rate minus that of the grid's best one, or 0 if that is worse."""
    from_optimum: float
    """The true loss of the chosen rate minus that of the best rate at all."""
    search: float
    """In whole runs."""
    tied: bool
    bound: RegretBound | None
    of_tried: float
    """The regret against all tried rates, which `bound` is about."""


def search(world: World, number: int, way: Way) -> Outcome:
    arm, stage_of = Arm(world, number), SearchStage if way.finer else WithoutFiner
    plan = SearchPlan(GRID, LOOK, RUNGS, GRID[0], GRID[-1], 3, tuple(range(way.seeds)), way.level, way.within)
    while (stage := stage_of(plan, functools.cache(arm))).requests:
        arm.run(stage.requests)
    assert stage.chosen is not None
    lr = stage.chosen.lr
    tried = {rate for rate, _ in arm.reached}
    ended = {(rate, seed) for (rate, seed), step in arm.reached.items() if step == STEPS}
    losses = {rate: {seed: arm.losses(rate, seed, STEPS) for own, seed in ended if own == rate} for rate in tried}
    regret = max(0.0, arm.mean(lr) - min(map(arm.mean, GRID)))
    taken = sum(step for (_, seed), step in arm.reached.items() if seed not in LOOK) / STEPS
    of_tried = arm.mean(lr) - min(map(arm.mean, tried))
    bound = regret_bound(losses, lr)
    return Outcome(regret > 0, regret, arm.mean(lr), taken, bool(stage.tied()), bound, of_tried)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=300, help="simulated arms of each task")
    draws = parser.parse_args().draws
    worlds, wrong, costs = recorded_worlds(), [], []
    lines = [
        [
            *("task", "search", "wrong rate", "regret", "95th percentile", "to the optimum", "tied", "search runs"),
            *("more steps", "with a look at 3", "bound, median", "above the bound"),
        ]
    ]
    for world in worlds:
        print(
            f"{world.task}: {len(world.seed_sds)} arms; half a decade costs {world.width:.4f}; SD of a rate between "
            f"seeds {np.median(world.seed_sds):.4f} ({min(world.seed_sds):.4f} to {max(world.seed_sds):.4f}), of a "
            f"difference between rows {world.row_sd:.3f}; rest {world.rest_sd:.3f}; two seeds name different rates in "
            f"{100 * world.disagree:.0f} % of the arms"
        )
        before = 0.0
        for way in WAYS:
            outcomes = [search(world, number, way) for number in range(draws)]
            regrets = [own.regret for own in outcomes]
            runs = float(np.mean([own.search for own in outcomes]))
            before = before or runs
            more, with_look = runs / before - 1, (runs + len(LOOK)) / (before + len(LOOK)) - 1
            bounded = [(own.bound.nats, own.of_tried) for own in outcomes if own.bound is not None]
            missed = float(np.mean([regret > bound for bound, regret in bounded]))
            lines.append(
                [
                    *(world.task, str(way), f"{100 * np.mean([own.wrong for own in outcomes]):.0f} %"),
                    *(f"{np.mean(regrets):.4f}", f"{np.quantile(regrets, 0.95):.4f}"),
                    f"{np.mean([own.from_optimum for own in outcomes]):.4f}",
                    f"{100 * np.mean([own.tied for own in outcomes]):.0f} %",
                    *(f"{runs:.1f}", f"{100 * more:+.0f} %", f"{100 * with_look:+.0f} %"),
                    *(f"{np.median([bound for bound, _ in bounded]):.4f}", f"{100 * missed:.1f} %"),
                ]
            )
            if way == DEFAULT:
                costs.append(with_look)
                if np.mean(regrets) > LARGEST_REGRET:
                    wrong.append(f"{world.task}: a regret of {np.mean(regrets):.4f}")
                if missed > LARGEST_MISS + 2 * math.sqrt(LARGEST_MISS / draws):
                    wrong.append(f"{world.task}: {100 * missed:.1f} % above the bound")
    print(f"\n{aligned(lines)}")
    cost = float(np.mean(costs))
    print(f"\nThe default takes {100 * cost:.0f} % more steps than two seeds, with a look at 3, on average.")
    if cost > LARGEST_COST:
        wrong.append(f"{100 * cost:.0f} % more steps")
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    with errors.exit_codes():
        main()
