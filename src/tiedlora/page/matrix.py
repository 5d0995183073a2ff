"""The page's first screen: for each model a matrix of claims x tasks, and the reasons behind its cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tiedlora.analysis import claims, shares
from tiedlora.analysis.answers import Answer, ClaimVerdict, Verdict
from tiedlora.page import formats
from tiedlora.page.formats import minus
from tiedlora.records.interval import Unit

ORDER = (Verdict.SUPPORTED, Verdict.CONTRADICTED, Verdict.UNDECIDED, Verdict.UNINFORMATIVE)


@dataclass(frozen=True)
class Cell:
    """The answer to one claim on one task."""

    task: str
    verdict: str
    """One of the words of Verdict, `not run`, or `not asked` if the claim is not about the task."""
    exploratory: bool
    effect: str
    """The difference of method and comparator, with its unit; empty if there is none."""
    interval: str
    """Its 95 % interval; empty if there is none."""
    reasons: str
    """The id of the group of reasons that holds this answer's."""


@dataclass(frozen=True)
class ReasonGroup:
    """Answers to one claim that have the same reason."""

    id: str
    tasks: list[str]
    answer: Answer
    """The first one."""
    numbers: list[tuple[str, str]]
    """Name and value of further numbers; only of a group with one task."""

    @property
    def verdict(self) -> str:
        """The verdict of all of them, or `not run`."""
        return self.answer.verdict.value if self.answer.pair is not None else "not run"


@dataclass(frozen=True)
class ClaimRow:
    """One claim for one model."""

    over_tasks: ClaimVerdict
    rule: str
    sides: str
    """The two sides that are compared, in words."""
    cells: list[Cell]
    reasons: list[ReasonGroup]


@dataclass(frozen=True)
class ModelVerdicts:
    """The matrix and the reasons of one model."""

    model: str
    tasks: list[str]
    rows: list[ClaimRow]
    headline: str


def by_model(verdicts: Sequence[ClaimVerdict], models: Sequence[str]) -> list[ModelVerdicts]:
    """A matrix for each model. A claim that no run of a model is about has cells that say so.

    Args:
        models: all models of the report, in order. Without any, claims of which nothing was run stand alone.
    """
    found = []
    for place, model in enumerate(models or [""]):
        # A claim of which no model has a run has one verdict without a model, and is not run on each of them.
        own = [verdict for verdict in verdicts if verdict.model in (model, "")]
        tasks = list(dict.fromkeys(answer.task for verdict in own for answer in verdict.answers))
        rows = [_row(verdict, tasks, f"reason-{place}-{number}") for number, verdict in enumerate(own)]
        found.append(ModelVerdicts(model, tasks, rows, _headline(own)))
    return found


def _headline(verdicts: Sequence[ClaimVerdict]) -> str:
    counts = [(sum(verdict.verdict == word for verdict in verdicts), word.value) for word in ORDER]
    found = [f"{count} {word}" for count, word in counts if count]
    plural = "s" if len(verdicts) != 1 else ""
    return f"{len(verdicts)} claim{plural}: {', '.join(found)}" if verdicts else ""


def _row(verdict: ClaimVerdict, tasks: Sequence[str], prefix: str) -> ClaimRow:
    claim = verdict.claim
    grouped: dict[tuple[str, ...], list[Answer]] = {}
    for answer in verdict.answers:
        # Answers with numbers of their own stay apart.
        own = answer.task if answer.measure is not None else ""
        grouped.setdefault((answer.verdict, answer.reason, answer.decide, own), []).append(answer)
    reasons = [
        ReasonGroup(f"{prefix}-{number}", [a.task for a in own], own[0], _numbers(own[0]) if len(own) == 1 else [])
        for number, own in enumerate(grouped.values())
    ]
    id_of = {task: reason.id for reason in reasons for task in reason.tasks}
    answer_of = {answer.task: answer for answer in verdict.answers}
    cells = [_cell(task, answer_of.get(task), id_of.get(task, "")) for task in tasks]
    sides = f"{_side(claim.method)} against {_side(claim.comparator)}"
    return ClaimRow(verdict, str(claim.rule), sides, cells, reasons)


def _side(side: claims.Side) -> str:
    rank = f"r={side.rank}" if side.rank is not None else f"at {str(side.at).replace('_', ' ')}"
    return f"{side.configuration} {rank}"


def _cell(task: str, answer: Answer | None, reasons: str) -> Cell:
    if answer is None:
        return Cell(task, "not asked", False, "", "", "")
    if answer.pair is None:
        return Cell(task, "not run", False, "", "", reasons)
    effect = interval = ""
    if answer.difference is not None and answer.measure is not None:
        unit, difference = answer.measure.unit, answer.difference.widest
        words = "points" if unit is Unit.POINTS else unit.words
        effect = minus(f"{formats.score(difference.value, signed=True, unit=unit)} {words}")
        if not math.isnan(difference.low):
            interval = minus(formats.ends(difference, signed=True, unit=unit))
    return Cell(task, answer.verdict.value, answer.exploratory, effect, interval, reasons)


def _numbers(answer: Answer) -> list[tuple[str, str]]:
    if answer.measure is None or answer.pair is None:
        return []
    unit, numbers = answer.measure.unit, []
    if answer.difference is not None:
        text = formats.score_interval(answer.difference.widest, signed=True, unit=unit)
        numbers.append(("method minus comparator, 95 %", f"{minus(text)} {unit.words}"))
    if answer.contrast is not None:
        text = formats.score_interval(answer.contrast, signed=True, unit=unit)
        numbers.append(("contrast at the look's level", f"{minus(text)} {unit.words}"))
    if (line := shares.forest_line(answer)).share is not None:
        numbers.append(("share of the comparator's gain", minus(line.in_words)))
    if answer.retains_at_least is not None:
        numbers.append(("keeps at least", f"{100 * answer.retains_at_least:.0f} %"))
    numbers.append(("seeds and rows", f"{answer.seeds} and {answer.rows:,}"))
    return numbers
