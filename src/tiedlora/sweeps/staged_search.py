"""The staged search of one configuration's learning rate, as a pure function of what its runs have shown so far.

1. *Search.* Every rate runs at the first seed. At each rung (a step of training) those that are clearly behind stop. If
   the best rate is the lowest or highest one, the next rate outward joins, within bounds.
2. *Finalists.* The two best rates run at the second seed, and a third one if it is not clearly behind.
3. *Repeat.* The chosen rate runs at the other seeds. If it diverges at one, the next best rate is chosen.
4. *Test.* The runs of the chosen rate are scored.

`next_stage` replays these steps from the start. Where a run is needed that has not come far enough, it ends with what
to run next. So a search has no state besides its runs: a stopped one continues with the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tiedlora.analysis.intervals import RowLosses, paired_difference
from tiedlora.analysis.rate_choice import ChosenRate, RateTrial, choose_rate
from tiedlora.records.selection import SearchDecision

NOISE_FACTOR = 2.0
"""A rate is clearly behind if its loss is higher than the best one's by more than this many paired standard errors."""
LEAST_KEPT = 2
"""A rate among the two best never stops at a rung, and both run at the second seed."""


@dataclass(frozen=True)
class SearchPlan:
    """What is fixed before the first run."""

    rates: tuple[float, ...]
    """The rates of the grid."""
    seeds: tuple[int, ...]
    """In the order of use: the first two search, and the others repeat the chosen rate."""
    rungs: tuple[int, ...]
    """Steps of training, in ascending order. Each has an evaluation, and is before the last step."""
    lowest: float
    """No rate below this one is tried, except those of the grid."""
    highest: float
    finalists: int = 3
    """The most rates that run at the second seed."""


@dataclass(frozen=True)
class Observation:
    """What one run has shown so far."""

    evaluations: Mapping[int, RowLosses] = field(default_factory=dict)
    """Step -> the loss of every validation row."""
    loss: float | None = None
    """The last validation loss of a finished run."""
    diverged: bool = False
    """Whether the run ended because a loss was not finite."""
    scored: bool = False
    """Whether the finished run has the scores that the sweep asks for."""


Observe = Callable[[float, int], Observation]
"""(Rate, seed) -> what its run has shown. A run that has not started has shown nothing."""


@dataclass(frozen=True)
class Request:
    """A run to start or to continue."""

    lr: float
    seed: int
    until: int | None = None
    """The rung after which it pauses; None trains to the end."""
    score: bool = False
    """Whether it is scored after training. Only the chosen runs are."""


def next_stage(plan: SearchPlan, observe: Observe) -> SearchStage:
    """What the search has decided, and what to run next, given what the runs have shown."""
    stage = SearchStage(plan, observe)
    with suppress(_Waiting):
        stage._replay()
    return stage


class _Waiting(Exception):
    """The search needs runs that have not come far enough."""


class SearchStage:
    """One replay of the search: what it has decided so far, and what it needs next."""

    def __init__(self, plan: SearchPlan, observe: Observe) -> None:
        self.plan, self.observe = plan, observe
        self.requests: list[Request] = []
        """Empty when the search has ended."""
        self.decisions: list[SearchDecision] = []
        self.chosen: ChosenRate | None = None
        """The chosen rate so far. None before the first choice, and if every rate diverged."""
        self.asked: set[tuple[float, int]] = set()
        """(Rate, seed) of every run that the search has asked for."""
        self._used: set[tuple[float, int]] = set()
        """As `asked`, without the runs that stopped or wait at a rung. Others do not change its decisions: a full grid
        may have finished runs that the search did not ask for, or had stopped."""
        self._tried = sorted(plan.rates)
        self._finalists: list[float] = []
        """The rates that run at the second seed."""
        self._at_rung: dict[int, dict[float, RowLosses]] = {rung: {} for rung in plan.rungs}
        """The rates that came to the rung at the first seed, with their evaluation there."""

    def _replay(self) -> None:
        """Raises:
        _Waiting: more runs are needed.
        """
        self._race(self._tried)
        self._choose("search")
        while self._follow_outward() or self._add_finalists():
            self._choose("search")
        self._repeat()
        if self.chosen is not None:
            self._need([Request(self.chosen.lr, seed, score=True) for seed in self.plan.seeds])

    def trials(self) -> list[RateTrial]:
        """The rates that were tried, with the losses of their finished runs."""
        trials = []
        for lr in sorted(self._tried):
            seen = {seed: self.observe(lr, seed) for seed in self.plan.seeds if (lr, seed) in self._used}
            losses = {seed: run.loss for seed, run in seen.items() if run.loss is not None}
            trials.append(RateTrial(lr, losses, failed=frozenset(seed for seed, run in seen.items() if run.diverged)))
        return trials

    def _need(self, requests: Iterable[Request]) -> None:
        """Raises:
        _Waiting: not all of the runs have come as far as requested.
        """
        requests = list(requests)
        self.asked.update((request.lr, request.seed) for request in requests)
        self._used.update((request.lr, request.seed) for request in requests if request.until is None)
        self.requests = [request for request in requests if not _fulfilled(request, self.observe)]
        if self.requests:
            raise _Waiting

    def _decide(self, lr: float, action: str, reason: str, seed: int | None = None, step: int | None = None) -> None:
        self.decisions.append(SearchDecision(lr, action, reason, seed, step))

    # 1. Search.

    def _race(self, entering: Sequence[float]) -> None:
        """Run the rates at the first seed. At the rungs, those that are clearly behind stop."""
        seed, running = self.plan.seeds[0], list(entering)
        for rung in self.plan.rungs:
            if len(running) + len(self._at_rung[rung]) <= LEAST_KEPT:
                # Nothing could stop here.
                continue
            self._need(Request(lr, seed, until=rung) for lr in running)
            stopped = self._stop_at(rung, running)
            running = [lr for lr in running if lr not in stopped]
        self._need(Request(lr, seed) for lr in running)
        for lr in running:
            self._note_divergence(lr, seed)

    def _stop_at(self, rung: int, running: Sequence[float]) -> set[float]:
        """The rates of `running` that stop at the rung.

        They are compared with all rates that came to it, also earlier ones. The better half stays, and at least two.
        """
        reached = self._at_rung[rung]
        # A run of an earlier version has no row losses. It is not compared, so it does not stop.
        seen = {lr: self.observe(lr, self.plan.seeds[0]).evaluations.get(rung) for lr in running}
        reached.update({lr: losses for lr, losses in seen.items() if losses is not None})
        ranked = sorted(reached, key=lambda lr: (reached[lr].mean(), lr))
        kept = max(LEAST_KEPT, math.ceil(len(ranked) / 2))
        stopped = set()
        for lr in ranked[kept:]:
            if lr in seen and (behind := _behind(reached[lr], reached[ranked[0]])):
                stopped.add(lr)
                reason = f"{behind} {ranked[0]:g} at step {rung}, and {ranked.index(lr)} of {len(ranked)} are better"
                self._decide(lr, "stopped", reason, self.plan.seeds[0], rung)
        return stopped

    def _note_divergence(self, lr: float, seed: int) -> None:
        if self.observe(lr, seed).diverged:
            self._decide(lr, "diverged", f"its loss was not finite at seed {seed}", seed)

    def _choose(self, stage: str) -> None:
        """Set the chosen rate, by the rule that the report and `select` use."""
        before, self.chosen = self.chosen, choose_rate(self.trials(), by="loss")
        if self.chosen is None:
            lowest = min(self._tried)
            self._decide(lowest, "none", "no rate is left that did not diverge; add lower ones with train.lr=")
        elif before is None or before.lr != self.chosen.lr:
            seeds = ", ".join(map(str, self.chosen.seeds))
            reason = f"the lowest loss, {self.chosen.loss:.4f}, over the shared seeds {seeds}"
            self._decide(self.chosen.lr, "fallback" if stage == "repeat" else "chosen", reason)

    def _follow_outward(self) -> bool:
        """If the chosen rate is at the edge of those tried, try the next one outward. Whether there was one."""
        if self.chosen is None or not self.chosen.edge:
            return False
        upward = self.chosen.lr == max(self._tried)
        lr = next_rate(self.chosen.lr, upward)
        if not self.plan.lowest <= lr <= self.plan.highest:
            bound = "highest" if upward else "lowest"
            if not any((made.lr, made.action) == (self.chosen.lr, "edge") for made in self.decisions):
                self._decide(self.chosen.lr, "edge", f"it is the {bound} rate, and {lr:g} is beyond the bounds")
            return False
        self._tried.append(lr)
        self._decide(lr, "outward", f"{self.chosen.lr:g} is the best, and the {'highest' if upward else 'lowest'} rate")
        self._race([lr])
        return True

    # 2. Finalists.

    def _add_finalists(self) -> bool:
        """Run the best rates at the second seed. Whether one of them had not run there before."""
        if len(self.plan.seeds) < 2 or self.chosen is None:
            return False
        first, second = self.plan.seeds[:2]
        losses = {
            trial.lr: trial.losses[first] for trial in self.trials() if first in trial.losses and not trial.failed
        }
        ranked = sorted(losses, key=lambda lr: (losses[lr], lr))
        new = []
        for place, lr in enumerate(ranked[: self.plan.finalists] if len(ranked) > 1 else []):
            close = place < LEAST_KEPT or self._is_close(lr, ranked[0])
            if close and lr not in self._finalists:
                new.append(lr)
                self._decide(lr, "finalist", f"number {place + 1} at seed {first}", first)
        self._finalists += new
        self._need(Request(lr, second) for lr in new)
        for lr in new:
            self._note_divergence(lr, second)
        return bool(new)

    def _is_close(self, lr: float, best: float) -> bool:
        """Whether a rate is not clearly behind at the end. Not, if a run of an earlier version has no row losses."""
        losses, others = (self.observe(rate, self.plan.seeds[0]).evaluations for rate in (lr, best))
        return bool(losses and others) and not _behind(losses[max(losses)], others[max(others)])

    # 3. Repeat.

    def _repeat(self) -> None:
        """Run the chosen rate at the other seeds. If it diverges, the next best rate follows."""
        while self.chosen is not None:
            lr = self.chosen.lr
            self._need(Request(lr, seed) for seed in self.plan.seeds)
            diverged = [seed for seed in self.plan.seeds if self.observe(lr, seed).diverged]
            if not diverged:
                return
            self._note_divergence(lr, diverged[0])
            self._choose("repeat")


def _behind(losses: RowLosses, best: RowLosses) -> str:
    """By how much one rate's loss is above the best one's, in words; empty if it is not clearly behind."""
    difference, error = paired_difference(losses, best)
    is_clear = difference > NOISE_FACTOR * error
    return f"{difference:.4f} (paired standard error {error:.4f}) behind" if is_clear else ""


def _fulfilled(request: Request, observe: Observe) -> bool:
    """Whether the run has come as far as requested. One that diverged goes no further."""
    run = observe(request.lr, request.seed)
    if run.diverged:
        return True
    if request.score:
        return run.scored
    if request.until is not None and request.until in run.evaluations:
        return True
    return run.loss is not None


def rung_steps(steps: int, validate_every: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """For each fraction of the steps, the first evaluation at or after it, if it is before the last step."""
    if not validate_every:
        return ()
    places = {math.ceil(fraction * steps / validate_every) * validate_every for fraction in fractions}
    return tuple(sorted(step for step in places if 0 < step < steps))


def next_rate(lr: float, upward: bool) -> float:
    """The rate half a decade further: 1e-2 -> 3e-2 -> 1e-1, and other values times or divided by 3."""
    digit = f"{lr:.1e}"[:3]
    factor = 10 / 3 if digit == ("3.0" if upward else "1.0") else 3
    return float(f"{lr * factor if upward else lr / factor:.1e}")
