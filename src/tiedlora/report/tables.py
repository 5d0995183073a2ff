"""The report's tables, built from its numbers. The values stay typed; formats.py and page.py turn them into text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from tiedlora.report.answers import Answer
from tiedlora.report.compare import Estimate, ResultRow
from tiedlora.report.groups import RunGroup
from tiedlora.report.peft_results import Peer
from tiedlora.report.runs import LeftOut
from tiedlora.report.values import (
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
from tiedlora.statistics.interval import Interval

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
    claims: Table
    peers: Table
    left_out: Table

    def all(self) -> list[Table]:
        """Every table, each once."""
        return [*self.overview, self.results, self.cost, self.claims, self.peers, self.left_out]


def results(rows: Iterable[ResultRow]) -> Table:
    """One row per group and metric, with all its numbers."""
    caption = (
        "Scores in points of 100, mean over seeds. '95 % seeds': t over seeds, these examples. '95 % examples': over "
        "which examples were drawn, these seeds (Wilson or Newcombe for one seed's proportion, bootstrap otherwise). "
        "'seeds+examples': both. 'minus LoRA' and 'minus base' are paired on the same examples and seeds. The learning "
        "rate was chosen on validation. 'published': what others report, measured in another way (see the notes)."
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
        Column("published", ScoreValue),
        Column("notes", wraps=True),
    )
    return Table("results", caption, columns, [_result(row) for row in rows])


def _result(row: ResultRow) -> tuple[Value, ...]:
    group, score, difference = row.group, row.score, row.difference
    return (
        *_group_values(group),
        LearningRate(group.lr, len(group.rates)),
        row.measure.metric or None,
        row.measure.split,
        len(row.seeds),
        Count(row.examples) if row.examples else None,
        Count(group.params),
        Percent(group.share),
        ScoreValue(score.value) if score else None,
        _ends(score.seeds) if score else None,
        _ends(score.examples) if score else None,
        ScoreValue(difference.value, signed=True) if difference else None,
        _ends(difference.seeds, signed=True) if difference else None,
        _difference_ends(difference),
        ScoreInterval(row.gain.widest, signed=True) if row.gain else None,
        PercentInterval(row.retained) if row.retained else None,
        ScoreValue(row.published[0].value) if row.published else None,
        "; ".join([*group.marks, *row.notes, *(score.note() for score in row.published)]),
    )


def _group_values(group: RunGroup) -> tuple[Value, ...]:
    return group.model, group.task, group.variant, group.configuration, group.rank


def _ends(interval: Interval | None, signed: bool = False) -> Ends | None:
    return None if interval is None else Ends(interval, signed)


def _difference_ends(difference: Estimate | None) -> NamedEnds | None:
    if difference is None:
        return None
    if difference.both is not None:
        return NamedEnds(difference.both, signed=True)
    return NamedEnds(difference.examples, "examples", signed=True) if difference.examples is not None else None


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
                "; ".join(sorted({str(record.execution) for record in records})),
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


def claims(answers: Iterable[Answer]) -> Table:
    """One row per answer."""
    rows = [
        (
            answer.claim.name,
            answer.model or None,
            answer.task,
            answer.verdict.value,
            100 * answer.claim.margin,
            ScoreInterval(answer.difference.widest, signed=True) if answer.difference else None,
            PercentInterval(answer.retained) if answer.retained else None,
            answer.seeds,
            answer.reason,
            answer.decide or None,
        )
        for answer in answers
    ]
    columns = (
        Column("claim", wraps=True),
        Column("model"),
        Column("task", wraps=True),
        Column("verdict"),
        Column("margin", float),
        Column("difference, 95 %", ScoreInterval),
        Column("retained gain", PercentInterval),
        Column("seeds", int),
        Column("because", wraps=True),
        Column("what would decide it", wraps=True),
    )
    caption = (
        "supported: the interval of the paired difference is above minus the margin; contradicted: below it; "
        "undecided: neither, or fewer than the minimum of seeds; uninformative: the comparator itself does not beat "
        "the base model. Retained gain: (method - base) / (comparator - base), Fieller's interval over seeds."
    )
    return Table("claims", caption, columns, rows)


def peers(published: Sequence[Peer]) -> Table:
    """One row per run that PEFT has published."""
    rows = [
        (
            peer.experiment,
            peer.method,
            peer.model,
            Count(peer.params),
            ScoreValue(peer.accuracy),
            Ends(peer.interval()),
            Amount(peer.file_bytes / MIB),
            Amount(peer.memory_bytes / GIB),
        )
        for peer in published
    ]
    columns = (
        Column("experiment"),
        Column("method"),
        Column("model"),
        Column("parameters", Count),
        Column("score", ScoreValue),
        Column("95 % examples", Ends),
        Column("adapter MiB", Amount),
        Column("peak memory GiB", Amount),
    )
    caption = (
        "Results files of PEFT's method_comparison/MetaMathQA as published: GSM8K test accuracy after training on "
        "MetaMathQA, one seed each, so the intervals (Wilson, 1,319 rows) cover only which examples were drawn. "
        "Another base model, other data and another protocol than ours: compare shapes, not numbers."
    )
    return Table("peers", caption, columns, rows)


def left_out(folders: Iterable[LeftOut]) -> Table:
    """Every folder that is not in the report."""
    rows = [(folder.path.name, folder.reason) for folder in folders]
    columns = (Column("folder"), Column("reason", wraps=True))
    return Table("left-out", "Folders that are not in this report, and why.", columns, rows)
