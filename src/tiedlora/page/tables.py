"""The report's tables: for each, its columns with their cells."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

from tiedlora.analysis.answers import DECIDED, Answer, ClaimVerdict, error_note
from tiedlora.analysis.compare import Estimate, ResultRow
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.runs import LeftOut
from tiedlora.analysis.shares import SizePanel
from tiedlora.page import formats
from tiedlora.page.formats import Column, Kind, Scored, Table
from tiedlora.records.interval import MISSING, Interval
from tiedlora.records.run_record import RunRecord

GIB, MIB = 2**30, 2**20


def _group_columns(of: Callable[[Any], RunGroup]) -> list[Column]:
    """The columns that say which group an item is about."""
    return [
        Column("model", cell=lambda item: of(item).model),
        Column("task", cell=lambda item: of(item).task, wraps=True),
        Column("variant", cell=lambda item: of(item).variant, wraps=True),
        Column("configuration", cell=lambda item: of(item).configuration),
        Column("rank", formats.WHOLE, lambda item: of(item).rank),
    ]


def results(rows: Iterable[ResultRow]) -> Table:
    """One row per group and metric, with all its numbers."""
    caption = (
        "Scores in points of 100, losses (lower is better) in nats, mean over seeds. '95 % seeds': t over seeds, these "
        "examples. '95 % examples': over which examples were drawn, these seeds (Wilson or Newcombe for one seed's "
        "proportion, bootstrap otherwise). 'seeds+examples': both. 'minus LoRA' and 'minus base' are paired on the "
        "same examples and seeds. 'of n' after a learning rate: n rates were tried, and validation chose. "
        "'worth': how many parameters of LoRA score the same, with the sizes whose contrast includes 0."
    )
    columns = (
        *_group_columns(lambda row: row.group),
        Column("lr", formats.RATE, lambda row: (row.group.lr, len(row.group.rates))),
        Column("metric", cell=lambda row: row.measure.metric or None),
        Column("split", cell=lambda row: row.measure.split),
        Column("seeds", formats.WHOLE, lambda row: len(row.seeds)),
        Column("rows", formats.COUNT, lambda row: row.examples or None),
        Column("parameters", formats.COUNT, lambda row: row.group.params),
        Column("share of LoRA", formats.percent(2), lambda row: row.group.runs[0].record.share_of_lora),
        Column("score", formats.SCORE, lambda row: scored(row, row.score)),
        Column("95 % seeds", formats.SCORE_ENDS, lambda row: row.score and scored(row, row.score.seeds)),
        Column("95 % examples", formats.SCORE_ENDS, lambda row: row.score and scored(row, row.score.examples)),
        Column("minus LoRA", formats.DIFFERENCE, lambda row: scored(row, row.difference)),
        Column(
            "95 % seeds",
            formats.DIFFERENCE_ENDS,
            lambda row: row.difference and scored(row, row.difference.seeds),
            csv_name="95 % seeds (difference)",
        ),
        Column(
            "95 % seeds+examples",
            formats.NAMED_ENDS,
            lambda row: (
                row.difference
                and (scored(row, row.difference.both) or scored(row, row.difference.examples, "examples"))
            ),
        ),
        Column("minus base", formats.DIFFERENCE_INTERVAL, lambda row: scored(row, row.gain)),
        Column("retained gain", formats.PERCENT_INTERVAL, lambda row: row.retained),
        Column("retains at least", formats.percent(0), lambda row: row.retains_at_least),
        Column("worth in LoRA", formats.WORTH, lambda row: row.worth),
        Column("notes", cell=lambda row: "; ".join([*row.group.marks, *row.notes]), wraps=True),
    )
    return Table.of("results", caption, columns, rows)


def scored(item: ResultRow | Answer, number: Estimate | Interval | None, covers: str = "") -> Scored | None:
    """The cell of a number by the item's measure, of an estimate with the interval that covers most."""
    if number is None or item.measure is None:
        return None
    return Scored(number.widest if isinstance(number, Estimate) else number, item.measure.unit, covers)


def cost(groups: Iterable[RunGroup]) -> Table:
    """The costs of training and the size of the adapter, as means over the chosen runs."""

    def records(group: RunGroup) -> list[RunRecord]:
        return [run.record for run in group.runs]

    columns = (
        *_group_columns(lambda group: group),
        Column("parameters", formats.COUNT, lambda group: group.params),
        Column("tokens/s", formats.amount(0), lambda group: mean(r.training.tokens_per_s for r in records(group))),
        Column("training s", formats.amount(0), lambda group: mean(r.training.seconds for r in records(group))),
        Column(
            "peak memory GiB",
            formats.amount(2),
            lambda group: max(r.training.peak_memory_bytes for r in records(group)) / GIB,
        ),
        Column("adapter MiB", formats.amount(2), lambda group: mean(r.adapter_bytes for r in records(group)) / MIB),
        Column(
            "device",
            cell=lambda group: "; ".join(sorted({str(each) for r in records(group) for each in r.executions})),
        ),
    )
    caption = "Means over the chosen runs; memory is their maximum. Speeds compare on one device only."
    return Table.of("cost", caption, columns, groups)


def verdicts(over_tasks: Iterable[ClaimVerdict]) -> Table:
    """One row per claim and model, over all tasks of the claim."""
    columns = (
        Column("claim", cell=lambda verdict: verdict.claim.name, wraps=True),
        Column("model", cell=lambda verdict: verdict.model or None),
        Column("verdict", cell=lambda item: item.verdict.value),
        Column("tasks", formats.WHOLE, lambda verdict: len(verdict.answers)),
        Column("because", cell=lambda verdict: verdict.reason, wraps=True),
    )
    caption = (
        "Each claim over its tasks. Supported: by every informative task, and at least one. Contradicted: on at least "
        "one task, by Holm's procedure over all planned tasks, so that many tasks do not make a wrong verdict likelier."
    )
    return Table.of("verdicts", caption, columns, over_tasks)


def claims(answers: Sequence[Answer]) -> Table:
    """One row per answer."""
    columns = (
        Column("claim", cell=lambda answer: answer.claim.name, wraps=True),
        Column("model", cell=lambda answer: answer.model or None),
        Column("task", cell=lambda answer: answer.task, wraps=True),
        Column("verdict", cell=lambda item: item.verdict.value),
        Column("holds by Holm", cell=lambda a: ("yes" if a.survives_holm else "no") if a.verdict in DECIDED else None),
        Column("sensitivity", cell=lambda answer: answer.sensitivity or None),
        Column("zero", cell=lambda answer: answer.zero),
        Column("retained gain", formats.PERCENT_INTERVAL, lambda answer: answer.retained),
        Column("retains at least", formats.percent(0), lambda answer: answer.retains_at_least),
        Column(
            "contrast at the look's level", formats.DIFFERENCE_INTERVAL, lambda answer: scored(answer, answer.contrast)
        ),
        Column("difference, 95 %", formats.DIFFERENCE_INTERVAL, lambda answer: scored(answer, answer.difference)),
        Column("seeds", formats.WHOLE, lambda answer: answer.seeds),
        Column("because", cell=lambda answer: answer.reason, wraps=True),
        Column("what would decide it", cell=lambda answer: answer.decide or None, wraps=True),
    )
    caption = (
        "The rule compares the contrast with 0, at the level of the planned look: 'keeps 90 % of the gain' has the "
        "contrast method - 0.9 comparator - 0.1 zero, and more is better (losses are negated). Supported: the interval "
        "is above 0, and the comparator gains over the zero point. Contradicted: it is below 0. Uninformative: at the "
        "last look, the comparator's own gain may be 0. Cannot fail here: the claim's weakest arm passes too; "
        "'sensitivity' is whether it was shown to fail. 'Retains at least' is the largest share that the rule would "
        f"support. Difference: method minus comparator. {error_note(answers)}"
    )
    return Table.of("claims", caption, columns, answers)


def shares(panels: Iterable[SizePanel]) -> Table:
    """One row per arm and metric: what it keeps of the gain of the reference arm."""
    caption = (
        "The share of the reference's gain over the zero point that each arm keeps, on the seeds that both have. The "
        "95 % interval is over seeds and examples, and paired."
    )
    columns = (
        *_group_columns(lambda item: item[1].group),
        Column("metric", cell=lambda item: item[0].measure.metric),
        Column("split", cell=lambda item: item[0].measure.split),
        Column("reference", cell=lambda item: item[0].reference.name),
        Column("zero", cell=lambda item: item[0].zero),
        Column("seeds", formats.WHOLE, lambda item: item[1].seeds),
        Column("parameters", formats.COUNT, lambda item: item[1].group.params),
        Column("share of its gain", formats.PERCENT_INTERVAL, lambda item: item[1].share),
    )
    return Table.of("shares", caption, columns, [(panel, arm) for panel in panels for arm in panel.arms])


def left_out(folders: Iterable[LeftOut]) -> Table:
    """Every folder that is not in the report."""
    columns = (
        Column("folder", cell=lambda folder: folder.path.name),
        Column("reason", cell=lambda folder: folder.reason, wraps=True),
    )
    return Table.of("left-out", "Folders that are not in this report, and why.", columns, folders)


# --- The overview: configurations x tasks.


def overview(rows: Sequence[ResultRow], folders: Sequence[LeftOut]) -> list[Table]:
    """A table per base model: score and paired difference to LoRA for every configuration and task.

    Args:
        folders: those that are left out, among which are the runs that failed.
    """
    primary = [row for row in rows if row.primary]
    models = sorted({row.group.model for row in primary})
    return [_overview(model, [row for row in primary if row.group.model == model], folders) for model in models]


def _overview(model: str, rows: Sequence[ResultRow], folders: Sequence[LeftOut]) -> Table:
    places = sorted({_place(row) for row in rows})
    by_place = {(_line(row), _place(row)): row for row in rows}
    settings = [(task, variant) for task, variant, _ in places]
    # The task's first metric needs no name, unless there is another one.
    named = {_place(row) for row in rows if not row.is_first or settings.count((row.group.task, row.group.variant)) > 1}
    names = [
        (f"{task} ({variant})" if variant else task) + (f", {metric}" if (task, variant, metric) in named else "")
        for task, variant, metric in places
    ]

    columns = [
        *(Column("configuration"), Column("rank", formats.WHOLE), Column("parameters", formats.COUNT)),
        *(Column("share of LoRA", formats.percent(2)), *(Column(name, TASK_SCORE) for name in names)),
    ]
    caption = (
        f"{model}: score in points of 100, loss in nats (mean over seeds, n seeds) and, in brackets, the paired "
        "difference to LoRA at the same rank with its 95 % interval over seeds and examples (only over examples for "
        "one seed). * has notes in the table of results."
    )
    cells = []
    for line in sorted({_line(row) for row in rows}):
        rank, params, configuration, share = line
        scores = [by_place.get((line, place)) or _missing(configuration, rank, place[0], folders) for place in places]
        cells.append([configuration, rank, params, share, *scores])
    return Table(f"overview-{re.sub(r'[^A-Za-z0-9]+', '-', model).lower()}", caption, columns, cells)


def _place(row: ResultRow) -> tuple[str, str, str]:
    """The column of the overview."""
    return row.group.task, row.group.variant, row.measure.metric


def _line(row: ResultRow) -> tuple[int, int, str, float]:
    """The values that identify a line of the overview."""
    group = row.group
    # The share is rounded as it is shown, because settings may differ in its last digits.
    return group.rank, group.params, group.configuration, round(group.runs[0].record.share_of_lora, 4)


def _task_score(row: ResultRow) -> str:
    """Such as `48.2 (n=5)* (-1.1 [-3.0, +0.8])`: score, seeds, a star for notes, difference to LoRA."""
    unit, star = row.measure.unit, "*" if row.group.marks or row.notes else ""
    if row.score is None:
        return f"{MISSING}*"
    shown = f"{unit.number(row.score.value)} (n={len(row.seeds)}){star}"
    return shown if row.difference is None else f"{shown} ({unit.text(row.difference.widest, '+')})"


def _task_cells(row: ResultRow) -> list[str]:
    unit, star = row.measure.unit, "*" if row.score is None or row.group.marks or row.notes else ""
    score = MISSING if row.score is None else unit.number(row.score.value)
    difference = [MISSING] * 3 if row.difference is None else formats.numbers(row.difference.widest, unit, "+")
    return [score, str(len(row.seeds)), star, *difference]


TASK_SCORE = Kind(
    _task_score,
    _task_cells,
    ("", " seeds", " notes", *(f" minus LoRA{ending}" for ending in formats.VALUE_LOW_HIGH)),
    is_number=False,
)
"""A ResultRow: its group's score on one task, and the difference to LoRA."""


def _missing(configuration: str, rank: int, task: str, folders: Iterable[LeftOut]) -> str | None:
    """`failed` if a run of the configuration failed on the task and none is finished."""
    runs = [folder.run for folder in folders if folder.run is not None and folder.run.ending == "failed"]
    return "failed" if any((run.label, run.rank, run.task) == (configuration, rank, task) for run in runs) else None
