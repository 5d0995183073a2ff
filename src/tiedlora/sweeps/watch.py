"""`scripts/sweep.py watch`: a sweep while it runs, in any terminal on the same folder, as a live table or as lines.

It looks at the sweep's folder again and again. It writes nothing there, and holds the lock of a run only for a moment.
Every text is a rich Text, which is never read as rich's markup.
"""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tiedlora import storage
from tiedlora.config.identity import config_tree
from tiedlora.errors import UserError
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import State
from tiedlora.records.selection import SELECTION_FILE, read_selection
from tiedlora.sweeps.cells import VERDICTS_FILE, SweepCell, frozen_cell, searches_rates
from tiedlora.sweeps.control import SweepControl
from tiedlora.sweeps.selection import decision_lines
from tiedlora.sweeps.status import CellStatus, Searched, counts, shown_score, status_of, time_left
from tiedlora.text import clock, visible

SECONDS_BETWEEN_LOOKS = 1.0
LARGEST_SHARE = 0.05
"""Most of the time that is spent on looking: ten thousand cells on a network file system take seconds."""
LISTED = 10
"""Most sweeps that an error message names."""
LONGEST_REASON = 300
"""Most characters of a text that are shown."""
STYLES = {
    State.DONE: "green",
    State.RUNNING: "bold cyan",
    State.FAILED: "bold red",
    State.PAUSED: "blue",
    State.PRUNED: "yellow",
    State.INTERRUPTED: "magenta",
    State.DROPPED: "dim",
    State.MISSING: "dim",
    State.UNNEEDED: "dim",
}
"""The state of a cell -> how it is drawn. The state is always a word too."""
SHOWN_FIRST = ("running", "failed", "interrupted", "paused", "done", "pruned", "missing", "dropped", "unneeded")
"""The order of the lines when not all fit."""
BAR = {State.MISSING: "·", State.UNNEEDED: " ", State.RUNNING: "▓", State.FAILED: "x"}
"""The sign of a state in the bar, where it is not a full block."""
WIDE = 100
"""From so many characters on, the table has all its columns and wider gaps."""
COLUMNS = {
    **dict.fromkeys(("state", "model", "task", "configuration", "rate"), 0),
    **{"seed": 50, "step": 0, "loss": 0, "to best": 60, "score": WIDE, "time": 70, "left": 60, "differs in": 0},
}
"""Column -> the narrowest terminal that shows it, in characters."""
WORDS = ("state", "model", "task", "configuration", "differs in")
"""The columns that are not numbers."""


def find_sweep(outputs: Path, name: str | None = None) -> Path:
    """The folder of a sweep.

    Args:
        outputs: the folder of the runs.
        name: the sweep's id, its name (as `paper` of paper-1a2b3c4d), a pattern with * and ?, or its folder. If several
            match, the one that changed last is taken. None matches all.

    Raises:
        UserError: there is no such sweep.
    """
    if name is not None and (Path(name) / "cells").is_dir():
        return Path(name).absolute()
    sweeps = [path.parent for path in (outputs / "sweeps").glob("*/cells") if path.is_dir()]
    matching = [
        path
        for path in sweeps
        if name is None or path.name.rpartition("-")[0] == name or fnmatch.fnmatch(path.name, name)
    ]
    if matching:
        return max(matching, key=_last_change)
    newest = [path.name for path in sorted(sweeps, key=_last_change, reverse=True)]
    if name is None or not newest:
        raise UserError(f"{outputs}: has no sweeps/; start one with train.py --multirun, or name its outputs=FOLDER")
    raise UserError(f"{name}: no such sweep in {outputs}; choose one of {', '.join(newest[:LISTED])}")


def _last_change(sweep: Path) -> float:
    """When a file of the sweep or of its cells changed last: a sweep that continues does not write its own folder."""
    outputs = sweep.parent.parent
    cells = [outputs / path.stem for path in (sweep / "cells").glob("*.json")]
    places = [sweep, sweep / "cells", *cells, *(cell / "metrics.jsonl" for cell in cells)]
    return max((path.stat().st_mtime for path in places if path.exists()), default=0.0)


@dataclass(frozen=True)
class SweepView:
    """A sweep as it is now."""

    id: str
    cells: list[CellStatus]
    losses: dict[str, tuple[float, float | None]]
    """Run id -> the newest validation loss, and this loss minus the lowest one at the same step among the cells that it
    is compared with; 0 if it is the lowest, and None if no other cell has a loss at this step."""
    compares_rates: bool
    """Whether losses are compared among the rates of one configuration; otherwise among cells of a model and task."""
    left: dict[str, float]
    """Run id -> seconds that an open cell still needs."""
    is_most: bool
    """Whether the time left is an upper limit, because a search may stop cells."""
    apart: dict[str, str]
    """Run id -> the values that tell the cell from others with the same name."""
    decisions: list[str]
    """What the sweeper decided and why, in its order."""
    stopped_by: str
    """The failed cell that stopped the sweep (fail_fast), or empty."""
    ended: bool
    """Whether nothing is left to do."""

    @property
    def failed(self) -> list[CellStatus]:
        """The cells that failed."""
        return [cell for cell in self.cells if cell.state == State.FAILED]


class Watch:
    """Looks at a sweep again and again. What cannot change any more is read once.

    Args:
        folder: the sweep's folder, outputs/sweeps/SWEEP.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.control = folder, SweepControl(folder)
        self._cells: dict[str, SweepCell] = {}
        self._done: dict[str, tuple[tuple[int, int], CellStatus]] = {}
        self._curves: dict[str, tuple[tuple[int, int], dict[int, float]]] = {}

    def look(self) -> SweepView:
        """The sweep as it is now.

        Raises:
            UserError: the sweep's own files are damaged. A damaged run is a failed cell.
        """
        for path in (self.folder / "cells").glob("*.json"):
            if path.stem not in self._cells:
                self._cells[path.stem] = frozen_cell(self.folder, path.stem)
        in_order = sorted(self._cells.values(), key=lambda cell: (cell.name, cell.run_id))
        file = self.folder / SELECTION_FILE
        selected = read_selection(file) if file.is_file() else None
        searched = Searched(selected, in_order) if selected and selected.searches else None
        cells = [self._status(cell, searched) for cell in in_order]
        losses, compares_rates = self._losses(in_order)
        stopped_by = self.control.first_failure() or ""
        is_idle = not any(cell.state == State.RUNNING for cell in cells)
        has_work = any(cell.is_open for cell in cells) and not stopped_by
        return SweepView(
            id=visible(self.folder.name),
            cells=cells,
            losses=losses,
            compares_rates=compares_rates,
            left=time_left(cells),
            is_most=searched is not None,
            apart=_telling_apart(in_order),
            decisions=[*map(_short, decision_lines(selected)), *_verdict_lines(self.folder / VERDICTS_FILE)],
            stopped_by=_short(stopped_by),
            ended=is_idle and not has_work and (searched is None or searched.is_over),
        )

    def _status(self, cell: SweepCell, searched: Searched | None) -> CellStatus:
        version = _version(cell.folder.result_file)
        if cell.run_id in self._done and self._done[cell.run_id][0] == version:
            return self._done[cell.run_id][1]
        status = status_of(cell, self.control, searched)
        # The search may still choose a run that is done without scores.
        if version is not None and status.state == State.DONE and (searched is None or searched.is_over):
            self._done[cell.run_id] = version, status
        return status

    def _losses(self, cells: Sequence[SweepCell]) -> tuple[dict[str, tuple[float, float | None]], bool]:
        """The losses and `compares_rates` of SweepView."""
        compares_rates = searches_rates(cells)
        groups: dict[object, list[str]] = {}
        for cell in cells:
            key = cell.rate_group if compares_rates else (cell.name.model, cell.name.task)
            groups.setdefault(key, []).append(cell.run_id)
        curves = {cell.run_id: self._curve(cell) for cell in cells}
        losses: dict[str, tuple[float, float | None]] = {}
        for group in groups.values():
            for run_id in (run_id for run_id in group if curves[run_id]):
                step = max(curves[run_id])
                loss, others = curves[run_id][step], [curves[other][step] for other in group if step in curves[other]]
                # Before the first step, all cells are the base model.
                losses[run_id] = loss, loss - min(others) if step and len(others) > 1 else None
        return losses, compares_rates

    def _curve(self, cell: SweepCell) -> dict[int, float]:
        """Step -> validation loss."""
        file = cell.folder.metrics_file
        if (version := _version(file)) is None:
            return {}
        if cell.run_id not in self._curves or self._curves[cell.run_id][0] != version:
            rows = read_metrics(file, "validation/loss")
            curve = {row.step: row.values["validation/loss"] for row in rows if "validation/loss" in row.values}
            self._curves[cell.run_id] = version, curve
        return self._curves[cell.run_id][1]


def _version(file: Path) -> tuple[int, int] | None:
    """Which version of a file is there; None without a regular file."""
    if not file.is_file():
        return None
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def _short(text: str) -> str:
    """A text of a stranger on one line, without control characters."""
    return visible(text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ...")


def _verdict_lines(file: Path) -> list[str]:
    """The verdicts of a deciding sweep; none before its end, or if the file is damaged."""
    try:
        entries = json.loads(storage.read_bytes(file))
    except (UserError, ValueError, RecursionError):
        return []
    return [
        _short(f"{claim.get('claim')} ({claim.get('model')}, {claim.get('task')}): {claim.get('verdict')}")
        + _short(f": {claim.get('reason')}")
        for claim in (entries if isinstance(entries, list) else [])
        if isinstance(claim, dict)
    ]


def _telling_apart(cells: Sequence[SweepCell]) -> dict[str, str]:
    """Run id -> the values that tell a cell from others with the same name; empty for a cell whose name suffices."""
    alike: dict[object, list[SweepCell]] = {}
    for cell in cells:
        alike.setdefault(cell.name, []).append(cell)
    words = dict.fromkeys((cell.run_id for cell in cells), "")
    for same in (same for same in alike.values() if len(same) > 1):
        # It takes half a second to import, and most sweeps do not need it.
        import pandas

        values = pandas.json_normalize([config_tree(cell.config) for cell in same]).astype(str)
        different = values.loc[:, values.nunique() > 1]
        for cell, row in zip(same, different.to_dict("records"), strict=True):
            words[cell.run_id] = _short(" ".join(f"{key}={value}" for key, value in row.items()))
    return words


def watch(folder: Path) -> bool:
    """Show the sweep until it has ended, or until Ctrl-C: as a live table on a terminal, otherwise as lines.

    Returns:
        Whether no cell has failed.

    Raises:
        UserError: the sweep's own files are damaged.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    is_table = console.is_terminal and not console.is_dumb_terminal
    view = _show_table(Watch(folder), console) if is_table else _print_lines(Watch(folder))
    return not view.failed


def _show_table(sweep: Watch, console: Console) -> SweepView:
    now = sweep.look()
    if not now.ended:
        # The alternate screen: what the terminal showed before comes back at the end, with the last table below it.
        with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
            for now in _looks(sweep):
                live.update(frame(now, console.width, console.height), refresh=True)
    console.print(frame(now, console.width, max(console.height, len(now.cells) + 40)))
    return now


def _print_lines(sweep: Watch) -> SweepView:
    before: SweepView | None = None
    with suppress(KeyboardInterrupt):
        for now in _looks(sweep):
            for line in news(before, now):
                print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            before = now
    return before or sweep.look()


def _looks(sweep: Watch) -> Iterator[SweepView]:
    """The sweep as it is, again and again until it has ended."""
    while True:
        begun = time.monotonic()
        view = sweep.look()
        yield view
        if view.ended:
            return
        # It includes the time to show the view.
        spent = time.monotonic() - begun
        time.sleep(max(SECONDS_BETWEEN_LOOKS, spent / LARGEST_SHARE))


def frame(view: SweepView, width: int, height: int) -> RenderableType:
    """The whole screen.

    Args:
        width, height: of the terminal, in characters. What does not fit is counted in words.
    """
    failed, decisions, footer = view.failed, view.decisions, _footer(view)
    # Title, bar, counts, an empty line, the table's head and its last line, and the footer.
    room = max(3, height - 6 - len(footer))
    failures = failed[: max(1, room // 5)]
    reasons = decisions[-max(1, room // 5) :] if decisions else []
    room -= (len(failures) + 2 if failures else 0) + (len(reasons) + 2 if reasons else 0)
    parts: list[RenderableType] = [_title(view), _bar(view, width), _counts(view), Text()]
    parts.append(_table(view, width, max(1, room)))
    if failures:
        parts += [Text(), Text(f"Failed: {len(failed)}", style="bold red")]
        parts += [_line(f"  {cell_name(view, cell)}: {_short(cell.error or '')}") for cell in failures]
    if reasons:
        more = len(decisions) - len(reasons)
        parts += [Text(), Text("Decided" + (f" ({more} earlier)" if more else ""), style="bold")]
        parts += [_line(f"  {reason}") for reason in reasons]
    return Group(*parts, *footer)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _title(view: SweepView) -> Text:
    title = _line(view.id, "bold")
    title.append(f"  {counts(view.cells)['done']} of {len(view.cells)} done", style="not bold")
    if view.ended:
        title.append("  ended", style="green" if not view.failed else "red")
    return title


def _bar(view: SweepView, width: int) -> Text:
    """A line whose parts are as long as the shares of the states."""
    bar, filled, seen, number = Text(no_wrap=True), 0, 0, counts(view.cells)
    for state in ("done", "pruned", "dropped", "failed", "running", "paused", "interrupted", "missing", "unneeded"):
        seen += number[state]
        upto = round(width * seen / max(1, len(view.cells)))
        bar.append(BAR.get(State(state), "█") * (upto - filled), style=STYLES[State(state)])
        filled = upto
    return bar


def _counts(view: SweepView) -> Text:
    """The states and times. The time left is that of all open cells, as many at once as now."""
    line, number = _line(""), counts(view.cells)
    for state, count in number.items():
        if count:
            line.append(f"{count} {state}", style=STYLES[State(state)])
            line.append("  ")
    line.append(f"{clock(sum(cell.seconds for cell in view.cells))} of work so far")
    at_once = number["running"]
    if (seconds := sum(view.left.values()) / max(1, at_once)) and not view.ended:
        line.append(f", {'at most' if view.is_most else 'about'} {clock(seconds)} left")
        line.append(f" with {at_once} at once" if at_once > 1 else "")
    return line


def _footer(view: SweepView) -> list[Text]:
    lines = [Text()]
    if view.stopped_by:
        lines.append(_line(f"fail_fast: {view.stopped_by} failed, so the others stopped", "bold red"))
    among = "its configuration's rates" if view.compares_rates else "its model and task"
    words = f"to best: loss minus the lowest at that step of {among}"
    return [*lines, _line(words + ("" if view.ended else " · Ctrl-C leaves"), "dim")]


def _table(view: SweepView, width: int, lines: int) -> RenderableType:
    """At most `lines` cells, the most telling ones, in the sweep's order."""
    shown = view.cells
    if len(shown) > lines:
        first = sorted(shown, key=lambda cell: SHOWN_FIRST.index(cell.state))[: max(0, lines - 1)]
        chosen = {cell.run_id for cell in first}
        shown = [cell for cell in shown if cell.run_id in chosen]
    names = [column for column in COLUMNS if _is_shown(column, view, width)]
    table = Table(box=None, padding=(0, 2 if width >= WIDE else 1, 0, 0), pad_edge=False, header_style="bold")
    for name in names:
        least = 4 if name in WORDS[1:] else None
        justify = "left" if name in WORDS else "right"
        table.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis", min_width=least)  # type: ignore[arg-type]
    for cell in shown:
        words = _words(view, cell)
        table.add_row(
            *(_cell_text(name, words[name], cell.state) for name in names),
            style="dim" if STYLES[cell.state] == "dim" else "",
        )
    if len(shown) == len(view.cells):
        return table
    return Group(table, Text(f"+ {len(view.cells) - len(shown)} more", style="dim"))


def _is_shown(column: str, view: SweepView, width: int) -> bool:
    if column in ("model", "task"):
        return len({getattr(cell.cell.name, column) for cell in view.cells}) > 1
    if column == "differs in":
        return any(view.apart.values())
    return width >= COLUMNS[column]


def _cell_text(column: str, text: str, state: State) -> Text:
    style = STYLES[state] if column == "state" else "green" if (column, text) == ("to best", "best") else ""
    return Text(text, style=style)


def _words(view: SweepView, cell: CellStatus) -> dict[str, str]:
    name, steps = cell.cell.name, cell.cell.config.train.steps
    loss, behind = view.losses.get(cell.run_id, (None, None))
    is_scoring = cell.state == State.RUNNING and cell.step >= steps
    return {
        "state": "scoring" if is_scoring else cell.state,
        "model": name.model,
        "task": name.task,
        "configuration": f"{name.configuration} r{name.rank}",
        "rate": f"{name.lr:g}",
        "seed": str(name.seed),
        "step": f"{cell.step}/{steps}" if cell.step or cell.state not in (State.MISSING, State.UNNEEDED) else "",
        "loss": "" if loss is None else f"{loss:.3f}",
        "to best": "" if behind is None else "best" if behind == 0 else f"+{behind:.3f}",
        "score": shown_score(cell),
        "time": clock(cell.seconds) if cell.seconds else "",
        "left": clock(view.left[cell.run_id]) if cell.state == State.RUNNING and cell.run_id in view.left else "",
        "differs in": view.apart[cell.run_id],
    }


def cell_name(view: SweepView, cell: CellStatus) -> str:
    """A cell in few words, such as `LoRA r8, rate 0.01, seed 0`; with model and task if the sweep has several."""
    name = cell.cell.name
    models, tasks = ({getattr(each.cell.name, key) for each in view.cells} for key in ("model", "task"))
    where = [*([name.model] if len(models) > 1 else []), *([name.task] if len(tasks) > 1 else [])]
    names = [*where, f"{name.configuration} r{name.rank}", f"rate {name.lr:g}", f"seed {name.seed}"]
    return ", ".join([*names, *filter(None, [view.apart[cell.run_id]])])


def news(before: SweepView | None, now: SweepView) -> Iterator[str]:
    """What has changed between two looks, as lines for a log. Without an earlier look, the state of all."""
    earlier = {} if before is None else {cell.run_id: cell.state for cell in before.cells}
    for cell in now.cells:
        if cell.state != earlier.get(cell.run_id, State.MISSING):
            words = _words(now, cell)
            named = [f"{name} {words[name]}" for name in ("step", "loss", "to best", "score") if words[name]]
            figures = [] if STYLES[cell.state] == "dim" else named
            error = f": {_short(cell.error)}" if cell.error else ""
            yield f"{', '.join([f'{cell_name(now, cell)}: {cell.state}', *figures])}{error}"
    known = set(before.decisions if before else ())
    yield from (f"decided: {line}" for line in now.decisions if line not in known)
    if before is None or counts(before.cells) != counts(now.cells) or before.ended != now.ended:
        yield f"{now.id}: {len(now.cells)} cells: {_counts(now)}{', ended' if now.ended else ''}"
