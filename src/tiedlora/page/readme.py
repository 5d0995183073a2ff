"""A report's tables inside a README, so that the numbers that people read there are those of the runs.

The README marks where a table goes, and `scripts/report.py ... --readme FILE` writes what stands between the marks:

    <!-- report: verdicts -->
    (the table)
    <!-- end of report -->

`<!-- report: answer LoRA r 8, TABuv r 8 -->` has these arms alone.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from tiedlora import storage
from tiedlora.analysis.answers import Answer, Verdict
from tiedlora.analysis.claims import Pair
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.ranking import is_at_equal_size
from tiedlora.analysis.results import ResultRow
from tiedlora.analysis.shares import SharePanel
from tiedlora.errors import UserError
from tiedlora.page import tables
from tiedlora.page.ranked import EQUAL_SIZE
from tiedlora.page.tables import Column, Table
from tiedlora.page.write import Report, found_in_words, models
from tiedlora.records.loss_metrics import TARGET_LOSS
from tiedlora.text import visible

START = "<!-- report: "
BLOCK = re.compile(rf"(?P<start>{START}(?P<name>[^>]*?) -->\r?\n).*?(?P<end><!-- end of report -->)", re.DOTALL)
RUNS = "runs"
"""The name of the line that says how many runs the report has, of which models, tasks and commits."""
VERDICTS = "verdicts"
"""The name of the table that has a row for each claim. A line below it names the claims without a run."""
ANSWER = "answer"
"""The name of the table that has a row for each arm. Arms may stand behind it, separated by commas."""
COST = ("configuration", "rank", "parameters", "tokens/s", "peak memory GiB", "adapter MiB")
"""The columns of the table of costs."""


def write(report: Report, file: Path) -> list[str]:
    """Write the tables of a report between the marks of a README.

    Returns:
        The names of the tables that were written.

    Raises:
        UserError: the file cannot be read, has no marks, or a mark is wrong; nothing is written then.
        OSError: the file cannot be written.
    """
    text = filled(check(file), report)
    storage.write_bytes(file, text.encode())
    return [found["name"] for found in BLOCK.finditer(text)]


def check(file: Path) -> str:
    """The text of a README, if its marks are right.

    Raises:
        UserError: the file cannot be read, it has no marks, one has no end, or no table has its name.
    """
    try:
        text = storage.read_bytes(file).decode()
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8; save it as UTF-8, because the rest of it is written back") from None
    blocks, names = list(BLOCK.finditer(text)), ", ".join((RUNS, *TABLES))
    if not blocks:
        raise UserError(
            f"{file}: has no marks; write <!-- report: NAME --> and <!-- end of report -->; NAME is {names}"
        )
    wrong = next((found["name"] for found in blocks if not _is_known(found["name"])), None)
    if wrong is not None or text.count(START) != len(blocks):
        where = "" if wrong is None else f" {START}{wrong} -->:"
        raise UserError(f"{file}:{where} NAME must be one of {names}, and each mark needs its own end")
    return text


def _is_known(name: str) -> bool:
    """Whether a table has the name of a mark. That of the answer may go on with arms."""
    return name in (RUNS, *TABLES) or name.startswith(f"{ANSWER} ")


def filled(text: str, report: Report) -> str:
    """The text with the report's tables between its marks, which are right (`check`).

    Raises:
        UserError: a mark names an arm that has no runs.
    """

    def block(found: re.Match[str]) -> str:
        body = f"{visible(report.summary())}\n"
        if found["name"] != RUNS:
            name, _, arms = found["name"].partition(" ")
            table = _answer(report, arms.split(", ")) if arms else TABLES[name](report)
            body = tables.pipe_table(table) if table.rows else "There are no runs for this table yet.\n"
            if name == VERDICTS and (not_run := _not_run(report)):
                body += f"\n{tables.markdown(not_run)}\n"
        return f"{found['start']}{body}{found['end']}"

    return BLOCK.sub(block, text)


def _verdicts(report: Report) -> Table:
    """One row for each model and each claim of which a task was run, one column for each task."""
    parts = models(report, [])
    tasks = list(dict.fromkeys(answer.task for verdict in report.verdicts for answer in verdict.answers))
    rows = []
    for part in parts:
        # A dash is where none of the model's claims is about the task.
        asked = {answer.task: "not asked" for verdict in part.verdicts for answer in verdict.answers}
        for verdict in part.verdicts:
            if verdict.verdict == Verdict.NOT_RUN:
                continue
            of_task = asked | {answer.task: _cell(answer) for answer in verdict.answers}
            rows.append([part.name, verdict.claim.name, *map(of_task.get, tasks)])
    return _without_one_model(Table(VERDICTS, "", [Column(name) for name in ("model", "claim", *tasks)], rows))


def _not_run(report: Report) -> str:
    """The claims of which no task was run on any model, in a line; empty if there are none."""
    verdicts = [verdict for part in models(report, []) for verdict in part.verdicts]
    run = {verdict.claim.name for verdict in verdicts if verdict.verdict != Verdict.NOT_RUN}
    names = dict.fromkeys(verdict.claim.name for verdict in verdicts if verdict.claim.name not in run)
    return f"Not run: {'; '.join(names)}." if names else ""


def _cell(answer: Answer) -> str:
    """The verdict, and the number that its rule tests, at the level and with the seeds of the look that decided.

    A star marks a verdict that holds by Holm's procedure over all tests.
    """
    star, found = " *" if answer.survives_holm else "", found_in_words(answer)
    return f"{answer.verdict.value}{star}{f': {found}' if found else ''}"


def _scores(report: Report) -> Table:
    """One row for each group, task and metric that a claim names; without claims, for each task's first metric."""
    columns = (
        Column("model", cell=lambda row: row.group.model),
        Column("task", cell=lambda row: row.group.task_in_words),
        Column("metric", cell=lambda row: row.measure.metric),
        Column("configuration", cell=lambda row: row.group.configuration),
        Column("rank", tables.WHOLE, lambda row: row.group.rank),
        Column("parameters", tables.COUNT, lambda row: row.group.params),
        Column("lr", tables.RATE, lambda row: (row.group.lr, len(row.group.rates))),
        Column("seeds", tables.WHOLE, lambda row: len(row.seeds)),
        Column("rows", tables.COUNT, lambda row: row.examples),
        tables.estimate("score", lambda row: row.score),
        tables.estimate("minus base", lambda row: row.gain, "+"),
        tables.estimate("minus LoRA at this rank", lambda row: row.against.difference, "+"),
    )
    asked = {
        (answer.pair.anchor.task, answer.measure.metric) for answer in report.answers if answer.pair and answer.measure
    }
    rows = [
        row
        for row in report.rows
        if row.score is not None and ((row.group.task, row.measure.metric) in asked or (row.primary and not asked))
    ]

    def order(row: ResultRow) -> tuple[str, str, str, int, str]:
        group = row.group
        return group.model, group.task_in_words, row.measure.metric, -group.params, group.name

    return _without_one_model(Table.of("scores", "", columns, sorted(rows, key=order)))


def _of(group: RunGroup) -> tuple[str, str, int]:
    return group.model, group.configuration, group.rank


def _without_one_model(table: Table) -> Table:
    """The table without its first column, the model, if that is the same in all rows."""
    if len({row[0] for row in table.rows}) > 1:
        return table
    return table.at(range(1, len(table.columns)))


def _answer(report: Report, names: Sequence[str] = ()) -> Table:
    """One row for each arm: parameters, then its score and the verdict at equal size on each panel of shares.

    The panels are the tasks on which the arms can be told apart. Without names, the arms are those in at least half of
    their model's panels.
    """
    places: dict[str, dict[str, SharePanel]] = defaultdict(dict)
    for panel in report.share_panels:
        metric = "loss" if panel.measure.metric == TARGET_LOSS else panel.measure.metric
        places[f"{panel.reference.task_in_words} {metric}"][panel.reference.model] = panel
    of_model = Counter(panel.reference.model for panel in report.share_panels)
    shown = Counter(_of(arm.group) for panel in report.share_panels for arm in panel.arms)
    arms = {_of(row.group): row.group.params for row in report.rows}
    known = [_adapter(arm) for arm in arms]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{START}{ANSWER}: there are no runs of {', '.join(unknown)}; choose from {', '.join(known)}")
    scores = {(_of(row.group), row.group.setting, row.measure): row.score for row in report.rows}

    def score(arm: tuple[str, str, int], panel: SharePanel) -> str | None:
        found = scores.get((arm, panel.reference.setting, panel.measure))
        return None if found is None else panel.measure.unit.number(found.value)

    rows: list[list[object]] = []
    for arm, params in sorted(arms.items(), key=lambda item: -item[1]):
        if _adapter(arm) in names if names else shown[arm] and 2 * shown[arm] >= of_model[arm[0]]:
            own = [panels.get(arm[0]) for panels in places.values()]
            cells = [panel and score(arm, panel) for panel in own]
            cells += [panel and _at_equal_size(report, arm, panel) for panel in own]
            rows.append([arm[0], _adapter(arm), params, *cells])
    heads = [*places, *(f"{place}: against LoRA of its size" for place in places)]
    columns = [Column("model"), Column("adapter"), Column("trained parameters", tables.COUNT), *map(Column, heads)]
    return _without_one_model(Table("answer", "", columns, rows))


def _adapter(arm: tuple[str, str, int]) -> str:
    """The name of an arm in the table of answers, and in its mark."""
    _, configuration, rank = arm
    return f"{configuration} r {rank}"


def _at_equal_size(report: Report, arm: tuple[str, str, int], panel: SharePanel) -> str | None:
    """Whether an arm is better than LoRA of about its size, or than the curve at its size, by the claims about it.

    A star marks what holds by Holm's procedure over all tests.
    """
    found: dict[str, None] = {}
    for answer in report.answers:
        pair = answer.pair
        if not isinstance(pair, Pair) or not is_at_equal_size(answer) or _of(pair.method) != arm:
            continue
        if answer.measure == panel.measure and pair.anchor.setting == panel.reference.setting:
            found[EQUAL_SIZE.get(answer.verdict, "not shown") + (" *" if answer.survives_holm else "")] = None
    return ", ".join(found) or None


def _cost(report: Report) -> Table:
    """The costs in the setting with the most groups: speeds of other models, tasks or variants cannot be compared."""
    places = [(group.model, group.task, group.variant) for group in report.groups]
    most = max(sorted(set(places)), key=places.count, default=None)
    table = tables.cost(group for group, place in zip(report.groups, places, strict=True) if place == most)
    return table.at([table.head.index(name) for name in COST])


TABLES: dict[str, Callable[[Report], Table]] = {
    VERDICTS: _verdicts,
    ANSWER: _answer,
    "scores": _scores,
    "cost": _cost,
}
"""The tables that a README can hold."""
