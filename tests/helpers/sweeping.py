"""Sweeps in this process: a launcher that remembers what it was asked, and runs that somebody else works on."""

import threading
from contextlib import contextmanager

from tiedlora.sweeps.worker import work


class Here:
    """A launcher that works in this process, and remembers the goals of each launch."""

    def __init__(self, before=lambda: None) -> None:
        """
        Args:
            before: what happens at the start of each launch.
        """
        self.launches, self.before = [], before

    def __call__(self, folder, goals) -> None:
        self.launches.append(list(goals))
        self.before()
        work(folder, goals)

    def run_ids(self) -> list[list[str]]:
        """The ids of each launch."""
        return [[goal.run_id for goal in goals] for goals in self.launches]


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
    yield
    if seconds is None:
        left.set()
    thread.join()
