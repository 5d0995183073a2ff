"""python benchmarks/yardstick.py [--draws N]: how often contrasts with floors, curves and clusters are wrong.

The populations are the first study's own records, so their skewed losses and unequal articles are in the test. From the
tables (seeds x rows) of its arms, each draw takes rows with replacement, or whole articles where rows come in them; for
each row the deviations of a recorded seed from the row's mean; and new means of seeds, normal with the recorded spread.
The contrast is compared with its true mean, as at the boundary of a rule: every verdict is wrong, at level 5 %. The
program prints Markdown:

- floor: TABuv_b0 or TAuv keeps 90 % of LoRA's gain over the weakest arm, TA (the study has no shuffled targets);
- frontier: TAuv or TABuv_b0 against a point between two sizes of LoRA;
- clusters: differences on squad, with articles as the sample, and beside it with rows as the sample;
- worth: how often its interval leaves out the true size.

It takes about 5 minutes on one core with the default of 4,000 draws.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiedlora.analysis import intervals
from tiedlora.analysis.comparison import match
from tiedlora.analysis.groups import RunGroup, group_runs
from tiedlora.analysis.intervals import Clusters
from tiedlora.analysis.runs import Measure, Scorebook, read_runs, read_selections, run_roots
from tiedlora.analysis.worth import worth_of
from tiedlora.places import PROJECT

Array = NDArray[np.float64]
SEEDS = (3, 5, 8)
SIZES = 41
"""How many sizes the curve has between two measured ones."""


@dataclass(frozen=True)
class Arms:
    """The recorded tables of some arms of one task, on the same seeds and rows."""

    name: str
    tables: Array
    """(arms, seeds, rows)."""
    clusters: Clusters | None


class Study:
    """The records of the first study."""

    def __init__(self) -> None:
        roots = run_roots([PROJECT / "studies" / "tied-lora-smollm2"])
        runs, left_out = read_runs(roots)
        self.groups, self.book = group_runs(runs, left_out, read_selections(roots)[0]), Scorebook()

    def group(self, task: str, name: str, rank: int) -> RunGroup:
        return next(g for g in self.groups if (g.task, g.configuration, g.rank) == (task, name, rank))

    def arms(self, task: str, metric: str, *names: tuple[str, int]) -> Arms:
        """The tables of arms, given by name and rank."""
        measure, groups = Measure("test", metric), [self.group(task, *name) for name in names]
        tables, clusters = match(groups, measure, self.book).tables
        words = " / ".join(f"{name} r {rank}" for name, rank in names)
        return Arms(f"{task} {metric}: {words}", measure.sign * np.stack(tables), clusters)


def drawn(arms: Arms, seeds: int, generator: np.random.Generator) -> tuple[Array, Clusters | None]:
    """Tables of one draw, (arms, seeds, rows), whose true means are the records', and the clusters of its rows."""
    tables, clusters = arms.tables, arms.clusters
    recorded, rows = tables.shape[1:]
    if clusters is None:
        chosen, codes = generator.integers(0, rows, rows), None
    else:
        taken = generator.integers(0, len(clusters.sizes), len(clusters.sizes))
        members = [np.flatnonzero(clusters.codes == number) for number in taken]
        chosen, codes = np.concatenate(members), np.repeat(np.arange(len(taken)), [len(own) for own in members])
    of_row = tables.mean(1, keepdims=True)
    of_seed = tables.mean(2, keepdims=True) - tables.mean((1, 2), keepdims=True)
    rest = (tables - of_row - of_seed)[:, :, chosen]
    # A seed's deviations from the row's mean are too small by this factor, because the mean holds them too.
    rest *= np.sqrt(recorded / (recorded - 1))
    which = generator.integers(0, recorded, (len(tables), seeds, len(chosen)))
    own = np.take_along_axis(rest, which, axis=1)
    squares = intervals.mean_squares(tables)
    between_seeds = np.maximum(0.0, squares.of_seeds - np.maximum(0.0, squares.of_rest)) / squares.rows
    sd = np.sqrt(between_seeds)[:, None, None]
    new_seeds = sd * generator.normal(size=(len(tables), seeds, 1))
    return of_row[:, :, chosen] + own + new_seeds, None if codes is None else Clusters(codes)


def wrong(arms: Arms, weights: Array, seeds: int, draws: int, *, with_clusters: bool = True) -> float:
    """How often the interval of the contrast `weights . arms` leaves out its true mean."""
    generator, count = np.random.default_rng(seeds), 0
    truth = float(np.tensordot(weights, arms.tables.mean((1, 2)), axes=1))
    for _ in range(draws):
        tables, clusters = drawn(arms, seeds, generator)
        found = intervals.mean_squares(np.tensordot(weights, tables, axes=1), clusters if with_clusters else None)
        count += abs(float(found.mean) - truth) > float(found.half_width())
    return count / draws


def worth_misses(arms: Arms, at: float, seeds: int, draws: int) -> float:
    """How often the interval of worth leaves out the true size. The arms are the method, then LoRA's two sizes.

    Args:
        at: the true place between the two sizes, from 0 to 1.
    """
    generator, misses = np.random.default_rng(seeds), 0
    method, below, above = arms.tables.mean((1, 2))
    moved = (1 - at) * below + at * above - method
    places = np.linspace(0, 1, SIZES)
    sizes, truth = 1000.0 * 8**places, 1000.0 * 8**at
    for _ in range(draws):
        (m, a, b), clusters = drawn(arms, seeds, generator)
        contrasts = m + moved - (1 - places[:, None, None]) * a - places[:, None, None] * b
        found = intervals.mean_squares(contrasts, clusters)
        worth = worth_of(sizes, found.mean, found.half_width())
        misses += not worth.low <= truth <= worth.high
    return misses / draws


def main(draws: int) -> None:
    study, table = Study(), []
    lora, small, tied, best, weakest = ("LoRA", 8), ("LoRA", 1), ("TABuv_b0", 8), ("TAuv", 8), ("TA", 8)
    losses = [("gsm8k", "target_loss"), ("squad", "target_loss"), ("chain_sum", "target_loss")]
    print(f"| contrast | arms | seeds | wrong, % of {draws:,} |\n| --- | --- | ---: | ---: |", flush=True)

    def add(kind: str, arms: Arms, seeds: int, share: float) -> None:
        table.append((kind, share))
        print(f"| {kind} | {arms.name} | {seeds} | {100 * share:.1f} |", flush=True)

    floors = [study.arms(task, metric, method, lora, weakest) for task, metric in losses for method in (tied, best)]
    for arms, seeds in [*list(itertools.product(floors, SEEDS))[::2], (floors[0], 5)]:
        add("floor", arms, seeds, wrong(arms, np.array([1, -0.9, -0.1]), seeds, draws))
    curves = [study.arms(task, metric, method, small, lora) for task, metric in losses for method in (tied, best)]
    for arms, seeds in [*list(itertools.product(curves, SEEDS))[1::2], (curves[1], 5)]:
        add("frontier", arms, seeds, wrong(arms, np.array([1, -0.4, -0.6]), seeds, draws))
    on_squad = [("target_loss", tied, lora), ("target_loss", best, lora), ("f1", tied, lora), ("f1", tied, small)]
    pairs = [study.arms("squad", metric, method, other) for metric, method, other in on_squad]
    for arms, seeds in list(itertools.product(pairs, SEEDS))[:10]:
        add("clusters", arms, seeds, wrong(arms, np.array([1, -1]), seeds, draws))
        add("rows, for comparison", arms, seeds, wrong(arms, np.array([1, -1]), seeds, draws, with_clusters=False))
    for arms, seeds in [*list(itertools.product(curves, SEEDS))[::2], (curves[0], 5)]:
        add("worth, not covered", arms, seeds, worth_misses(arms, 0.4, seeds, draws // 2))
    for kind in dict.fromkeys(name for name, _ in table):
        shares = [100 * share for name, share in table if name == kind]
        print(f"\n{kind}: {min(shares):.1f} to {max(shares):.1f} % in {len(shares)} settings")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000)
    main(parser.parse_args().draws)
