"""The live table of `scripts/sweep.py watch`, drawn with rich, and the same news as plain lines.

Every text is a rich Text, which is never read as rich's markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tiedlora.sweeps.watched import CellView, SweepView
from tiedlora.text import clock

STYLES = {
    "done": "green",
    "running": "bold cyan",
    "failed": "bold red",
    "paused": "blue",
    "pruned": "yellow",
    "interrupted": "magenta",
    "dropped": "dim",
    "missing": "dim",
}
"""The state of a cell -> how it is drawn. The state is always a word too."""
SHOWN_FIRST = ("running", "failed", "interrupted", "paused", "done", "pruned", "missing", "dropped")
"""The order of the lines when not all fit."""
WIDE = 100
"""From so many characters on, the table has all its columns and wider gaps."""
QUIET_SECONDS = 120.0
"""After so long without a change, the table asks whether the sweep still runs."""


@dataclass(frozen=True)
class _Column:
    name: str
    right: bool
    least: int = 0
    """The narrowest terminal that shows it, in characters."""


_COLUMNS = (
    _Column("state", right=False),
    _Column("model", right=False),
    _Column("task", right=False),
    _Column("configuration", right=False),
    _Column("rate", right=True),
    _Column("seed", right=True, least=50),
    _Column("step", right=True),
    _Column("loss", right=True),
    _Column("to best", right=True, least=60),
    _Column("score", right=True, least=WIDE),
    _Column("time", right=True, least=70),
    _Column("left", right=True, least=60),
    _Column("differs in", right=False),
)


def frame(view: SweepView, width: int, height: int) -> RenderableType:
    """The whole screen.

    Args:
        width, height: of the terminal, in characters. What does not fit is counted in words.
    """
    failed, decisions = view.failed(), view.decisions
    footer = _footer(view)
    # Title, bar, counts, an empty line, the table's head and its last line, and the footer.
    room = max(3, height - 6 - len(footer))
    failures = failed[: max(1, room // 5)]
    reasons = decisions[-max(1, room // 5) :] if decisions else []
    room -= (len(failures) + 2 if failures else 0) + (len(reasons) + 2 if reasons else 0)
    parts: list[RenderableType] = [_title(view), _bar(view, width), _counts(view), Text()]
    parts.append(_table(view, width, max(1, room)))
    if failures:
        parts += [Text(), Text(f"Failed: {len(failed)}", style="bold red")]
        parts += [_line(f"  {cell_name(view, cell)}: {cell.error}") for cell in failures]
    if reasons:
        more = len(decisions) - len(reasons)
        parts += [Text(), Text("Decided" + (f" ({more} earlier)" if more else ""), style="bold")]
        parts += [_line(f"  {reason}") for reason in reasons]
    return Group(*parts, *footer)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _title(view: SweepView) -> Text:
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(view.id, style="bold")
    title.append(f"  {view.counts['done']} of {len(view.cells)} done")
    if view.ended:
        title.append("  ended", style="bold green" if not view.failed() else "bold red")
    return title


def _bar(view: SweepView, width: int) -> Text:
    """A line whose parts are as long as the shares of the states."""
    bar, filled, seen = Text(no_wrap=True), 0, 0
    for state in ("done", "pruned", "dropped", "failed", "running", "paused", "interrupted", "missing"):
        seen += view.counts[state]
        upto = round(width * seen / max(1, len(view.cells)))
        sign = {"missing": "·", "running": "▓", "failed": "x"}.get(state, "█")
        bar.append(sign * (upto - filled), style=STYLES[state])
        filled = upto
    return bar


def _counts(view: SweepView) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for state, count in view.counts.items():
        if count:
            line.append(f"{count} {state}", style=STYLES[state])
            line.append("  ")
    line.append(f"{clock(sum(cell.seconds for cell in view.cells))} of work so far")
    if view.seconds_left and not view.ended:
        at_once = view.counts["running"]
        line.append(f", {time_left(view)} left" + (f" with {at_once} at once" if at_once > 1 else ""))
    return line


def time_left(view: SweepView) -> str:
    """The time left in words: `about 1:20`, or `at most 1:20` while a search may stop cells."""
    return f"{'at most' if view.is_most else 'about'} {clock(view.seconds_left or 0.0)}"


def _footer(view: SweepView) -> list[Text]:
    lines = [Text()]
    if view.stopped_by:
        lines.append(_line(f"fail_fast: {view.stopped_by} failed, so the others stopped", "bold red"))
    elif not view.ended and not view.counts["running"] and view.quiet_seconds > QUIET_SECONDS:
        words = f"No cell runs, nothing has changed for {clock(view.quiet_seconds)}: the sweep's command continues it"
        lines.append(_line(words, "yellow"))
    among = "its configuration's rates" if view.compares_rates else "its model and task"
    words = f"to best: loss minus the lowest at that step of {among}"
    return [*lines, _line(words + ("" if view.ended else " · Ctrl-C leaves"), "dim")]


def _table(view: SweepView, width: int, lines: int) -> RenderableType:
    """At most `lines` cells, the most telling ones, in the sweep's order."""
    shown = view.cells
    if len(shown) > lines:
        first = sorted(shown, key=lambda cell: SHOWN_FIRST.index(cell.state))[: max(0, lines - 1)]
        chosen = {cell.cell.run_id for cell in first}
        shown = [cell for cell in shown if cell.cell.run_id in chosen]
    names = [column for column in _COLUMNS if _is_shown(column, view, width)]
    table = Table(box=None, padding=(0, 2 if width >= WIDE else 1, 0, 0), pad_edge=False, header_style="bold")
    for column in names:
        flexible = column.name in ("model", "task", "configuration", "differs in")
        table.add_column(
            column.name, justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis",
            min_width=4 if flexible else None,
        )  # fmt: skip
    for cell in shown:
        words = _words(cell)
        style = "dim" if cell.state in ("missing", "dropped") else ""
        table.add_row(*(_cell_text(column.name, words[column.name], cell.state) for column in names), style=style)
    if len(shown) == len(view.cells):
        return table
    return Group(table, Text(f"+ {len(view.cells) - len(shown)} more", style="dim"))


def _is_shown(column: _Column, view: SweepView, width: int) -> bool:
    if column.name in ("model", "task"):
        return len({getattr(cell.cell, column.name) for cell in view.cells}) > 1
    if column.name == "differs in":
        return any(cell.apart for cell in view.cells)
    return width >= column.least


def _cell_text(column: str, text: str, state: str) -> Text:
    style = STYLES[state] if column == "state" else "green" if (column, text) == ("to best", "best") else ""
    return Text(text, style=style)


def _words(view: CellView) -> dict[str, str]:
    cell = view.cell
    return {
        "state": "scoring" if view.is_scoring else view.state,
        "model": cell.model,
        "task": cell.task,
        "configuration": f"{cell.configuration} r{cell.rank}",
        "rate": f"{cell.lr:g}",
        "seed": str(cell.seed),
        "step": f"{view.step}/{cell.steps}" if view.step or view.state != "missing" else "",
        "loss": "" if view.loss is None else f"{view.loss:.3f}",
        "to best": "" if view.behind is None else "best" if view.behind == 0 else f"+{view.behind:.3f}",
        "score": "" if view.score is None else f"{100 * view.score:.1f} %",
        "time": clock(view.seconds) if view.seconds else "",
        "left": clock(view.seconds_left) if view.state == "running" and view.seconds_left is not None else "",
        "differs in": view.apart,
    }


def cell_name(view: SweepView, cell: CellView) -> str:
    """A cell in few words, such as `LoRA r8, rate 0.01, seed 0`; with model and task if the sweep has several."""
    about = cell.cell
    models, tasks = ({getattr(each.cell, name) for each in view.cells} for name in ("model", "task"))
    where = [*([about.model] if len(models) > 1 else []), *([about.task] if len(tasks) > 1 else [])]
    names = [*where, f"{about.configuration} r{about.rank}", f"rate {about.lr:g}", f"seed {about.seed}"]
    return ", ".join([*names, *([cell.apart] if cell.apart else [])])


def news(before: SweepView | None, now: SweepView) -> Iterator[str]:
    """What has changed between two looks, as lines for a log. Without an earlier look, the state of all."""
    earlier = {} if before is None else {cell.cell.run_id: cell for cell in before.cells}
    for cell in now.cells:
        old = earlier.get(cell.cell.run_id)
        if cell.state != (old.state if old else "missing"):
            yield f"{cell_name(now, cell)}: {cell.state}{_figures(cell)}"
    for line in _added(before.decisions if before else [], now.decisions):
        yield f"decided: {line}"
    if before is None or before.counts != now.counts or before.ended != now.ended:
        yield counts_line(now)


def _figures(view: CellView) -> str:
    words = _words(view)
    named = [("step", words["step"]), ("loss", words["loss"]), ("to best", words["to best"]), ("score", words["score"])]
    figures = [f"{name} {value}" for name, value in named if value and view.state not in ("missing", "dropped")]
    return "".join(f", {figure}" for figure in figures) + (f": {view.error}" if view.error else "")


def _added(before: Sequence[str], now: Sequence[str]) -> list[str]:
    known = set(before)
    return [line for line in now if line not in known]


def counts_line(view: SweepView) -> str:
    """One line: the sweep's states and its time left."""
    states = ", ".join(f"{count} {state}" for state, count in view.counts.items() if count)
    left = f", {time_left(view)} left" if view.seconds_left and not view.ended else ""
    return f"{view.id}: {len(view.cells)} cells: {states}{', ended' if view.ended else left}"
