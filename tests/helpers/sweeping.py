"""Sweeps in this process: a launcher that remembers what it was asked, and runs that somebody else works on."""

import functools
import os
import threading
from collections.abc import Sequence
from contextlib import contextmanager

from tiedlora.sweeps import expand
from tiedlora.sweeps.cells import Sweep, frozen_cell
from tiedlora.sweeps.expand import SearchOptions
from tiedlora.sweeps.launching import work


def compose_sweep(words: Sequence[str]) -> Sweep:
    """As expand.compose_sweep. What the sweeps of different tests share is composed once, because it takes long."""
    return expand.compose_sweep(list(words), _composers(os.environ.get("TIEDLORA_DATA")))


@functools.cache
def _composers(_data_root: str | None) -> expand.Composers:
    return {}


def search_options(**options) -> SearchOptions:
    return SearchOptions(
        **{
            "rungs": [0.25, 0.5],
            "finalists": 2,
            "race_level": 0.3,
            "race_within": 0.005,
            "lowest_rate": 1e-5,
            "highest_rate": 1.0,
            **options,
        }
    )


def cell_of(folder, goal):
    """The cell that a worker carries out."""
    return frozen_cell(folder, goal.run_id).until(goal.pause_after, goal.splits)


def fail(cell, error="UserError: no rows here\n") -> None:
    cell.folder.path.mkdir(parents=True, exist_ok=True)
    cell.folder.error_file.write_text(error)


def times(folder) -> dict:
    """When each file and folder below a folder was written last."""
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


class Here:
    """A launcher that works in this process, one cell after the other, and remembers what it has started."""

    def __init__(self, before=lambda: None, stop_before: int | None = None) -> None:
        """
        Args:
            before: what happens at the start of each launch.
            stop_before: the run before which it raises KeyboardInterrupt, as a stopped sweep does.
        """
        self.launches, self.before, self.stop_before = [], before, stop_before

    def __call__(self, folder, goals) -> None:
        self.launches.append([])
        self.before()
        for goal in goals:
            if len(self.goals) == self.stop_before:
                raise KeyboardInterrupt
            self.launches[-1].append(cell_of(folder, goal))
            work(folder, [goal])

    @property
    def cells(self) -> list:
        """The cells of all launches, as they were launched."""
        return [cell for launch in self.launches for cell in launch]

    @property
    def goals(self) -> list:
        return [cell.goal for cell in self.cells]

    def run_ids(self) -> list[list[str]]:
        """The ids of each launch."""
        return [[cell.run_id for cell in launch] for launch in self.launches]


@contextmanager
def held(folder, seconds=None):
    """The run's lock is held by somebody else: for some seconds, or (None) to the end of the block.

    By another thread, because the same one may take it again.
    """
    taken, left = threading.Event(), threading.Event()

    def hold():
        with folder.locked():
            taken.set()
            left.wait(seconds)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        yield
    finally:
        if seconds is None:
            left.set()
        thread.join()
