"""The whole report, from folders of runs to a folder of tables, figures and one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tiedlora import storage
from tiedlora import text as present
from tiedlora.report import cells as grouping
from tiedlora.report import claims as claiming
from tiedlora.report import compare, page, peft_results, plots, tables
from tiedlora.report.cells import Cell
from tiedlora.report.claims import Answer
from tiedlora.report.compare import Row
from tiedlora.report.peft_results import Peer
from tiedlora.report.runs import LeftOut, Run, read_runs
from tiedlora.report.tables import Table

COVERAGE = (
    "Intervals over seeds assume roughly normal scores. Where scores near 0 or 100 and few seeds make one cover less "
    "than 93 %, its row says what it covers (by simulation). The worst found, of intervals that claim 95 %: at 200 "
    "rows and a score of 1 point the bootstrap covers 87 %, the paired one 83 %, t over 2 seeds 86 %, paired 90 %; "
    "over seeds and examples 87 % with 2 seeds. docs/results.md has the table."
)


@dataclass
class Report:
    """What was found, before it is written."""

    runs: list[Run]
    left_out: list[LeftOut]
    cells: list[Cell]
    rows: list[Row]
    answers: list[Answer]
    peers: list[Peer] = field(default_factory=list)


def build(
    roots: Sequence[Path], *, claims: Path | None = None, split: str | None = None, peft_results_in: Path | None = None
) -> Report:
    """Read the runs and work out every number of the report.

    Args:
        split: validation or test; None shows test where the chosen runs have it.

    Raises:
        UserError: a folder or the claims file cannot be read at all. A bad run is never fatal.
    """
    stated = claiming.read(claims) if claims else []
    runs, left_out = read_runs(roots)
    found = grouping.cells(runs, left_out)
    book = compare.Scorebook()
    rows = compare.rows(found, book, split)
    answers = claiming.answers(stated, found, book, split)
    peers: list[Peer] = []
    if peft_results_in is not None:
        peers, bad = peft_results.read(peft_results_in)
        left_out = [*left_out, *bad]
    return Report(runs, left_out, found, rows, answers, peers)


def write(report: Report, out: Path, *, sections: int = 24) -> list[str]:
    """Write tables (Markdown, CSV, LaTeX), figures (PNG, SVG) and index.html.

    Returns:
        Lines for the terminal.
    """
    out.mkdir(parents=True, exist_ok=True)
    overview = tables.overview(report.rows, report.left_out)
    named = {
        table.name: table
        for table in (
            tables.results(report.rows),
            tables.cost(report.cells),
            tables.claims(report.answers),
            _peers(report.peers),
            tables.left_out(report.left_out),
        )
    }
    for table in [*overview, *named.values()]:
        if table.rows:
            for suffix, text in (
                ("md", tables.to_markdown(table)),
                ("csv", tables.to_csv(table)),
                ("tex", tables.to_latex(table)),
            ):
                storage.write_bytes(out / f"{table.name}.{suffix}", text.encode())
    figures = plots.draw(report.rows, report.peers, out)
    text = page.render(
        title="Tied-LoRA: results",
        summary=_summary(report),
        rows=report.rows,
        cells=report.cells,
        tables_of=named,
        overview=overview,
        figures=figures,
        coverage_note=COVERAGE,
        most_sections=sections,
    )
    storage.write_bytes(out / "index.html", text.encode("utf-8", "replace"))
    return _lines(report, out)


def _peers(peers: Sequence[Peer]) -> Table:
    body = [
        (
            *(peer.experiment, peer.method, peer.model, f"{peer.params:,}", tables.points(peer.accuracy)),
            *(tables.bounds(peer.interval()), f"{peer.file_bytes / 2**20:.2f}", f"{peer.memory_bytes / 2**30:.2f}"),
        )
        for peer in peers
    ]
    head = ("experiment", "method", "model", "parameters", "score", "95 % examples", "adapter MiB", "peak memory GiB")
    caption = (
        "Results files of PEFT's method_comparison/MetaMathQA as published: GSM8K test accuracy after training on "
        "MetaMathQA, one seed each, so the intervals (Wilson, 1,319 rows) cover which examples were drawn alone. "
        "Another base model, other data and another protocol than ours: compare shapes, not numbers."
    )
    return Table("peers", caption, head, body)


def _summary(report: Report) -> str:
    commits = sorted({str(run.record["code"].get("commit"))[:8] for run in report.runs})
    tasks = sorted({run.task for run in report.runs})
    models = sorted({run.model for run in report.runs})
    return (
        f"{len(report.runs):,} finished runs in {len(report.cells):,} cells; {', '.join(models) or 'no model'}; "
        f"{', '.join(tasks) or 'no task'}; code {', '.join(commits) or 'unknown'}; "
        f"{len(report.left_out):,} folders left out."
    )


def _lines(report: Report, out: Path) -> list[str]:
    lines = [_summary(report)]
    for answer in report.answers:
        gap = answer.difference
        text = f" {tables.points(gap.value, '+')} {tables.bounds(gap.widest(), '+')}" if gap else ""
        kept = answer.retained
        share = f", retained gain {100 * kept.value:.0f} %" if kept and not math.isnan(kept.value) else ""
        lines.append(f"{answer.verdict.upper():<14} {answer.claim.name} [{answer.model} {answer.task}]{text}{share}")
        lines.append(f"{'':<14} {answer.reason}" + (f"; would decide it: {answer.decide}" if answer.decide else ""))
    for folder in report.left_out[:20]:
        lines.append(f"left out       {folder.path.name}: {folder.reason}")
    if len(report.left_out) > 20:
        lines.append(f"left out       {len(report.left_out) - 20} more; left-out.md has them all")
    lines.append(f"open           {out / 'index.html'}")
    return [present.visible(line) for line in lines]
