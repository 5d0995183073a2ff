"""report/index.html: the whole report on one page that opens from disk and loads nothing.

Predictions are hostile text. Jinja escapes every value, the script sets only `textContent`, a policy in the page allows
only the page's own script and style, and control characters are shown as signs.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tiedlora.analysis.claim_verdicts import ClaimVerdict, error_note
from tiedlora.analysis.compare import ResultRow
from tiedlora.analysis.shares_by_size import SizePanel
from tiedlora.page import formats, page_models
from tiedlora.page.browser import Sheet
from tiedlora.page.sections import run_section
from tiedlora.page.tables import ReportTables
from tiedlora.page.values import AverageScore, Column, Table, TaskScore
from tiedlora.text import visible

HERE = Path(__file__).parent
TITLE = "Tied-LoRA: results"
GENERATOR = "tiedlora report"
FILTERS = ("model", "task", "variant", "configuration", "rank", "metric")
CONDENSED = ("model", "task", "variant", "metric", "split", "rows", "seeds", "device", "notes")
"""Columns that move into the table's caption if all rows have the same value."""
HIDDEN = ("share of LoRA",)
"""Columns that the page leaves out of the table of results, to fit a laptop's screen. results.csv has them."""
LEFT_ALIGNED = (str, TaskScore, AverageScore)
COVERAGE_NOTE = (
    "Intervals over seeds assume roughly normal scores. Where scores near 0 or 100 and few seeds make one cover less "
    "than 93 %, its row says what it covers (by simulation). The worst found, of intervals that claim 95 %: at 200 "
    "rows and a score of 1 point the bootstrap covers 87 %, the paired one 83 %, t over 2 seeds 86 %, paired 90 %. "
    "docs/results.md has the table."
)


@dataclass(frozen=True)
class ShownColumn:
    """A column of a table on the page."""

    name: str
    is_number: bool
    """Whether the column is aligned to the right."""
    css: str
    """The CSS classes of its cells."""
    is_verdict: bool


@dataclass(frozen=True)
class ShownTable:
    """A table as the page shows it."""

    columns: list[ShownColumn]
    rows: list[list[str]]
    name: str
    caption: str
    constant: str
    """Name and value of the columns in which all rows have the same value."""


@dataclass(frozen=True)
class Filter:
    """A filter of the results' rows by the values of one column."""

    name: str
    column: int
    choices: list[str]


@dataclass(frozen=True)
class SheetLink:
    """A link to a sheet of answers that is a file of its own."""

    href: str
    title: str
    about: str


@dataclass(frozen=True)
class EmbeddedSheet:
    """A sheet of answers inside a page."""

    title: str
    head_json: Markup
    index: str
    texts: list[str]


def shown(table: Table, hidden: Sequence[str] = ()) -> ShownTable:
    """The table as text, without hidden columns and without columns in which all rows have the same value."""
    constant, kept = [], []
    for place, name in enumerate(table.head):
        values = {row[place] for row in table.rows}
        if name in CONDENSED and len(values) == 1:
            if value := visible(formats.text(values.pop())):
                constant.append(f"{name} {value}")
        elif name not in hidden:
            kept.append(place)
    columns = [_shown_column(table.columns[place]) for place in kept]
    rows = [[visible(formats.text(row[place])) for place in kept] for row in table.rows]
    return ShownTable(columns, rows, table.name, table.caption, "; ".join(constant))


def _shown_column(column: Column) -> ShownColumn:
    is_number = column.kind not in LEFT_ALIGNED
    css = f"{'n' if is_number else ''} {'text' if column.wraps else ''}".strip()
    return ShownColumn(column.name, is_number, css, is_verdict=column.name == "verdict")


def render(
    summary: str,
    rows: Sequence[ResultRow],
    tables: ReportTables,
    verdicts: Sequence[ClaimVerdict],
    *,
    most_sections: int,
    sizes: Sequence[SizePanel] = (),
    sheets: Sequence[Sheet] = (),
    links: Sequence[SheetLink] = (),
) -> str:
    """The page's text.

    Args:
        most_sections: the most groups of which a run is shown.
        sizes: what every arm keeps of a reference's gain.
        sheets: the answers in the page.
        links: the answers in files of their own.
    """
    results = shown(tables.results, HIDDEN)
    groups = list(dict.fromkeys(row.group for row in rows))
    sections = [run_section(group, sheets) for group in groups[:most_sections]]
    more = f" The first {most_sections} of {len(groups)} groups; --sections N shows more."
    curves = page_models.curves(rows)
    return _rendered(
        "page.html.j2",
        title=TITLE,
        sheets=sheets,
        summary=summary,
        contents=_contents(tables, has_answers=bool(sheets or links), has_curves=bool(curves)),
        models=page_models.models(rows, verdicts, sizes),
        error_note=error_note([answer for verdict in verdicts for answer in verdict.answers]) if verdicts else "",
        links=links,
        curves=curves,
        verdicts=shown(tables.verdicts),
        claims=shown(tables.claims),
        overview=[shown(table) for table in tables.overview],
        filters=_filters(tables.results, results),
        results=results,
        cost=shown(tables.cost),
        left_out=shown(tables.left_out),
        sections=sections,
        sections_note=f"One run per group, the one with the lowest seed.{more if len(groups) > most_sections else ''}",
        coverage_note=COVERAGE_NOTE,
    )


def render_sheet(sheet: Sheet, back: str) -> str:
    """The text of a page that holds only one sheet of answers.

    Args:
        back: the address of the report.
    """
    return _rendered("page.sheet.html.j2", title=f"Answers: {sheet.title}", sheets=[sheet], back=back)


def _rendered(template: str, title: str, sheets: Sequence[Sheet], **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css, script = (
        "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)
        for names in (("page.css", "page.charts.css", "page.answers.css"), ("page.js", "page.answers.js"))
    )
    return environment.get_template(template).render(
        title=title,
        generator=GENERATOR,
        css=Markup(css),
        css_hash=_hash(css),
        script=Markup(script),
        script_hash=_hash(script),
        sheets=[EmbeddedSheet(sheet.title, _json(sheet.head), sheet.index, sheet.texts) for sheet in sheets],
        **values,
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> Markup:
    """JSON that may stand in a script element: no text in it can end the element."""
    return Markup(json.dumps(value, ensure_ascii=False).replace("<", "\\u003c"))


def _contents(tables: ReportTables, has_answers: bool, has_curves: bool) -> list[tuple[str, str]]:
    """(id, name) of the parts that the page has."""
    parts = [
        ("verdicts", "Verdicts", True),
        ("answers", "Answers", has_answers),
        ("curves", "Curves", has_curves),
        ("overview", "Overview", True),
        ("results", "Results", True),
        ("claims", "Claims", bool(tables.claims.rows)),
        ("cost", "Cost", True),
        ("runs", "Runs", True),
        ("left-out", f"Left out ({len(tables.left_out.rows)})", True),
    ]
    return [(part, name) for part, name, exists in parts if exists]


def _filters(table: Table, results: ShownTable) -> list[Filter]:
    """A filter for each column of FILTERS that the page shows. Numbers are sorted by value."""
    names = [column.name for column in results.columns]
    filters = []
    for name in FILTERS:
        if name in names:
            place = table.head.index(name)
            values = {row[place] for row in table.rows}
            choices = sorted(values, key=lambda value: (value if isinstance(value, int) else 0, formats.text(value)))
            filters.append(Filter(name, names.index(name), [visible(formats.text(value)) for value in choices]))
    return filters
