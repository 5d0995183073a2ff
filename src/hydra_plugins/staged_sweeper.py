"""hydra/sweeper=staged and hydra/sweeper=deciding: search learning rates, and decide claims, with few runs.

This file has only what Hydra needs from a sweeper. The work is in tiedlora.sweeps. Hydra imports this file at every
start, so what needs numpy or scipy is imported when a sweep starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra_plugins.resuming_sweeper import ResumingSweeper
from tiedlora.config.project import PROJECT
from tiedlora.sweeps.cells import Sweep
from tiedlora.sweeps.launching import Launch


class StagedSweeper(ResumingSweeper):
    """Runs the cells of the grid that the search of the learning rates asks for."""

    def __init__(
        self,
        params: dict[str, str],
        match_lora: bool,
        rungs: list[float],
        finalists: int,
        lowest_rate: float,
        highest_rate: float,
        fail_fast: bool = False,
    ) -> None:
        """
        Args:
            params, match_lora, fail_fast: as for ResumingSweeper.
            rungs, finalists, lowest_rate, highest_rate: as in SearchOptions.
        """
        super().__init__(params, match_lora, fail_fast)
        self.search = (rungs, finalists, lowest_rate, highest_rate)

    def run(self, sweep: Sweep, launch: Launch) -> None:
        """Carry out the staged sweep. The arguments and errors are those of run_staged."""
        from tiedlora.sweeps.staged import SearchOptions, run_staged

        run_staged(sweep, SearchOptions.checked(*self.search), launch, self.fail_fast)


class DecidingSweeper(StagedSweeper):
    """After the search, runs the seeds that open claims need."""

    def __init__(self, claims: str, budget: int | None, **search: Any) -> None:
        """
        Args:
            claims: the file with the claims and their planned looks.
            budget: the most runs of the sweep; None sets no limit.
            search: the arguments of StagedSweeper.
        """
        super().__init__(**search)
        self.claims, self.budget = claims, budget

    def run(self, sweep: Sweep, launch: Launch) -> None:
        """Carry out the deciding sweep. The arguments and errors are those of run_deciding."""
        from tiedlora.sweeps.deciding import run_deciding
        from tiedlora.sweeps.staged import SearchOptions

        options = SearchOptions.checked(*self.search)
        run_deciding(sweep, options, self.claims, self.budget, launch, self.fail_fast)

    def claims_file(self) -> tuple[Path, ...]:
        """The file with the sweep's own claims."""
        return (Path(self.claims) if Path(self.claims).exists() else PROJECT / self.claims,)
