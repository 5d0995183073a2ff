"""hydra/sweeper=staged: search the learning rate of each configuration, then repeat and test only the best one.

This file has only what Hydra needs from a sweeper. The work is in tiedlora.sweeps.
"""

from __future__ import annotations

from hydra_plugins.resuming_sweeper import ResumingSweeper
from tiedlora.sweeps.cells import Sweep
from tiedlora.sweeps.launching import Launch
from tiedlora.sweeps.staged import SearchOptions, run_staged


class StagedSweeper(ResumingSweeper):
    """Runs the cells of the grid that the staged search asks for."""

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

        Raises:
            UserError: an option has a value that is not allowed.
        """
        super().__init__(params, match_lora, fail_fast)
        self.options = SearchOptions.checked(rungs, finalists, lowest_rate, highest_rate)

    def run(self, sweep: Sweep, launch: Launch) -> None:
        """Carry out the staged sweep. The arguments and errors are those of run_staged."""
        run_staged(sweep, self.options, launch, self.fail_fast)
