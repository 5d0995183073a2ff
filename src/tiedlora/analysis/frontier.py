"""The curve of one configuration over its sizes: the fair peer of an arm with any number of trained parameters.

A curve holds the groups of one configuration in one setting: every rank on all layers and, below rank 1, rank 1 on
evenly spaced layers (LoRA_l15 on 15 of them). Between two measured sizes a and b, the score at n parameters is

    q(n) = w q_a + (1 - w) q_b,   w = (log b - log n) / (log b - log a)

on the same seeds and rows, so a comparison with it is one contrast like any other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tiedlora.analysis.groups import RunGroup


@dataclass(frozen=True, eq=False)
class Blend:
    """A point of a curve: one measured size, or a weighted mean of the two that enclose it."""

    configuration: str
    params: int
    parts: tuple[tuple[float, RunGroup], ...]
    """(weight, group); the weights add up to 1."""

    @property
    def groups(self) -> list[RunGroup]:
        """The groups that have a part in it."""
        return [group for _, group in self.parts]

    @property
    def name(self) -> str:
        """Such as `LoRA at 41,328 parameters (between LoRA_l15 r=1 and LoRA r=1)`."""
        names = [group.name for group in self.groups]
        where = f" (between {' and '.join(names)})" if len(names) > 1 else f" ({names[0]})"
        return f"{self.configuration} at {self.params:,} parameters{where}"


Peer = RunGroup | Blend
"""What a method is compared with."""


@dataclass(frozen=True, eq=False)
class Curve:
    """One configuration in one setting, at every size that was run."""

    configuration: str
    groups: tuple[RunGroup, ...]
    """In rising order of parameters."""

    def __str__(self) -> str:
        sizes = ", ".join(f"{group.params:,}" for group in self.groups) or "none"
        return f"sizes of {self.configuration}: {sizes}"

    def at(self, params: int) -> Blend | None:
        """The curve at a number of parameters; None outside the measured sizes."""
        for group in self.groups:
            if group.params == params:
                return Blend(self.configuration, params, ((1.0, group),))
        for smaller, larger in itertools.pairwise(self.groups):
            if smaller.params < params < larger.params:
                weight = math.log(larger.params / params) / math.log(larger.params / smaller.params)
                return Blend(self.configuration, params, ((weight, smaller), (1 - weight, larger)))
        return None


def curve(configuration: str, setting: str, groups: Sequence[RunGroup]) -> Curve:
    """The curve of a configuration in a setting. Only plain groups are on it (RunGroup.is_plain)."""
    on_layers = re.compile(rf"{re.escape(configuration)}_l\d+")
    members: dict[int, RunGroup] = {}
    for group in groups:
        is_part = group.label == configuration or (group.rank == 1 and on_layers.fullmatch(group.label))
        if group.setting == setting and is_part and group.is_plain:
            members.setdefault(group.params, group)
    return Curve(configuration, tuple(members[params] for params in sorted(members)))
