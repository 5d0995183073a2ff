"""What every arm keeps of the gain of one reference arm, beside how many parameters it trains.

The claims compare two arms each. Here all arms of a setting stand on one scale: 0 is the base model, and 1 is the
reference, the comparator of the first claim that uses this metric. The share is of the seeds that an arm has in common
with the reference, and its interval is that of the paired difference. (Much of the interval of a score is the choice of
rows, which all arms share.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiedlora.analysis import estimates, forest, shares
from tiedlora.analysis.answers import Answer
from tiedlora.analysis.compare import ResultRow
from tiedlora.analysis.estimates import Measure, PairedScores
from tiedlora.analysis.forest import ShareAxis
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.rules import Better
from tiedlora.analysis.scorebook import Scorebook
from tiedlora.errors import UserError
from tiedlora.records.interval import LEVEL, Interval

USUAL = (0.89, 1.03)
"""The narrowest axis. On a narrower one, arms that are level would look far apart."""


@dataclass(frozen=True)
class SizedShare:
    """One arm: its share of the reference's gain, with a 95 % interval. The ends are NaN if it has none."""

    group: RunGroup
    share: Interval
    seeds: int
    """How many seeds it has in common with the reference."""


@dataclass(frozen=True)
class SizePanel:
    """The arms of one setting by one metric."""

    measure: Measure
    reference: RunGroup
    arms: list[SizedShare]

    def lines(self) -> list[list[SizedShare]]:
        """The arms of each configuration, sorted by their parameters."""
        by_name: dict[str, list[SizedShare]] = defaultdict(list)
        for arm in sorted(self.arms, key=lambda arm: arm.group.params):
            by_name[arm.group.configuration].append(arm)
        return list(by_name.values())


def size_panels(rows: Sequence[ResultRow], answers: Sequence[Answer], book: Scorebook) -> list[SizePanel]:
    """A panel for every setting and metric of the figures in which a claim names a comparator that gains something."""
    by_panel: dict[tuple[str, Measure], list[RunGroup]] = defaultdict(list)
    for row in rows:
        if row.primary and row.score is not None:
            by_panel[row.group.setting, row.measure].append(row.group)
    panels = []
    for (setting, measure), groups in by_panel.items():
        reference = _reference(answers, setting, measure)
        if reference is None or len(groups) < 2:
            continue
        arms = [arm for group in groups if (arm := _arm(group, reference, measure, book)) is not None]
        if arms:
            panels.append(SizePanel(measure, reference, arms))
    return panels


def share_axis(panels: Iterable[SizePanel]) -> ShareAxis:
    """One axis for all panels, so that tasks on which the arms hardly differ look like it."""
    return forest.axis_of((arm.share for panel in panels for arm in panel.arms), USUAL)


def _reference(answers: Sequence[Answer], setting: str, measure: Measure) -> RunGroup | None:
    """The comparator of the first answer in the setting by this metric that gains something over the base."""
    for answer in answers:
        # With the runs of all seeds, whatever seeds the claim takes.
        comparator = answer.pair.searched[1] if answer.pair else None
        if comparator is None or comparator.setting != setting or answer.measure != measure:
            continue
        if answer.comparator_gain is not None and answer.comparator_gain > 0:
            return comparator
    return None


def _arm(group: RunGroup, reference: RunGroup, measure: Measure, book: Scorebook) -> SizedShare | None:
    """The arm with its share; None if its scores cannot be compared, as a note of the results says."""
    try:
        scores = estimates.paired_scores(group, reference, measure, book)
    except UserError:
        return None
    share = _share(scores)
    return None if share is None else SizedShare(group, share, len(scores.seeds))


def _share(scores: PairedScores) -> Interval | None:
    if scores.base is None:
        return None
    if len(scores.seeds) > 1 and len(scores.base) > 1:
        return shares.kept(Better(), (scores.method, scores.comparator, scores.base), 1 - LEVEL)
    gain = float((scores.comparator - scores.base).mean())
    return Interval(float((scores.method - scores.base).mean()) / gain, math.nan, math.nan) if gain > 0 else None
