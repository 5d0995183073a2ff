"""Synthetic scores with a known truth, for benchmarks/verdicts.py and the tests of the decision rules.

A score depends on a latent normal: the row's difficulty, which all methods share; the method's own effect on the row;
the seed's effect; and a remainder. So its true mean has a closed form, and the truth can be exactly at a boundary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float32]
SEEDS = 12


@dataclass(frozen=True)
class World:
    """A population of scores of a base model and a comparator, with their true means."""

    kind: str
    base: float
    comparator: float
    rows: int
    seed_sd: float
    seeds_agree: bool = False
    """Whether a method has much the same score on a row with every seed, so that rows matter most."""

    @property
    def variances(self) -> tuple[float, float, float]:
        """The latent variance of a row for all methods, of a row for one method, and of the remainder.

        They add up to 1, or are those of the logarithm of a loss.
        """
        if self.kind == "loss":
            return (0.36, 0.09, 0.0025) if self.seeds_agree else (0.36, 0.0064, 0.0025)
        return (0.3, 0.65, 0.05) if self.seeds_agree else (0.4, 0.15, 0.45)

    @property
    def gain(self) -> float:
        return self.comparator - self.base


class Population:
    """Draws of the scores of base, comparator and methods of a world. Their true means are exact, in closed form."""

    def __init__(self, world: World, draws: int, generator: np.random.Generator) -> None:
        self.world, self.generator, self.draws = world, generator, draws
        self.difficulty = self._normal(1, world.rows)
        self.length = self._uniform(1, world.rows) if world.kind == "rouge" else None
        self.base = self.scores(world.base, 1, 0.0)
        self.comparator = self.scores(world.comparator, SEEDS, world.seed_sd)
        self.effects = self._effects(SEEDS)

    def method(self, truth: float) -> Array:
        """The method's scores with this true mean; the same chances for every truth."""
        return self._with_mean(truth, self.effects, self.world.seed_sd)

    def scores(self, truth: float, seeds: int, seed_sd: float) -> Array:
        """(draws, seeds, rows), with effects of their own."""
        return self._with_mean(truth, self._effects(seeds), seed_sd)

    def _effects(self, seeds: int) -> tuple[Array, Array, Array | None]:
        """Seeds (standard normal), rows with the remainder, and the lengths of answers: of one method."""
        shared, own, rest = np.sqrt(self.world.variances, dtype=np.float32)
        of_cells = rest * self._normal(seeds, self.world.rows)
        of_cells += shared * self.difficulty + own * self._normal(1, self.world.rows)
        lengths = (self.length + self._uniform(seeds, self.world.rows)) / 2 if self.length is not None else None
        return self._normal(seeds, 1), of_cells, lengths

    def _with_mean(self, truth: float, effects: tuple[Array, Array, Array | None], seed_sd: float) -> Array:
        of_seeds, of_cells, lengths = effects
        if self.world.kind == "loss":
            # The mean of a lognormal is exp(mu + variance / 2). Negated: more is better.
            deviation = seed_sd / abs(truth)
            location = math.log(abs(truth)) - (sum(self.world.variances) + deviation**2) / 2
            return -np.exp(np.float32(location) + of_cells + np.float32(deviation) * of_seeds)
        # A score is above 0 where a standard normal is below a threshold. Seeds move it by seed_sd, to first order.
        length = 1.0 if lengths is None else 0.5
        threshold = float(stats.norm.ppf(truth / length))
        deviation = seed_sd / (length * float(stats.norm.pdf(threshold)))
        latent = np.float32(math.sqrt(1 - deviation**2)) * of_cells + np.float32(deviation) * of_seeds
        scores = (latent < threshold).astype(np.float32)
        return scores if lengths is None else scores * lengths

    def _normal(self, seeds: int, rows: int) -> Array:
        return self.generator.standard_normal((self.draws, seeds, rows), dtype=np.float32)

    def _uniform(self, seeds: int, rows: int) -> Array:
        return self.generator.random((self.draws, seeds, rows), dtype=np.float32)
