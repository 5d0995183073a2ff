"""report/index.html: everything on one page that opens from disk and loads nothing.

Predictions are hostile text. Jinja escapes every value, a policy in the page lets no script run but its own, and
control characters are shown as signs.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tiedlora.config import command
from tiedlora.config import compose as configuration
from tiedlora.config.identity import run_id
from tiedlora.errors import UserError
from tiedlora.report import plots
from tiedlora.report.cells import Cell
from tiedlora.report.compare import Row
from tiedlora.report.runs import Run
from tiedlora.report.tables import Table
from tiedlora.text import visible

HERE = Path(__file__).parent
FILTERS = ("model", "task", "variant", "configuration", "rank", "metric")
PREDICTIONS = 10
LONGEST = 700
"""Characters shown of a prompt or an output; predictions/ has the rest."""
CONDENSED = ("model", "task", "variant", "metric", "split", "rows", "seeds", "device", "notes")
"""Columns that go into a table's caption when all rows agree."""
HIDDEN = ("share of LoRA",)
"""Columns of the results that the page leaves to its overview (and to results.csv): a laptop is only so wide."""
NUMERIC = re.compile(r"[+-]?[\d,.]+( %)?( of \d+)?( ?\[.*\])?( examples)?|–|\[.*\]( examples)?")


@dataclass
class Shown:
    """A table as the page shows it."""

    head: list[str]
    rows: list[list[str]]
    caption: str
    constant: str
    numeric: set[int]


def shown(table: Table, hidden: tuple[str, ...] = ()) -> Shown:
    """Text made visible, constant columns taken out, numbers found (they align right)."""
    rows = [[visible(cell) for cell in row] for row in table.rows]
    constant, kept = [], []
    for place, name in enumerate(table.head):
        if name in hidden:
            continue
        values = {row[place] for row in rows}
        if name in CONDENSED and len(values) == 1:
            if value := values.pop():
                constant.append(f"{name} {value}")
        else:
            kept.append(place)
    numeric = {
        at for at, place in enumerate(kept) if rows and all(NUMERIC.fullmatch(row[place] or "–") for row in rows)
    }
    return Shown(
        [table.head[place] for place in kept],
        [[row[place] for place in kept] for row in rows],
        table.caption,
        "; ".join(constant),
        numeric,
    )


def render(
    *,
    title: str,
    summary: str,
    rows: Sequence[Row],
    cells: Sequence[Cell],
    tables_of: dict[str, Table],
    overview: Sequence[Table],
    figures: Sequence[tuple[str, str, str]],
    coverage_note: str,
    most_sections: int,
) -> str:
    """The page's text."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (HERE / "page.js").read_text(encoding="utf-8")
    results = shown(tables_of["results"], HIDDEN)
    splits = {id(row.cell): row.split for row in rows}
    sections = [_section(cell, splits[id(cell)]) for cell in cells[:most_sections]]
    more = (
        f" The first {most_sections} of {len(cells)} cells; --sections N shows more."
        if len(cells) > most_sections
        else ""
    )
    contents = [("claims", "Claims")] if tables_of["claims"].rows else []
    contents += [("overview", "Overview"), *([("figures", "Figures")] if figures else []), ("results", "Results")]
    contents += [("cost", "Cost"), *([("peers", "PEFT's runs")] if tables_of["peers"].rows else [])]
    contents += [("runs", "Chosen runs"), ("left-out", f"Left out ({len(tables_of['left-out'].rows)})")]
    return environment.get_template("page.html.j2").render(
        title=title,
        summary=summary,
        contents=contents,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        claims=shown(tables_of["claims"]),
        overview=[shown(table) for table in overview],
        figures=[(name, caption, Markup(svg.replace(plots.INK, "currentColor"))) for name, caption, svg in figures],
        filters=_filters(results, rows),
        results=results,
        cost=shown(tables_of["cost"]),
        peers=shown(tables_of["peers"]),
        left_out=shown(tables_of["left-out"]),
        sections=sections,
        sections_note=f"One run a cell, that of its lowest seed.{more}",
        coverage_note=coverage_note,
    )


def _filters(results: Shown, rows: Sequence[Row]) -> list[dict[str, Any]]:
    found = []
    for name in FILTERS:
        if name in results.head:
            column = results.head.index(name)
            values = sorted({row[column] for row in results.rows}, key=lambda v: (not v.isdigit(), v.zfill(12)))
            found.append({"name": name, "column": column, "choices": values, "chosen": ""})
    return found


def _section(cell: Cell, split: str) -> dict[str, Any]:
    run = cell.runs[0]
    record, training = run.record, run.record["training"]
    facts = [
        ("run", run.run_id),
        ("base model", f"{record['base']['name']} ({record['base'].get('digest')})"),
        ("trained", ", ".join(part for part in PARTS if record["identity"]["tying"].get(part, {}).get("trained"))),
        ("trainable parameters", f"{run.params:,} ({100 * cell.share:.2f} % of LoRA)"),
        ("learning rate", ", ".join(f"{rate.lr:g}" for rate in cell.rates) + f"; chosen {cell.lr:g}"),
        ("seeds", ", ".join(str(one.seed) for one in cell.runs)),
        ("steps, batch", f"{training.get('steps')} of {record['identity']['train'].get('batch_size')} rows"),
        (
            "validation loss",
            f"{training.get('validation_loss_first', float('nan')):.3f} → {training['validation_loss_last']:.3f}",
        ),
        ("speed", f"{training['tokens_per_s']:,.0f} tokens/s, {training['seconds']:,.0f} s, {record.get('device')}"),
        ("commit", f"{record['code'].get('commit')}{' with changes' if record['code'].get('dirty') else ''}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    predictions, problem = _predictions(run, split)
    return {
        "name": cell.name,
        "about": f"{cell.task}, {cell.model}, seed {run.seed}{', ' + cell.variant if cell.variant else ''}",
        "facts": [(key, visible(str(value))) for key, value in facts],
        "curve": curve(run),
        "command": visible(_command(run)),
        "split": split,
        "predictions": predictions,
        "no_predictions": problem,
    }


def _command(run: Run) -> str:
    """The command that repeats the run, or where to look if this version of the code reads another from its record."""
    elsewhere = f"# this version of the code reads another run; its whole configuration is in {run.run_id}/config.yaml"
    try:
        config = configuration.load(OmegaConf.create(run.record["config"]))
    except (UserError, OmegaConfBaseException):
        return elsewhere
    return command.command(config) if run_id(config) == run.run_id else elsewhere


def _predictions(run: Run, split: str) -> tuple[list[dict[str, str]], str]:
    try:
        rows = run.rows(split)
    except UserError as error:
        return [], str(error)
    step = max(1, len(rows) // PREDICTIONS)
    return [
        {
            "id": visible(row["id"]),
            "prompt": _text(row.get("prompt", "")),
            "output": _text(row.get("output", "")),
            "references": _text("\n".join(map(str, row.get("references") or []))),
            "scores": ", ".join(
                f"{visible(str(name))} {score:.2f}".replace(".00", "")
                if isinstance(score, (int, float))
                else visible(str(name))
                for name, score in row["scores"].items()
            ),
        }
        for row in rows[::step][:PREDICTIONS]
    ], ""


def _text(value: Any) -> str:
    text = str(value)
    cut = f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)" if len(text) > LONGEST else text
    # Line feeds are what <pre> is for; every other control character becomes a sign.
    return "\n".join(visible(line) for line in cut.split("\n"))


def curve(run: Run) -> Markup:
    """A run's losses by step, drawn in the page's own colours."""
    curves = {kind: run.curve(f"{kind}/loss") for kind in ("train", "validation")}
    points = [pair for steps, values in curves.values() for pair in zip(steps, values, strict=True)]
    if not points:
        return Markup("<p>metrics.jsonl holds no losses.</p>")
    last, high, low = max(max(step for step, _ in points), 1), max(v for _, v in points), min(v for _, v in points)
    span = (high - low) or 1.0
    width, height, left, top = 560, 210, 46, 18

    def place(step: int, value: float) -> str:
        return f"{left + (width - left - 8) * step / last:.1f},{top + (height - top - 26) * (high - value) / span:.1f}"

    lines = [
        Markup('<polyline class="{}" points="{}"/>').format(
            kind, " ".join(place(step, value) for step, value in zip(*curves[kind], strict=True))
        )
        for kind in curves
    ]
    floor = height - 26
    label = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format
    return Markup(
        '<svg class="curve" viewBox="0 0 {} {}" role="img" aria-label="losses by step">'
        '<line class="axis" x1="{}" y1="{}" x2="{}" y2="{}"/>'
        '<line class="axis" x1="{}" y1="{}" x2="{}" y2="{}"/>{}</svg>'
    ).format(
        *(width, height, left, top, left, floor, left, floor, width - 8, floor),
        Markup("").join(
            [
                *lines,
                label(left - 6, top + 4, "end", f"{high:.3g}"),
                label(left - 6, floor, "end", f"{low:.3g}"),
                label(width - 8, height - 8, "end", f"step {last}"),
                label(left + 6, height - 8, "start", "validation loss bold, training loss thin"),
            ]
        ),
    )
