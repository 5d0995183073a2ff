"""The whole report, from folders of runs to a folder of tables, figures and index.html.

The page opens from disk and loads nothing. Predictions are hostile text. Jinja escapes every value, the script sets
only `textContent`, a policy in the page allows only the page's own script and style, and control characters are shown
as signs.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tiedlora import storage
from tiedlora.analysis import answers as claim_answers
from tiedlora.analysis import claims as claim_files
from tiedlora.analysis import over_steps, shares
from tiedlora.analysis.answers import Answer, Verdict, error_note
from tiedlora.analysis.claims import Pair
from tiedlora.analysis.groups import RunGroup, group_runs, short_commits
from tiedlora.analysis.over_steps import LeadAtStep
from tiedlora.analysis.over_tasks import ClaimVerdict, claim_verdicts
from tiedlora.analysis.ranking import RankedArm, rankings
from tiedlora.analysis.regret import mark_arms
from tiedlora.analysis.results import ResultRow, result_rows
from tiedlora.analysis.runs import LeftOut, Measure, Run, Scorebook, names_of, read_runs, read_selections, run_roots
from tiedlora.analysis.shares import SharePanel, share_panels
from tiedlora.analysis.tested import number_tested
from tiedlora.page import browser, charts, figures, ranked, tables
from tiedlora.page.figures import HERE, Panel
from tiedlora.page.tables import Table, minus
from tiedlora.page.tracks import axis_of_differences, better_right, track
from tiedlora.records.interval import MISSING, Interval
from tiedlora.text import counted, visible, without_folders

FILTERS = ("model", "task", "variant", "configuration", "rank", "metric")
CONDENSED = ("model", "task", "variant", "metric", "split", "rows", "seeds", "device", "notes")
"""Columns that move into the table's caption if all rows have the same value."""


@dataclass
class Report:
    """All numbers of a report, before they are written."""

    runs: list[Run]
    left_out: list[LeftOut]
    groups: list[RunGroup]
    rows: list[ResultRow]
    answers: list[Answer]
    verdicts: list[ClaimVerdict]
    """Those over all tasks."""
    share_panels: list[SharePanel]
    """What every arm keeps of a reference's gain."""
    rankings: list[list[RankedArm]]
    """The arms of each setting, the best first."""
    leads: list[list[LeadAtStep]]
    """Each arm against LoRA over the steps of training."""

    def headline(self) -> str:
        """How many runs and groups there are, and which models and tasks."""
        tasks = sorted({run.task for run in self.runs})
        models = sorted({run.model for run in self.runs})
        return (
            f"{counted(len(self.runs), 'finished run')} in {counted(len(self.groups), 'group')}; "
            f"{', '.join(models) or 'no model'}; "
            f"{', '.join(tasks) or 'no task'}"
        )

    def summary(self) -> str:
        """One line: the headline, which code, and how many folders are left out."""
        commits = sorted({commit for run in self.runs for commit in short_commits(run)})
        code = ", ".join(commits) or "unknown"
        return f"{self.headline()}; code {code}; {counted(len(self.left_out), 'folder')} left out."

    def tables(self) -> list[Table]:
        """The report's tables: an overview for each model, and then one of each name."""
        # Without a claim about several tasks, a verdict says no more than its answer.
        over_tasks = self.verdicts if any(len(verdict.answers) > 1 for verdict in self.verdicts) else []
        return [
            *tables.overview(self.rows, self.left_out),
            ranked.table(self.rankings),
            tables.results(self.rows),
            tables.cost(self.groups),
            tables.verdicts(over_tasks),
            tables.claims(self.answers),
            tables.shares(self.share_panels),
            tables.over_steps(self.leads),
            tables.left_out(self.left_out),
        ]


def build(roots: Sequence[Path], *, claims: Path | None = None, split: str | None = None) -> Report:
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
        claim_files.check_names(claims, stated, names_of(runs))
    selections, damaged = read_selections(roots)
    left_out = [*left_out, *damaged]
    groups = group_runs(runs, left_out, selections)
    book = Scorebook()
    rows = result_rows(groups, book, split, stated)
    answers = claim_answers.answer_claims(stated, groups, book, split)
    mark_arms(answer.doubtful_rates for answer in answers)
    ranked_arms = rankings(rows, answers, book)
    return Report(
        runs,
        left_out,
        groups,
        rows,
        answers,
        claim_verdicts(answers),
        share_panels(rows, answers, book),
        ranked_arms,
        over_steps.leads(ranked_arms),
    )


def write(report: Report, out: Path) -> None:
    """Write tables (Markdown, CSV, LaTeX), figures (PNG, SVG) and index.html."""
    out.mkdir(parents=True, exist_ok=True)
    all_tables = report.tables()
    figures.choose_styles(report.groups)
    panels = charts.panels(report.rows, report.rankings, report.share_panels, report.leads)
    formats = {"md": tables.to_markdown, "csv": tables.to_csv, "tex": tables.to_latex}
    written = [table for table in all_tables if table.rows]
    # An earlier report in this folder may have had other tables.
    names = {table.name for table in all_tables} | {file.stem for file in out.glob("overview-*")}
    for name, suffix in itertools.product(names - {table.name for table in written}, formats):
        (out / f"{name}.{suffix}").unlink(missing_ok=True)
    for table, (suffix, text) in itertools.product(written, formats.items()):
        storage.write_bytes(out / f"{table.name}.{suffix}", text(table).encode())
    figures.write_files(panels, out)
    storage.write_bytes(out / "index.html", render(report, all_tables, panels).encode("utf-8", "replace"))


# --- index.html.


def render(report: Report, all_tables: Sequence[Table], panels: Sequence[Panel]) -> str:
    """The page's text."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        # Texts may come from a damaged record. What is not markup of ours shows its control characters as signs.
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # No text in JSON can end the script element around it.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    css, script = (
        "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)
        for names in (("page.css", "page.charts.css", "page.answers.css"), ("page.js", "page.answers.js"))
    )
    of_name = {table.name: shown(table) for table in all_tables}
    return environment.get_template("page.html.j2").render(
        css=Markup(css),
        css_hash=_hash(css),
        script=Markup(script),
        script_hash=_hash(script),
        summary=report.summary(),
        sheets=browser.sheets(report.rows, first_pairs(report)),
        models=models(report, panels),
        ranked=ranked,
        drawn=claim_tracks(report.answers),
        files=[f"{table.name}.csv" for table in all_tables if table.rows],
        left_out=left_out_in_short(report.left_out),
        legend=figures.legend,
        css_names=figures.CSS_NAMES,
        glyphs=figures.GLYPHS,
        inline=figures.inline,
        found_in_words=found_in_words,
        numbers=numbers,
        without_folders=without_folders,
        error_note=error_note(report.answers) if report.answers else "",
        tables=of_name,
        filters=_filters(of_name["results"]),
    )


def shown(table: Table) -> Table:
    """The table without the columns in which all rows have the same value; the caption has them."""
    constant, kept, texts = [], [], table.texts()
    for place, column in enumerate(table.columns):
        values = {row[place] for row in texts}
        if column.name not in CONDENSED or len(values) != 1:
            kept.append(place)
        elif (value := values.pop()) not in ("", MISSING):
            constant.append(f"{column.name} {value}")
    caption = f"{table.caption} All rows: {'; '.join(constant)}." if constant else table.caption
    return replace(table.at(kept), caption=caption)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _filters(results: Table) -> list[tuple[str, int, list[str]]]:
    """A filter for each column of FILTERS that the page shows: its name, place and choices, numbers by value."""
    filters = []
    for place, column in enumerate(results.columns):
        if column.name in FILTERS:
            choices = {row[place] for row in results.rows}
            ordered = sorted(choices, key=lambda value: (value if isinstance(value, int) else 0, column.text(value)))
            filters.append((column.name, place, list(map(column.text, ordered))))
    return filters


# --- Each model: its rankings, its claims by subject, and the charts.


@dataclass(frozen=True)
class ModelPart:
    """What the page shows of one base model."""

    name: str
    headline: str
    """Such as `3 claims: 2 supported, 1 not run`."""
    rankings: list[list[RankedArm]]
    verdicts: list[ClaimVerdict]
    panels: Mapping[str, list[Panel]]
    """Kind of a figure -> its panels; empty for a kind that the model does not have."""

    @property
    def subjects(self) -> list[tuple[str, list[ClaimVerdict]]]:
        """The claims of which a task was run, by the arm that they are about."""
        of_arm: dict[str, list[ClaimVerdict]] = defaultdict(list)
        for verdict in self.verdicts:
            if verdict.verdict != Verdict.NOT_RUN:
                of_arm[str(verdict.claim.method)].append(verdict)
        return list(of_arm.items())

    @property
    def not_run(self) -> list[ClaimVerdict]:
        """The claims of which no task was run."""
        return [verdict for verdict in self.verdicts if verdict.verdict == Verdict.NOT_RUN]


def models(report: Report, panels: Sequence[Panel]) -> list[ModelPart]:
    """Every model of the report, in the order of its tables. Without a run, one part has the claims, all not run."""
    parts = []
    for name in dict.fromkeys(row.group.model for row in report.rows) or [""]:
        own: dict[str, list[Panel]] = defaultdict(list)
        for panel in panels:
            if panel.model == name:
                own[panel.kind].append(panel)
        stated = [verdict for verdict in report.verdicts if verdict.model == name]
        ranked_here = [ranking for ranking in report.rankings if ranking[0].group.model == name]
        counts = Counter(verdict.verdict for verdict in stated)
        found = ", ".join(f"{counts[kind]} {kind}" for kind in Verdict if counts[kind])
        headline = f"{counted(len(stated), 'claim')}: {found}" if stated else ""
        parts.append(ModelPart(name or "No finished run", headline, ranked_here, stated, own))
    return parts


def found_in_words(answer: Answer) -> str:
    """The number that the rule tests; empty if the claim was not run."""
    return "" if answer.verdict == Verdict.NOT_RUN else minus(shares.tested_in_words(answer))


def claim_tracks(answers: Sequence[Answer]) -> Callable[[Answer], Markup]:
    """What draws the number that an answer's rule tests: on one axis for all shares, and on one for all differences of
    a task and metric. It draws nothing without a number.
    """
    shown = [(answer, found) for answer in answers if (found := number_tested(answer)) is not None]
    kept = [found for _, found in shown if found.is_share]
    of_shares = shares.axis((found.interval for found in kept), (found.zone for found in kept))
    differences: dict[tuple[str, str, Measure | None], list[Interval]] = defaultdict(list)
    for answer, found in shown:
        if not found.is_share:
            differences[answer.model, answer.task, answer.measure].append(better_right(found.interval, found.sign))
    axes = {key: axis_of_differences(own) for key, own in differences.items()}

    def drawn(answer: Answer) -> Markup:
        if (found := number_tested(answer)) is None:
            return Markup()
        place = answer.model, answer.task, answer.measure
        return track(
            better_right(found.interval, found.sign),
            (of_shares.low, of_shares.high) if found.is_share else axes[place],
            tone=ranked.TONES.get(answer.verdict, "soft"),
            reference=1.0 if found.is_share else 0.0,
            zone=found.zone,
            is_filled=answer.survives_holm,
            is_firm=answer.is_firm,
        )

    return drawn


def first_pairs(report: Report) -> list[tuple[RunGroup, RunGroup]]:
    """The arms that the answers browser may compare at first: those of the claims and then, for each ranking, the best
    one and what it is compared with.
    """
    pairs = [
        (answer.pair.comparator.groups[-1], answer.pair.method)
        for answer in report.answers
        if isinstance(answer.pair, Pair)
    ]
    for best, *others in report.rankings:
        rival = best.lora.groups[-1] if best.lora is not None else others[0].group if others else best.group
        pairs.append((rival, best.group))
    return pairs


def left_out_in_short(folders: Sequence[LeftOut]) -> str:
    """How many folders are not in the report, by their kind; empty without any."""
    words = {"pruned": "runs that a search stopped", "failed": "failed runs"}
    kinds = Counter(words.get(folder.run.ending if folder.run else "", "other folders") for folder in folders)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())


def numbers(answer: Answer) -> list[tuple[str, str]]:
    """Name and value of the numbers behind a verdict."""
    if answer.measure is None:
        return []
    unit, found = answer.measure.unit, answer.findings
    least = found.retains_at_least

    kept = minus(shares.share_in_words(found.kept)) if found.kept is not None else ""

    def text(interval: Interval | None) -> str:
        return f"{minus(unit.text(interval, '+'))} {unit.words}" if interval else ""

    shown = {
        f"method minus comparator, 95 %, {counted(found.difference_seeds, 'seed')}": text(
            found.difference.widest if found.difference else None
        ),
        "contrast at the look's level": text(found.contrast),
        "share of the comparator's gain at the look's level": kept,
        "keeps at least": "" if least is None else shares.at_least(least),
        "seeds of the look, and rows" if found.looks else "seeds and rows": f"{found.seeds}, {found.rows:,}",
    }
    return [(name, value) for name, value in shown.items() if value]
