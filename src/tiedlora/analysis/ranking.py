"""All arms of a setting in the order of their scores, where no claim fits: against the best one and against LoRA.

The differences are those of comparison.py, with its intervals. A ranking gives no verdict.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tiedlora.analysis.answers import Answer, Verdict
from tiedlora.analysis.comparison import Estimate, compare
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.results import BASELINE, ResultRow
from tiedlora.analysis.runs import Measure, NotComparable, Scorebook


@dataclass(frozen=True)
class RankedArm:
    """One arm of a ranking."""

    row: ResultRow
    from_best: Estimate | None
    """The paired difference from the best arm; None for this one, and where they cannot be compared."""
    lora: RunGroup | None
    """The LoRA that is nearest in size; None for LoRA itself, and without any."""
    from_lora: Estimate | None
    """The paired difference from it."""

    @property
    def measure(self) -> Measure:
        """What the arms are ranked by."""
        return self.row.measure

    @property
    def group(self) -> RunGroup:
        """The arm's runs."""
        return self.row.group


def rankings(rows: Sequence[ResultRow], answers: Sequence[Answer], book: Scorebook) -> list[list[RankedArm]]:
    """The arms of each setting in which no claim finds its arms, the best first, by each metric that figures show.

    An arm without a score stands in none, and a single arm is no ranking.
    """
    asked = {(answer.model, answer.task) for answer in answers if answer.verdict != Verdict.NOT_RUN}
    together: dict[tuple[str, str], list[ResultRow]] = defaultdict(list)
    for row in rows:
        is_ranked = row.primary and row.score is not None
        if is_ranked and (row.group.model, row.group.task_in_words) not in asked:
            together[row.group.setting, row.measure.metric].append(row)
    return [_ranked(own, book) for own in together.values() if len(own) > 1]


def _ranked(rows: Sequence[ResultRow], book: Scorebook) -> list[RankedArm]:
    def goodness(row: ResultRow) -> float:
        return row.measure.sign * row.score.value if row.score is not None else -math.inf

    ordered = sorted(rows, key=goodness, reverse=True)
    loras = [row.group for row in rows if row.group.label == BASELINE]
    best, arms = ordered[0].group, []
    for row in ordered:
        group, lora = row.group, None
        if group not in loras and loras:
            lora = min(loras, key=lambda other: abs(math.log(other.params / group.params)))
        arms.append(RankedArm(row, _difference(row, best, book), lora, _difference(row, lora, book)))
    return arms


def _difference(row: ResultRow, other: RunGroup | None, book: Scorebook) -> Estimate | None:
    if other is None or other is row.group:
        return None
    try:
        return compare(row.group, other, row.measure, book).difference()[0]
    except NotComparable:
        return None
