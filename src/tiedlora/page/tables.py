"""The report's tables: typed cells, how they become text for people, Markdown, CSV and LaTeX, and the columns of each.

A column has a kind, which says how its cells are shown. Scores, differences and shares are fractions of 1 in cells, and
points of 100 or per cent in texts. Losses are in nats.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from tiedlora.analysis.answers import DECIDED, Answer, error_note
from tiedlora.analysis.comparison import Estimate
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.over_steps import LeadAtStep
from tiedlora.analysis.over_tasks import ClaimVerdict
from tiedlora.analysis.results import ResultRow
from tiedlora.analysis.runs import LeftOut
from tiedlora.analysis.shares import SharePanel, at_least, share_in_words
from tiedlora.records.interval import MISSING, Interval, Unit
from tiedlora.text import visible, without_folders

GIB, MIB = 2**30, 2**20


def minus(text: str) -> str:
    """The text with a minus sign (U+2212), which is as wide as the plus, for each hyphen."""
    return text.replace("-", "−")


@dataclass(frozen=True)
class Kind:
    """How the cells of a column become text. A cell of any kind may also be a word such as `failed`, or None."""

    text: Callable[[Any], str] = str
    """For people."""
    csv: Callable[[Any], Sequence[str]] | None = None
    """For programs: a text for each ending of `endings`. None is the text for people."""
    endings: tuple[str, ...] = ("",)
    """The endings of the names of its columns in CSV."""
    is_number: bool = True
    """Whether the page aligns it to the right."""


VALUE_LOW_HIGH: tuple[str, ...] = ("", " low", " high")


def numbers(unit: Unit, interval: Interval, sign: str = "") -> list[str]:
    """The value and the two ends."""
    return [unit.number(interval.value, sign), *(unit.end(number, sign) for number in (interval.low, interval.high))]


def amount(decimals: int) -> Kind:
    """A measured quantity whose unit is in the column's name."""
    return Kind(lambda cell: f"{cell:,.{decimals}f}", lambda cell: [f"{cell:.{decimals}f}"])


def _percents(cell: Interval) -> list[str]:
    return [MISSING if math.isnan(end) else f"{100 * end:.2f}" for end in (cell.value, cell.low, cell.high)]


TEXT = Kind(is_number=False)
WHOLE = Kind()
COUNT = Kind(lambda cell: f"{cell:,}", lambda cell: [str(cell)])
"""A whole number that may be large: parameters, rows."""
RATE = Kind(lambda cell: f"{cell[0]:g} of {cell[1]}" if cell[1] > 1 else f"{cell[0]:g}")
"""The chosen learning rate, and how many were tried."""
SHARE = Kind(lambda cell: f"{100 * cell:.2f} %")
PERCENT_INTERVAL = Kind(share_in_words, _percents, VALUE_LOW_HIGH)
"""A share as Interval; in per cent in CSV."""
NATS_INTERVAL = Kind(lambda cell: Unit.NATS.text(cell, "+"), lambda cell: numbers(Unit.NATS, cell, "+"), VALUE_LOW_HIGH)
"""A difference of losses as Interval."""
AT_LEAST = Kind(at_least, lambda cell: [f"{100 * cell:.2f}"])
WORTH = Kind(str, lambda cell: [f"{size:.0f}" for size in (cell.value, cell.low, cell.high)], VALUE_LOW_HIGH)
"""A worth.Worth. In CSV, 0 is below the curve's sizes, and inf above them."""
NAMED_ENDS = Kind(
    lambda cell: f"{cell[0].ends(cell[1], '+')} {cell[2]}".rstrip(),
    lambda cell: [cell[2], *numbers(cell[0], cell[1], "+")[1:]],
    VALUE_LOW_HIGH,
)
"""Unit, interval and name: the ends of a difference's interval, which may cover less than the column's name says."""


@dataclass(frozen=True)
class Column:
    """A column: its name, the kind of its cells, and what gives the cell of an item (see Table.of)."""

    name: str
    kind: Kind = TEXT
    cell: Callable[[Any], Any] = lambda item: item
    csv_name: str = ""
    """The name in CSV files, if another column of the table has the same name."""
    wraps: bool = False
    """Whether the column has long texts."""

    def text(self, cell: Any) -> str:
        """A cell for people. None means missing, and is never filled in."""
        return MISSING if cell is None else cell if isinstance(cell, str) else self.kind.text(cell)

    def csv(self, cell: Any) -> list[str]:
        """The cells of CSV for a value: one for each of the column's names there."""
        if cell is None or isinstance(cell, str):
            first = MISSING if cell is None else safe_text(cell)
            return [first, *[MISSING] * (len(self.kind.endings) - 1)]
        return [self.text(cell)] if self.kind.csv is None else list(self.kind.csv(cell))


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells, with a caption that says how to read them."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, name: str, caption: str, columns: Sequence[Column], items: Iterable[Any]) -> Table:
        """The table with a row for each item."""
        return cls(name, caption, columns, [[column.cell(item) for column in columns] for item in items])

    @property
    def head(self) -> list[str]:
        """The names of the columns."""
        return [column.name for column in self.columns]

    def texts(self) -> list[list[str]]:
        """The cells as texts, row by row."""
        return [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]

    def at(self, places: Sequence[int]) -> Table:
        """The table with only the columns at these places."""
        rows = [[row[place] for place in places] for row in self.rows]
        return Table(self.name, self.caption, [self.columns[place] for place in places], rows)


def estimate(
    name: str,
    of: Callable[[Any], Estimate | Interval | None],
    sign: str = "",
    *,
    shown: Callable[[Unit, Interval, str], str] = Unit.text,
    parts: slice = slice(3),
    csv_name: str = "",
) -> Column:
    """A column of numbers in the unit of the item's metric, of an estimate with the interval that covers most.

    Args:
        parts: which of the value and the two ends are in CSV.
    """

    def cell(item: Any) -> tuple[Unit, Interval] | None:
        number = of(item)
        if number is None or item.measure is None:
            return None
        return item.measure.unit, number.widest if isinstance(number, Estimate) else number

    kind = Kind(
        lambda cell: shown(cell[0], cell[1], sign),
        lambda cell: numbers(cell[0], cell[1], sign)[parts],
        VALUE_LOW_HIGH[parts],
    )
    return Column(name, kind, cell, csv_name)


VALUE: Any = {"shown": lambda unit, interval, sign: unit.number(interval.value, sign), "parts": slice(1)}
ENDS: Any = {"shown": Unit.ends, "parts": slice(1, 3)}
"""Columns that show only the value, or only the ends."""


def to_markdown(table: Table) -> str:
    """The caption, and below it a pipe table."""
    return f"{markdown(table.caption)}\n\n{pipe_table(table)}"


def pipe_table(table: Table) -> str:
    """The table in Markdown, without its caption."""
    lines = [f"| {' | '.join(map(markdown, table.head))} |", f"|{' --- |' * len(table.columns)}"]
    lines += [f"| {' | '.join(map(markdown, row))} |" for row in table.texts()]
    return "\n".join(lines) + "\n"


def markdown(text: str) -> str:
    """A text as Markdown shows it as it is, with its control characters made visible."""
    return re.sub(r"([\\`*_<>|\[\]&])", r"\\\1", visible(text)) or " "


def to_csv(table: Table) -> str:
    """CSV for programs and spreadsheets.

    The ends of an interval have their own columns, counts have no commas, and a text that a spreadsheet would run as a
    formula gets an apostrophe.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = table.columns
    names = [(column.csv_name or column.name, column.kind.endings) for column in columns]
    writer.writerow([safe_text(name + ending) for name, endings in names for ending in endings])
    for row in table.rows:
        writer.writerow([text for column, cell in zip(columns, row, strict=True) for text in column.csv(cell)])
    return file.getvalue()


def safe_text(cell: str) -> str:
    """A text that no spreadsheet runs: what starts like a formula gets an apostrophe."""
    cell = visible(cell)
    return cell if not cell.lstrip().startswith(("=", "+", "-", "@")) else f"'{cell}"


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{c: rf"\{c}" for c in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        MISSING: "--",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


def to_latex(table: Table) -> str:
    """The table for LaTeX, with the rules of booktabs."""
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        rf"\caption{{{_latex(table.caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}",
        r"\toprule",
        _latex_row(table.head),
        r"\midrule",
        *map(_latex_row, table.texts()),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    row = " & ".join(map(_latex, cells)) + r" \\"
    # After the \\ of the row before, LaTeX would read [ and * as its arguments.
    return f"{{}}{row}" if row.startswith(("[", "*")) else row


def _latex(cell: str) -> str:
    return visible(cell).translate(_LATEX)


# --- The tables.


def _group_columns(of: Callable[[Any], RunGroup]) -> list[Column]:
    """The columns that say which group an item is about."""
    return [
        Column("model", cell=lambda item: of(item).model),
        Column("task", cell=lambda item: of(item).task, wraps=True),
        Column("variant", cell=lambda item: of(item).variant or None, wraps=True),
        Column("configuration", cell=lambda item: of(item).configuration),
        Column("rank", WHOLE, lambda item: of(item).rank),
    ]


def results(rows: Iterable[ResultRow]) -> Table:
    """One row per group and metric, with all its numbers."""
    caption = (
        "Scores in points of 100, losses (lower is better) in nats, mean over seeds. '95 % seeds': t over seeds, these "
        "examples. '95 % examples': over which examples were drawn, these seeds (Wilson or Newcombe for one seed's "
        "proportion, jackknife for rows in clusters, bootstrap otherwise). 'seeds+examples': both. 'minus LoRA' and "
        "'minus base' are paired on the same examples and seeds. 'of n' after a learning rate: n rates were tried, and "
        "validation chose. 'lr regret at most': by how much the best of the rates that share two seeds or more may "
        "have a lower validation loss (95 %, over seeds and rows). 'worth': how many parameters of LoRA score the "
        "same; in brackets, the smallest and the largest of its sizes that cannot be told apart from the arm at level "
        "5 %. 'Retained gain' (95 %) and 'retains at least' (level 5 %) are over the base model; a claim's are over "
        "its own zero point."
    )
    columns = (
        *_group_columns(lambda row: row.group),
        Column("lr", RATE, lambda row: (row.group.lr, len(row.group.rates))),
        Column("lr regret at most", amount(3), lambda row: row.group.regret and row.group.regret.nats),
        Column("metric", cell=lambda row: row.measure.metric or None),
        Column("split", cell=lambda row: row.measure.split),
        Column("seeds", WHOLE, lambda row: len(row.seeds)),
        Column("rows", COUNT, lambda row: row.examples or None),
        Column("parameters", COUNT, lambda row: row.group.params),
        Column("share of LoRA", SHARE, lambda row: row.group.runs[0].record.share_of_lora),
        estimate("score", lambda row: row.score, **VALUE),
        estimate("95 % seeds", lambda row: row.score and row.score.seeds, **ENDS),
        estimate("95 % examples", lambda row: row.score and row.score.examples, **ENDS),
        estimate("minus LoRA", lambda row: row.against.difference, "+", **VALUE),
        estimate(
            "95 % seeds",
            lambda row: row.against.difference and row.against.difference.seeds,
            "+",
            csv_name="95 % seeds (difference)",
            **ENDS,
        ),
        Column("95 % seeds+examples", NAMED_ENDS, _both_or_examples),
        estimate("minus base", lambda row: row.gain, "+"),
        Column("retained gain", PERCENT_INTERVAL, lambda row: row.against.retained),
        Column("retains at least", AT_LEAST, lambda row: row.against.retains_at_least),
        Column("worth in LoRA", WORTH, lambda row: row.worth),
        Column("notes", cell=lambda row: without_folders("; ".join([*row.group.marks, *row.notes])), wraps=True),
    )
    return Table.of("results", caption, columns, rows)


def _both_or_examples(row: ResultRow) -> tuple[Unit, Interval, str] | None:
    difference = row.against.difference
    if difference is None or (interval := difference.both or difference.examples) is None:
        return None
    return row.measure.unit, interval, "" if difference.both else "examples"


def cost(groups: Iterable[RunGroup]) -> Table:
    """The costs of training and the size of the adapter, as means over the chosen runs."""
    columns = (
        *_group_columns(lambda group: group),
        Column("parameters", COUNT, lambda group: group.params),
        Column("tokens/s", amount(0), lambda group: mean(run.record.training.tokens_per_s for run in group.runs)),
        Column("training s", amount(0), lambda group: mean(run.record.training.seconds for run in group.runs)),
        Column(
            "peak memory GiB",
            amount(2),
            lambda group: max(run.record.training.peak_memory_bytes for run in group.runs) / GIB,
        ),
        Column("adapter MiB", amount(2), lambda group: mean(run.record.adapter_bytes for run in group.runs) / MIB),
        Column(
            "device",
            cell=lambda group: "; ".join(sorted({str(each) for run in group.runs for each in run.record.executions})),
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
        Column("tasks", WHOLE, lambda verdict: len(verdict.answers)),
        Column("because", cell=lambda verdict: without_folders(verdict.reason), wraps=True),
    )
    caption = (
        "Each claim over its tasks. Supported: all were run, and every informative one (at least one) supports it. "
        "Contradicted: on at least one, by Holm's procedure, which allows for the number of planned tasks."
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
        Column("sensitivity", cell=lambda answer: answer.findings.sensitivity or None),
        Column("zero", cell=lambda answer: answer.zero),
        Column("retained gain", PERCENT_INTERVAL, lambda answer: answer.findings.retained),
        Column("retains at least", AT_LEAST, lambda answer: answer.findings.retains_at_least),
        Column("share kept at the look's level", PERCENT_INTERVAL, lambda answer: answer.findings.kept),
        estimate("contrast at the look's level", lambda answer: answer.findings.contrast, "+"),
        Column("seeds", WHOLE, lambda answer: answer.findings.seeds),
        Column("rows", COUNT, lambda answer: answer.findings.rows or None),
        estimate("difference, 95 %", lambda answer: answer.findings.difference, "+"),
        Column("seeds of the difference", WHOLE, lambda answer: answer.findings.difference_seeds),
        Column("because", cell=lambda answer: without_folders(answer.reason), wraps=True),
        Column("what would decide it", cell=lambda answer: answer.decide or None, wraps=True),
    )
    caption = (
        "The rule compares the contrast with 0, at the level of the planned look: 'keeps 90 % of the gain' has the "
        "contrast method - 0.9 comparator - 0.1 zero, and more is better (losses are negated). Supported: the interval "
        "is above 0. Contradicted: it is below 0. For a share that is kept, and for 'level', the comparator must also "
        "gain over the zero point. 'Retained gain' has a 95 % interval over seeds and rows. Uninformative: at the "
        "last look, the comparator's own gain may be 0. Cannot fail here: the claim's weakest arm passes too; "
        "'sensitivity' is whether it was shown to fail. 'Retains at least' is the largest share for which 'keeps' "
        f"would be supported at this look. Difference: method minus comparator. {error_note(answers)}"
    )
    return Table.of("claims", caption, columns, answers)


def shares(panels: Iterable[SharePanel]) -> Table:
    """One row per arm and metric: what it keeps of the gain of the reference arm."""
    caption = (
        "The share of the reference's gain over the zero point that each arm keeps, on the seeds that both have. The "
        "95 % interval is over seeds and examples, and takes the gain's own uncertainty into account."
    )
    columns = (
        *_group_columns(lambda item: item[1].group),
        Column("metric", cell=lambda item: item[0].measure.metric),
        Column("split", cell=lambda item: item[0].measure.split),
        Column("reference", cell=lambda item: item[0].reference.name),
        Column("zero", cell=lambda item: item[0].zero),
        Column("seeds", WHOLE, lambda item: item[1].seeds),
        Column("parameters", COUNT, lambda item: item[1].group.params),
        Column("share of its gain", PERCENT_INTERVAL, lambda item: item[1].share),
    )
    return Table.of("shares", caption, columns, [(panel, arm) for panel in panels for arm in panel.arms])


def over_steps(leads: Iterable[Sequence[LeadAtStep]]) -> Table:
    """One row per arm and validation: its loss minus LoRA's."""
    caption = (
        "The validation loss of an adapter minus that of LoRA of its size (or the nearest one), in nats, on the same "
        "rows and scored seeds. Below 0 the adapter is better. 'Change to the last step': the last difference minus "
        "this one; a lead that shrinks has one above 0. The 95 % intervals are over seeds and validation rows (taken "
        "as independent), for each step alone; one seed has none. Validation rows also chose the rates."
    )
    columns = (
        *_group_columns(lambda lead: lead.group),
        Column("LoRA", cell=lambda lead: lead.lora.name, wraps=True),
        Column("seeds", WHOLE, lambda lead: lead.seeds),
        Column("step", WHOLE, lambda lead: lead.step),
        Column("minus LoRA", NATS_INTERVAL, lambda lead: lead.difference),
        Column("change to the last step", NATS_INTERVAL, lambda lead: lead.change),
    )
    return Table.of("over-steps", caption, columns, [lead for own in leads for lead in own])


def left_out(folders: Iterable[LeftOut]) -> Table:
    """Every folder that is not in the report."""
    columns = (
        Column("folder", cell=lambda folder: folder.path.name),
        Column("reason", cell=lambda folder: without_folders(folder.reason), wraps=True),
    )
    return Table.of("left-out", "Folders that are not in this report, and why.", columns, folders)


# --- The overview: configurations x tasks.


def overview(rows: Sequence[ResultRow], folders: Sequence[LeftOut]) -> list[Table]:
    """A table per base model: score and paired difference to LoRA for every configuration and task."""
    by_model: dict[str, list[ResultRow]] = defaultdict(list)
    for row in rows:
        if row.primary:
            by_model[row.group.model].append(row)
    return [_overview(model, by_model[model], folders) for model in sorted(by_model)]


def _overview(model: str, rows: Sequence[ResultRow], folders: Sequence[LeftOut]) -> Table:
    lines: dict[tuple[int, int, str, float], dict[tuple[str, str, str], ResultRow]] = defaultdict(dict)
    for row in rows:
        # The share is rounded as it is shown, because settings may differ in its last digits.
        group, share = row.group, round(row.group.runs[0].record.share_of_lora, 4)
        lines[group.rank, group.params, group.configuration, share][_place(row)] = row
    places = sorted({_place(row) for row in rows})
    settings = [(task, variant) for task, variant, _ in places]
    # The task's first metric needs no name, unless there is another one.
    named = {_place(row) for row in rows if not row.is_first or settings.count((row.group.task, row.group.variant)) > 1}
    names = []
    for task, variant, metric in places:
        name = f"{task} ({variant})" if variant else task
        names.append(f"{name}, {metric}" if (task, variant, metric) in named else name)

    columns = [
        Column("configuration"),
        Column("rank", WHOLE),
        Column("parameters", COUNT),
        Column("share of LoRA", SHARE),
        *(Column(name, TASK_SCORE) for name in names),
    ]
    caption = (
        f"{model}: score in points of 100, loss in nats (mean over seeds, n seeds) and, in brackets, the paired "
        "difference to LoRA at the same rank with its 95 % interval over seeds and examples (only over examples for "
        "one seed). * has notes in the table of results."
    )
    # Without a finished run, a cell is `failed` if a run of it failed.
    unfinished = [folder.run for folder in folders if folder.run is not None and folder.run.model in (model, "")]
    failed = {(run.configuration, run.rank, run.task) for run in unfinished if run.ending == "failed"}
    cells = []
    for rank, params, name, share in sorted(lines):
        own = lines[rank, params, name, share]
        scores = (own.get(place, "failed" if (name, rank, place[0]) in failed else None) for place in places)
        cells.append([name, rank, params, share, *scores])
    finished, tasks = {(row.group.label, row.group.rank) for row in rows}, [task for task, _, _ in places]
    for name, rank in sorted({(name, rank) for name, rank, task in failed if task in tasks} - finished):
        cells.append([name, rank, None, None, *("failed" if (name, rank, task) in failed else None for task in tasks)])
    # With case and marks, so that two models have two files (where the case of a file's name counts).
    return Table(f"overview-{re.sub(r'[^A-Za-z0-9._-]+', '-', model)}", caption, columns, cells)


def _place(row: ResultRow) -> tuple[str, str, str]:
    """The column of the overview."""
    return row.group.task, row.group.variant, row.measure.metric


def _task_score(row: ResultRow) -> str:
    """Such as `48.2 (n=5)* (-1.1 [-3.0, +0.8])`: score, seeds, a star for notes, difference to LoRA."""
    score, seeds, star, *_ = _task_cells(row)
    shown = f"{score}{star}" if row.score is None else f"{score} (n={seeds}){star}"
    difference = row.against.difference
    return shown if difference is None else f"{shown} ({row.measure.unit.text(difference.widest, '+')})"


def _task_cells(row: ResultRow) -> list[str]:
    unit, star = row.measure.unit, "*" if row.score is None or row.group.marks or row.notes else ""
    score = MISSING if row.score is None else unit.number(row.score.value)
    difference = row.against.difference
    ends = [MISSING] * 3 if difference is None else numbers(unit, difference.widest, "+")
    return [score, str(len(row.seeds)), star, *ends]


TASK_SCORE = Kind(
    _task_score,
    _task_cells,
    ("", " seeds", " notes", *(f" minus LoRA{ending}" for ending in VALUE_LOW_HIGH)),
    is_number=False,
)
"""A ResultRow: its group's score on one task, and the difference to LoRA."""
