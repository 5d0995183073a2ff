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

from tiedlora.analysis.answers import ClaimVerdict, error_note
from tiedlora.analysis.compare import ResultRow
from tiedlora.page import figures, matrix
from tiedlora.page.browser import Sheet
from tiedlora.page.figures import Key, Panel
from tiedlora.page.formats import Table
from tiedlora.page.matrix import ModelVerdicts
from tiedlora.page.sections import run_section
from tiedlora.text import visible

HERE = Path(__file__).parent
TITLE = "Tied-LoRA: results"
GENERATOR = "tiedlora report"
FILTERS = ("model", "task", "variant", "configuration", "rank", "metric")
CONDENSED = ("model", "task", "variant", "metric", "split", "rows", "seeds", "device", "notes")
"""Columns that move into the table's caption if all rows have the same value."""
HIDDEN = ("share of LoRA",)
"""Columns that the page leaves out of the table of results, to fit a laptop's screen. results.csv has them."""
COVERAGE_NOTE = (
    "Intervals over seeds assume roughly normal scores. Where scores near 0 or 100 and few seeds make one cover less "
    "than 93 %, its row says what it covers (by simulation). The worst found, of intervals that claim 95 %: at 200 "
    "rows and a score of 1 point the bootstrap covers 87 %, the paired one 83 %, t over 2 seeds 86 %, paired 90 %. "
    "docs/results.md has the table."
)
CAPTIONS = {
    "forest": "0 % is the base model, 100 % the comparator. Shaded: what the claim asks for. A bar inside the shade "
    "supports its claim, a bar outside contradicts it. Bars have the level of the planned look. No verdict can rest on "
    "a dashed one: it is a 95 % interval before the first look, or the comparator's own gain may be 0.",
    "shares": "0 % is the base model, 100 % the comparator of the first claim on the task. Bars are 95 % intervals of "
    "the paired difference to it, over seeds and rows; a line joins the ranks of a configuration. A hollow marker lies "
    "beyond the axis. All charts have the same axes.",
    "pareto": "Filled markers are not beaten by anything with as few parameters, and the grey line joins them. A line "
    "in colour joins the ranks of a configuration. Bars are 95 % intervals over rows, which all arms share. Hollow "
    "stars are published scores.",
    "arena": "All arms, sorted by score, with the numbers that they train and store. * has marks.",
    "curves": "Mean over seeds, with the band from the lowest to the highest seed.",
    "search": "Last validation loss of every run against its learning rate. Lines join the means of finished runs, a "
    "ring marks the chosen rate, hollow runs were stopped by the search (at their last loss), and crosses failed.",
    "layers": "From the adapters' files. Vectors: norm divided by the root of the length, so 1 is where they start. "
    "Update: Frobenius norm. Cosine of the whole update of a layer with LoRA's at the same seed; the dotted line is "
    "what two seeds of LoRA have in common. Bands go from the lowest to the highest seed.",
}
"""Kind of a figure -> how to read it."""


@dataclass(frozen=True)
class ShownTable:
    """A table as the page shows it."""

    table: Table
    """Without hidden columns, and without those in which all rows have the same value."""
    constant: str
    """Name and value of the columns in which all rows have the same value."""


@dataclass(frozen=True)
class Filter:
    """A filter of the results' rows by the values of one column."""

    name: str
    column: int
    choices: list[str]


@dataclass(frozen=True)
class Chart:
    """One panel of a figure."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class ModelPart:
    """What the page shows of one base model."""

    name: str
    verdicts: ModelVerdicts
    charts: dict[str, list[Chart]]
    """Kind of a figure -> its panels."""
    legends: dict[str, list[Key]]
    hidden: int
    """How many groups have no lines in the charts of training."""


@dataclass(frozen=True)
class SheetLink:
    """A link to a sheet of answers that is a file of its own."""

    href: str
    title: str
    about: str


def shown(table: Table, hidden: Sequence[str] = ()) -> ShownTable:
    """The table without hidden columns and without columns in which all rows have the same value."""
    constant, kept, texts = [], [], table.texts()
    for place, column in enumerate(table.columns):
        values = {row[place] for row in texts}
        if column.name in CONDENSED and len(values) == 1:
            if value := values.pop():
                constant.append(f"{column.name} {value}")
        elif column.name not in hidden:
            kept.append(place)
    return ShownTable(table.at(kept), "; ".join(constant))


def render(
    summary: str,
    rows: Sequence[ResultRow],
    tables: Sequence[Table],
    verdicts: Sequence[ClaimVerdict],
    panels: Sequence[Panel],
    *,
    most_sections: int,
    sheets: Sequence[Sheet] = (),
    links: Sequence[SheetLink] = (),
) -> str:
    """The page's text.

    Args:
        most_sections: the most groups of which a run is shown.
        sheets: the answers in the page.
        links: the answers in files of their own.
    """
    of_name = {table.name: table for table in tables}
    results = shown(of_name["results"], HIDDEN)
    groups = list(dict.fromkeys(row.group for row in rows))
    more = f" The first {most_sections} of {len(groups)} groups; --sections N shows more."
    return _rendered(
        "page.html.j2",
        title=TITLE,
        sheets=sheets,
        links=links,
        summary=summary,
        models=_models(rows, verdicts, panels),
        captions=CAPTIONS,
        error_note=error_note([answer for verdict in verdicts for answer in verdict.answers]) if verdicts else "",
        tables={name: shown(table) for name, table in of_name.items()} | {"results": results},
        overview=[shown(table) for table in tables if table.name.startswith("overview")],
        filters=_filters(of_name["results"], results.table),
        sections=[run_section(group, sheets) for group in groups[:most_sections]],
        sections_note=f"One run per group, the one with the lowest seed.{more if len(groups) > most_sections else ''}",
        coverage_note=COVERAGE_NOTE,
    )


def _models(rows: Sequence[ResultRow], verdicts: Sequence[ClaimVerdict], panels: Sequence[Panel]) -> list[ModelPart]:
    """Every model of the report, in the order of its tables."""
    names = list(dict.fromkeys(row.group.model for row in rows))
    parts = []
    for name, of_model in zip(names or [""], matrix.by_model(verdicts, names), strict=True):
        own = {kind: [p for p in panels if (p.model, p.kind) == (name, kind)] for kind in CAPTIONS}
        charts = {kind: [Chart(panel.title, figures.inline(panel)) for panel in found] for kind, found in own.items()}
        drawn = {group for panel in own["curves"] for group in panel.groups}
        hidden = len({row.group for row in rows if row.group.model == name} - drawn) if drawn else 0
        legends = {kind: figures.legend(found) for kind, found in own.items()}
        parts.append(ModelPart(name or "No finished run", of_model, charts, legends, hidden))
    return parts


def render_sheet(sheet: Sheet, back: str) -> str:
    """The text of a page that holds only one sheet of answers.

    Args:
        back: the address of the report.
    """
    return _rendered("page.sheet.html.j2", title=f"Answers: {sheet.title}", sheets=[sheet], back=back)


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        # Texts may come from a damaged record. What is not markup of ours shows its control characters as signs.
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = _json
    css, script = (
        "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)
        for names in (("page.css", "page.charts.css", "page.answers.css"), ("page.js", "page.answers.js"))
    )
    return environment.get_template(template).render(
        generator=GENERATOR,
        css=Markup(css),
        css_hash=_hash(css),
        script=Markup(script),
        script_hash=_hash(script),
        **values,
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> Markup:
    """JSON that may stand in a script element: no text in it can end the element."""
    return Markup(json.dumps(value, ensure_ascii=False).replace("<", "\\u003c"))


def _filters(table: Table, results: Table) -> list[Filter]:
    """A filter for each column of FILTERS that the page shows. Numbers are sorted by value."""
    filters = []
    for name in FILTERS:
        if name in results.head:
            place = table.head.index(name)
            values = {row[place] for row in table.rows}
            text = table.columns[place].text
            choices = sorted(values, key=lambda value: (value if isinstance(value, int) else 0, text(value)))
            filters.append(Filter(name, results.head.index(name), list(map(text, choices))))
    return filters
