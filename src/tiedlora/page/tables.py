"""The report's tables, built from its numbers. The values stay typed; formats.py and page.py turn them into text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from tiedlora.analysis.answers import Answer, Verdict
from tiedlora.analysis.claim_verdicts import ClaimVerdict, error_note
from tiedlora.analysis.compare import ResultRow
from tiedlora.analysis.estimates import Estimate
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.runs import LeftOut
from tiedlora.analysis.shares_by_size import SizePanel
from tiedlora.page.values import (
    Amount,
    Column,
    Count,
    Ends,
    LearningRate,
    NamedEnds,
    Percent,
    PercentInterval,
    ScoreInterval,
    ScoreValue,
    Table,
    Value,
)
from tiedlora.records.interval import Interval, Unit

GIB, MIB = 2**30, 2**20
GROUP_COLUMNS = (
    Column("model"),
    Column("task", wraps=True),
    Column("variant", wraps=True),
    Column("configuration"),
    Column("rank", int),
)


@dataclass(frozen=True)
class ReportTables:
    """Every table of a report."""

    overview: Sequence[Table]
    """One per base model."""
    results: Table
    cost: Table
    verdicts: Table
    """Claims over all their tasks; without rows if every claim has one task."""
    claims: Table
    shares: Table
    left_out: Table

    def all(self) -> list[Table]:
        """Every table, each once."""
        return [
            *self.overview,
            self.results,
            self.cost,
            self.verdicts,
            self.claims,
            self.shares,
            self.left_out,
        ]


def results(rows: Iterable[ResultRow]) -> Table:
    """One row per group and metric, with all its numbers."""
    caption = (
        "Scores in points of 100, losses (lower is better) in nats, mean over seeds. '95 % seeds': t over seeds, these "
        "examples. '95 % examples': over which examples were drawn, these seeds (Wilson or Newcombe for one seed's "
        "proportion, bootstrap otherwise). 'seeds+examples': both. 'minus LoRA' and 'minus base' are paired on the "
        "same examples and seeds. 'of n' after a learning rate: n rates were tried, and validation chose. "
        "'published': what others report, measured in another way (see the notes)."
    )
    columns = (
        *GROUP_COLUMNS,
        Column("lr", LearningRate),
        Column("metric"),
        Column("split"),
        Column("seeds", int),
        Column("rows", Count),
        Column("parameters", Count),
        Column("share of LoRA", Percent),
        Column("score", ScoreValue),
        Column("95 % seeds", Ends),
        Column("95 % examples", Ends),
        Column("minus LoRA", ScoreValue),
        Column("95 % seeds", Ends, csv_name="95 % seeds (difference)"),
        Column("95 % seeds+examples", NamedEnds),
        Column("minus base", ScoreInterval),
        Column("retained gain", PercentInterval),
        Column("retains at least", Percent),
        Column("published", ScoreValue),
        Column("notes", wraps=True),
    )
    return Table("results", caption, columns, [_result(row) for row in rows])


def _result(row: ResultRow) -> tuple[Value, ...]:
    group, score, difference, unit = row.group, row.score, row.difference, row.measure.unit
    return (
        *_group_values(group),
        LearningRate(group.lr, len(group.rates)),
        row.measure.metric or None,
        row.measure.split,
        len(row.seeds),
        Count(row.examples) if row.examples else None,
        Count(group.params),
        Percent(group.share),
        ScoreValue(score.value, unit=unit) if score else None,
        _ends(score.seeds, unit) if score else None,
        _ends(score.examples, unit) if score else None,
        ScoreValue(difference.value, signed=True, unit=unit) if difference else None,
        _ends(difference.seeds, unit, signed=True) if difference else None,
        _difference_ends(difference, unit),
        ScoreInterval(row.gain.widest, signed=True, unit=unit) if row.gain else None,
        PercentInterval(row.retained) if row.retained else None,
        Percent(row.retains_at_least, 0) if row.retains_at_least is not None else None,
        ScoreValue(row.published[0].value, unit=unit) if row.published else None,
        "; ".join([*group.marks, *row.notes, *(score.note() for score in row.published)]),
    )


def _group_values(group: RunGroup) -> tuple[Value, ...]:
    return group.model, group.task, group.variant, group.configuration, group.rank


def _ends(interval: Interval | None, unit: Unit, signed: bool = False) -> Ends | None:
    return None if interval is None else Ends(interval, signed, unit)


def _difference_ends(difference: Estimate | None, unit: Unit) -> NamedEnds | None:
    if difference is None:
        return None
    if difference.both is not None:
        return NamedEnds(difference.both, signed=True, unit=unit)
    if difference.examples is None:
        return None
    return NamedEnds(difference.examples, "examples", signed=True, unit=unit)


def cost(groups: Iterable[RunGroup]) -> Table:
    """The costs of training and the size of the adapter, as means over the chosen runs."""
    rows = []
    for group in groups:
        records = [run.record for run in group.runs]
        rows.append(
            (
                *_group_values(group),
                Count(group.params),
                Amount(mean(record.training.tokens_per_s for record in records), 0),
                Amount(mean(record.training.seconds for record in records), 0),
                Amount(max(record.training.peak_memory_bytes for record in records) / GIB),
                Amount(mean(record.adapter_bytes for record in records) / MIB),
                "; ".join(sorted({str(execution) for record in records for execution in record.executions})),
            )
        )
    columns = (
        *GROUP_COLUMNS,
        Column("parameters", Count),
        Column("tokens/s", Amount),
        Column("training s", Amount),
        Column("peak memory GiB", Amount),
        Column("adapter MiB", Amount),
        Column("device"),
    )
    caption = "Means over the chosen runs; memory is their maximum. Speeds compare on one device only."
    return Table("cost", caption, columns, rows)


def verdicts(over_tasks: Iterable[ClaimVerdict]) -> Table:
    """One row per claim and model, over all tasks of the claim."""
    rows = [
        (
            verdict.claim.name,
            verdict.model or None,
            _verdict(verdict.verdict, verdict.exploratory),
            len(verdict.answers),
            verdict.reason,
        )
        for verdict in over_tasks
    ]
    columns = (
        Column("claim", wraps=True),
        Column("model"),
        Column("verdict"),
        Column("tasks", int),
        Column("because", wraps=True),
    )
    caption = (
        "Each claim over its tasks. Supported: by every informative task, and at least one. Contradicted: on at least "
        "one task, by Holm's procedure over all planned tasks, so that many tasks do not make a wrong verdict likelier."
    )
    return Table("verdicts", caption, columns, rows)


def claims(answers: Sequence[Answer]) -> Table:
    """One row per answer."""
    columns = (
        Column("claim", wraps=True),
        Column("model"),
        Column("task", wraps=True),
        Column("verdict"),
        Column("retained gain", PercentInterval),
        Column("retains at least", Percent),
        Column("contrast at the look's level", ScoreInterval),
        Column("difference, 95 %", ScoreInterval),
        Column("seeds", int),
        Column("because", wraps=True),
        Column("what would decide it", wraps=True),
    )
    caption = (
        "The rule compares the contrast with 0, at the level of the planned look: 'keeps 90 % of the gain' has the "
        "contrast method - 0.9 comparator - 0.1 base, and more is better (losses are negated). Supported: the interval "
        "is above 0, and the comparator gains over the base. Contradicted: it is below 0. Uninformative: at the last "
        "look, the comparator's own gain may be 0. 'Retains at least' is the largest share that the same rule would "
        f"support. Difference: method minus comparator. {error_note(answers)}"
    )
    return Table("claims", caption, columns, [_answer(answer) for answer in answers])


def _answer(answer: Answer) -> tuple[Value, ...]:
    unit = answer.measure.unit if answer.measure else Unit.POINTS
    return (
        answer.claim.name,
        answer.model or None,
        answer.task,
        _verdict(answer.verdict, answer.exploratory),
        PercentInterval(answer.retained) if answer.retained else None,
        Percent(answer.retains_at_least, 0) if answer.retains_at_least is not None else None,
        ScoreInterval(answer.contrast, signed=True, unit=unit) if answer.contrast else None,
        ScoreInterval(answer.difference.widest, signed=True, unit=unit) if answer.difference else None,
        answer.seeds,
        answer.reason,
        answer.decide or None,
    )


def _verdict(verdict: Verdict, exploratory: bool) -> str:
    return f"{verdict.value} (exploratory)" if exploratory else verdict.value


def shares(panels: Iterable[SizePanel]) -> Table:
    """One row per arm and metric: what it keeps of the gain of the reference arm."""
    caption = (
        "The share of the reference's gain over the base that each arm keeps, on the seeds that both have. The 95 % "
        "interval is over seeds and examples, and paired."
    )
    columns = (
        *GROUP_COLUMNS,
        Column("metric"),
        Column("split"),
        Column("reference"),
        Column("seeds", int),
        Column("parameters", Count),
        Column("share of its gain", PercentInterval),
    )
    rows: list[tuple[Value, ...]] = [
        (
            *_group_values(arm.group),
            panel.measure.metric,
            panel.measure.split,
            panel.reference.name,
            arm.seeds,
            Count(arm.group.params),
            PercentInterval(arm.share),
        )
        for panel in panels
        for arm in panel.arms
    ]
    return Table("shares", caption, columns, rows)


def left_out(folders: Iterable[LeftOut]) -> Table:
    """Every folder that is not in the report."""
    rows = [(folder.path.name, folder.reason) for folder in folders]
    columns = (Column("folder"), Column("reason", wraps=True))
    return Table("left-out", "Folders that are not in this report, and why.", columns, rows)
