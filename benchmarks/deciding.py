"""python benchmarks/deciding.py [--draws 1000]: the deciding sweep on simulated populations of scores.

Each population has a claim with the default looks at 3, 5, 8 and 12 seeds. Its runs stop at the first look that
decides, or that is futile. With the truth at the claim's boundary, at most 5 % may get a verdict (up to two standard
errors of the simulation). With the truth far from it, at most half of the runs of the fixed plan (12 seeds on both
sides) may be used. The searches of the rates are not counted. It ends with an error otherwise.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import numpy as np
from populations import Population, World

from tiedlora.analysis import rules
from tiedlora.analysis.rules import Plan, Rule, Sides, better_by, retains
from tiedlora.text import aligned

CHUNK = 50
"""Populations that are drawn at once."""


@dataclass(frozen=True)
class Setting:
    """A claim, and where the truth lies."""

    name: str
    world: World
    rule: Rule
    truth: float
    """The method's true mean."""
    at_boundary: bool


BINARY = World("binary", base=0.1, comparator=0.5, rows=300, seed_sd=0.015)
LOSS = World("loss", base=-2.0, comparator=-1.2, rows=300, seed_sd=0.02)
SETTINGS = [
    Setting("keeps 90 % of the gain, exact match", BINARY, retains(0.9), 0.1 + 0.9 * BINARY.gain, True),
    Setting("is better, exact match", BINARY, better_by(0.0), 0.5, True),
    Setting("keeps 90 % of the gain, loss", LOSS, retains(0.9), LOSS.base + 0.9 * LOSS.gain, True),
    Setting("keeps 90 %, and is far worse, exact match", BINARY, retains(0.9), 0.3, False),
    Setting("is better, by 15 points", BINARY, better_by(0.0), 0.65, False),
    Setting("keeps 90 %, and is 0.2 nats better, loss", LOSS, retains(0.9), -1.0, False),
]


def seeds_and_verdict(rule: Rule, method: np.ndarray, comparator: np.ndarray, base: np.ndarray) -> tuple[int, bool]:
    """How many seeds a claim takes, and whether it gets a verdict. The scores are (12 seeds, rows) and (rows,)."""
    plan = Plan()
    for number, (seeds, level) in enumerate(zip(plan.looks, plan.levels, strict=True)):
        sides = Sides(method[:seeds], comparator[:seeds], base)
        evidence = rule.evidence(sides)
        if min(evidence.supported, evidence.contradicted) <= level:
            return seeds, True
        if seeds < plan.looks[-1] and rules.chance_of_decision(rule, sides, plan, number) < rules.FUTILE:
            return seeds, False
    return plan.looks[-1], False


def simulate(setting: Setting, draws: int) -> tuple[float, float]:
    """The share of populations with a verdict, and the mean number of seeds."""
    generator = np.random.default_rng(0)
    seeds, verdicts = [], 0
    for _ in range(0, draws, CHUNK):
        population = Population(setting.world, CHUNK, generator)
        method = population.method(setting.truth)
        for number in range(CHUNK):
            base = population.base[number].reshape(-1).astype(float)
            sides = (method[number].astype(float), population.comparator[number].astype(float), base)
            taken, has_verdict = seeds_and_verdict(setting.rule, *sides)
            seeds.append(taken)
            verdicts += has_verdict
    return verdicts / len(seeds), float(np.mean(seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="populations of each setting")
    draws = parser.parse_args().draws
    lines, wrong = [["claim", "truth", "verdicts", "+-", "seeds of 12"]], []
    for setting in SETTINGS:
        share, seeds = simulate(setting, draws)
        error = math.sqrt(share * (1 - share) / draws)
        where = "at the boundary" if setting.at_boundary else "far from it"
        lines.append([setting.name, where, f"{100 * share:.1f} %", f"{100 * error:.1f} %", f"{seeds:.1f}"])
        holds = share - 2 * error <= rules.TOTAL if setting.at_boundary else seeds <= rules.LOOKS[-1] / 2
        if not holds:
            wrong.append(setting.name)
    print(aligned(lines))
    if wrong:
        sys.exit(f"does not hold: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
