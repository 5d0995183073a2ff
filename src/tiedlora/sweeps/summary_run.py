"""What a tracker gets of a whole sweep: a run with its verdicts, rates and decisions, and the chosen runs' answers.

Everything is read from the files of the sweep and its runs, so it can be sent at any time, and again. Nothing is sent
twice: summary_run.json in the sweep's folder says what was sent.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.analysis import claims as claim_files
from tiedlora.analysis.answers import Answer, Verdict, answer_claims
from tiedlora.analysis.groups import group_runs
from tiedlora.analysis.runs import LeftOut, Run, Scorebook, read_run
from tiedlora.config.compose import read_config
from tiedlora.config.project import PROJECT
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.selection import Selection
from tiedlora.records.summary import flat_summary
from tiedlora.sweeps.cells import Sweep, searches_rates
from tiedlora.sweeps.selection import decision_lines, written
from tiedlora.tracking.base import SWEEP, Cell, TextTable, TrackedRun
from tiedlora.tracking.run_trackers import NONE, SafeTracker, answers_table, backend_of, run_tables

log = logging.getLogger(__name__)

SENT_FILE = "summary_run.json"
CLAIMS = PROJECT / "claims" / "tied_lora.yaml"
"""The claims whose verdicts a sweep shows that has no claims of its own."""
MOST_ANSWERS = 1000
"""Most rows of the summary's table of answers."""


def track_sweep(sweep: Sweep, claims: Path = CLAIMS) -> None:
    """Send the summary of a sweep, and the chosen runs once more with their answers, if the sweep has a tracker.

    A failure is a warning: the sweep's result is in its files.
    """
    config = sweep.cells[0].config
    if (backend := backend_of(config)) == NONE:
        return
    try:
        _send(sweep, config, backend, claims)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("%s: its summary is not tracked (%s); its files have everything", sweep.id, reason[:300])


def _send(sweep: Sweep, config: Config, backend: str, claims: Path) -> None:
    selection, outputs = written(sweep), Path(config.outputs)
    # Those outside the grid too.
    found = [read_run(outputs / run_id) for run_id in sweep.run_ids() if (outputs / run_id).is_dir()]
    runs = [run for run in found if isinstance(run, Run)]
    left_out = [run for run in found if isinstance(run, LeftOut)]
    if not runs:
        return
    groups = group_runs(runs, left_out, [selection] if selection else [])
    stated = claim_files.read(claims) if claims.exists() else []
    # A claim that no run is about says nothing of this sweep.
    answers = [answer for answer in answer_claims(stated, groups, Scorebook()) if answer.pair is not None]
    tables = {"verdicts": verdicts_table(answers), **_selection_tables(selection)}
    chosen = _chosen(sweep, runs, selection)
    most = config.tracking.answers
    if most and (texts := _all_answers(chosen, most)) is not None:
        tables["answers"] = texts
    sent = _read_sent(sweep.path / SENT_FILE)
    digest = hashlib.sha256(json.dumps([backend, {k: asdict(t) for k, t in tables.items()}]).encode()).hexdigest()
    if sent.get("digest") == digest:
        return
    # A sweep without a search has sent the answers of its runs when they ended.
    replayed = set(sent.get("chosen", ())) if sent.get("backend") == backend else set()
    if most and searches_rates(sweep.cells):
        for run in chosen:
            if run.run_id not in replayed and _replay(sweep, run, most):
                replayed.add(run.run_id)
    values = {"cells": len(sweep.cells), "finished": len(runs), "claims": claims.name}
    summary = TrackedRun(sweep.id, sweep.path, config, kind=SWEEP, values=values)
    tracker = SafeTracker(summary, [])
    tracker.log_tables(lambda: tables)
    tracker.finish(_figures(answers, len(sweep.cells), len(runs)))
    if tracker.works:
        storage.write_json(sweep.path / SENT_FILE, {"backend": backend, "digest": digest, "chosen": sorted(replayed)})


def _read_sent(path: Path) -> dict[str, Any]:
    try:
        return storage.read_json(path)
    except UserError:
        return {}


def verdicts_table(answers: Sequence[Answer]) -> TextTable:
    """The verdicts with their effects and reasons."""
    columns = ("claim", "model", "task", "verdict", "difference", "low", "high", "seeds", "rows", "reason", "next")
    rows: list[tuple[Cell, ...]] = []
    for answer in answers:
        interval = answer.difference.widest if answer.difference else None
        ends = (interval.value, interval.low, interval.high) if interval else (None, None, None)
        named = (answer.claim.name, answer.model, answer.task, _in_words(answer))
        rows.append((*named, *ends, answer.seeds, answer.rows, answer.reason, answer.decide))
    return TextTable(columns, rows)


def _selection_tables(selection: Selection | None) -> dict[str, TextTable]:
    if selection is None:
        return {}
    columns = ("configuration", "rank", "task", "model", "rate", "rates tried", "metric", "value", "seeds")
    rows: list[tuple[Cell, ...]] = [
        (
            *(choice.configuration, choice.rank, choice.task, choice.model, choice.lr),
            *(len(choice.lrs), choice.metric, choice.value, choice.seeds, str(choice.edge).lower()),
        )
        for choice in selection.choices
    ]
    tables = {"rates": TextTable((*columns, "at the edge"), rows)} if rows else {}
    if selection.searches:
        tables["decisions"] = TextTable(("decision",), [(line,) for line in decision_lines(selection)])
    return tables


def _chosen(sweep: Sweep, runs: Sequence[Run], selection: Selection | None) -> list[Run]:
    """The runs at chosen rates; all runs of a sweep that searches none."""
    if not searches_rates(sweep.cells):
        return list(runs)
    ids = {run_id for choice in (selection.choices if selection else ()) for run_id in choice.run_ids}
    return [run for run in runs if run.run_id in ids]


def _all_answers(runs: Sequence[Run], most: int) -> TextTable | None:
    """The answers of all chosen runs in one table; None without answers."""
    columns: dict[str, None] = {}
    found: list[tuple[Run, TextTable]] = []
    for run in runs:
        if (table := answers_table(RunFolder(run.path), min(most, max(1, MOST_ANSWERS // len(runs))))) is not None:
            columns.update(dict.fromkeys(table.columns))
            found.append((run, table))
    if not found:
        return None
    rows: list[tuple[Cell, ...]] = []
    for run, table in found:
        for row in table.rows:
            named = dict(zip(table.columns, row, strict=True))
            rows.append((run.configuration, run.rank, run.seed, *(named.get(column) for column in columns)))
    return TextTable(("configuration", "rank", "seed", *columns), rows)


def _figures(answers: Sequence[Answer], cells: int, finished: int) -> dict[str, float | int | str]:
    """The summary's figures: how many verdicts of each kind, and every verdict by its claim."""
    figures: dict[str, float | int | str] = {"cells": cells, "finished": finished}
    verdicts = [answer.verdict for answer in answers]
    figures.update({f"verdicts/{verdict}": verdicts.count(verdict) for verdict in Verdict})
    for answer in answers:
        figures[f"verdict/{answer.claim.name} ({answer.model}, {answer.task})"] = _in_words(answer)
    return figures


def _in_words(answer: Answer) -> str:
    return f"{answer.verdict}{' (exploratory)' if answer.exploratory else ''}"


def _replay(sweep: Sweep, run: Run, most: int) -> bool:
    """Send a chosen run once more as a whole, now with its answers. Whether the tracker took it."""
    folder = RunFolder(run.path)
    config = read_config(folder.config_file)
    tracking = sweep.cells[0].config.tracking
    config.tracking = replace(tracking, group=tracking.group or sweep.id)
    tracked = TrackedRun(run.run_id, run.path, config, run.params, chosen=True)
    tracker = SafeTracker(tracked, read_metrics(folder.metrics_file))
    tracker.log_tables(lambda: run_tables(tracked, most))
    tracker.finish(flat_summary(run.record))
    return tracker.works
