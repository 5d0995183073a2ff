"""The state of a sweep's cells, read from their folders: as a table, in lines, as JSON, or live.

`scripts/sweep.py status` and `watch` show it, in any terminal on the same folder. They write nothing into the sweep's
folder, and hold the lock of a run only for a moment.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tiedlora import screen
from tiedlora.config.rates import NOT_SEARCHED, searched_lr
from tiedlora.config.sizes import trainable_params
from tiedlora.errors import UserError
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import LOOK_SECONDS, State
from tiedlora.records.scores import read_finished
from tiedlora.records.selection import SELECTION_FILE, Selection, read_selection
from tiedlora.scoring.wanted import lacks_scores
from tiedlora.sweeps.cells import PLAN_FILE, VERDICTS_FILE, SweepCell, SweepControl, frozen_cell, rate_groups
from tiedlora.sweeps.selection import decision_lines
from tiedlora.text import clock, visible

KEYS_WITH_COLUMN = ("model", "task", "tying", "rank", "rank.r", "train.lr", "seed")
"""Keys whose values have their own columns in the table."""
COLUMNS = ("model", "task", "configuration", "rank", "trainable", "lr", "seed")
RESULT_COLUMNS = ("state", "step", "score", "val. loss", "seconds")
NUMBERS = ("rank", "trainable", "seed", "step", "score", "val. loss", "seconds", "time")
SECONDS_BETWEEN_LOOKS = 1.0
LARGEST_SHARE = 0.05
"""The largest share of the time for looking: ten thousand cells take seconds on a network file system."""
LISTED = 6
"""The most failures and decisions above the live table, and the most sweeps that an error message names."""
STYLES = {
    State.RUNNING: "bold cyan",
    State.FAILED: "bold red",
    State.INTERRUPTED: "magenta",
    State.PAUSED: "blue",
    State.DONE: "green",
    State.PRUNED: "yellow",
    **dict.fromkeys((State.MISSING, State.DROPPED, State.UNNEEDED), "dim"),
}
"""The states in the order of the live table, of which a terminal may show only the beginning -> how a line is drawn."""


@dataclass(frozen=True)
class CellStatus:
    """One cell: its state, its scores and time so far, and why it failed."""

    cell: SweepCell
    state: State
    is_needed: bool = True
    """Whether the sweep will run it, if it is not done. A search that has chosen a rate needs no other."""
    error: str | None = None
    """Why it failed, in one line."""
    seconds: float = 0.0
    """The time so far, of training and of scoring the splits that the sweep scores."""
    step: int = 0
    """The last logged step."""
    validation_loss: float | None = None
    """The last one so far."""
    metric: str | None = None
    """The task's first metric on validation; None if validation is not scored."""
    score: float | None = None
    """The value of the metric, a fraction of 1; for a loss, nats."""

    @property
    def run_id(self) -> str:
        """The id of the cell's run."""
        return self.cell.run_id

    @property
    def is_open(self) -> bool:
        """Whether the sweep still has work to do on it."""
        return self.is_needed and self.state not in (State.DONE, State.FAILED, State.DROPPED)

    def __str__(self) -> str:
        """State, seconds so far, run, rate, and why it failed."""
        rate = f"lr={self.cell.name.lr:g}"
        return f"{self.state:<12} {self.seconds:>6.0f} s  {self.run_id}  {rate}  {self.error or ''}".rstrip()


class Searched:
    """What a search of learning rates has decided about the cells of its sweep."""

    def __init__(self, selected: Selection, cells: Iterable[SweepCell], takes_looks: bool = False) -> None:
        self.selection = selected
        self.chosen = {run_id for choice in selected.choices for run_id in choice.run_ids}
        self.rungs = {step for search in selected.searches for step in search.rungs}
        without = {s.group for s in selected.searches if any(made.action == "none" for made in s.decisions)}
        self.is_over = len(selected.choices) + len(without) == len(selected.searches) and not takes_looks
        """Whether every search has chosen a rate, or found that all diverge; and no look is to come."""
        self.unneeded: set[str] = set()
        """The cells that the searches no longer need. A look may need other seeds of a chosen rate."""
        for name, group in rate_groups(cells).items():
            rates = {cell.name.lr for cell in group if cell.run_id in self.chosen}
            needed = self.chosen | {cell.run_id for cell in group if takes_looks and cell.name.lr in rates}
            if rates or name in without:
                self.unneeded |= {cell.run_id for cell in group} - needed


def read_search(folder: Path, cells: Iterable[SweepCell]) -> Searched | None:
    """What a search has decided in the sweep of this folder; None if there is no search."""
    file = folder / SELECTION_FILE
    selected = read_selection(file) if file.is_file() else None
    # A deciding sweep writes its plan first and its verdicts last.
    takes_looks = (folder / PLAN_FILE).exists() and not (folder / VERDICTS_FILE).exists()
    return Searched(selected, cells, takes_looks) if selected is not None and selected.searches else None


def status_of(
    cell: SweepCell, control: SweepControl, searched: Searched | None = None, patience: float = LOOK_SECONDS
) -> CellStatus:
    """The status of a cell. A run whose result.json is damaged has failed.

    Args:
        searched: what the sweep's search has decided; None for a sweep that runs all cells.
        patience: as RunFolder.state.
    """
    folder = cell.folder
    try:
        run = read_finished(folder)
        # A search scores only the runs that it chooses. The others are done without scores.
        is_unscored = searched is not None and cell.run_id not in searched.chosen and not folder.error_file.exists()
        is_scored = run is None or is_unscored or not lacks_scores(cell.config.score, folder)
    except UserError as damage:
        return CellStatus(cell, State.FAILED, error=visible(str(damage)))
    pause = cell.pauses_at
    if searched and not folder.pruned_file.exists() and (step := folder.checkpoint_step()) in searched.rungs:
        pause = step
    state = folder.state(is_scored, pause, patience)
    is_needed = searched is None or (cell.run_id not in searched.unneeded and state != State.PRUNED)
    if state not in (State.DONE, State.RUNNING) and control.is_dropped(cell.run_id):
        state = State.DROPPED
    if not is_needed and state in (State.MISSING, State.INTERRUPTED, State.PAUSED):
        state = State.UNNEEDED
    error = folder.error() if state == State.FAILED else None
    if run is None:
        rows = read_metrics(folder.metrics_file) if folder.metrics_file.is_file() else []
        losses = [loss for row in rows if (loss := row.values.get("validation/loss")) is not None]
        # The logged time of training, which only grows.
        seconds = max((row.values.get("train/seconds", 0.0) for row in rows), default=0.0)
        step = max((row.step for row in rows), default=0)
        return CellStatus(cell, state, is_needed, error, seconds, step, losses[-1] if losses else None)
    # `select` may have scored test later. The other cells of the sweep will not need that time.
    asked = [record for split in cell.config.score.splits for record in run.scores.of(split)]
    training = run.record.training
    seconds = training.seconds + sum(record.seconds for record in asked)
    metric = run.scores.first_metric("validation")
    score = run.scores.metrics("validation")[metric].value if metric else None
    loss, step = training.validation_loss_last, training.steps
    return CellStatus(cell, state, is_needed, error, seconds, step, loss, metric, score)


def time_left(cells: Sequence[CellStatus]) -> dict[str, float]:
    """Run id -> the seconds that an open cell still needs.

    A cell is expected to need the mean time of the done cells of its model and task, or else of all done cells. Before
    one is done, its own speed so far counts. A cell about which nothing is known is taken as the mean of the others.
    """
    times: dict[tuple[str, ...], list[float]] = {}
    for cell in cells:
        if cell.state == State.DONE:
            for key in ((cell.cell.name.model, cell.cell.name.task), ()):
                times.setdefault(key, []).append(cell.seconds)
    left = {}
    still_open = [cell for cell in cells if cell.is_open]
    for cell in still_open:
        if alike := times.get((cell.cell.name.model, cell.cell.name.task), times.get(())):
            left[cell.run_id] = max(0.0, mean(alike) - cell.seconds)
        elif cell.step and cell.seconds:
            steps_left = max(0, cell.cell.config.train.steps - cell.step)
            left[cell.run_id] = steps_left * cell.seconds / cell.step
    typical = mean(left.values()) if left else 0.0
    return {cell.run_id: left.get(cell.run_id, typical) for cell in still_open} if left else {}


def counts(cells: Iterable[CellStatus]) -> dict[str, int]:
    """State -> how many cells are in it, for every state."""
    found = Counter(cell.state for cell in cells)
    return {state.value: found[state] for state in State}


def summary_line(sweep_id: str, cells: Sequence[CellStatus]) -> str:
    """One line: number of cells, states, time."""
    states = ", ".join(f"{count} {state}" for state, count in counts(cells).items() if count)
    text = f"{sweep_id}: {len(cells)} cells: {states}; {clock(sum(cell.seconds for cell in cells))} so far"
    left = sum(time_left(cells).values())
    return text if not left else f"{text}, about {clock(left)} left for one process"


def rows(cells: Sequence[CellStatus]) -> list[list[str]]:
    """Every cell with its names, state, score and time, below the head. Other swept keys get columns too."""
    words = [dict(override.split("=", 1) for override in cell.cell.overrides) for cell in cells]
    keys = [key for key in dict.fromkeys(key for own in words for key in own) if key not in KEYS_WITH_COLUMN]
    extra = [key for key in keys if len({own[key] for own in words if key in own}) > 1]
    lines = [[*COLUMNS, *extra, *RESULT_COLUMNS]]
    for cell, values in zip(cells, words, strict=True):
        name, trainable = cell.cell.name, trainable_params(cell.cell.config)
        # The first metric in per cent. A loss is in nats, and has its own column.
        score = "" if cell.score is None or is_loss(cell.metric or "") else f"{100 * cell.score:.1f} %"
        loss = "" if cell.validation_loss is None else f"{cell.validation_loss:.3f}"
        lines.append(
            [name.model, name.task, name.configuration, str(name.rank)]
            + ["" if trainable is None else f"{trainable:,}", _rate(cell.cell, values), str(name.seed)]
            + [values.get(key, "") for key in extra]
            + [cell.state, _step(cell), score, loss, f"{cell.seconds:.0f}"]
        )
    return lines


def drawn(cells: Sequence[CellStatus]) -> RenderableType:
    """The table of cells, each in the colour of its state. If there is too little room, columns that only repeat one
    value are left out.
    """
    head, *values = rows(cells)
    varying = [i for i, name in enumerate(head) if name in RESULT_COLUMNS or len({row[i] for row in values}) > 1]

    def at(places: Sequence[int]) -> Table:
        return _coloured(cells, [head[i] for i in places], [[row[i] for i in places] for row in values])

    return screen.FirstThatFits(at(range(len(head))), at(varying))


def _coloured(cells: Sequence[CellStatus], head: Sequence[str], values: Sequence[Sequence[str]]) -> Table:
    made = screen.table(head, values, NUMBERS)
    for row, cell in zip(made.rows, cells, strict=True):
        row.style = STYLES[cell.state]
    return made


def summarised(sweep_id: str, cells: Sequence[CellStatus]) -> tuple[RenderableType, ...]:
    """The table of all cells, and below it the counts and times in one line."""
    return drawn(cells), "", Text(summary_line(sweep_id, cells), style="bold")


def unfinished(sweep_id: str, cells: Sequence[CellStatus]) -> Iterator[RenderableType]:
    """The counts and times in one line, the cells that are not done with the ids that `drop` takes, and why some have
    failed.
    """
    yield Text(summary_line(sweep_id, cells), style="bold")
    by_state = list(STYLES)
    listed = [cell for cell in cells if cell.state != State.DONE and cell.is_needed]
    listed.sort(key=lambda cell: by_state.index(cell.state))
    if listed:
        lines = [
            [cell.state, _step(cell), clock(cell.seconds), f"{cell.cell.name.lr:g}", cell.run_id] for cell in listed
        ]
        yield _coloured(listed, ("state", "step", "time", "lr", "cell"), lines)
    yield from (
        Text(f"{cell.run_id}: {visible(cell.error or '')}", style=STYLES[cell.state])
        for cell in listed
        if cell.state == State.FAILED
    )


def _step(cell: CellStatus) -> str:
    return f"{cell.step}/{cell.cell.config.train.steps}" if cell.step else ""


def _rate(cell: SweepCell, values: Mapping[str, str]) -> str:
    """The rate, and whether it is a default that no search stands behind. The words of a frozen cell are not known.

    Args:
        values: key -> value of the cell's words.
    """
    name, rate = cell.name, f"{cell.name.lr:g}"
    is_default = bool(values) and "train.lr" not in values
    if is_default and searched_lr(cell.config.model.name, name.task, name.configuration, name.rank) is None:
        return f"{rate} {NOT_SEARCHED}"
    return rate


def to_json(sweep_id: str, cells: Sequence[CellStatus], forecast: Sequence[Mapping[str, object]] | None = None) -> str:
    """The sweep with its cells as plain data, for programs. The object of a cell has one level of keys.

    Args:
        cells: one that was read from its frozen configuration has no overrides.
        forecast: the cost of each model and task, for a plan.
    """
    left = time_left(cells)
    has_estimate = left or any(cell.state == State.DONE for cell in cells)
    found = ("state", "metric", "score", "validation_loss", "error", "seconds")
    tree = {
        "sweep": sweep_id,
        "counts": counts(cells),
        "seconds_left": sum(left.values()) if has_estimate else None,
        **({} if forecast is None else {"forecast": list(forecast)}),
        "cells": [
            {"run_id": cell.run_id, "overrides": list(cell.cell.overrides), **asdict(cell.cell.name)}
            | {"trainable": trainable_params(cell.cell.config)}
            | {name: getattr(cell, name) for name in found}
            for cell in cells
        ],
    }
    return json.dumps(tree, indent=2, ensure_ascii=False)


def find_sweep(outputs: Path, name: str | None = None) -> Path:
    """The folder of a sweep.

    Args:
        outputs: the folder of the runs.
        name: the sweep's id, its name (as `paper` of paper-1a2b3c4d), or its folder. If several have the name, the one
            whose command was started last is taken. None matches all.

    Raises:
        UserError: there is no such sweep.
    """
    if name is not None and (Path(name) / "cells").is_dir():
        return Path(name).absolute()
    sweeps = [path.parent for path in (outputs / "sweeps").glob("*/cells") if path.is_dir()]
    sweeps.sort(key=lambda path: SweepControl(path).began(), reverse=True)
    for path in sweeps:
        if name in (None, path.name, path.name.rpartition("-")[0]):
            return path
    if not sweeps:
        raise UserError(f"{outputs}: has no sweeps/; start one with train.py --multirun, or name its outputs=FOLDER")
    newest = ", ".join(path.name for path in sweeps[:LISTED])
    raise UserError(f"{name}: no such sweep in {outputs}; choose one of {newest}")


@dataclass(frozen=True)
class SweepView:
    """A sweep as it is now."""

    cells: list[CellStatus]
    summary: str
    """The counts and times in one line."""
    decisions: list[str]
    """What the sweeper decided and why, in its order."""
    ended: bool
    """Whether nothing is left to do."""


def views(folder: Path) -> Iterator[SweepView]:
    """The sweep of outputs/sweeps/SWEEP as it is now, at every step of the iteration. What cannot change any more is
    read once, and a damaged run is a failed cell.
    """
    control = SweepControl(folder)
    known: dict[str, SweepCell] = {}
    done: dict[str, CellStatus] = {}
    while True:
        for path in (folder / "cells").glob("*.json"):
            if path.stem not in known:
                known[path.stem] = frozen_cell(folder, path.stem)
        in_order = sorted(known.values(), key=lambda cell: (cell.name, cell.run_id))
        searched = read_search(folder, in_order)
        # Without patience, because many cells may be running. Nothing is decided here.
        cells = [done.get(cell.run_id) or status_of(cell, control, searched, patience=0) for cell in in_order]
        is_decided = searched is None or searched.is_over
        if is_decided:
            # Before, the search may still choose a run that is done without scores.
            done.update({cell.run_id: cell for cell in cells if cell.state == State.DONE})
        stopped_by = control.first_failure()
        # A search that needs a cell that has failed starts no other one, and decides nothing.
        goes_on = stopped_by is None and not control.has_ended()
        is_working = any(cell.state == State.RUNNING or (cell.is_open and goes_on) for cell in cells)
        ended = (is_decided or not goes_on) and not is_working
        summary = summary_line(visible(folder.name), cells) + (", ended" if ended else "")
        if stopped_by is not None:
            summary += f"; stopped, because {visible(stopped_by)} failed (fail_fast)"
        yield SweepView(cells, summary, [] if searched is None else decision_lines(searched.selection), ended)


def watch(folder: Path) -> bool:
    """Show the sweep until it has ended, or until Ctrl-C: as a live table on a terminal, otherwise as lines.

    Returns:
        Whether no cell has failed.

    Raises:
        UserError: the sweep's own files are damaged.
    """
    console = screen.console()
    # The alternate screen: what the terminal showed before comes back at the end, with the last table below it.
    live = Live(console=console, screen=True, auto_refresh=False)
    is_live = console.is_terminal and not console.is_dumb_terminal
    before = None
    with suppress(KeyboardInterrupt), live if is_live else nullcontext():
        for now in views(folder):
            begun = time.monotonic()
            if is_live:
                live.update(frame(now), refresh=True)
            else:
                for line in news(before, now):
                    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            before = now
            if now.ended:
                break
            time.sleep(max(SECONDS_BETWEEN_LOOKS, (time.monotonic() - begun) / LARGEST_SHARE))
    last = next(views(folder))
    if is_live:
        console.print(frame(last))
    return not any(cell.state == State.FAILED for cell in last.cells)


def frame(view: SweepView) -> Group:
    """The screen: a terminal that is too small for it shows its beginning."""
    lines = [Text(view.summary, style="bold"), *([] if view.ended else [Text("Ctrl-C leaves", style="dim")])]
    failed = [str(cell) for cell in view.cells if cell.state == State.FAILED]
    for title, listed in (("Failed", failed[:LISTED]), ("Decided", view.decisions[-LISTED:])):
        if listed:
            lines += [Text(), Text(title, style="bold")]
            lines += [Text(line, no_wrap=True, overflow="ellipsis") for line in listed]
    cells = sorted(view.cells, key=lambda cell: list(STYLES).index(cell.state))
    return Group(*lines, Text(), drawn(cells))


def news(before: SweepView | None, now: SweepView) -> Iterator[str]:
    """What has changed between two looks, as lines for a log. Without an earlier look, the state of all."""
    earlier = {} if before is None else {cell.run_id: cell.state for cell in before.cells}
    yield from (str(cell) for cell in now.cells if cell.state != earlier.get(cell.run_id, State.MISSING))
    known = set(before.decisions if before else ())
    yield from (f"decided: {line}" for line in now.decisions if line not in known)
    if before is None or counts(before.cells) != counts(now.cells) or before.ended != now.ended:
        yield now.summary
