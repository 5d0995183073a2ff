"""The staged sweep: launch what each configuration's search asks for, until all have a chosen rate with scored runs.

staged_search.py decides, from the files in the cells' folders only. This module reads these files, launches, and writes
the decisions to selection.json.

The deciding sweep then runs the seeds of the planned looks that open claims still need. The claims, their looks and the
budget are written to plan.json before the first run. A claim is closed when the rules of the report have decided it
(supported, contradicted or uninformative), when no look is likely to decide it (futile), or after its last look.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import RenderableType

from tiedlora import screen, storage
from tiedlora.analysis import claims as claim_files
from tiedlora.analysis.answers import Answer, Verdict, answer_claims
from tiedlora.analysis.claims import Claim, Pair, Side
from tiedlora.analysis.groups import group_runs
from tiedlora.analysis.runs import LeftOut, Names, Run, Scorebook, read_run
from tiedlora.config.identity import identity
from tiedlora.config.trial_arm import TrialArm
from tiedlora.errors import UserError
from tiedlora.places import DATA
from tiedlora.records.rows import read_validation_losses
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_run_scores
from tiedlora.records.selection import (
    LOSS,
    SEARCH_OPTIONS,
    SELECTION_FILE,
    RateChoice,
    RateSearch,
    Selection,
    read_selection,
    write_selection,
)
from tiedlora.sweeps import selection
from tiedlora.sweeps.cells import PLAN_FILE, VERDICTS_FILE, Goal, Sweep, SweepCell, rate_groups
from tiedlora.sweeps.expand import DecidingOptions, SearchOptions
from tiedlora.sweeps.launching import Launch, changed_inputs, check_scoring, end_with, launch_cells, wait_for_one
from tiedlora.sweeps.staged_search import Observation, SearchPlan, SearchStage, rung_steps

log = logging.getLogger(__name__)


class Search:
    """The search of one configuration: its plan, its cells by rate and seed, and how far it has come."""

    def __init__(
        self, name: str, cells: Sequence[SweepCell], options: SearchOptions, seeds: Sequence[int] | None
    ) -> None:
        self.name, self._first = name, cells[0]
        self._cells = {(cell.name.lr, cell.name.seed): cell for cell in cells}
        train = self._first.config.train
        rates = tuple(sorted({lr for lr, _ in self._cells}))
        # Sorted, because the same cells are the same sweep in any order.
        in_order = tuple(seeds or sorted({seed for _, seed in self._cells}))
        rungs = rung_steps(train.steps, train.validate_every, options.rungs)
        # A rate below the one at which the schedule ends is refused.
        bounds = max(options.lowest_rate, train.min_lr), options.highest_rate
        self.plan = SearchPlan(
            rates,
            in_order,
            rungs,
            *bounds,
            options.finalists,
            tuple(options.search_seeds),
            options.race_level,
            options.race_within,
        )
        self.stage: SearchStage
        """What `decide` has found."""

    def decide(self) -> None:
        """Read what the runs have shown, and decide what the search needs next.

        Raises:
            UserError: a file of a run is damaged, or its rows are not those of the other runs.
        """
        try:
            self.stage = SearchStage(self.plan, functools.cache(self._observe))
        except ValueError as error:
            raise UserError(f"{self.name}: {error}: the validation rows have changed; restore them") from None

    def _observe(self, lr: float, seed: int) -> Observation:
        """What the files of a run's folder show."""
        cell = self.cell(lr, seed)
        folder, record = cell.folder, cell.folder.record()
        rows = read_validation_losses(folder.validation_losses_file)
        return Observation(
            evaluations={row.step: row for row in rows},
            loss=None if record is None else record.training.validation_loss_last,
            diverged=record is None and folder.diverged(),
            scored=cell.finished(),
        )

    def cell(self, lr: float, seed: int) -> SweepCell:
        """The cell of the grid, or one with a rate outside of it."""
        if (lr, seed) not in self._cells:
            config = replace(self._first.config, seed=seed, train=replace(self._first.config.train, lr=lr))
            self._cells[lr, seed] = SweepCell((), config)
        return self._cells[lr, seed]

    def next_cells(self) -> list[SweepCell]:
        """The cells that the search needs next, each for the launch that it needs."""
        splits = self._first.config.score.splits
        return [
            self.cell(request.lr, request.seed).until(request.until, splits if request.score else [])
            for request in self.stage.requests
        ]

    def choice(self) -> RateChoice | None:
        """The chosen rate with its runs, once the search has ended."""
        chosen = self.stage.chosen
        if chosen is None or self.stage.requests:
            return None
        cells = [self.cell(chosen.lr, seed) for seed in self.plan.seeds]
        failed = sum(len(trial.failed) for trial in self.stage.trials())
        choice = selection.recorded_choice(
            chosen, cells, LOSS, chosen.value, trials=len(self.stage.asked), failed=failed
        )
        scores = [own for cell in cells if (own := read_run_scores(cell.folder).metrics("test"))]
        # The first metric that all seeds have on test.
        test, test_metric = (None, "") if len(scores) < len(cells) else selection.mean_score(scores)
        return replace(choice, test=test, test_metric=test_metric, tied=self.stage.tied())


class StagedSweep:
    """The searches of a sweep, one for each model, task, configuration and rank, and the launches of one command.

    Each run is launched at most once for each goal: one that has failed is launched again by the next command.

    Args:
        seeds: the seeds in the order of use; None takes those of the grid.

    Raises:
        UserError: the runs are trained from a reward.
    """

    def __init__(
        self, sweep: Sweep, options: SearchOptions, launch: Launch, seeds: Sequence[int] | None = None
    ) -> None:
        if any(cell.config.objective.name == "reward" for cell in sweep.cells):
            raise UserError(
                "hydra/sweeper: a search of rates compares validation losses of references, and objective=reward does "
                "not lower them; run a grid of rates with hydra/sweeper=resuming, and choose with scripts/sweep.py "
                "select"
            )
        self.sweep, self.launch, self.control = sweep, launch, sweep.control
        self._fail_fast = options.fail_fast
        self._launched: set[Goal] = set()
        """Empty until the first launch. Before it nothing is written, so a read-only archive can be printed."""
        self.searches: list[Search] = []
        for name, cells in rate_groups(sweep.cells).items():
            self.searches.append(Search(name, cells, options, seeds))

    def search(self) -> None:
        """Launch what the searches ask for until they have ended, or need a run that has failed.

        Raises:
            UserError: a file of a run, or the selection.json of an earlier start, is damaged.
        """
        # A diverged run is a result, until a person asks for it again.
        for run_id in self.control.retried():
            RunFolder(self.sweep.path.parents[1] / run_id).error_file.unlink(missing_ok=True)
        while True:
            for search in self.searches:
                search.decide()
                # The state of stopped runs is `pruned`, as long as nothing continues them.
                for made in search.stage.decisions:
                    if made.action == "stopped" and made.seed is not None:
                        folder = search.cell(made.lr, made.seed).folder
                        if folder.state() == "interrupted":
                            storage.write_bytes(folder.pruned_file, f"{made.reason}\n".encode())
            decided = self.selection()
            if not self._launched:
                self._warn_of_other_options(decided)
            write_selection(self.sweep.path / SELECTION_FILE, decided)
            # Such as `21 cells to step 20, 2 cells to the end`.
            goals = Counter(
                "are scored" if request.score else f"to step {request.until}" if request.until else "to the end"
                for search in self.searches
                for request in search.stage.requests
            )
            what = ", ".join(f"{count} cells {goal}" for goal, count in goals.items())
            goes_on = self.run([cell for search in self.searches for cell in search.next_cells()], what)
            self.record(search.cell(*each) for search in self.searches for each in sorted(search.stage.asked))
            if not goes_on:
                return

    def record(self, cells: Iterable[SweepCell]) -> None:
        """Freeze those that no launch has frozen, because another sweep has finished them: `status` lists them too."""
        splits = self.sweep.cells[0].config.score.splits
        frozen = self.sweep.path / "cells"
        self.sweep.freeze(cell.until(None, splits) for cell in cells if not (frozen / f"{cell.run_id}.json").exists())

    def _warn_of_other_options(self, decided: Selection) -> None:
        """Say which options of the search differ from those of an earlier start: all decisions are made anew by them.

        Raises:
            UserError: the selection.json of that start is damaged.
        """
        path = self.sweep.path / SELECTION_FILE
        earlier = {search.group: search for search in read_selection(path).searches} if path.exists() else {}
        for search in decided.searches:
            if (before := earlier.get(search.group)) is None:
                continue
            changed = [
                f"{name} {getattr(before, name)} -> {getattr(search, name)}"
                for name in SEARCH_OPTIONS
                if getattr(before, name) != getattr(search, name)
            ]
            if changed:
                log.warning(
                    "%s: %s: the search goes on with other options, so its decisions are made anew: %s",
                    self.sweep.id,
                    search.group,
                    ", ".join(changed),
                )

    def run(self, cells: Sequence[SweepCell], what: str) -> bool:
        """Launch the cells that are new, and return when they have ended. Whether the searches should decide again.

        If none is new, another command may be working on some, and the searches wait for it.

        Args:
            what: the stage, for the log.

        Raises:
            UserError: test rows are missing or wrong. Nothing has run then.
        """
        if self._first_failure() is not None:
            return False
        new = [cell for cell in cells if cell.goal not in self._launched]
        if not new:
            if busy := [cell for cell in cells if cell.state() == "running"]:
                wait_for_one(busy)
            return bool(busy)
        if not self._launched:
            check_scoring(self.sweep.cells)
            self.sweep.freeze()
            self.control.start(self._fail_fast)
            (self.sweep.path / VERDICTS_FILE).unlink(missing_ok=True)
        log.info("%s: %s", self.sweep.id, what)
        # Rates beyond the grid are not frozen yet.
        grid, splits = {cell.run_id for cell in self.sweep.cells}, self.sweep.cells[0].config.score.splits
        self.sweep.freeze(cell.until(None, splits) for cell in new if cell.run_id not in grid)
        self._launched.update(cell.goal for cell in new)
        launch_cells(new, self.launch, self.control)
        return True

    def _first_failure(self) -> str | None:
        """The cell that has stopped this command. What an earlier one has left counts no more."""
        return self.control.first_failure() if self._launched else None

    def selection(self) -> Selection:
        """The choices and decisions so far."""
        choices, searches = [], []
        for search in self.searches:
            if (choice := search.choice()) is not None:
                choices.append(choice)
            plan, made = search.plan, search.stage.decisions
            bounds = plan.lowest, plan.highest
            found = RateSearch(search.name, list(plan.seeds), list(plan.rungs), *bounds, made, list(plan.named_seeds))
            if plan.named_seeds:
                found = replace(found, race_level=plan.race_level, race_within=plan.race_within)
            searches.append(found)
        return Selection(self.sweep.id, "loss", choices, searches)

    def summary(self) -> list[RenderableType]:
        """The chosen rates as a table, after the decisions that a reader should know."""
        selected = self.selection()
        notes = selection.decision_lines(selected, ("diverged", "outward", "edge", "tied", "fallback", "none"))
        return [*notes, *([""] if notes else []), *selection.table(selected.choices, searched=True)]

    def end(self, unfinished: Sequence[SweepCell] = (), of_looks: Iterable[SweepCell] = ()) -> None:
        """End the command, with SystemExit as run_staged.

        Args:
            unfinished: missing runs that no search needs.
            of_looks: finished runs at a chosen rate, also at seeds that no search has.
        """
        asked = [*(cell for search in self.searches for cell in search.next_cells()), *unfinished]
        trials = [(search, trial) for search in self.searches for trial in search.stage.trials()]
        of_search = [search.cell(trial.lr, seed) for search, trial in trials for seed in trial.losses]
        used = {cell.run_id: cell for cell in [*of_search, *of_looks]}
        errors = {cell.run_id: self._why_unfinished(cell) for cell in asked}
        # Those that this command has launched were checked then.
        launched = {goal.run_id for goal in self._launched}
        earlier = [cell for run_id, cell in used.items() if run_id not in launched and cell.folder.result_file.exists()]
        errors.update(changed_inputs(earlier))
        if self._launched:
            self.control.end()
        without = [search.name for search in self.searches if not search.stage.requests and search.stage.chosen is None]
        for name in without:
            print(f"{name}: every rate diverged; add lower ones with train.lr=", file=sys.stderr)
        end_with(errors, len(used) + len(asked), self._first_failure())
        if without:
            raise SystemExit(1)

    def _why_unfinished(self, cell: SweepCell) -> str:
        if self.control.is_dropped(cell.run_id):
            return "dropped, but the search needs it; put it back with scripts/sweep.py retry"
        if cell.state() == "failed":
            return cell.folder.error()
        if self._first_failure() is not None:
            return "stopped, because another cell failed"
        return "stopped without the losses or scores that the search needs; the same command continues it"


def run_staged(sweep: Sweep, options: SearchOptions, launch: Launch) -> None:
    """Carry out the staged sweep, then print the chosen rates. The same command continues a stopped one.

    Raises:
        UserError: a file of a run is damaged.
        SystemExit: with code 1, after naming every cell that failed and every configuration without a usable rate.
        KeyboardInterrupt: the sweep was asked to stop.
    """
    staged = StagedSweep(sweep, options, launch)
    staged.search()
    screen.show("", *staged.summary())
    staged.end()


def run_deciding(sweep: Sweep, options: DecidingOptions, launch: Launch) -> None:
    """Carry out the deciding sweep, then print the chosen rates and the verdicts. The same command continues it.

    Raises:
        UserError: the claims' file is wrong, or not the one of the plan; a claim needs scores that the sweep does not
            compute; or a file of a run is damaged.
        SystemExit: with code 1, as run_staged.
        KeyboardInterrupt: the sweep was asked to stop.
    """
    # Every rate starts at the first seed. A run that is stopped early counts too.
    least, budget = max(Counter(cell.config.seed for cell in sweep.cells).values()), options.budget
    if budget is not None and budget < least:
        raise UserError(f"hydra.sweeper.budget={budget}: the search alone has {least} runs or more; raise the budget")
    path = Path(options.claims) if Path(options.claims).exists() else DATA / options.claims
    planned = claim_files.read(path)
    configs = [cell.config for cell in sweep.cells]
    names = Names()
    for cell in sweep.cells:
        names.add(cell.arm, cell.config.task.name, (), identity(cell.config))
    claim_files.check_names(path, planned, names)
    _check_sides(sweep, planned)
    if not all(config.score.splits for config in configs):
        raise UserError("score.splits=[]: the claims need scores; choose validation, test or both")
    for claim in planned:
        if claim.rule.needs_zero and claim.floor is None and not all(config.score.base for config in configs):
            raise UserError(f"score.base=false: the claim '{claim.name}' needs the scores of the base model")
    # The chosen rates run at the seeds of the earliest look. Rates are searched there too, if no others are named.
    seeds = list(min(planned, key=lambda claim: claim.plan.looks[0]).plan.of_look(0))
    staged = StagedSweep(sweep, options, launch, seeds)
    # A sweep that is refused leaves no plan. Otherwise the runs of a plan need not be there any more.
    if not (sweep.path / PLAN_FILE).exists():
        check_scoring(sweep.cells)
    _write_plan(sweep, path, planned, options.search_seeds or seeds, budget)
    staged.search()
    used = {search.cell(*asked).run_id for search in staged.searches for asked in search.stage.asked}
    # An earlier start of the same command has paid for the runs of looks that have ended.
    paid = [cell for _, _, cell in _of_looks(planned, staged) if _has_ended(cell)]
    staged.record(paid)
    used |= {cell.run_id for cell in paid}
    while True:
        states = next_looks(planned, staged)
        needed = {cell.run_id: cell for _, cells in states for cell in cells}
        spent = budget is not None and len(used | set(needed)) > budget
        what = f"{len(needed)} cells for the next looks of {sum(bool(cells) for _, cells in states)} claims"
        if spent or not staged.run(list(needed.values()), what):
            break
        used |= set(needed)
    verdicts = [
        {
            "claim": answer.claim.name,
            "model": answer.model,
            "task": answer.task,
            "verdict": str(answer.verdict),
            "futile": answer.is_futile,
            "look": None if (look := answer.findings.look) is None else look.number + 1,
            "seeds": answer.findings.seeds,
            "reason": answer.reason,
            "open": bool(cells),
        }
        for answer, cells in states
    ]
    storage.write_changed(sweep.path / VERDICTS_FILE, storage.json_bytes(verdicts))
    screen.show("", *staged.summary(), "")
    for answer, _ in states:
        verdict = "futile" if answer.is_futile else str(answer.verdict)
        where = f" ({answer.model}, {answer.task})" if answer.model else ""
        print(f"{answer.claim.name}{where}: {verdict}: {answer.reason}")
    print(f"{len(used)} runs in all" + (f"; the budget of {budget} runs is spent" if spent else ""))
    of_looks = [cell for _, _, cell in _of_looks(planned, staged) if cell.finished()]
    staged.end(() if spent else tuple(needed.values()), of_looks)


def _check_sides(sweep: Sweep, claims: Sequence[Claim]) -> None:
    """Refuse a grid in which no claim has both sides: it would search rates, and decide nothing.

    Raises:
        UserError: naming what the first claim needs, and what the grid has.
    """
    cells: dict[tuple[str, str], list[SweepCell]] = {}
    for cell in sweep.cells:
        cells.setdefault((cell.config.model.name, cell.config.task.name), []).append(cell)

    def arms(claim: Claim, cells: list[SweepCell]) -> set[TrialArm]:
        """The arms of those cells that the claim is about."""
        return {cell.arm for cell in cells if claim.covers_setting(cell.config.task.name, identity(cell.config))}

    def has(side: Side, claim: Claim, own: set[TrialArm]) -> bool:
        """Whether a side is among the arms of one model and task."""
        if side.frontier:
            return any(arm.is_size_of(side.frontier) for arm in own)
        rank = claim.anchor.rank if side.at == claim_files.EQUAL_RANK else side.rank
        return any(side.means(arm) and rank in (None, arm.rank) for arm in own)

    def needed(claim: Claim) -> list[Side]:
        return [claim.method, claim.comparator, *([claim.floor] if claim.floor and claim.rule.needs_zero else [])]

    if not any(
        all(has(side, claim, arms(claim, own)) for side in needed(claim)) for claim in claims for own in cells.values()
    ):
        first, names = claims[0], sorted({f"{cell.arm.label} r={cell.arm.rank}" for cell in sweep.cells})
        raise UserError(
            f"hydra.sweeper.claims: no claim has both its sides in the grid; {first.name!r:.80} needs "
            f"{' and '.join(map(str, needed(first)))}, and the grid has {', '.join(names)}; add the missing axis, such "
            "as tying=LoRA,TABuv or +grid=yardstick, or name other claims"
        )


def _write_plan(sweep: Sweep, path: Path, claims: Sequence[Claim], seeds: list[int], budget: int | None) -> None:
    """Write plan.json before the first run, or compare it with the one that was written then.

    As long as no run has begun, another plan replaces it: nobody has seen a result.

    Args:
        path: the claims' file.
        seeds: those at which rates are searched.

    Raises:
        UserError: another plan was written.
    """
    plan = {
        "claims_file": path.name,
        "claims_sha256": storage.sha256(path),
        "claims": [
            {"name": claim.name, "rule": claim.rule.words}
            | {key: list(getattr(claim.plan, key)) for key in ("looks", "levels", "seeds")}
            for claim in claims
        ],
        "search_seeds": seeds,
        "budget": budget,
    }
    file = sweep.path / PLAN_FILE
    # A search may have run at other seeds than those of the grid.
    run_ids = {cell.run_id for cell in sweep.cells} | {cell.stem for cell in (sweep.path / "cells").glob("*.json")}
    if not file.exists() or not any((sweep.path.parents[1] / run_id).exists() for run_id in run_ids):
        storage.write_changed(file, storage.json_bytes(plan))
    elif (written := storage.read_json(file)) != plan:
        different = ", ".join(key for key in plan if plan[key] != written.get(key))
        raise UserError(
            f"{file}: was written before the first run with other values of {different}; restore them, or take another "
            "outputs= for a new plan with new seeds"
        )


def _of_looks(claims: Iterable[Claim], staged: StagedSweep) -> list[tuple[Search, RateChoice, SweepCell]]:
    """The cell of every chosen rate at every seed of a planned look, on either side, with its search."""
    sides = [(claim, side) for claim in claims for side in claim.sides.values()]
    seeds = sorted({seed + side.seed_offset for claim, side in sides for seed in claim.plan.of_look(-1)})
    choices = [(search, choice) for search in staged.searches if (choice := search.choice()) is not None]
    return [(search, choice, search.cell(choice.lr, seed)) for search, choice in choices for seed in seeds]


def _has_ended(cell: SweepCell) -> bool:
    """Whether the run is scored, or has diverged."""
    return cell.finished() or cell.folder.diverged()


def next_looks(claims: Sequence[Claim], staged: StagedSweep) -> list[tuple[Answer, list[SweepCell]]]:
    """The answer to every claim from the chosen runs of this sweep, with the runs that it needs next, if it is open."""
    owners: dict[str, tuple[Search, RateChoice]] = {}
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for search, choice, cell in _of_looks(claims, staged):
        owners[cell.run_id] = search, choice
        if cell.folder.path.exists():
            run = read_run(cell.folder.path)
            runs.append(run) if isinstance(run, Run) else left_out.append(run)
    groups, book = group_runs(runs, left_out, [staged.selection()]), Scorebook()
    # Some runs may have test scores from another command, and the runs of later looks will not.
    split = "test" if "test" in staged.sweep.cells[0].config.score.splits else "validation"
    answers = [answer for claim in claims for answer in answer_claims([claim], groups, book, split)]
    return [(answer, _next_look(answer, owners)) for answer in answers]


def _next_look(answer: Answer, owners: dict[str, tuple[Search, RateChoice]]) -> list[SweepCell]:
    """The missing runs of the first incomplete look. A run is missing if it is neither scored nor diverged."""
    pair, plan = answer.pair, answer.claim.plan
    if not isinstance(pair, Pair) or answer.verdict != Verdict.UNDECIDED or answer.is_futile:
        return []
    for number in range(len(plan.looks)):
        if number and not answer.findings.rows:
            return []  # The first look has its runs and cannot be computed, so more runs would not help.
        cells = [
            search.cell(choice.lr, seed + offset)
            for group, offset in pair.arms
            for search, choice in [owners[group.runs[0].path.name]]
            for seed in plan.of_look(number)
        ]
        if missing := [cell for cell in cells if not _has_ended(cell)]:
            return [cell.until(None, cell.config.score.splits) for cell in missing]
    return []
