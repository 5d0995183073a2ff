"""Rows of numbers as Markdown, CSV and LaTeX. Scores are in points of 100; a missing number is never filled in."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tiedlora.report.cells import Cell
from tiedlora.report.claims import Answer
from tiedlora.report.compare import Estimate, Row
from tiedlora.report.runs import LeftOut
from tiedlora.statistics import crossed
from tiedlora.statistics.intervals import Interval
from tiedlora.text import visible

MISSING = "–"
HEAD = (
    "model",
    "task",
    "variant",
    "configuration",
    "rank",
    "lr",
    "metric",
    "split",
    "seeds",
    "rows",
    "parameters",
    "share of LoRA",
    "score",
    "95 % seeds",
    "95 % examples",
    "minus LoRA",
    "95 % seeds",
    "95 % seeds+examples",
    "minus base",
    "retained gain",
    "notes",
)


@dataclass(frozen=True)
class Table:
    """A head and rows of text, with a caption that says how to read it."""

    name: str
    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def points(value: float | None, sign: str = "") -> str:
    """0.4213 -> 42.1."""
    return MISSING if value is None or math.isnan(value) else f"{100 * value:{sign}.1f}"


def bounds(interval: Interval | None, sign: str = "") -> str:
    """[40.1, 44.2]."""
    if interval is None or math.isnan(interval.low):
        return MISSING
    return f"[{points(interval.low, sign)}, {points(interval.high, sign)}]"


def results(rows: Iterable[Row]) -> Table:
    """A row a cell and metric, with everything the report knows of it."""
    caption = (
        "Scores in points of 100, mean over seeds. '95 % seeds': t over seeds, these examples. '95 % examples': over "
        "which examples were drawn, these seeds (Wilson or Newcombe for one seed's proportion, bootstrap otherwise). "
        "'seeds+examples': both. 'minus LoRA' and 'minus base' are paired on the same examples and seeds. The learning "
        "rate was chosen on validation."
    )
    return Table("results", caption, HEAD, [_result(row) for row in rows])


def _result(row: Row) -> tuple[str, ...]:
    cell, score, gap = row.cell, row.score, row.difference
    rates = f" of {len(cell.rates)}" if len(cell.rates) > 1 else ""
    percent = "" if row.retained is None else f"{100 * row.retained.value:.0f} %"
    if row.retained is not None and not math.isnan(row.retained.low):
        percent += f" [{100 * row.retained.low:.0f}, {100 * row.retained.high:.0f}]"
    return (
        cell.model,
        cell.task,
        cell.variant,
        cell.configuration,
        str(cell.rank),
        f"{cell.lr:g}{rates}",
        row.metric or MISSING,
        row.split,
        str(len(row.seeds)),
        f"{row.examples:,}" if row.examples else MISSING,
        f"{cell.params:,}",
        f"{100 * cell.share:.2f} %",
        points(score.value) if score else MISSING,
        bounds(score.seeds) if score else MISSING,
        bounds(score.examples) if score else MISSING,
        points(gap.value, "+") if gap else MISSING,
        bounds(gap.seeds, "+") if gap else MISSING,
        bounds(gap.both or gap.examples, "+") + ("" if gap.both else " examples") if gap else MISSING,
        _with_bounds(row.gain),
        percent or MISSING,
        "; ".join([*cell.marks, *row.notes]),
    )


def _with_bounds(found: Estimate | None) -> str:
    if found is None:
        return MISSING
    interval = found.widest()
    return points(found.value, "+") + (f" {bounds(interval, '+')}" if interval else "")


def overview(rows: Sequence[Row], left_out: Sequence[LeftOut]) -> list[Table]:
    """Configurations x tasks, a table a base model: score, and paired difference to LoRA; with an average."""
    primary = [row for row in rows if row.primary]
    tables = []
    for model in sorted({row.cell.model for row in primary}):
        own = [row for row in primary if row.cell.model == model]
        columns = sorted({(row.cell.task, row.cell.variant) for row in own})
        lines = sorted({(r.cell.rank, r.cell.params, r.cell.configuration, f"{100 * r.cell.share:.2f} %") for r in own})
        # An average is over tasks: of a task in two settings neither may count twice or be dropped silently.
        averaged = len(columns) > 1 and len({task for task, _ in columns}) == len(columns)
        body = []
        for rank, params, configuration, share in lines:
            found = {
                (row.cell.task, row.cell.variant): row
                for row in own
                if (row.cell.rank, row.cell.params, row.cell.configuration) == (rank, params, configuration)
            }
            cells = [_overview_cell(found.get(column), configuration, rank, column[0], left_out) for column in columns]
            average = [_average([found.get(column) for column in columns])] if averaged else []
            body.append((configuration, str(rank), f"{params:,}", share, *cells, *average))
        names = [f"{task} ({variant})" if variant else task for task, variant in columns]
        head = ("configuration", "rank", "parameters", "share of LoRA", *names)
        caption = (
            f"{model}: score in points of 100 (mean over seeds, n seeds) and, in brackets, the paired difference to "
            "LoRA at the same rank with its 95 % interval over seeds and examples (over examples alone for one seed). "
            "* has notes in the table of results."
        )
        if averaged:
            head += ("average",)
            caption += (
                f" The average is the plain mean of each task's first metric over the {len(columns)} columns "
                f"{', '.join(names)}; its interval is a t interval over seeds that all of them share, and it is left "
                "out where a column is missing."
            )
        tables.append(Table(f"overview-{re.sub(r'[^A-Za-z0-9]+', '-', model).lower()}", caption, head, body))
    return tables


def _overview_cell(row: Row | None, configuration: str, rank: int, task: str, left_out: Sequence[LeftOut]) -> str:
    if row is None:
        about = [f.about for f in left_out if f.about.get("label") == configuration and f.about.get("rank") == rank]
        return "failed" if any(one.get("failed") and one.get("task") == task for one in about) else MISSING
    if row.score is None:
        return f"{MISSING}*"
    star = "*" if row.cell.marks or row.notes else ""
    text = f"{points(row.score.value)} (n={len(row.seeds)}){star}"
    if row.difference is not None:
        text += f" ({points(row.difference.value, '+')} {bounds(row.difference.widest(), '+')})"
    return text


def _average(found: Sequence[Row | None]) -> str:
    if any(row is None or row.score is None for row in found):
        return MISSING
    present = [row for row in found if row is not None]
    shared = set.intersection(*(set(row.seeds) for row in present))
    if not shared:
        return MISSING
    values = np.array([[_seed_value(row, seed) for seed in sorted(shared)] for row in present]).mean(0)
    if len(shared) == 1:
        return f"{points(float(values[0]))} (n=1)"
    interval = crossed.interval(crossed.over_seeds(values))
    return f"{points(interval.value)} {bounds(interval)} (n={len(shared)})"


def _seed_value(row: Row, seed: int) -> float:
    (run,) = [run for run in row.cell.runs if run.seed == seed]
    return float(run.splits[row.split]["metrics"][row.metric]["value"])


def cost(cells: Iterable[Cell]) -> Table:
    """What training and the adapter cost, means over the chosen runs."""
    body = []
    for cell in cells:
        training = [run.record["training"] for run in cell.runs]
        speed = float(np.mean([one["tokens_per_s"] for one in training]))
        seconds = float(np.mean([one["seconds"] for one in training]))
        memory = max(one["peak_memory_bytes"] for one in training)
        size = float(np.mean([run.record["adapter_bytes"] for run in cell.runs]))
        devices = sorted({str(run.record.get("device", "")) for run in cell.runs})
        body.append(
            (
                *(cell.model, cell.task, cell.variant, cell.configuration, str(cell.rank), f"{cell.params:,}"),
                *(
                    f"{speed:,.0f}",
                    f"{seconds:,.0f}",
                    f"{memory / 2**30:.2f}",
                    f"{size / 2**20:.2f}",
                    "; ".join(devices),
                ),
            )
        )
    head = (
        *("model", "task", "variant", "configuration", "rank", "parameters"),
        *("tokens/s", "training s", "peak memory GiB", "adapter MiB", "device"),
    )
    caption = "Means over the chosen runs; memory is their maximum. Speeds compare on one device only."
    return Table("cost", caption, head, body)


def claims(answers: Iterable[Answer]) -> Table:
    """A row an answer."""
    body = []
    for answer in answers:
        gap, interval = answer.difference, answer.difference.widest() if answer.difference else None
        kept = answer.retained
        percent = MISSING if kept is None else f"{100 * kept.value:.0f} %"
        if kept is not None and not math.isnan(kept.low):
            percent += f" [{100 * kept.low:.0f}, {100 * kept.high:.0f}]"
        body.append(
            (
                *(
                    answer.claim.name,
                    answer.model or MISSING,
                    answer.task,
                    answer.verdict,
                    f"{100 * answer.claim.margin:g}",
                ),
                f"{points(gap.value, '+')} {bounds(interval, '+')}" if gap else MISSING,
                percent,
                *(str(answer.seeds), answer.reason, answer.decide or MISSING),
            )
        )
    head = (
        *("claim", "model", "task", "verdict", "margin", "difference, 95 %", "retained gain", "seeds"),
        *("because", "what would decide it"),
    )
    caption = (
        "supported: the interval of the paired difference lies above minus the margin; contradicted: below it; "
        "undecided: neither, or fewer than the minimum of seeds; uninformative: the comparator itself does not beat "
        "the base model. Retained gain: (method - base) / (comparator - base), Fieller's interval over seeds."
    )
    return Table("claims", caption, head, body)


def left_out(found: Iterable[LeftOut]) -> Table:
    """Every folder that is not in the report."""
    body = [(folder.path.name, folder.reason) for folder in found]
    return Table("left-out", "Folders that are not in this report, and why.", ("folder", "reason"), body)


def to_markdown(table: Table) -> str:
    """A pipe table under its caption."""

    def text(cell: str) -> str:
        return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", visible(cell)) or " "

    lines = [text(table.caption), "", f"| {' | '.join(map(text, table.head))} |", f"|{' --- |' * len(table.head)}"]
    lines += [f"| {' | '.join(map(text, row))} |" for row in table.rows]
    return "\n".join(lines) + "\n"


_INTERVAL = re.compile(r"(?P<value>[^\[]*?) ?\[(?P<low>[^,\]]+), (?P<high>[^\]]+)\](?P<rest>.*)")


def to_csv(table: Table) -> str:
    """CSV for programs and spreadsheets: an interval's ends have columns of their own, counts have no commas, and a
    cell that a spreadsheet would run as a formula gets an apostrophe."""
    columns = []
    for place, name in enumerate(table.head):
        cells = [visible(row[place]) for row in table.rows]
        name = name if name not in table.head[:place] else f"{name} (difference)"
        found = [_INTERVAL.fullmatch(cell) for cell in cells]
        if name in TEXT or not any(found):
            columns.append([name, *cells])
            continue
        values = [f"{m['value']}{m['rest']}" if m else cell for m, cell in zip(found, cells, strict=True)]
        if any(values):
            columns.append([name, *values])
        for end in ("low", "high"):
            columns.append([f"{name} {end}", *(m[end] if m else MISSING for m in found)])
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([safe_cell(cell) for cell in row] for row in zip(*columns, strict=True))
    return file.getvalue()


TEXT = ("notes", "because", "reason", "what would decide it", "claim")
"""Columns that hold sentences."""


def safe_cell(cell: str) -> str:
    """Neutralise what spreadsheets take for a formula."""
    cell = visible(cell)
    if re.fullmatch(r"[+-]?[\d,]*\.?\d+(e[+-]?\d+)?", cell):
        return cell.replace(",", "")
    return cell if not cell.lstrip().startswith(("=", "+", "-", "@")) else f"'{cell}"


_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: rf"\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    MISSING: "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def to_latex(table: Table) -> str:
    """A booktabs table."""

    def text(cell: str) -> str:
        return "".join(_LATEX.get(c, c) for c in visible(cell))

    rows = [" & ".join(map(text, row)) + r" \\" for row in table.rows]
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        rf"\caption{{{text(table.caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.head)}}}",
        *(r"\toprule", " & ".join(map(text, table.head)) + r" \\", r"\midrule", *rows, r"\bottomrule"),
        *(r"\end{tabular}", r"\end{table}"),
    ]
    return "\n".join(lines) + "\n"
