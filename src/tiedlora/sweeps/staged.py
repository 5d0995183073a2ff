"""The staged sweep: launch what each configuration's search asks for, until all have a chosen rate with scored runs.

staged_search.py decides, from the files in the cells' folders only. This module reads these files, launches, and writes
the decisions to selection.json.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from omegaconf import ListConfig

from tiedlora import storage
from tiedlora.analysis.intervals import RowLosses
from tiedlora.analysis.rate_choice import ChosenRate
from tiedlora.errors import UserError
from tiedlora.keys import is_count
from tiedlora.records.reading import is_number
from tiedlora.records.rows import read_validation_losses
from tiedlora.records.selection import LOSS, RateChoice, RateSearch, Selection, write_selection
from tiedlora.sweeps import selection, status
from tiedlora.sweeps.cells import Sweep, SweepCell, frozen_tree, write_frozen
from tiedlora.sweeps.control import SweepControl
from tiedlora.sweeps.launching import Launch, changed_inputs, check_test_rows, end_with, launch_cells, wait_for_others
from tiedlora.sweeps.staged_search import Observation, Request, SearchPlan, SearchStage, next_stage, rung_steps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchOptions:
    """The options of the staged sweeper."""

    rungs: tuple[float, ...]
    """Shares of the steps, after which rates that are clearly behind stop."""
    finalists: int
    """The most rates that run at the second seed."""
    lowest_rate: float
    """The bounds of rates outside the grid."""
    highest_rate: float

    @classmethod
    def checked(cls, rungs: Sequence[float], finalists: int, lowest_rate: float, highest_rate: float) -> SearchOptions:
        """The options of the command line.

        Raises:
            UserError: a value is not allowed.
        """
        is_list = isinstance(rungs, list | ListConfig)
        if not is_list or not all(is_number(rung) and 0 < rung < 1 for rung in rungs):
            raise UserError(f"hydra.sweeper.rungs={rungs}: give a list of shares of the steps between 0 and 1, or []")
        if not is_count(finalists) or finalists < 2:
            raise UserError(f"hydra.sweeper.finalists={finalists}: must be a whole number of at least 2")
        for name, rate in (("lowest_rate", lowest_rate), ("highest_rate", highest_rate)):
            if not is_number(rate):
                raise UserError(f"hydra.sweeper.{name}={rate}: must be a number above 0")
        if not 0 < lowest_rate <= highest_rate:
            raise UserError(
                f"hydra.sweeper.lowest_rate={lowest_rate:g}: must be above 0, and not above hydra.sweeper.highest_rate"
                f"={highest_rate:g}"
            )
        return cls(tuple(rungs), finalists, lowest_rate, highest_rate)


class SearchGroup:
    """The search of one configuration: its plan, and its cells by rate and seed."""

    def __init__(
        self, name: str, cells: Sequence[SweepCell], options: SearchOptions, seeds: Sequence[int] | None = None
    ) -> None:
        self.name, self.first = name, cells[0]
        self._cells = {(cell.parameters().lr, cell.config.seed): cell for cell in cells}
        train = self.first.config.train
        self.plan = SearchPlan(
            rates=tuple(sorted({lr for lr, _ in self._cells})),
            # Sorted, because the same cells are the same sweep in any order.
            seeds=tuple(seeds or sorted({seed for _, seed in self._cells})),
            rungs=rung_steps(train.steps, train.validate_every, options.rungs),
            lowest=options.lowest_rate,
            highest=options.highest_rate,
            finalists=options.finalists,
        )

    def cell(self, lr: float, seed: int) -> SweepCell:
        """The cell of the grid, or one with a rate outside of it."""
        if (lr, seed) not in self._cells:
            config = replace(self.first.config, seed=seed, train=replace(self.first.config.train, lr=lr))
            kept = [word for word in self.first.overrides if word.split("=")[0] not in ("train.lr", "seed")]
            self._cells[lr, seed] = SweepCell((*kept, f"train.lr={lr:g}", f"seed={seed}"), config)
        return self._cells[lr, seed]

    def requested(self, request: Request) -> SweepCell:
        """The cell for the launch that a request needs."""
        cell = self.cell(request.lr, request.seed)
        return cell.until(request.until, cell.config.score.splits if request.score else [])

    def next(self) -> SearchStage:
        """What the search has decided so far, and what it needs next.

        Raises:
            UserError: a file of a run is damaged, or its rows are not those of the other runs.
        """
        seen: dict[tuple[float, int], Observation] = {}

        def observe(lr: float, seed: int) -> Observation:
            if (lr, seed) not in seen:
                seen[lr, seed] = observation(self.cell(lr, seed))
            return seen[lr, seed]

        try:
            return next_stage(self.plan, observe)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}: the validation rows have changed; restore them") from None

    def search(self, stage: SearchStage) -> RateSearch:
        """The decisions, as selection.json holds them."""
        plan = self.plan
        return RateSearch(
            self.name, list(plan.seeds), list(plan.rungs), plan.lowest, plan.highest, list(stage.decisions)
        )

    def choice(self, stage: SearchStage, chosen: ChosenRate) -> RateChoice:
        """The chosen rate with its runs, once the search has ended."""
        cells = [self.cell(chosen.lr, seed) for seed in self.plan.seeds]
        failed = sum(len(trial.failed) for trial in stage.trials)
        choice = selection.recorded_choice(
            chosen, cells, metric=LOSS, value=chosen.value, trials=len(stage.runs), failed=failed
        )
        test, test_metric = _mean_test(cells)
        return replace(choice, test=test, test_metric=test_metric)


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


def _mean_test(cells: Sequence[SweepCell]) -> tuple[float | None, str]:
    """The mean over the seeds of their first common metric on test, and its name; None if there is none."""
    records = [record for cell in cells if (record := cell.folder.record()) is not None]
    scores = [record.scores["test"] for record in records if "test" in record.scores]
    return (None, "") if len(scores) < len(cells) else selection.mean_score(scores)


def search_groups(sweep: Sweep, options: SearchOptions, seeds: Sequence[int] | None = None) -> list[SearchGroup]:
    """The searches of a sweep: one for each model, task, configuration and rank.

    Args:
        seeds: the seeds in the order of use; None takes those of the grid.
    """
    groups: list[SearchGroup] = []
    for cells in selection.rate_groups(sweep.cells).values():
        named = cells[0].parameters()
        name = f"{named.configuration} r={named.rank} on {named.task}, {named.model}"
        # Two groups can have the same name, if they differ in another key.
        alike = sum(group.name.split(" (")[0] == name for group in groups)
        groups.append(SearchGroup(f"{name} ({alike + 1})" if alike else name, cells, options, seeds))
    return groups


@dataclass(frozen=True)
class Search:
    """A search and how far it has come."""

    group: SearchGroup
    stage: SearchStage

    @property
    def choice(self) -> RateChoice | None:
        """The chosen rate, once the search has ended."""
        chosen = self.stage.chosen
        return None if chosen is None or self.stage.requests else self.group.choice(self.stage, chosen)

    def asked(self) -> list[SweepCell]:
        """The cells that the search needs next."""
        return [self.group.requested(request) for request in self.stage.requests]

    def runs(self) -> list[SweepCell]:
        """Every cell that the search has asked for."""
        return [self.group.cell(lr, seed) for lr, seed in self.stage.runs]

    def used(self) -> list[SweepCell]:
        """The finished cells that the search used."""
        return [self.group.cell(trial.lr, seed) for trial in self.stage.trials for seed in trial.losses]


class StageLaunches:
    """The launches of one command. Each run is launched at most once for each goal: one that has failed is launched
    again by the next command."""

    def __init__(self, sweep: Sweep, launch: Launch, fail_fast: bool) -> None:
        self.sweep, self.launch, self.control = sweep, launch, sweep.control
        self.control.start(fail_fast)
        self._grid = {cell.run_id for cell in sweep.cells}
        self._launched: set[tuple[str, tuple[str, ...]]] = set()
        self._next_job = 0

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
        new = [cell for cell in cells if (cell.run_id, cell.launch_words) not in self._launched]
        if not new:
            return wait_for_others(cells)
        if not self._launched:
            check_test_rows(self.sweep.cells)
        log.info("%s: %s", self.sweep.id, what)
        for cell in new:
            self._freeze(cell)
        self._launched.update((cell.run_id, cell.launch_words) for cell in new)
        self._next_job = launch_cells(new, self.launch, self.control, self._next_job)
        return True

    def _freeze(self, cell: SweepCell) -> None:
        """Write the configuration of a cell outside the grid, as Sweep.freeze does for those of the grid."""
        if cell.run_id not in self._grid:
            config = cell.until(None, self.sweep.cells[0].config.score.splits).config
            path = self.sweep.path / "cells" / f"{cell.run_id}.json"
            write_frozen(path, frozen_tree(config, self.sweep.id, searches_rates=True))

    def errors(self, asked: Sequence[SweepCell]) -> dict[str, str]:
        """Why cells are not as far as they should be: run id -> the reason."""
        return {cell.run_id: _why_unfinished(cell, self.control) for cell in asked}


def run_staged(sweep: Sweep, options: SearchOptions, launch: Launch, fail_fast: bool = False) -> None:
    """Carry out the staged sweep, then print the chosen rates. The same command continues a stopped one.

    Args:
        fail_fast: as for run_sweep.

    Raises:
        UserError: a file of a run is damaged.
        SystemExit: with code 1, after naming every cell that failed and every configuration without a usable rate.
        KeyboardInterrupt: the sweep was asked to stop.
    """
    launches = StageLaunches(sweep, launch, fail_fast)
    finished_before = {cell.run_id for cell in sweep.cells if cell.folder.result_file.exists()}
    searches = run_searches(sweep, search_groups(sweep, options), launches)
    print(f"\n{summary(selection_of(sweep, searches))}")
    end_searches(searches, launches, finished_before)


def run_searches(sweep: Sweep, groups: Sequence[SearchGroup], launches: StageLaunches) -> list[Search]:
    """Launch what the searches ask for until they have ended, or need a run that has failed."""
    while True:
        searches = [Search(group, group.next()) for group in groups]
        _mark_pruned(searches)
        write_selection(selection.selection_file(sweep), selection_of(sweep, searches))
        asked = [cell for search in searches for cell in search.asked()]
        if not launches.run(asked, _stage_line(searches)):
            return searches


def end_searches(
    searches: Sequence[Search],
    launches: StageLaunches,
    finished_before: Container[str],
    unfinished: Sequence[SweepCell] = (),
) -> None:
    """End the command.

    Args:
        finished_before: the runs that this command has found finished. Their inputs are checked.
        unfinished: runs that are missing, in addition to those that the searches need.

    Raises:
        SystemExit: as run_staged.
    """
    asked = [*(cell for search in searches for cell in search.asked()), *unfinished]
    used = [cell for search in searches for cell in search.used()]
    errors = launches.errors(asked)
    errors.update(changed_inputs(cell for cell in used if cell.run_id in finished_before))
    without = [search.group.name for search in searches if not search.stage.requests and search.stage.chosen is None]
    for name in without:
        print(f"{name}: every rate diverged; add lower ones with train.lr=", file=sys.stderr)
    end_with(errors, len(used) + len(asked), launches.control.first_failure())
    if without:
        raise SystemExit(1)


def _mark_pruned(searches: Sequence[Search]) -> None:
    """Write pruned.txt, which is the state `pruned`, for the stopped runs that nothing has continued since."""
    for search in searches:
        for made in search.stage.decisions:
            if made.action == "stopped" and made.seed is not None:
                cell = search.group.cell(made.lr, made.seed)
                if cell.folder.state() == "interrupted":
                    storage.write_bytes(cell.folder.pruned_file, f"{made.reason}\n".encode())


def selection_of(sweep: Sweep, searches: Sequence[Search]) -> Selection:
    """The choices and decisions so far."""
    choices = [choice for search in searches if (choice := search.choice) is not None]
    return Selection(sweep.id, "loss", choices, [search.group.search(search.stage) for search in searches])


def _stage_line(searches: Sequence[Search]) -> str:
    """What runs next, such as `21 cells to step 20, 2 cells to the end`."""
    goals = Counter(
        "are scored" if request.score else f"to step {request.until}" if request.until else "to the end"
        for search in searches
        for request in search.stage.requests
    )
    return ", ".join(f"{count} cells {goal}" for goal, count in goals.items())


def _why_unfinished(cell: SweepCell, control: SweepControl) -> str:
    if control.is_dropped(cell.run_id):
        return "dropped, but the search needs it; put it back with scripts/sweep.py retry"
    if cell.state() == "failed":
        return status.last_error(cell.folder)
    if control.first_failure() is not None:
        return "stopped, because another cell failed"
    if cell.finished():
        return "its validation_losses.jsonl lacks losses that the search needs; delete its folder, and start again"
    return "stopped without the losses or scores that the search needs; the same command continues it"


def summary(selected: Selection) -> str:
    """The chosen rates as a table, after the decisions that a reader should know."""
    notes = [
        f"{search.group}: {made.lr:g} {made.action}: {made.reason}"
        for search in selected.searches
        for made in search.decisions
        if made.action in ("diverged", "outward", "edge", "fallback", "none")
    ]
    return "\n".join([*notes, "", selection.table(selected.choices)] if notes else [selection.table(selected.choices)])
