"""The staged search of one configuration's learning rate, as a pure function of what its runs have shown so far.

1. *Search.* Every rate runs at the first seed. At each rung (a step of training) those that are clearly and far behind
   stop. If the best rate is the lowest or highest one, the next rate outward joins, within bounds.
2. *Finalists.* The two best rates run at the second seed, and a third one if it is not clearly behind.
3. *Race*, if there are more than two seeds to search with. The finalists that are not worse than the best one, by the
   interval over seeds and validation rows, run at the next seed, until one is left, they are shown to be level, or the
   seeds are used. If two are left, a rate between them joins.
4. *Repeat.* The chosen rate runs at the other seeds. If it diverges at one, the next best rate is chosen.
5. *Test.* The runs of the chosen rate are scored.

`SearchStage` replays these steps from the start. Where a run is needed that has not come far enough, it ends with what
to run next. So a search has no state besides its runs: a stopped one continues with the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import mean

from tiedlora.analysis.intervals import both_interval, mean_loss, paired_difference
from tiedlora.analysis.rate_choice import ChosenRate, RateTrial, choose_rate, rate_contrast, regret_bound
from tiedlora.records.interval import Interval
from tiedlora.records.rows import ValidationLosses
from tiedlora.records.selection import SearchDecision

NOISE_FACTOR = 2.0
"""A rate is clearly behind if its loss is higher than the best one's by more than this many paired standard errors."""
RECOVERABLE = 0.25
"""A rate is far behind at a rung if its loss is higher than the best one's by more than this share of what the best one
has gained since its start. A rate above the best one catches up while the rates fall along their schedule, and one
below it needs more steps. In recorded runs, rates that were behind by 6 and 10 % ended level with the best one."""
LEAST_KEPT = 2
"""A rate among the two best never stops at a rung, and both run at the second seed."""
RACE_LEVEL, RACE_WITHIN = 0.3, 0.005
"""Those of conf/hydra/sweeper/, for simulations."""


@dataclass(frozen=True)
class SearchPlan:
    """What is fixed before the first run."""

    rates: tuple[float, ...]
    """The rates of the grid."""
    seeds: tuple[int, ...]
    """Those at which the chosen rate runs, in the order of use."""
    rungs: tuple[int, ...]
    """Steps of training, in ascending order. Each has an evaluation, and is before the last step."""
    lowest: float
    """No rate below this one is tried, except those of the grid."""
    highest: float
    finalists: int = 3
    """The most rates that run at the second seed."""
    named_seeds: tuple[int, ...] = ()
    """Those at which rates are compared, in the order of use; empty for the first two of `seeds`."""
    race_level: float = RACE_LEVEL
    """A rate leaves the race if the interval of its loss minus the best one's is above 0, at this two-sided level."""
    race_within: float = RACE_WITHIN
    """The race ends if none of the rates that are left can be better by as much as this, in nats, than the one that is
    best so far: by the bound of the regret over these rates."""

    @property
    def search_seeds(self) -> tuple[int, ...]:
        """All rates run at the first one, the finalists at the second, and at the others those left in the race."""
        return self.named_seeds or self.seeds[:2]


@dataclass(frozen=True)
class Observation:
    """What one run has shown so far."""

    evaluations: Mapping[int, ValidationLosses] = field(default_factory=dict)
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

    def is_met(self, run: Observation) -> bool:
        """Whether the run has come as far. One that diverged goes no further."""
        if run.diverged or self.score:
            return run.diverged or run.scored
        return run.loss is not None or self.until in run.evaluations


class _Waiting(Exception):
    """The search needs runs that have not come far enough."""


class SearchStage:
    """What a search has decided, and what it needs next, given what its runs have shown."""

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
        """As `asked`, without runs that stopped or wait at a rung. Only these runs count in its decisions: a full grid
        may have other finished runs, which the search did not ask for, or had stopped."""
        self._tried = sorted(plan.rates)
        self._finalists: list[float] = []
        """The rates that run at the second seed."""
        self._behind: set[float] = set()
        """The finalists that have left the race."""
        self._at_rung: dict[int, dict[float, ValidationLosses]] = {rung: {} for rung in plan.rungs}
        """The rates that came to the rung at the first seed, with their evaluation there."""
        with suppress(_Waiting):
            self._search(self._tried)
            self._choose()
            while self._follow_outward() or self._add_finalists() or self._race() or self._add_finer():
                self._choose()
            self._note_tie()
            self._repeat()
            if self.chosen is not None:
                self._need([Request(self.chosen.lr, seed, score=True) for seed in plan.seeds])

    def trials(self) -> list[RateTrial]:
        """The rates that were tried, with the losses of their finished runs."""
        trials, seeds = [], dict.fromkeys([*self.plan.search_seeds, *self.plan.seeds])
        for lr in sorted(self._tried):
            seen = {seed: self.observe(lr, seed) for seed in seeds if (lr, seed) in self._used}
            losses = {seed: run.loss for seed, run in seen.items() if run.loss is not None}
            trials.append(RateTrial(lr, losses, failed=frozenset(seed for seed, run in seen.items() if run.diverged)))
        return trials

    def _need(self, requests: Iterable[Request]) -> None:
        """Request these runs. Raises _Waiting unless all of them have come as far as requested."""
        requests = list(requests)
        self.asked.update((request.lr, request.seed) for request in requests)
        self._used.update((request.lr, request.seed) for request in requests if request.until is None)
        self.requests = [each for each in requests if not each.is_met(self.observe(each.lr, each.seed))]
        if self.requests:
            raise _Waiting

    def _decide(self, lr: float, action: str, reason: str, seed: int | None = None, step: int | None = None) -> None:
        self.decisions.append(SearchDecision(lr, action, reason, seed, step))

    # 1. Search.

    def _search(self, entering: Sequence[float]) -> None:
        """Run the rates at the first seed. At the rungs, those that are clearly and far behind stop."""
        seed, running = self.plan.search_seeds[0], list(entering)
        for rung, reached in self._at_rung.items():
            if len(running) + len(reached) <= LEAST_KEPT:
                # Nothing could stop here.
                continue
            self._need(Request(lr, seed, until=rung) for lr in running)
            # A run whose file of row losses is gone is not compared, so it does not stop.
            seen = {lr: self.observe(lr, seed).evaluations.get(rung) for lr in running}
            reached.update({lr: losses for lr, losses in seen.items() if losses is not None})
            # All rates that came to the rung are compared, also earlier ones. The better half stays, and at least two.
            ranked = sorted(reached, key=lambda lr: (mean_loss(reached[lr]), lr))
            for place in range(max(LEAST_KEPT, math.ceil(len(ranked) / 2)), len(ranked)):
                lr, best = ranked[place], ranked[0]
                start = self.observe(best, seed).evaluations.get(0)
                is_far = start is not None and _is_far(reached[lr], reached[best], start)
                if lr in running and is_far and (behind := _behind(reached[lr], reached[best])):
                    running.remove(lr)
                    reason = f"{behind} {best:g} at step {rung}, and {place} of {len(ranked)} are better"
                    self._decide(lr, "stopped", reason, seed, rung)
        self._finish(running, seed)

    def _finish(self, rates: Sequence[float], seed: int) -> None:
        """Run the rates to their end at a seed."""
        self._need(Request(lr, seed) for lr in rates)
        for lr in rates:
            if self.observe(lr, seed).diverged:
                self._decide(lr, "diverged", f"its loss was not finite at seed {seed}", seed)

    def _choose(self, action: str = "chosen") -> None:
        """Set the chosen rate, by the rule that the report and `select` use."""
        # A rate that has left the race is not chosen, even if its mean is lower on the seeds that all share.
        racing = self._racing() if self._is_race else None
        before, self.chosen = self.chosen, choose_rate(self.trials(), by="loss", among=racing)
        if self.chosen is None:
            lowest = min(self._tried)
            self._decide(lowest, "none", "no rate is left that did not diverge; add lower ones with train.lr=")
        elif before is None or before.lr != self.chosen.lr:
            seeds = ", ".join(map(str, self.chosen.seeds))
            reason = f"the lowest loss, {self.chosen.loss:.4f}, over the shared seeds {seeds}"
            self._decide(self.chosen.lr, action, reason)

    def _follow_outward(self) -> bool:
        """If the chosen rate is at the edge of those tried, try the next one outward. Whether there was one."""
        if self.chosen is None or not self.chosen.edge:
            return False
        upward = self.chosen.lr == max(self._tried)
        bound, lr = "highest" if upward else "lowest", next_rate(self.chosen.lr, upward)
        if not self.plan.lowest <= lr <= self.plan.highest:
            if not any((made.lr, made.action) == (self.chosen.lr, "edge") for made in self.decisions):
                self._decide(self.chosen.lr, "edge", f"it is the {bound} rate, and {lr:g} is beyond the bounds")
            return False
        self._tried.append(lr)
        self._decide(lr, "outward", f"{self.chosen.lr:g} is the best, and the {bound} rate")
        self._search([lr])
        return True

    # 2. Finalists.

    def _add_finalists(self) -> bool:
        """Run the best rates at the second seed. Whether one of them had not run there before."""
        if len(self.plan.search_seeds) < 2 or self.chosen is None:
            return False
        first, second = self.plan.search_seeds[:2]
        usable = [trial for trial in self.trials() if first in trial.losses and not trial.failed]
        ranked = [trial.lr for trial in sorted(usable, key=lambda trial: (trial.losses[first], trial.lr))]
        new = []
        for place, lr in enumerate(ranked[: self.plan.finalists] if len(ranked) > 1 else []):
            if lr not in self._finalists and (place < LEAST_KEPT or self._is_close(lr, ranked[0])):
                new.append(lr)
                self._decide(lr, "finalist", f"number {place + 1} at seed {first}", first)
        self._finalists += new
        self._finish(new, second)
        return bool(new)

    def _is_close(self, lr: float, best: float) -> bool:
        """Whether a rate is not clearly behind at the end. False if the row losses of one are gone."""
        losses, others = (self.observe(rate, self.plan.search_seeds[0]).evaluations for rate in (lr, best))
        return bool(losses and others) and not _behind(losses[max(losses)], others[max(others)])

    # 3. Race.

    @property
    def _is_race(self) -> bool:
        return len(self.plan.search_seeds) > 2

    def _racing(self) -> list[float]:
        """The finalists that have neither left the race nor diverged."""
        failed = {trial.lr for trial in self.trials() if trial.failed}
        return [lr for lr in self._finalists if lr not in self._behind and lr not in failed]

    def _race(self) -> bool:
        """Let the finalists leave that are worse than the best one, and run the others at the next seed.

        Returns:
            Whether there was one. A rate that joined late has fewer seeds, and goes on first.
        """
        if not self._is_race or self.chosen is None:
            return False
        best = self.chosen.lr
        for lr in self._racing():
            found = self._versus(lr, best)
            if lr != best and found is not None and found.low > 0:
                self._behind.add(lr)
                self._decide(lr, "behind", f"its loss minus that of {best:g} is {_in_words(found)}")
        racing = self._racing()
        runs = {lr: self._runs(lr) for lr in racing}
        fewest = min(runs.values(), default=0)
        if len(racing) < 2 or fewest == len(self.plan.search_seeds) or self._is_level(racing, best):
            return False
        self._finish([lr for lr in racing if runs[lr] == fewest], self.plan.search_seeds[fewest])
        return True

    def _runs(self, lr: float) -> int:
        """At how many seeds of the search a rate has run."""
        return sum((lr, seed) in self._used for seed in self.plan.search_seeds)

    def _is_level(self, racing: Iterable[float], best: float) -> bool:
        """Whether it does not matter which of the rates is taken. Each must share two seeds with the best one."""
        losses = {lr: self._all_last_losses(lr) for lr in racing}
        bound = regret_bound(losses, best)
        return bound is not None and bound.rates == len(losses) - 1 and bound.nats < self.plan.race_within

    def _add_finer(self) -> bool:
        """If the race has not told the two best rates apart, try one between them. Whether there was one."""
        racing = set(self._racing()) if self._is_race else set()
        if len(racing) < 2 or any(made.action == "finer" for made in self.decisions):
            return False
        ranked = sorted((mean(trial.losses.values()), trial.lr) for trial in self.trials() if trial.lr in racing)
        low, high = sorted(lr for _, lr in ranked[:2])
        lr = rate_between(low, high)
        if any(low < tried < high for tried in self._tried) or not low < lr < high:
            return False
        self._tried.append(lr)
        seeds = min(self._runs(low), self._runs(high))
        self._decide(lr, "finer", f"{low:g} and {high:g} are left after {seeds} seeds")
        self._search([lr])
        return True

    def tied(self) -> list[float]:
        """The rates that the race could not tell from the chosen one, in ascending order."""
        if not self._is_race or self.chosen is None:
            return []
        return sorted(lr for lr in self._racing() if lr != self.chosen.lr)

    def _note_tie(self) -> None:
        for lr in self.tied():
            assert self.chosen is not None
            found = self._versus(lr, self.chosen.lr)
            words = f"the loss of {lr:g} minus its own is {_in_words(found)}" if found else f"with {lr:g}"
            self._decide(self.chosen.lr, "tied", words)

    def _versus(self, lr: float, best: float) -> Interval | None:
        """The loss of a rate minus the best one's, over seeds and rows; None if they cannot be compared."""
        table = rate_contrast(self._all_last_losses(lr), self._all_last_losses(best))
        return None if table is None else both_interval(table, self.plan.race_level)

    def _all_last_losses(self, lr: float) -> dict[int, ValidationLosses | None]:
        return {seed: self._last_losses(lr, seed) for seed in self.plan.search_seeds}

    def _last_losses(self, lr: float, seed: int) -> ValidationLosses | None:
        """Those of a finished run that the search has asked for; None if its file of row losses is gone."""
        evaluations = self.observe(lr, seed).evaluations if (lr, seed) in self._used else {}
        return evaluations[max(evaluations)] if evaluations else None

    # 4. Repeat.

    def _repeat(self) -> None:
        """Run the chosen rate at the other seeds. If it diverges, the next best rate follows."""
        while self.chosen is not None:
            lr = self.chosen.lr
            self._need(Request(lr, seed) for seed in self.plan.seeds)
            diverged = [seed for seed in self.plan.seeds if self.observe(lr, seed).diverged]
            if not diverged:
                return
            self._finish([lr], diverged[0])
            self._choose("fallback")


def _behind(losses: ValidationLosses, best: ValidationLosses) -> str:
    """By how much one rate's loss is above the best one's, in words; empty if it is not clearly behind."""
    difference, error = paired_difference(losses, best)
    is_clear = difference > NOISE_FACTOR * error
    return f"{difference:.4f} (paired standard error {error:.4f}) behind" if is_clear else ""


def _is_far(losses: ValidationLosses, best: ValidationLosses, start: ValidationLosses) -> bool:
    """Whether one rate's loss is above the best one's by more than it can make up for by the end."""
    lowest = mean_loss(best)
    return mean_loss(losses) - lowest > RECOVERABLE * (mean_loss(start) - lowest)


def _in_words(found: Interval) -> str:
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def rate_between(low: float, high: float) -> float:
    """The geometric mean of two rates, in two digits: 1e-2 and 3e-2 -> 1.7e-2."""
    return float(f"{math.sqrt(low * high):.1e}")


def rung_steps(steps: int, validate_every: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """For each fraction of the steps, the first evaluation at or after it, if it is before the last step."""
    # A product such as 0.55 * 100 is a little more than 55.
    places = {
        math.ceil(share * steps / validate_every - 1e-9) * validate_every for share in fractions if validate_every
    }
    return tuple(sorted(step for step in places if 0 < step < steps))


def next_rate(lr: float, upward: bool) -> float:
    """The rate half a decade further: 1e-2 -> 3e-2 -> 1e-1, and other values times or divided by 3."""
    digit = f"{lr:.1e}"[:3]
    factor = 10 / 3 if digit == ("3.0" if upward else "1.0") else 3
    return float(f"{lr * factor if upward else lr / factor:.1e}")
