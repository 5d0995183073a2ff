"""What stopping for futility costs and saves: lost verdicts, and seeds not run. For benchmarks/verdicts.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from populations import SEEDS, Population, World

from tiedlora.analysis import rules
from tiedlora.analysis.rules import Plan, Sides, retains

FUTILITY_THRESHOLDS = (0.01, 0.02, 0.05, 0.10)


@dataclass(frozen=True)
class Futility:
    """What it costs and saves to stop a plan whose chance of a decision is below a threshold."""

    world: World
    retained: float
    """The method's true share of the gain."""
    threshold: float
    stopped: float
    """The share of plans that stop before the last look, undecided."""
    lost: float
    """The share of verdicts that would have come at a later look and are lost."""
    seeds: float
    """The mean number of seeds that a plan runs."""
    seeds_without: float


def futility(world: World, retained: float, draws: int) -> list[Futility]:
    """Run plans for `retains(0.9)` with the method's true share of the gain, with and without stopping."""
    rule, plan, generator = retains(0.9), Plan(), np.random.default_rng(world.rows)
    decided_at = np.full(draws, len(plan.looks))
    chances = np.ones((draws, len(plan.looks)))
    for draw in range(draws):
        population = Population(world, 1, generator)
        scores = [population.method(world.base + retained * world.gain), population.comparator]
        method, comparator = (table[0].astype(np.float64) for table in scores)
        base = population.base[0].astype(np.float64)
        for look, (n, level) in enumerate(zip(plan.looks, plan.levels, strict=True)):
            sides = Sides(method[:n], comparator[:n], base)
            evidence = rule.evidence(sides)
            if min(evidence.supported, evidence.contradicted) <= level:
                decided_at[draw] = look
                break
            if n < SEEDS:
                chances[draw, look] = rules.chance_of_decision(rule, sides, plan, look)
    ends = np.array([*plan.looks, SEEDS])
    found = []
    for threshold in FUTILITY_THRESHOLDS:
        low = chances < threshold
        stopped_at = np.where(low.any(1), low.argmax(1), len(plan.looks))
        stops = stopped_at < decided_at
        verdicts = decided_at < len(plan.looks)
        lost = float((stops & verdicts).sum() / max(1, verdicts.sum()))
        seeds, without = ends[np.minimum(stopped_at, decided_at)].mean(), ends[decided_at].mean()
        found.append(Futility(world, retained, threshold, float(stops.mean()), lost, float(seeds), float(without)))
    return found
