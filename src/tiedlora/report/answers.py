"""The answer of the runs to each claim.

The possible verdicts, for every model and task that a claim is about:

- supported: the interval of the paired difference (over seeds and examples) is above -margin;
- contradicted: the interval is below -margin;
- undecided: the interval contains -margin, runs are missing, or there are fewer seeds than the minimum;
- uninformative: the comparator itself does not beat the base model, so any method would be as good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tiedlora.errors import UserError
from tiedlora.report import compare
from tiedlora.report.claims import ASSUMED, LEAST_SEEDS, Claim, needed_in_words
from tiedlora.report.compare import Estimate, Measure
from tiedlora.report.groups import RunGroup
from tiedlora.report.scorebook import Scorebook
from tiedlora.statistics import crossed
from tiedlora.statistics.crossed import Spread
from tiedlora.statistics.interval import Interval

TOLERANCE = 0.25
"""Numbers of parameters count as equal up to this share, because LoRA's rank allows only steps. (For SmolLM2-135M,
LoRA has 46,080 at r = 1, and TABuv has 41,328 at r = 8.)"""
ASSUMED_ROWS = 1000
"""The number of rows for a plan if nothing was scored yet."""


class Verdict(StrEnum):
    """The verdict on a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    UNINFORMATIVE = "uninformative"


@dataclass
class Answer:
    """The answer to a claim for one model and task."""

    claim: Claim
    model: str
    task: str
    verdict: Verdict
    reason: str
    difference: Estimate | None = None
    retained: Interval | None = None
    seeds: int = 0
    rows: int = 0
    decide: str = ""
    """The seeds and rows that would decide the claim."""


def answer_claims(
    claims: Iterable[Claim], groups: Sequence[RunGroup], book: Scorebook, split: str | None = None
) -> list[Answer]:
    """The answers to all claims, for every setting in which the method was run, and for tasks without such a run."""
    shown = compare.shown_splits(groups)
    answers = []
    for claim in claims:
        methods = [
            group
            for group in groups
            if (group.label, group.rank) == (claim.configuration, claim.rank)
            and (not claim.tasks or group.task in claim.tasks)
        ]
        answers += [_answer(claim, method, groups, split or shown[method.task], book) for method in methods]
        tasks = claim.tasks or tuple(sorted({group.task for group in groups}))
        for task in sorted(set(tasks) - {method.task for method in methods}):
            reason = f"{claim.configuration} r={claim.rank} was not run on it"
            decide = needed_in_words(claim, ASSUMED, ASSUMED_ROWS)
            answers.append(Answer(claim, "", task, Verdict.UNDECIDED, reason, decide=decide))
    return answers


def _answer(claim: Claim, method: RunGroup, groups: Sequence[RunGroup], split: str, book: Scorebook) -> Answer:
    task = f"{method.task} ({method.variant})" if method.variant else method.task
    answer = Answer(claim, method.model, task, Verdict.UNDECIDED, "")
    comparator, answer.reason = _comparator(claim, method, groups)
    scored = [run.splits[split] for run in method.runs if split in run.splits]
    answer.rows = scored[0].rows if scored else 0
    answer.decide = needed_in_words(claim, ASSUMED, answer.rows or ASSUMED_ROWS)
    if comparator is None or not scored:
        answer.reason = answer.reason or f"not scored on {split}"
        return answer
    measure = Measure(split, scored[0].first_metric)
    answer.difference, why = compare.difference(method, comparator, measure, book)
    if answer.difference is None:
        answer.reason = why
        return answer
    answer.retained = compare.retained(method, comparator, measure)
    _decide(answer, method, comparator, measure, book)
    return answer


def _decide(answer: Answer, method: RunGroup, comparator: RunGroup, measure: Measure, book: Scorebook) -> None:
    """Set the verdict, with its reason, if method and comparator were both scored."""
    claim, split = answer.claim, measure.split
    seeds = {run.seed for run in method.runs if split in run.splits}
    answer.seeds = len(seeds & {run.seed for run in comparator.runs if split in run.splits})
    spread = _spread(method, comparator, measure, book, answer.seeds)
    compared = f"{comparator.name}, {split}, {measure.metric}"
    if floor := _at_the_floor(comparator, measure, book):
        answer.verdict, answer.reason = Verdict.UNINFORMATIVE, f"at the floor: {floor} ({compared})"
        answer.decide = "a task, model or training on which the comparator beats the base"
        return
    if answer.seeds < claim.minimum_seeds:
        answer.reason = f"{answer.seeds} of at least {claim.minimum_seeds} seeds ({compared})"
        answer.decide = needed_in_words(claim, spread, answer.rows)
        return
    assert answer.difference is not None
    interval = answer.difference.both or answer.difference.seeds
    assert interval is not None
    covers = "seeds and examples" if answer.difference.both else "seeds only, on these examples"
    answer.verdict = verdict(interval, claim.margin)
    answer.reason = f"95 % over {covers} ({compared})"
    distance = abs(interval.value + claim.margin)
    undecided = answer.verdict == Verdict.UNDECIDED
    answer.decide = needed_in_words(claim, spread, answer.rows, distance) if undecided else ""


def verdict(interval: Interval, margin: float) -> Verdict:
    """supported, contradicted or undecided: the position of the difference's interval relative to -margin."""
    if interval.low > -margin:
        return Verdict.SUPPORTED
    return Verdict.CONTRADICTED if interval.high < -margin else Verdict.UNDECIDED


def _comparator(claim: Claim, method: RunGroup, groups: Sequence[RunGroup]) -> tuple[RunGroup | None, str]:
    """The group that the claim compares with, or None and the reason."""
    candidates = [group for group in groups if group.setting == method.setting and group.label == claim.comparator]
    if claim.at == "equal_rank":
        of_rank = [group for group in candidates if group.rank == method.rank]
        if not of_rank:
            return None, f"{claim.comparator} r={method.rank} was not run in the same setting"
        return of_rank[0], ""
    if not candidates:
        return None, f"{claim.comparator} was not run in the same setting"
    nearest = min(candidates, key=lambda group: abs(math.log(group.params / method.params)))
    if abs(nearest.params / method.params - 1) > TOLERANCE:
        rank = max(1, round(nearest.rank * method.params / nearest.params))
        return None, (
            f"no {claim.comparator} of about {method.params:,} parameters was run (nearest: r={nearest.rank} with "
            f"{nearest.params:,}); run rank.r={rank}"
        )
    return nearest, ""


def _at_the_floor(comparator: RunGroup, measure: Measure, book: Scorebook) -> str:
    """Why the comparator does not beat the base model; empty if it does."""
    gain = compare.gain(comparator, measure, book)
    if gain is None:
        return ""
    # With fewer than 5 seeds, an interval over seeds says little, so the one over examples is used.
    interval = (gain.both if len(comparator.runs) >= LEAST_SEEDS else gain.examples) or gain.widest
    if math.isnan(interval.low) or interval.low > 0:
        return ""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{comparator.name} gains {100 * interval.value:+.1f} [{low:+.1f}, {high:+.1f}] over the base"


def _spread(method: RunGroup, comparator: RunGroup, measure: Measure, book: Scorebook, seeds: int) -> Spread:
    """The spread, measured on the given runs if they have two seeds, otherwise assumed."""
    if seeds < 2:
        return ASSUMED
    try:
        return crossed.measured_spread(compare.paired_differences(method, comparator, measure, book))
    except UserError:
        return ASSUMED
