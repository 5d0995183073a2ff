"""The staged sweep: launch what each configuration's search asks for, until all have a chosen rate with scored runs.

staged_search.py decides, from the files in the cells' folders only. This module reads these files, launches, and writes
the decisions to selection.json.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from tiedlora import storage
from tiedlora.analysis.intervals import RowLosses
from tiedlora.errors import UserError
from tiedlora.keys import Count, Number
from tiedlora.records.rows import read_validation_losses
from tiedlora.records.selection import LOSS, RateChoice, RateSearch, Selection, write_selection
from tiedlora.sweeps import selection
from tiedlora.sweeps.cells import Goal, Sweep, SweepCell, rate_groups
from tiedlora.sweeps.control import SweepControl
from tiedlora.sweeps.launching import (
    Launch,
    changed_inputs,
    check_test_rows,
    end_with,
    launch_cells,
    wait_until_free,
)
from tiedlora.sweeps.staged_search import Observation, SearchPlan, SearchStage, next_stage, rung_steps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchOptions:
    """The options of the staged sweeper (conf/hydra/sweeper/staged.yaml), as `from_person` checks them."""

    rungs: Sequence[Annotated[Number, Field(gt=0, lt=1)]]
    """Shares of the steps, after which rates that are clearly behind stop."""
    finalists: Annotated[Count, Field(ge=2)]
    """The most rates that run at the second seed."""
    lowest_rate: Annotated[Number, Field(gt=0)]
    """The bounds of rates outside the grid."""
    highest_rate: Number

    def __post_init__(self) -> None:
        if self.highest_rate < self.lowest_rate:
            raise ValueError(f"highest_rate={self.highest_rate} is below lowest_rate={self.lowest_rate}")


class Search:
    """The search of one configuration: its plan, its cells by rate and seed, and how far it has come."""

    def __init__(
        self, name: str, cells: Sequence[SweepCell], options: SearchOptions, seeds: Sequence[int] | None = None
    ) -> None:
        self.name, self._first = name, cells[0]
        self._cells = {(cell.name.lr, cell.name.seed): cell for cell in cells}
        train = self._first.config.train
        self.plan = SearchPlan(
            rates=tuple(sorted({lr for lr, _ in self._cells})),
            # Sorted, because the same cells are the same sweep in any order.
            seeds=tuple(seeds or sorted({seed for _, seed in self._cells})),
            rungs=rung_steps(train.steps, train.validate_every, options.rungs),
            lowest=options.lowest_rate,
            highest=options.highest_rate,
            finalists=options.finalists,
        )
        self.stage: SearchStage
        """What `decide` has found."""

    def decide(self) -> None:
        """Read what the runs have shown, and decide what the search needs next.

        Raises:
            UserError: a file of a run is damaged, or its rows are not those of the other runs.
        """
        observe = functools.cache(lambda lr, seed: observation(self.cell(lr, seed)))
        try:
            self.stage = next_stage(self.plan, observe)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}: the validation rows have changed; restore them") from None

    def cell(self, lr: float, seed: int) -> SweepCell:
        """The cell of the grid, or one with a rate outside of it."""
        if (lr, seed) not in self._cells:
            config = replace(self._first.config, seed=seed, train=replace(self._first.config.train, lr=lr))
            kept = [word for word in self._first.overrides if word.split("=")[0] not in ("train.lr", "seed")]
            self._cells[lr, seed] = SweepCell((*kept, f"train.lr={lr:g}", f"seed={seed}"), config)
        return self._cells[lr, seed]

    def asked(self) -> list[SweepCell]:
        """The cells that the search needs next, each for the launch that it needs."""
        splits = self._first.config.score.splits
        return [
            self.cell(request.lr, request.seed).until(request.until, splits if request.score else [])
            for request in self.stage.requests
        ]

    def runs(self) -> list[SweepCell]:
        """Every cell that the search has asked for."""
        return [self.cell(lr, seed) for lr, seed in self.stage.asked]

    def used(self) -> list[SweepCell]:
        """The finished cells that the search used."""
        return [self.cell(trial.lr, seed) for trial in self.stage.trials() for seed in trial.losses]

    def choice(self) -> RateChoice | None:
        """The chosen rate with its runs, once the search has ended."""
        chosen = self.stage.chosen
        if chosen is None or self.stage.requests:
            return None
        cells = [self.cell(chosen.lr, seed) for seed in self.plan.seeds]
        failed = sum(len(trial.failed) for trial in self.stage.trials())
        choice = selection.recorded_choice(
            chosen, cells, metric=LOSS, value=chosen.value, trials=len(self.stage.asked), failed=failed
        )
        records = [record for cell in cells if (record := cell.folder.record()) is not None]
        scores = [record.scores["test"] for record in records if "test" in record.scores]
        # The first metric that all seeds have on test.
        test, test_metric = (None, "") if len(scores) < len(cells) else selection.mean_score(scores)
        return replace(choice, test=test, test_metric=test_metric)

    def recorded(self) -> RateSearch:
        """The decisions, as selection.json holds them."""
        plan = self.plan
        return RateSearch(
            self.name, list(plan.seeds), list(plan.rungs), plan.lowest, plan.highest, list(self.stage.decisions)
        )


def observation(cell: SweepCell) -> Observation:
    """What the files of a cell's folder show."""
    folder, record = cell.folder, cell.folder.record()
    return Observation(
        evaluations={
            row.step: RowLosses(row.losses, row.tokens) for row in read_validation_losses(folder.validation_losses_file)
        },
        loss=None if record is None else record.training.validation_loss_last,
        diverged=record is None and folder.diverged(),
        scored=cell.finished(),
    )


class StagedSweep:
    """The searches of a sweep, one for each model, task, configuration and rank, and the launches of one command.

    Each run is launched at most once for each goal: one that has failed is launched again by the next command.

    Args:
        fail_fast: as for run_sweep.
        seeds: the seeds in the order of use; None takes those of the grid.

    Raises:
        UserError: the runs are trained from a reward.
    """

    def __init__(
        self,
        sweep: Sweep,
        options: SearchOptions,
        launch: Launch,
        fail_fast: bool,
        seeds: Sequence[int] | None = None,
    ) -> None:
        if any(cell.config.objective.name == "reward" for cell in sweep.cells):
            raise UserError(
                "hydra.sweeper: a search of rates compares validation losses of references, and objective=reward does "
                "not lower them; run a grid of rates with hydra/sweeper=resuming, and choose with scripts/sweep.py "
                "select"
            )
        self.sweep, self.launch, self.control = sweep, launch, sweep.control
        self._finished_before = {cell.run_id for cell in sweep.cells if cell.folder.result_file.exists()}
        """The runs that this command has found finished. Their inputs are checked at the end."""
        sweep.freeze()
        self.control.start(fail_fast)
        self._grid = {cell.run_id for cell in sweep.cells}
        self._launched: set[Goal] = set()
        self.searches: list[Search] = []
        for cells in rate_groups(sweep.cells).values():
            name = cells[0].name.group
            # Two groups can have the same name, if they differ in another key.
            alike = sum(search.name.split(" (")[0] == name for search in self.searches)
            self.searches.append(Search(f"{name} ({alike + 1})" if alike else name, cells, options, seeds))

    def search(self) -> None:
        """Launch what the searches ask for until they have ended, or need a run that has failed."""
        while True:
            for search in self.searches:
                search.decide()
            self._mark_pruned()
            write_selection(self.sweep.selection_file, self.selection())
            # Such as `21 cells to step 20, 2 cells to the end`.
            goals = Counter(
                "are scored" if request.score else f"to step {request.until}" if request.until else "to the end"
                for search in self.searches
                for request in search.stage.requests
            )
            what = ", ".join(f"{count} cells {goal}" for goal, count in goals.items())
            if not self.run([cell for search in self.searches for cell in search.asked()], what):
                return

    def run(self, cells: Sequence[SweepCell], what: str) -> bool:
        """Launch the cells that are new, and return when they have ended. Whether the searches should decide again.

        If none is new, another command may be working on some, and the searches wait for it.

        Args:
            what: the stage, for the log.

        Raises:
            UserError: test rows are missing or wrong. Nothing has run then.
        """
        if self.control.first_failure() is not None:
            return False
        new = [cell for cell in cells if cell.goal not in self._launched]
        if not new:
            return any([wait_until_free(cell) for cell in cells])
        if not self._launched:
            check_test_rows(self.sweep.cells)
        log.info("%s: %s", self.sweep.id, what)
        outside = [cell for cell in new if cell.run_id not in self._grid]
        self.sweep.freeze(cell.until(None, self.sweep.cells[0].config.score.splits) for cell in outside)
        self._launched.update(cell.goal for cell in new)
        launch_cells(new, self.launch, self.control)
        return True

    def selection(self) -> Selection:
        """The choices and decisions so far."""
        choices = [choice for search in self.searches if (choice := search.choice()) is not None]
        return Selection(self.sweep.id, "loss", choices, [search.recorded() for search in self.searches])

    def summary(self) -> str:
        """The chosen rates as a table, after the decisions that a reader should know."""
        selected = self.selection()
        notes = selection.decision_lines(selected, ("diverged", "outward", "edge", "fallback", "none"))
        return "\n".join([*notes, *([""] if notes else []), selection.table(selected.choices)])

    def end(self, unfinished: Sequence[SweepCell] = ()) -> None:
        """End the command.

        Args:
            unfinished: runs that are missing, in addition to those that the searches need.

        Raises:
            SystemExit: as run_staged.
        """
        asked = [*(cell for search in self.searches for cell in search.asked()), *unfinished]
        used = [cell for search in self.searches for cell in search.used()]
        errors = {cell.run_id: _why_unfinished(cell, self.control) for cell in asked}
        errors.update(changed_inputs(cell for cell in used if cell.run_id in self._finished_before))
        without = [search.name for search in self.searches if not search.stage.requests and search.stage.chosen is None]
        for name in without:
            print(f"{name}: every rate diverged; add lower ones with train.lr=", file=sys.stderr)
        end_with(errors, len(used) + len(asked), self.control.first_failure())
        if without:
            raise SystemExit(1)

    def _mark_pruned(self) -> None:
        """Write pruned.txt, which is the state `pruned`, for the stopped runs that nothing has continued since."""
        for search in self.searches:
            for made in search.stage.decisions:
                if made.action == "stopped" and made.seed is not None:
                    cell = search.cell(made.lr, made.seed)
                    if cell.folder.state() == "interrupted":
                        storage.write_bytes(cell.folder.pruned_file, f"{made.reason}\n".encode())


def run_staged(sweep: Sweep, options: SearchOptions, launch: Launch, fail_fast: bool = False) -> None:
    """Carry out the staged sweep, then print the chosen rates. The same command continues a stopped one.

    Args:
        fail_fast: as for run_sweep.

    Raises:
        UserError: a file of a run is damaged.
        SystemExit: with code 1, after naming every cell that failed and every configuration without a usable rate.
        KeyboardInterrupt: the sweep was asked to stop.
    """
    staged = StagedSweep(sweep, options, launch, fail_fast)
    staged.search()
    print(f"\n{staged.summary()}")
    staged.end()


def _why_unfinished(cell: SweepCell, control: SweepControl) -> str:
    if control.is_dropped(cell.run_id):
        return "dropped, but the search needs it; put it back with scripts/sweep.py retry"
    if cell.state() == "failed":
        return cell.folder.error()
    if control.first_failure() is not None:
        return "stopped, because another cell failed"
    if cell.finished():
        return "its validation_losses.jsonl lacks losses that the search needs; delete its folder, and start again"
    return "stopped without the losses or scores that the search needs; the same command continues it"
