"""The whole report, from folders of runs to a folder of tables, figures and one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tiedlora import storage
from tiedlora.analysis import answers as claim_answers
from tiedlora.analysis import claims as claim_files
from tiedlora.analysis import compare
from tiedlora.analysis.answers import Answer, ClaimVerdict, claim_verdicts
from tiedlora.analysis.compare import ResultRow
from tiedlora.analysis.groups import RunGroup, group_runs, short_commits
from tiedlora.analysis.runs import LeftOut, Run, Scorebook, names_of, read_runs, read_selections, run_roots
from tiedlora.analysis.shares import SizePanel, size_panels
from tiedlora.page import browser, charts, figures, page, tables
from tiedlora.page.tables import Table
from tiedlora.text import visible

LISTED = 20
"""The most left-out folders that the terminal names."""


@dataclass
class Report:
    """All numbers of a report, before they are written."""

    runs: list[Run]
    left_out: list[LeftOut]
    groups: list[RunGroup]
    rows: list[ResultRow]
    answers: list[Answer]
    sizes: list[SizePanel] = field(default_factory=list)
    """What every arm keeps of a reference's gain."""

    def summary(self) -> str:
        """One line: how many runs and groups, which models and tasks, which code."""
        commits = sorted({commit for run in self.runs for commit in short_commits(run)})
        tasks = sorted({run.task for run in self.runs})
        models = sorted({run.model for run in self.runs})
        return (
            f"{len(self.runs):,} finished runs in {len(self.groups):,} groups; {', '.join(models) or 'no model'}; "
            f"{', '.join(tasks) or 'no task'}; code {', '.join(commits) or 'unknown'}; "
            f"{len(self.left_out):,} folders left out."
        )

    @property
    def verdicts(self) -> list[ClaimVerdict]:
        """The verdicts over all tasks."""
        return claim_verdicts(self.answers)

    def tables(self) -> list[Table]:
        """The report's tables: an overview for each model, and then one of each name."""
        # Without a claim about several tasks, a verdict says no more than its answer.
        over_tasks = self.verdicts if any(len(verdict.answers) > 1 for verdict in self.verdicts) else []
        return [
            *tables.overview(self.rows, self.left_out),
            tables.results(self.rows),
            tables.cost(self.groups),
            tables.verdicts(over_tasks),
            tables.claims(self.answers),
            tables.shares(self.sizes),
            tables.left_out(self.left_out),
        ]


def build(
    roots: Sequence[Path],
    *,
    claims: Path | None = None,
    split: str | None = None,
) -> Report:
    """Read the runs and compute every number of the report.

    Args:
        split: validation or test; None shows test if the chosen runs have it.

    Raises:
        UserError: a folder or the claims file cannot be read. A damaged run is listed instead.
    """
    stated = claim_files.read(claims) if claims else []
    roots = run_roots(roots)
    runs, left_out = read_runs(roots)
    if claims:
        claim_files.check_names(claims, stated, *names_of(runs))
    selections, damaged = read_selections(roots)
    left_out = [*left_out, *damaged]
    groups = group_runs(runs, left_out, selections)
    book = Scorebook()
    rows = compare.result_rows(groups, book, split, stated)
    answers = claim_answers.answer_claims(stated, groups, book, split)
    return Report(runs, left_out, groups, rows, answers, size_panels(rows, answers, book))


def write(report: Report, out: Path) -> list[str]:
    """Write tables (Markdown, CSV, LaTeX), figures (PNG, SVG) and index.html.

    Returns:
        Lines for the terminal.
    """
    out.mkdir(parents=True, exist_ok=True)
    all_tables = report.tables()
    panels = charts.panels(report.rows, report.answers, report.sizes)
    for table in all_tables:
        if table.rows:
            storage.write_bytes(out / f"{table.name}.md", tables.to_markdown(table).encode())
            storage.write_bytes(out / f"{table.name}.csv", tables.to_csv(table).encode())
            storage.write_bytes(out / f"{table.name}.tex", tables.to_latex(table).encode())
    figures.write_files(panels, out)
    sheets = browser.sheets(report.groups, {row.group: row.measure.split for row in report.rows})
    html = page.render(report.summary(), report.rows, all_tables, report.verdicts, panels, sheets)
    storage.write_bytes(out / "index.html", html.encode("utf-8", "replace"))
    return _lines(report, out)


def _lines(report: Report, out: Path) -> list[str]:
    lines = [report.summary()]
    for verdict in report.verdicts:
        if len(verdict.answers) > 1:
            lines.append(f"{verdict.verdict.upper():<14} {verdict.claim.name} [{verdict.model}]: {verdict.reason}")
        for answer in verdict.answers:
            lines += _answer_lines(answer)
    lines += [f"left out       {folder.path.name}: {folder.reason}" for folder in report.left_out[:LISTED]]
    if len(report.left_out) > LISTED:
        lines.append(f"left out       {len(report.left_out) - LISTED} more; left-out.md has them all")
    lines.append(f"open           {out / 'index.html'}")
    return [visible(line) for line in lines]


def _answer_lines(answer: Answer) -> list[str]:
    difference = ""
    if answer.difference and answer.measure:
        difference = f" {answer.measure.unit.text(answer.difference.widest, '+')}"
    share = f", retains at least {100 * answer.retains_at_least:.0f} %" if answer.retains_at_least is not None else ""
    decide = f"; next: {answer.decide}" if answer.decide else ""
    where = f"{answer.model} {answer.task}".strip()
    return [
        f"{answer.verdict.upper():<14} {answer.claim.name} [{where}]{difference}{share}",
        f"{'':<14} {answer.reason}{decide}",
    ]
