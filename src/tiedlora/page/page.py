"""report/index.html: the whole report on one page that opens from disk and loads nothing.

Predictions are hostile text. Jinja escapes every value, the script sets only `textContent`, a policy in the page allows
only the page's own script and style, and control characters are shown as signs.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class ShownTable:
    """A table as the page shows it."""

    table: Table
    """Without hidden columns, and without those in which all rows have the same value."""
    constant: str
    """Name and value of the columns in which all rows have the same value."""


@dataclass(frozen=True)
class ModelPart:
    """What the page shows of one base model."""

    name: str
    verdicts: ModelVerdicts
    charts: Mapping[str, list[tuple[str, Markup]]]
    """Kind of a figure -> title and SVG of its panels; none for a kind that it does not have."""
    legends: Mapping[str, list[Key]]
    hidden: int
    """How many groups have no lines in the charts of training."""


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
    links: Sequence[tuple[str, str, str]] = (),
) -> str:
    """The page's text.

    Args:
        most_sections: the most groups of which a run is shown.
        sheets: the answers in the page.
        links: address, title and size of the answers in files of their own.
    """
    of_name = {table.name: shown(table) for table in tables}
    (results,) = [table for table in tables if table.name == "results"]
    of_name["results"] = shown(results, HIDDEN)
    groups = list(dict.fromkeys(row.group for row in rows))
    return _rendered(
        "page.html.j2",
        title=TITLE,
        sheets=sheets,
        links=links,
        summary=summary,
        models=_models(rows, verdicts, panels),
        error_note=error_note([answer for verdict in verdicts for answer in verdict.answers]) if verdicts else "",
        tables=of_name,
        overview=[shown for name, shown in of_name.items() if name.startswith("overview")],
        filters=_filters(results, of_name["results"].table),
        sections=[run_section(group, sheets) for group in groups[:most_sections]],
        groups=len(groups),
    )


def _models(rows: Sequence[ResultRow], verdicts: Sequence[ClaimVerdict], panels: Sequence[Panel]) -> list[ModelPart]:
    """Every model of the report, in the order of its tables."""
    names = list(dict.fromkeys(row.group.model for row in rows))
    parts = []
    for name, of_model in zip(names or [""], matrix.by_model(verdicts, names), strict=True):
        own: dict[str, list[Panel]] = defaultdict(list)
        charts: dict[str, list[tuple[str, Markup]]] = defaultdict(list)
        for panel in (panel for panel in panels if panel.model == name):
            own[panel.kind].append(panel)
            charts[panel.kind].append((panel.title, figures.inline(panel)))
        legends = {kind: figures.legend(found) for kind, found in own.items()}
        drawn = {group for panel in own["curves"] for group in panel.groups}
        hidden = len({row.group for row in rows if row.group.model == name} - drawn)
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


def _filters(table: Table, results: Table) -> list[tuple[str, int, list[str]]]:
    """A filter for each column of FILTERS that the page shows: its name, place and choices, numbers by value."""
    filters = []
    for name in FILTERS:
        if name in results.head:
            place = table.head.index(name)
            text = table.columns[place].text
            choices = {row[place] for row in table.rows}
            ordered = sorted(choices, key=lambda value: (value if isinstance(value, int) else 0, text(value)))
            filters.append((name, results.head.index(name), list(map(text, ordered))))
    return filters
