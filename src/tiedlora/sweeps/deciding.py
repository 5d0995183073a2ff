"""The deciding sweep: search the rates, then run the seeds of the planned looks that open claims still need.

The claims, their looks and the budget are written to plan.json before the first run. A claim is closed when the rules
of the report have decided it (supported, contradicted or uninformative), when no planned look is likely to decide it
(futile), or after its last look.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiedlora import storage
from tiedlora.analysis import claims as claim_files
from tiedlora.analysis.answers import Answer, Verdict, answer_claims
from tiedlora.analysis.claims import Claim, Pair, Side
from tiedlora.analysis.groups import group_runs
from tiedlora.analysis.runs import LeftOut, Run, Scorebook, read_run
from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError
from tiedlora.keys import is_count
from tiedlora.records.selection import RateChoice
from tiedlora.sweeps.cells import Sweep, SweepCell
from tiedlora.sweeps.launching import Launch
from tiedlora.sweeps.staged import Search, SearchOptions, StagedSweep

PLAN_FILE, VERDICTS_FILE = "plan.json", "verdicts.json"
"""What a deciding sweep writes into its folder before the first run, and at its end."""


@dataclass(frozen=True)
class ClaimState:
    """A claim on one model and task, and what it still needs."""

    answer: Answer
    needed: tuple[SweepCell, ...]
    """The runs of the next look. Empty if the claim is closed."""

    def __str__(self) -> str:
        answer = self.answer
        verdict = "futile" if answer.is_futile else str(answer.verdict)
        where = f" ({answer.model}, {answer.task})" if answer.model else ""
        return f"{answer.claim.name}{where}: {verdict}: {answer.reason}"


def run_deciding(
    sweep: Sweep, options: SearchOptions, claims: str, budget: int | None, launch: Launch, fail_fast: bool = False
) -> None:
    """Carry out the deciding sweep, then print the chosen rates and the verdicts. The same command continues it.

    Args:
        claims: the claims' file, relative to the working folder or to the project.
        budget: the most runs; None sets no limit.
        fail_fast: as for run_sweep.

    Raises:
        UserError: the claims' file is wrong, or not the one of the plan; a claim needs scores that the sweep does not
            compute; or a file of a run is damaged.
        SystemExit: with code 1, as run_staged.
        KeyboardInterrupt: the sweep was asked to stop.
    """
    if budget is not None and not is_count(budget):
        raise UserError(f"hydra.sweeper.budget={budget}: must be a whole number of at least 1, or null")
    if not isinstance(claims, str) or not claims:
        raise UserError(f"hydra.sweeper.claims={claims}: must be the name of a file, such as claims/tied_lora.yaml")
    # Every rate runs at the first seed, except those that are stopped early, which count as runs too.
    least = max(Counter(cell.config.seed for cell in sweep.cells).values())
    if budget is not None and budget < least:
        raise UserError(f"hydra.sweeper.budget={budget}: the search of the rates alone has {least} runs or more")
    path = Path(claims) if Path(claims).exists() else PROJECT / claims
    planned = claim_files.read(path)
    configs = [cell.config for cell in sweep.cells]
    names = {config.tying.name for config in configs}
    claim_files.check_names(path, planned, names, {config.task.name: () for config in configs})
    _check_sides(sweep, planned)
    if not all(cell.config.score.splits for cell in sweep.cells):
        raise UserError("score.splits=[]: the claims need scores; choose validation, test or both")
    for claim in planned:
        if claim.rule.needs_zero and claim.floor is None and not all(cell.config.score.base for cell in sweep.cells):
            raise UserError(f"score.base=false: the claim '{claim.name}' needs the scores of the base model")
    seeds = _write_plan(sweep, path, planned, budget)
    staged = StagedSweep(sweep, options, launch, fail_fast, seeds)
    staged.search()
    used = {cell.run_id for search in staged.searches for cell in [*search.runs(), *_ended_looks(planned, search)]}
    while True:
        states = claim_states(planned, staged)
        needed = {cell.run_id: cell for state in states for cell in state.needed}
        spent = budget is not None and len(used | set(needed)) > budget
        what = f"{len(needed)} cells for the next looks of {sum(bool(state.needed) for state in states)} claims"
        if spent or not staged.run(list(needed.values()), what):
            break
        used |= set(needed)
    storage.write_json(sweep.path / VERDICTS_FILE, [_to_json(state) for state in states])
    print(f"\n{staged.summary()}\n")
    print("\n".join(map(str, states)))
    print(f"{len(used)} runs in all" + (f"; the budget of {budget} runs is spent" if spent else ""))
    staged.end(() if spent else tuple(needed.values()))


def _check_sides(sweep: Sweep, claims: Sequence[Claim]) -> None:
    """Refuse a grid that has both sides of no claim: it would search rates, and decide nothing.

    Raises:
        UserError: naming what the first claim needs, and what the grid has.
    """
    arms: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for cell in sweep.cells:
        arm = cell.name.configuration, cell.name.rank
        arms.setdefault((cell.config.model.name, cell.config.task.name), set()).add(arm)
    if not any(claim.covers(task) and _has_sides(claim, own) for claim in claims for (_, task), own in arms.items()):
        sides = " and ".join(map(str, _needed(claims[0])))
        names = ", ".join(sorted({f"{name} r={rank}" for own in arms.values() for name, rank in own}))
        raise UserError(
            f"hydra.sweeper.claims: the grid has both sides of no claim; {claims[0].name!r:.80} needs {sides}, and the "
            f"grid has {names}; add the missing axis, such as tying=LoRA,TABuv or +grid=yardstick, or name other claims"
        )


def _has_sides(claim: Claim, arms: set[tuple[str, int]]) -> bool:
    """Whether all that a claim needs is among these configurations and ranks of one model and task."""

    def has(side: Side) -> bool:
        rank = claim.anchor.rank if side.at == claim_files.EQUAL_RANK else side.rank
        names = rf"{re.escape(side.frontier)}(_l\d+)?" if side.frontier else re.escape(side.label)
        return any(re.fullmatch(names, name) and rank in (None, own) for name, own in arms)

    return all(map(has, _needed(claim)))


def _needed(claim: Claim) -> list[Side]:
    """The sides without which a claim has no verdict."""
    return [claim.method, claim.comparator, *([claim.floor] if claim.floor and claim.rule.needs_zero else [])]


def _write_plan(sweep: Sweep, path: Path, claims: Sequence[Claim], budget: int | None) -> list[int]:
    """Write plan.json before the first run, or compare it with the one that was written then.

    Returns:
        The seeds at which rates are searched: those of the earliest look.

    Raises:
        UserError: another plan was written.
    """
    first = min(claims, key=lambda claim: claim.plan.looks[0])
    plan = {
        "claims_file": path.name,
        "claims_sha256": storage.sha256(path),
        "claims": [
            {
                "name": claim.name,
                "rule": str(claim.rule),
                "looks": list(claim.plan.looks),
                "levels": list(claim.plan.levels),
                "seeds": list(claim.plan.seeds),
            }
            for claim in claims
        ],
        "search_seeds": list(first.plan.of_look(0)),
        "budget": budget,
    }
    file = sweep.path / PLAN_FILE
    if not file.exists():
        storage.write_json(file, plan)
    elif (written := storage.read_json(file)) != plan:
        different = ", ".join(key for key in plan if plan[key] != written.get(key))
        raise UserError(
            f"{file}: was written before the first run with other values of {different}; restore them, or take another "
            "outputs= for a new plan with new seeds"
        )
    return list(first.plan.of_look(0))


def claim_states(claims: Sequence[Claim], staged: StagedSweep) -> list[ClaimState]:
    """The answer to every claim from the chosen runs of this sweep, and the runs that open claims need next."""
    owners: dict[str, tuple[Search, RateChoice]] = {}
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for search in staged.searches:
        if (choice := search.choice()) is None:
            continue
        for seed in _all_seeds(claims):
            folder = search.cell(choice.lr, seed).folder
            owners[folder.path.name] = search, choice
            if folder.path.exists():
                run = read_run(folder.path)
                runs.append(run) if isinstance(run, Run) else left_out.append(run)
    groups, book, states = group_runs(runs, left_out, [staged.selection()]), Scorebook(), []
    for claim in claims:
        for answer in answer_claims([claim], groups, book):
            needed: tuple[SweepCell, ...] = ()
            if answer.pair is not None and answer.verdict == Verdict.UNDECIDED and not answer.is_futile:
                needed = _next_look(claim, answer.pair, owners)
            states.append(ClaimState(answer, needed))
    return states


def _ended_looks(claims: Iterable[Claim], search: Search) -> list[SweepCell]:
    """The runs of planned looks that have ended, which an earlier start of the same command has paid for."""
    if (choice := search.choice()) is None:
        return []
    cells = [search.cell(choice.lr, seed) for seed in _all_seeds(claims)]
    return [cell for cell in cells if cell.finished() or cell.folder.diverged()]


def _all_seeds(claims: Iterable[Claim]) -> list[int]:
    """Every seed of a planned look, on either side."""
    return sorted(
        {
            seed + side.seed_offset
            for claim in claims
            for side in claim.sides.values()
            for seed in claim.plan.of_look(-1)
        }
    )


def _next_look(claim: Claim, pair: Pair, owners: dict[str, tuple[Search, RateChoice]]) -> tuple[SweepCell, ...]:
    """The runs of the first look that has not all of them: not scored, and not diverged."""
    for number in range(len(claim.plan.looks)):
        # The weakest arm says whether the trial can fail, so it has the seeds of every look too.
        weakest = [(pair.weakest, 0)] if pair.weakest is not None and pair.arms else []
        cells = [
            search.cell(choice.lr, seed + offset)
            for group, offset in [*pair.arms, *weakest]
            for search, choice in [owners[group.runs[0].path.name]]
            for seed in claim.plan.of_look(number)
        ]
        missing = [cell for cell in cells if not cell.finished() and not cell.folder.diverged()]
        if missing:
            return tuple(cell.until(None, cell.config.score.splits) for cell in missing)
    return ()


def _to_json(state: ClaimState) -> dict[str, object]:
    answer = state.answer
    return {
        "claim": answer.claim.name,
        "model": answer.model,
        "task": answer.task,
        "verdict": str(answer.verdict),
        "futile": answer.is_futile,
        "look": None if answer.look is None else answer.look + 1,
        "seeds": answer.seeds,
        "reason": answer.reason,
        "open": bool(state.needed),
    }
