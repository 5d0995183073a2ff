"""`scripts/sweep.py watch`: find a sweep by its name, and show it while it runs, in any terminal on the same folder."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from tiedlora.errors import UserError
from tiedlora.sweeps.kept_page import KeptPage
from tiedlora.sweeps.watch_table import counts_line, frame, news
from tiedlora.sweeps.watched import SweepView, WatchedSweep

SECONDS_BETWEEN_LOOKS = 1.0
LARGEST_SHARE = 0.05
"""Most of the time that is spent on looking: ten thousand cells on a network file system take seconds."""
SECONDS_BETWEEN_COUNTS = 60.0
"""Without a terminal, the counts are printed at least so often."""
LISTED = 10
"""Most sweeps that an error message names."""


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


def watch(folder: Path, html: Path | None = None) -> bool:
    """Show the sweep until it has ended, or until Ctrl-C: as a live table on a terminal, otherwise as lines.

    Args:
        html: a file that is kept up to date with the report's page of all runs beside the sweep.

    Returns:
        Whether no cell has failed.

    Raises:
        UserError: the sweep's own files are damaged.
    """
    sweep, page = WatchedSweep(folder), KeptPage(folder.parent.parent, html) if html else None
    console = Console(highlight=False, markup=False, emoji=False)
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            view = _show_table(sweep, console, page)
        else:
            view = _print_lines(sweep, page)
    finally:
        if page is not None:
            page.stop()
    if page is not None:
        print(page.finish(view))
    return not view.failed()


def _show_table(sweep: WatchedSweep, console: Console, page: KeptPage | None) -> SweepView:
    view = sweep.look()
    if not view.ended:
        # The alternate screen: what the terminal showed before comes back at the end, with the last table below it.
        with Live(console=console, screen=True, auto_refresh=False) as live:

            def show(now: SweepView) -> None:
                live.update(frame(now, console.width, console.height), refresh=True)

            view = _look_until_ended(sweep, view, page, show)
    console.print(frame(view, console.width, max(console.height, len(view.cells) + 40)))
    return view


def _print_lines(sweep: WatchedSweep, page: KeptPage | None) -> SweepView:
    before: SweepView | None = None
    printed = 0.0

    def show(now: SweepView) -> None:
        nonlocal before, printed
        lines = list(news(before, now))
        if not lines and time.monotonic() - printed > SECONDS_BETWEEN_COUNTS:
            lines = [counts_line(now)]
        for line in lines:
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            printed = time.monotonic()
        before = now

    return _look_until_ended(sweep, sweep.look(), page, show)


def _look_until_ended(
    sweep: WatchedSweep, view: SweepView, page: KeptPage | None, show: Callable[[SweepView], None]
) -> SweepView:
    """Look and show again and again. Ctrl-C ends it: it ends the watch, and not the sweep."""
    try:
        show(view)
        while not view.ended:
            if page is not None:
                page.keep(view)
            begun = time.monotonic()
            view = sweep.look()
            show(view)
            spent = time.monotonic() - begun
            time.sleep(max(SECONDS_BETWEEN_LOOKS, spent / LARGEST_SHARE))
    except KeyboardInterrupt:
        pass
    return view
