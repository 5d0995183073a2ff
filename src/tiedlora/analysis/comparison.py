"""How a comparison is made: a method against another arm or a point of a curve, by one measure, over seeds and rows.

1. `match` takes the runs of the seeds that all arms have. They must be trained and scored on the same rows.
2. `Matched.tables` are the scores of these runs for every row, and which rows belong together.
3. `compare` gives the arms their roles: `Comparison.difference` is the paired difference with its intervals, and
   `Comparison.sides` is what the rules of claims and the shares of a gain take, with the zero point.

Claims, the table of results, the figures of shares and the worth of an arm all start here. Where arms cannot be
compared, NotComparable says why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from tiedlora.analysis import intervals
from tiedlora.analysis.groups import Peer, RunGroup
from tiedlora.analysis.intervals import Array, Clusters
from tiedlora.analysis.rules import Plan, Sides
from tiedlora.analysis.runs import Measure, NotComparable, Run, Scorebook
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.scores import ScoreRecord
from tiedlora.text import counted

_PACKAGES = ("torch", "transformers")
OTHER_ENDS = "the answers of the two sides end at different tokens (docs/tasks.md)"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % intervals, each named by the variance that it covers. None: it cannot be computed."""

    value: float
    count: int
    """The number of seeds."""
    seeds: Interval | None = None
    """The t interval over seeds, on these examples."""
    examples: Interval | None = None
    """The interval over examples, with these seeds."""
    both: Interval | None = None
    """The interval over seeds and examples."""

    @classmethod
    def over_seeds(cls, values: Array) -> Estimate:
        """The mean of one number per seed, (seeds,), with its interval over seeds."""
        interval = intervals.seeds_interval(values) if len(values) > 1 else None
        return cls(float(values.mean()), len(values), interval)

    def over_rows(self, ours: Array, theirs: Array | None, clusters: Clusters | None) -> Estimate:
        """With the intervals over rows too, from (seeds, rows) tables of the scores, or of both sides of a difference
        (theirs)."""
        both = None
        if min(ours.shape) > 1:
            both = intervals.both_interval(ours if theirs is None else ours - theirs, clusters=clusters)
        examples = intervals.over_examples(ours, theirs, clusters) if ours.shape[1] > 1 else None
        return replace(self, examples=examples, both=both)

    @property
    def widest(self) -> Interval:
        """The value with the interval that covers most: both, otherwise examples, seeds, or no interval (NaN)."""
        interval = self.both or self.examples or self.seeds or Interval(self.value, math.nan, math.nan)
        return replace(interval, value=self.value)


@dataclass(frozen=True, eq=False)
class Matched:
    """Runs of some arms that can be compared: of the same seeds, trained and scored on the same rows."""

    measure: Measure
    runs: tuple[tuple[Run, ...], ...]
    """For each arm, a run of each seed, in the same order."""
    book: Scorebook = field(repr=False)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that all arms have."""
        return tuple(run.seed for run in self.runs[0])

    @cached_property
    def tables(self) -> tuple[list[Array], Clusters | None]:
        """(seeds, rows) for each arm: the scores of the same rows, as recorded; and the rows' clusters.

        Raises:
            NotComparable: rows are missing or damaged, or are others.
        """
        return self.book.tables(self.runs, self.measure)


def match(arms: Sequence[RunGroup], measure: Measure, book: Scorebook, among: Collection[int] | None = None) -> Matched:
    """The scored runs of the seeds that all arms have.

    Args:
        among: the seeds that may be taken; None allows all.

    Raises:
        NotComparable: an arm is not scored, there is no seed in common, or the runs saw different rows.
    """
    by_seed = [{run.seed: run for run in measure.scored(group.runs)} for group in arms]
    if unscored := [group.name for group, runs in zip(arms, by_seed, strict=True) if not runs]:
        raise NotComparable(f"no run of {' or '.join(unscored)} has {measure.metric} on {measure.split}")
    allowed = by_seed[0] if among is None else among
    seeds = [seed for seed in by_seed[0] if all(seed in runs for runs in by_seed) and seed in allowed]
    if not seeds:
        raise NotComparable("no seed in common" if among is None else "no planned seed in common")
    runs = tuple(tuple(own[seed] for seed in seeds) for own in by_seed)
    every = list(itertools.chain.from_iterable(runs))
    if len({run.scores.adapted[measure.split, measure.kind].digest for run in every}) > 1:
        raise NotComparable("other data")
    # Shuffled targets are the same rows in another order, and so have another digest.
    for is_shuffled in (False, True):
        alike = [run.record for run in every if run.record.identity.shuffles_targets == is_shuffled]
        if len({record.data["train"].digest for record in alike}) > 1:
            raise NotComparable("trained on other rows")
    return Matched(measure, runs, book)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A method and what it is compared with, by one measure, over the seeds that all sides have."""

    method: RunGroup
    comparator: Peer
    floor: RunGroup | None
    """The zero point of gains; None takes the base model, if it was scored."""
    matched: Matched
    """The runs of the method, of each part of the comparator, and of the floor."""

    @cached_property
    def sides(self) -> Sides:
        """What a rule compares. Losses are negated.

        Raises:
            NotComparable: as `Matched.tables`, or the scores of the base model, the zero point, cannot be read.
        """
        matched, measure = self.matched, self.matched.measure
        (method, *others), clusters = matched.tables
        zero = None
        if self.floor is not None:
            zero = measure.sign * others.pop()
        elif with_base := [run for runs in matched.runs for run in runs if measure.has_base(run)]:
            zero = measure.sign * matched.book.base_scores(with_base[0], measure)
        return Sides(measure.sign * method, measure.sign * self._blended(others), zero, clusters, matched.seeds)

    def difference(self) -> tuple[Estimate, list[str]]:
        """The paired difference of method and comparator, which keeps the sign of a loss; and notes for the reader.

        It has no intervals over rows where their scores cannot be read.
        """
        runs, measure, notes = self.matched.runs, self.matched.measure, []
        method, *others = map(measure.values, runs)
        estimate = Estimate.over_seeds(method - self._blended(others))
        try:
            (table, *tables), clusters = self.matched.tables
            estimate = estimate.over_rows(table, self._blended(tables), clusters)
        except NotComparable as why:
            notes.append(f"no interval over examples: {why}")
        notes += unlike(runs, measure)
        common = len(self.matched.seeds)
        if common < max(len(group.runs) for group in (self.method, *self.comparator.groups)):
            notes.append(f"{counted(common, 'seed')} in common")
        return estimate, notes

    def _blended(self, arrays: Iterable[Array]) -> Array:
        """The sum of arrays, one for each part of the comparator, by the parts' weights. A floor's is left out."""
        weighted = (weight * array for (weight, _), array in zip(self.comparator.parts, arrays, strict=False))
        total: Array = sum(weighted, np.zeros(()))
        return total


def compare(
    method: RunGroup,
    comparator: Peer,
    measure: Measure,
    book: Scorebook,
    *,
    floor: RunGroup | None = None,
    among: Collection[int] | None = None,
) -> Comparison:
    """The comparison over the seeds that all sides have, or those of them that are among some.

    Raises:
        NotComparable: as `match`.
    """
    arms = [method, *comparator.groups, *([floor] if floor is not None else [])]
    return Comparison(method, comparator, floor, match(arms, measure, book, among))


@dataclass(frozen=True, eq=False)
class PlannedSides:
    """What a claim's rule compares, and which seeds can be taken."""

    sides: Sides
    usable: frozenset[int] | None = None
    """Those among which `sides` has the seeds that all arms have; None allows all."""
    problem: str = ""
    """Why no other seed can be taken."""


def planned_sides(
    method: RunGroup, comparator: Peer, measure: Measure, book: Scorebook, *, floor: RunGroup | None, plan: Plan
) -> PlannedSides:
    """The sides of `compare`. Where a seed cannot be compared, those of the last look that can be are taken.

    So a verdict stands, whatever happens to a later seed.

    Raises:
        NotComparable: as `match`, of the first look's seeds.
    """

    def among(seeds: Collection[int] | None) -> Sides:
        # Read here, because one seed's damaged rows refuse all of them.
        return compare(method, comparator, measure, book, floor=floor, among=seeds).sides

    try:
        return PlannedSides(among(None))
    except NotComparable as why:
        problem = str(why)
    first, *later = (frozenset(plan.of_look(number)) for number in range(len(plan.looks)))
    for usable in reversed(later):
        with suppress(NotComparable):
            return PlannedSides(among(usable), usable, problem)
    return PlannedSides(among(first), first, problem)


def _scores(run: Run, measure: Measure) -> list[ScoreRecord]:
    return [scored for scored in run.scores.of(measure.split) if scored.kind == measure.kind]


def unlike(arms: Sequence[Sequence[Run]], measure: Measure) -> list[str]:
    """Notes on what differs between the runs of some arms beside what is compared."""
    made: dict[str, Callable[[Run], set[str]]] = {
        "made by another commit": lambda run: {code.commit or code.short for code in run.record.code_versions},
        "made with another torch or transformers": lambda run: {
            f"{package} {named.get(package)}" for named in run.record.all_versions for package in _PACKAGES
        },
        "made on another device": lambda run: {execution.device_and_threads for execution in run.record.executions},
        "scored by another commit": lambda run: {scored.code.short for scored in _scores(run, measure)},
        "scored with other settings of the metric": lambda run: {str(one.signatures) for one in _scores(run, measure)},
    }
    # A loss has no answers.
    if not is_loss(measure.metric):
        made[OTHER_ENDS] = lambda run: {str(run.record.more_ends)}
    found = {note: [set().union(*map(of_run, runs)) for runs in arms] for note, of_run in made.items()}
    return [note for note, of_arms in found.items() if any(own != of_arms[0] for own in of_arms)]
