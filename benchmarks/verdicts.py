"""python benchmarks/verdicts.py [--quick] [--json FILE]: how often verdicts are wrong, by simulation.

Synthetic scores with a known truth are drawn again and again, and the functions of tiedlora.analysis decide. With the
truth exactly at a rule's boundary, every verdict is wrong. The program prints, as Markdown:

- the worst settings of each rule, found with --draws populations and measured again with --worst-draws;
- how often a claim to retain the gain is supported where nothing gains anything;
- the power: how often the right verdict comes where the truth is not at the boundary;
- what stopping for futility costs.

Scores are binary, like ROUGE (0 for many rows, otherwise in (0, 1)), or losses (positive and skewed), with 200 to 1,200
rows, 3 to 12 seeds, and standard deviations between seeds of 0.5 to 3 points (benchmarks/populations.py). Rows and
seeds are drawn again each time. The full program takes about 12 minutes on two cores, and --quick takes one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
from numpy.typing import NDArray
from populations import SEEDS, Array, Population, World
from stopping import Futility, futility

from tiedlora.analysis import rules
from tiedlora.analysis.intervals import MeanSquares
from tiedlora.analysis.rules import Plan, Rule, Sides, better_by, level_within, retains

PLANS: dict[str, Plan] = {
    **{f"{n} seeds": Plan((n,)) for n in rules.LOOKS},
    "looks": Plan(),
}
UNPLANNED = "looks at 5 % each"
NUMBERS_AT_ONCE = 400_000
"""So many scores of one method are in memory together; more are slower, because they leave the cache."""


def boundaries() -> list[tuple[str, Rule, Callable[[World], float]]]:
    """Every rule with the method's true score at which any verdict is wrong."""

    def retained(rho: float) -> Callable[[World], float]:
        return lambda world: world.base + rho * world.gain

    return [
        ("retains 0.9", retains(0.9), retained(0.9)),
        ("retains 0.5", retains(0.5), retained(0.5)),
        ("better", better_by(), retained(1.0)),
        ("better by 0.02", better_by(0.02), lambda world: world.comparator + 0.02),
        ("level 0.2, worse", level_within(0.2), retained(0.8)),
        ("level 0.2, better", level_within(0.2), retained(1.2)),
    ]


Counts = dict[str, NDArray[np.int64]]
"""For each plan, how many populations gave (supported, contradicted)."""
Squares = dict[int, MeanSquares]
"""The mean squares of the first n seeds."""


FIRST = np.array([[1 / n if seed < n else 0 for seed in range(SEEDS)] for n in rules.LOOKS], dtype=np.float32)
"""The means over the first n seeds, as a matrix."""


def mean_squares(table: Array) -> Squares:
    """`intervals.mean_squares` of the first n seeds at every look, in one pass and in single precision.

    It is three times as fast. tests/analysis/test_rules.py holds that both are equal.
    """
    rows = table.shape[-1]
    of_seed = table.mean(-1, dtype=np.float64)
    squares = np.einsum("...sr,...sr->...s", table, table).astype(np.float64)
    of_rows = (FIRST @ table).var(-1, ddof=1, dtype=np.float64)
    found = {}
    for look, n in enumerate(rules.LOOKS):
        mean = of_seed[:, :n].mean(-1)
        of_seeds, of_row = rows * of_seed[:, :n].var(-1, ddof=1), n * of_rows[:, look]
        total = squares[:, :n].sum(-1) - n * rows * mean**2
        rest = (total - (n - 1) * of_seeds - (rows - 1) * of_row) / ((n - 1) * (rows - 1))
        found[n] = MeanSquares(mean, of_seeds, of_row, np.maximum(rest, 0.0), n, rows, rows - 1)
    return found


def count(rule: Rule, contrasts: Sequence[Squares], gains: Squares) -> Counts:
    """The verdicts of every plan on the same populations."""
    draws = len(gains[SEEDS].mean)

    def verdicts(seeds: Sequence[int], levels: Sequence[float]) -> NDArray[np.int64]:
        supported, contradicted = np.zeros((2, draws), dtype=bool)
        for n, level in zip(seeds, levels, strict=True):
            yes, no = rule.decide([squares[n] for squares in contrasts], gains[n], level)
            undecided = ~(supported | contradicted)
            supported, contradicted = supported | (yes & undecided), contradicted | (no & undecided)
        return np.array([supported.sum(), contradicted.sum()])

    counts = {name: verdicts(plan.looks, plan.levels) for name, plan in PLANS.items()}
    counts[UNPLANNED] = verdicts(rules.LOOKS, [rules.TOTAL] * len(rules.LOOKS))
    return counts


@dataclass(frozen=True)
class Job:
    """Several rules on one world, each at a true score of the method, with so many populations."""

    world: World
    rules: tuple[tuple[str, Rule, float], ...]
    draws: int
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """How often a plan gave each verdict."""

    rule: str
    world: World
    truth: float
    plan: str
    supported: float
    contradicted: float
    draws: int

    @property
    def wrong(self) -> float:
        """At a boundary, every verdict is wrong."""
        return self.supported + self.contradicted

    @property
    def error(self) -> float:
        """The Monte Carlo standard error of `wrong`."""
        return math.sqrt(max(self.wrong * (1 - self.wrong), 1 / self.draws) / self.draws)


def run(job: Job) -> list[Outcome]:
    """Draw the job's populations in chunks and count the verdicts."""
    generator = np.random.default_rng([job.seed, job.world.rows, round(1e4 * job.world.seed_sd), job.draws])
    chunk = max(1, NUMBERS_AT_ONCE // (SEEDS * job.world.rows))
    totals: dict[tuple[str, str], NDArray[np.int64]] = {}
    drawn = 0
    while drawn < job.draws:
        population = Population(job.world, min(chunk, job.draws - drawn), generator)
        drawn += population.draws
        gains = mean_squares(population.comparator - population.base)
        for name, rule, truth in job.rules:
            tables = rule.contrasts(Sides(population.method(truth), population.comparator, population.base))
            counts = count(rule, [mean_squares(table) for table in tables], gains)
            for plan, verdicts in counts.items():
                totals[name, plan] = totals.get((name, plan), np.zeros(2, dtype=np.int64)) + verdicts
    truths = {name: truth for name, _, truth in job.rules}
    return [
        Outcome(name, job.world, truths[name], plan, *(verdicts / job.draws).tolist(), job.draws)
        for (name, plan), verdicts in totals.items()
    ]


SCORES = {
    "binary": [(0.20, 0.50), (0.02, 0.06)],
    "rouge": [(0.10, 0.25), (0.02, 0.05)],
    "loss": [(-2.0, -1.5), (-2.0, -1.9)],
}
ROWS = (200, 1200)
SEED_SD = (0.005, 0.01, 0.03)


NOTHING_GAINED = [
    World(kind, score, score, rows, 0.01)
    for kind, score in (("binary", 0.3), ("binary", 0.03), ("rouge", 0.1), ("loss", -2.0))
    for rows in (200, 1200)
]
TRUTHS: list[tuple[str, Rule, Callable[[World], float]]] = [
    ("retains 0.9: the method retains all", retains(0.9), lambda world: world.comparator),
    ("retains 0.9: the method retains 0.7", retains(0.9), lambda world: world.base + 0.7 * world.gain),
    ("retains 0.9: the method is the base", retains(0.9), lambda world: world.base),
    ("better: by 0.05", better_by(), lambda world: world.comparator + 0.05),
    ("level 0.2: equal", level_within(0.2), lambda world: world.comparator),
]
"""What the power is measured at. The right verdict is *contradicted* where the method retains 0.7 or nothing."""


def worlds() -> Iterator[World]:
    """The grid of settings: large and small gains of each kind of score."""
    for kind, scores in SCORES.items():
        for (base, comparator), rows, seed_sd, seeds_agree in itertools.product(scores, ROWS, SEED_SD, (False, True)):
            yield World(kind, base, comparator, rows, seed_sd, seeds_agree)


def at_boundaries(world: World, draws: int, only: str = "", seed: int = 0) -> Job:
    """All rules, or only one, whose boundary is a possible score in this world."""
    found = [(name, rule, truth(world)) for name, rule, truth in boundaries() if only in ("", name)]
    return Job(world, tuple(rule for rule in found if world.kind == "loss" or rule[2] > 0.005), draws, seed)


def without_gain(world: World, draws: int) -> Job:
    """Nobody gains anything: base, comparator and method have one true score."""
    return Job(world, (("retains 0.9", retains(0.9), world.base), ("retains 0.5", retains(0.5), world.base)), draws)


def with_power(world: World, draws: int) -> Job:
    return Job(world, tuple((name, rule, truth(world)) for name, rule, truth in TRUTHS), draws)


def run_all(jobs: Sequence[Job], processes: int) -> list[Outcome]:
    """The outcomes of all jobs, in their order."""
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        return [outcome for found in pool.map(run, jobs) for outcome in found]


def in_words(world: World) -> list[str]:
    kind = f"{world.kind}, seeds agree" if world.seeds_agree else world.kind
    return [kind, f"{world.base:g} to {world.comparator:g}", f"{world.rows:,}", f"{100 * world.seed_sd:g}"]


SETTING = ["scores", "base to comparator", "rows", "SD of seeds"]


def by_plan(outcomes: Sequence[Outcome], shown: Callable[[Outcome], str]) -> str:
    """A table with a column for each plan."""
    plans = [*PLANS, UNPLANNED]
    cells = {(o.rule, o.world, o.plan): shown(o) for o in outcomes}
    keys = list(dict.fromkeys((o.rule, o.world) for o in outcomes))
    rows = [[rule, *in_words(world), *(cells[rule, world, plan] for plan in plans)] for rule, world in keys]
    return common.table(["rule", *SETTING, *plans], rows)


def worst(outcomes: Sequence[Outcome], how_many: int) -> list[tuple[str, World]]:
    """For each rule, the settings in which a plan had the most wrong verdicts."""
    found = []
    for rule in dict.fromkeys(o.rule for o in outcomes):
        ranked = sorted((o for o in outcomes if o.rule == rule and o.plan != UNPLANNED), key=lambda o: -o.wrong)
        found += [(rule, world) for world in list(dict.fromkeys(o.world for o in ranked))[:how_many]]
    return found


def show_boundaries(grid: Sequence[Outcome], settings: int, draws: int) -> None:
    """For each rule and plan, the largest share of wrong verdicts of all settings."""
    print(f"## Wrong verdicts at the boundary, %: the largest of {settings} settings, {draws:,} populations each\n")
    names = list(dict.fromkeys(o.rule for o in grid))
    plans = [*PLANS, UNPLANNED]
    rows = []
    for rule in names:
        highest = [max(o.wrong for o in grid if (o.rule, o.plan) == (rule, plan)) for plan in plans]
        rows.append([rule, *(f"{100 * wrong:.1f}" for wrong in highest)])
    print(common.table(["rule", *plans], rows))
    print(
        f"\nOne figure is known to within {200 * math.sqrt(0.05 * 0.95 / draws):.1f} (95 %); the largest is too large."
    )


def show_futility(stopping: Sequence[Futility], plans: int) -> None:
    """What stopping for futility saves in seeds, and costs in verdicts."""
    print(f"\n## Stopping for futility, retains 0.9, {plans} plans each\n")
    rows = []
    for found in stopping:
        setting = [f"{found.retained:g}", *in_words(found.world), f"{found.threshold:g}"]
        seeds = [f"{found.seeds:.1f}", f"{found.seeds_without:.1f}"]
        rows.append([*setting, f"{100 * found.stopped:.0f}", f"{100 * found.lost:.1f}", *seeds])
    header = ["retained", *SETTING, "threshold", "stopped, %", "verdicts lost, %", "seeds", "seeds without"]
    print(common.table(header, rows))


def read_options() -> argparse.Namespace:
    """The options of the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--draws", type=int, default=2500, help="populations of each setting of the grid")
    arguments.add_argument("--worst", type=int, default=1, help="settings of each rule that are measured again")
    arguments.add_argument("--worst-draws", type=int, default=100_000)
    arguments.add_argument("--futility-draws", type=int, default=400)
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--quick", action="store_true", help="200 rows only, and few populations")
    arguments.add_argument("--json", type=Path)
    return arguments.parse_args()


def main() -> None:
    options = read_options()
    draws, worst_draws, futility_draws = options.draws, options.worst_draws, options.futility_draws
    settings = list(worlds())
    if options.quick:
        draws, worst_draws, futility_draws = 1000, 4000, 50
        settings = [world for world in settings if world.rows == ROWS[0]]
    started = time.perf_counter()
    figures: dict[str, list[dict[str, object]]] = {}

    def keep(name: str, found: Sequence[Outcome | Futility]) -> None:
        """Write what is known so far: a program that is stopped has not run for nothing."""
        figures[name] = [dataclasses.asdict(outcome) for outcome in found]
        common.write(options.json, figures)

    grid = run_all([at_boundaries(world, draws) for world in settings], options.processes)
    keep("grid", grid)
    show_boundaries(grid, len(settings), draws)

    # Other seeds than the grid's: the worst of many is partly chance, and must not be measured on the same draws.
    again = [at_boundaries(world, worst_draws, rule, seed=1) for rule, world in worst(grid, options.worst)]
    repeated = run_all(again, options.processes)
    keep("worst", repeated)
    print(f"\n## The worst settings again, {worst_draws:,} populations each, wrong verdicts in %\n")
    print(by_plan(repeated, lambda o: f"{100 * o.wrong:.2f}"))
    print(f"\nOne figure is known to within {200 * math.sqrt(0.05 * 0.95 / worst_draws):.2f} (95 %).")

    empty = run_all([without_gain(world, 5 * draws) for world in NOTHING_GAINED], options.processes)
    keep("nothing gained", empty)
    print(f"\n## Nothing is gained: supported in %, {5 * draws:,} populations each\n")
    print(by_plan(empty, lambda o: f"{100 * o.supported:.2f}"))

    strong = [World(kind, *SCORES[kind][0], rows, 0.01) for kind in SCORES for rows in (ROWS[0], ROWS[-1])]
    power = run_all([with_power(world, draws) for world in strong], options.processes)
    keep("power", power)
    print(f"\n## Power: supported / contradicted in %, {draws:,} populations each\n")
    print(by_plan(power, lambda o: f"{100 * o.supported:.0f} / {100 * o.contradicted:.0f}"))

    stopped = [(world, retained) for world in strong[1::2] for retained in (1.0, 0.9, 0.7)]
    with concurrent.futures.ProcessPoolExecutor(options.processes) as pool:
        calls = [pool.submit(futility, world, retained, futility_draws) for world, retained in stopped]
        stopping = [found for call in calls for found in call.result()]
    keep("futility", stopping)
    show_futility(stopping, futility_draws)
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes, {options.processes} processes")


if __name__ == "__main__":
    main()
