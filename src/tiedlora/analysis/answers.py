"""The answer of the runs to each claim, for every model and task.

docs/statistics.md (Claims) says when each verdict is given: at the first planned look that decides, which later seeds
do not change.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from operator import attrgetter
from typing import Literal

from tiedlora.analysis import claims, intervals, rules
from tiedlora.analysis.claims import Claim, Pair, Unpaired
from tiedlora.analysis.comparison import Estimate, PlannedSides, compare, planned_sides, unlike
from tiedlora.analysis.groups import RunGroup, shown_splits
from tiedlora.analysis.next_look import Next, before_look, next_look
from tiedlora.analysis.regret import DoubtfulRate, doubtful_rates
from tiedlora.analysis.rules import Rule, Sides
from tiedlora.analysis.runs import Measure, NotComparable, Scorebook
from tiedlora.records.interval import Interval
from tiedlora.text import number_list

MOST_FOR_NO_VERDICT = intervals.FEWEST_FREEDOM
"""Rows that count as so many clusters of one size, or fewer, give no verdict: of 4 clusters, up to 69 % were wrong."""


class Verdict(StrEnum):
    """The verdict on a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    UNINFORMATIVE = "uninformative"
    CANNOT_FAIL = "cannot fail here"
    NOT_RUN = "not run"


DECIDED = (Verdict.SUPPORTED, Verdict.CONTRADICTED)
ALIKE = "the contrast or the gain is the same in all rows, and these are few"
Sensitivity = Literal["", "shown", "not shown", "lacking"]
BASE = "the base"
"""The zero point of claims without a floor."""


@dataclass(frozen=True)
class GainShare:
    """What the method keeps of the comparator's gain over the zero point, on the same seeds."""

    gain: float
    """The comparator's mean gain."""
    kept: Interval | None
    """The share that the method keeps, with the ends at which the rule decides (Rule.kept); with one seed, the interval
    is over rows. None if the comparator gains nothing on average, or may gain nothing at the last look."""


@dataclass(frozen=True)
class Look:
    """A planned look that was taken, and what it says by itself."""

    number: int
    """Counted from 0."""
    seeds: int
    """How many of its seeds all sides have."""
    verdict: Verdict
    reason: str
    decide: str
    """What would decide the claim after an uninformative last look."""
    contrast: Interval
    """The number that the rule compares with 0, with its interval at the level of the look. More is better."""
    share: GainShare | None
    """At the level of the look; None without a zero point."""
    retains_at_least: float | None
    """The largest share that the rule `retains` would support at the level of the look."""
    gain_may_be_zero: bool
    """Whether the interval of the comparator's gain includes 0, so that a share of it means little."""
    supported_level: float
    """The level of the whole plan at which the claim is supported."""
    contradicted_level: float
    """The level of the whole plan at which the claim is contradicted."""


@dataclass(frozen=True)
class Findings:
    """The numbers of the sides of a claim. They stay empty if the sides cannot be compared."""

    rows: int = 0
    common_seeds: int = 0
    """How many seeds all sides have."""
    difference: Estimate | None = None
    """Method minus comparator, on all seeds that both have; None if some of these cannot be compared."""
    retained: Interval | None = None
    """The share of the comparator's gain, over all common seeds."""
    early_share: GainShare | None = None
    """At level 5 %, on all common seeds; None without a zero point."""
    looks: tuple[Look, ...] = ()
    """The looks that were taken, up to the first one that decides."""
    sensitivity: Sensitivity = ""
    """Whether the weakest arm was shown to fail, so that the trial can fail; lacking if it passes. Empty before the
    first look, or if the claim names no weakest arm."""

    @property
    def look(self) -> Look | None:
        """The look that the answer rests on."""
        return self.looks[-1] if self.looks else None

    @property
    def seeds(self) -> int:
        """The number of seeds of the look, or of all common seeds before the first one."""
        return self.look.seeds if self.look is not None else self.common_seeds

    @property
    def share(self) -> GainShare | None:
        """The share that the method keeps, at the look or before the first one."""
        return self.look.share if self.look is not None else self.early_share

    @property
    def kept(self) -> Interval | None:
        """The interval of `share`, if there is one."""
        return self.share.kept if self.share is not None else None

    @property
    def contrast(self) -> Interval | None:
        """The contrast of the look."""
        return self.look.contrast if self.look is not None else None

    @property
    def retains_at_least(self) -> float | None:
        """The largest share that is supported at the look."""
        return self.look.retains_at_least if self.look is not None else None

    @property
    def difference_seeds(self) -> int:
        """The number of seeds of `difference`, which uses all that both sides have."""
        return self.difference.count if self.difference is not None else 0

    @property
    def contradicted_level(self) -> float:
        """The level of the whole plan at which the claim is contradicted, for Holm's procedure over tasks."""
        return min((look.contradicted_level for look in self.looks), default=1.0)

    @property
    def decided_level(self) -> float:
        """The level of the whole plan at which a look decides the claim, for Holm's procedure over all tests."""
        levels = (level for look in self.looks for level in (look.supported_level, look.contradicted_level))
        return min(levels, default=1.0)


@dataclass(frozen=True)
class Answer:
    """The answer to a claim for one model and task."""

    claim: Claim
    model: str
    task: str
    """The task, with the variant of its setting if there are several."""
    pair: Pair | Unpaired | None
    """The groups that are compared; None if no run of the claim exists."""
    verdict: Verdict
    reason: str
    decide: str
    """What would decide the claim, in planned looks."""
    chance: float | None = None
    """How likely a later look decides; None if this is not known, or no later look is planned."""
    lacking: Mapping[str, set[int]] = field(default_factory=dict)
    """The name of a side -> the seeds that the next look still needs of it; empty if no seed of the plan is likely to
    help."""
    measure: Measure | None = None
    """None if nothing is scored by a metric of the claim."""
    findings: Findings = Findings()
    doubtful_rates: tuple[DoubtfulRate, ...] = ()
    """The arms whose rate may be so far from the best one that it matters here."""
    survives_holm: bool = False
    """Whether the verdict holds by Holm's procedure over all tests of the report (see `with_survivors`)."""

    @property
    def zero(self) -> str:
        """What a gain is measured from."""
        return _zero(self.claim, self.pair)

    @property
    def is_futile(self) -> bool:
        """Whether no later look is likely to decide."""
        return self.chance is not None and self.chance < rules.FUTILE

    @property
    def is_firm(self) -> bool:
        """Whether a verdict can rest on what is kept. It cannot before the first look, or while the gain may be 0."""
        look = self.findings.look
        return look is not None and not (look.gain_may_be_zero and self.claim.rule.needs_zero)


def _zero(claim: Claim, pair: Pair | Unpaired | None) -> str:
    """What a gain is measured from."""
    if isinstance(pair, Pair) and pair.floor is not None:
        return pair.floor.name
    return str(claim.floor) if claim.floor and claim.rule.needs_zero else BASE


@dataclass(frozen=True)
class _Decision:
    """What the looks of a plan say together."""

    looks: tuple[Look, ...]
    verdict: Verdict
    reason: str
    next: Next


def answer_claims(
    stated: Iterable[Claim], groups: Sequence[RunGroup], book: Scorebook, split: str | None = None
) -> list[Answer]:
    """The answers to all claims, for every setting with a run of the claim, and for tasks without such a run."""
    splits = shown_splits(groups, split)
    answers: list[Answer] = []
    for claim in stated:
        pairs = claims.pairs(claim, groups, splits)
        answers += [_answer(claim, pair, splits[pair.anchor.model, pair.anchor.task], book) for pair in pairs]
        where = "".join(f" with {key}={value}" for key, value in claim.where.items())
        reason, decide = f"no finished run of {claim.anchor}{where}", next_look(claim, 0, {})
        for model in sorted(claims.models(claim, groups)) or [""]:
            run_on = {pair.anchor.task for pair in pairs if pair.anchor.model == model}
            # Without tasks, a claim is about those that its anchor was run on; what other arms were run on changes
            # nothing. If it was run on none, the claim is about all tasks of the model.
            asked = set(claim.tasks) or (run_on or {group.task for group in groups if group.model == model})
            answers += [
                Answer(claim, model, task, None, Verdict.NOT_RUN, reason, decide) for task in sorted(asked - run_on)
            ]
    return with_survivors(answers)


def _answer(claim: Claim, pair: Pair | Unpaired, split: str, book: Scorebook) -> Answer:
    """The answer in one setting."""
    asked = partial(Answer, claim, pair.anchor.model, pair.anchor.task_in_words, pair)
    if isinstance(pair, Unpaired):
        needed = f"runs of the missing side with seeds {number_list(claim.plan.of_look(0))}"
        # Usually the arm is beyond the curve, where no seed helps.
        decide = "" if claim.comparator.frontier else needed
        return asked(Verdict.NOT_RUN if pair.lacks_method else Verdict.UNDECIDED, pair.problem, decide)
    measure, ended = None, {}
    try:
        measure = _measure(claim, pair.method, split)
        ended = _ended(pair.sides, measure)
        found = planned_sides(pair.method, pair.comparator, measure, book, floor=pair.floor, plan=claim.plan)
        few = _few_clusters(pair.method, measure, book)
    except NotComparable as why:
        reason = f"{pair.method.name} and {pair.comparator.name}{_over(pair)}: {why}"
        # Where the runs are, they lack these scores.
        lacks_scores = measure is None and _has_planned(claim, pair.method)
        decide = f"scripts/score.py RUN --split {split}" if lacks_scores else next_look(claim, 0, ended)
        return asked(Verdict.UNDECIDED, reason, decide, measure=measure)
    sides = found.sides
    if few is not None:
        reason = f"the rows count as only {few:.2g} clusters of one size: a verdict would hold for these alone"
        decision = _Decision((), Verdict.UNDECIDED, reason, Next("rows of more clusters"))
    else:
        decision = _decide(claim, _zero(claim, pair), found, ended)
    sensitivity, words = _sensitivity(claim, pair, decision, measure, book)
    if sensitivity == "lacking":
        other = replace(decision.next, decide="a task or a zero point at which the weakest arm fails")
        decision = replace(decision, verdict=Verdict.CANNOT_FAIL, next=other)
    findings = Findings(
        rows=sides.method.shape[1],
        common_seeds=len(sides.seeds),
        difference=_difference(pair, measure, book),
        retained=rules.share(sides),
        early_share=_share(claim.rule, sides, rules.TOTAL),
        looks=decision.looks,
        sensitivity=sensitivity,
    )
    doubtful = doubtful_rates(claim.rule, pair, measure, sides)
    notes = _notes(claim, pair, decision, measure, sides, on_sensitivity=words)
    reason = "; ".join([*notes, *map(str, doubtful)])
    wanted = decision.next
    return asked(decision.verdict, reason, wanted.decide, wanted.chance, wanted.lacking, measure, findings, doubtful)


def _few_clusters(group: RunGroup, measure: Measure, book: Scorebook) -> float | None:
    """As how many clusters of one size the rows of a group's scores count, if a verdict needs more; otherwise None."""
    for run in measure.scored(group.runs):
        # One seed's damaged rows say nothing about the others'.
        with suppress(NotComparable):
            rows = book.read(run, measure.split, measure.kind, False)
            if rows.named_clusters and rows.clusters is None and rows.equal_clusters <= MOST_FOR_NO_VERDICT:
                return rows.equal_clusters
    return None


def _over(pair: Pair) -> str:
    """The floor, in a reason."""
    return f" (over {pair.floor.name})" if pair.floor is not None else ""


def _difference(pair: Pair, measure: Measure, book: Scorebook) -> Estimate | None:
    """Method minus comparator. A floor does not decide which seeds count, and neither does a plan."""
    try:
        estimate, _ = compare(pair.method, pair.comparator, measure, book).difference()
    except NotComparable:
        return None
    return estimate


def _notes(
    claim: Claim, pair: Pair, decision: _Decision, measure: Measure, sides: Sides, *, on_sensitivity: str
) -> Iterator[str]:
    """The reason of an answer, and what a reader must know of its sides."""
    method, comparator, rows = pair.method, pair.comparator, sides.method.shape[1]
    against = f"({method.name} against {comparator.name}, {measure.split}, {measure.metric})"
    yield f"{decision.reason}{_over(pair)} {against}"
    if sides.clusters is not None:
        yield f"{rows:,} rows in {len(sides.clusters.sizes)} clusters"
    if on_sensitivity:
        yield on_sensitivity
    yield from unlike([group.runs for group in pair.sides], measure)
    efforts = {group.name: len(group.rates) for group in (method, *comparator.groups)}
    searched = {name: count for name, count in efforts.items() if count > 1}
    if given := [name for name in efforts if name not in searched]:
        yield f"the rate of {', '.join(given)} was given, not searched in these folders"
    if len(set(searched.values())) > 1:
        yield f"rates tried: {', '.join(f'{count} of {name}' for name, count in searched.items())}"
    for group in pair.sides:
        may_change, seeds = len(group.rates) > 1 and not group.has_recorded_rate, {trial.seed for trial in group.trials}
        if decision.looks and may_change and seeds & _later_seeds(claim, decision.looks[-1].number):
            yield (
                f"the rate of {group.name} was chosen on later seeds too, so they can change this: record the choice "
                "at the look with scripts/sweep.py select"
            )


def _later_seeds(claim: Claim, number: int) -> set[int]:
    """The seeds that the claim's plan has after a look, on either side."""
    plan = claim.plan
    later = set(plan.of_look(len(plan.looks) - 1)) - set(plan.of_look(number))
    return {seed + side.seed_offset for seed in later for side in (claim.method, claim.comparator)}


def _ended(sides: Iterable[RunGroup], measure: Measure) -> dict[str, set[int]]:
    """Group -> the seeds that are scored, or have diverged and never will be. Any other failure can be repaired."""
    return {side.name: {run.seed for run in measure.scored(side.runs)} | side.diverged_seeds for side in sides}


def _sensitivity(
    claim: Claim, pair: Pair, decision: _Decision, measure: Measure, book: Scorebook
) -> tuple[Sensitivity, str]:
    """Ask the claim's rule of its weakest arm, at the answer's look or the latest before it that the arm's seeds reach.

    Returns:
        What it says, also in words.
    """
    if pair.weakest is None or not decision.looks:
        return "", ""
    try:
        arm, look, seen = _weakest_at_look(claim, pair, decision.looks[-1].number, measure, book)
    except NotComparable as why:
        return "not shown", f"sensitivity not shown: {why}"
    level, evidence, who = (
        claim.plan.levels[look],
        claim.rule.evidence(seen),
        f"{arm}, the weakest arm at look {look + 1}",
    )
    if evidence.supported <= level and decision.verdict == Verdict.CONTRADICTED:
        return "not shown", f"the same is supported for {who}"
    if evidence.supported <= level:
        return "lacking", f"cannot fail here: the same is supported for {who}"
    if evidence.contradicted <= level:
        return "shown", f"sensitivity shown: the same is contradicted for {who}"
    return "not shown", f"sensitivity not shown: the same is undecided for {who}"


def _weakest_at_look(
    claim: Claim, pair: Pair, last_look: int, measure: Measure, book: Scorebook
) -> tuple[str, int, Sides]:
    """The name of the weakest arm, the latest look up to the last one that its seeds reach, and its scores there.

    Raises:
        NotComparable: the arm is a side of the comparison itself, or its scores reach no look or show nothing there.
    """
    weakest = pair.weakest
    assert weakest is not None
    if isinstance(weakest, Unpaired):
        raise NotComparable(weakest.problem)
    arm, peer, rule, plan = weakest.method, weakest.comparator, claim.rule, claim.plan
    # An arm is the same with other seeds, too.
    name_of = attrgetter("setting", "label", "rank", "params")
    if any(side is not None and name_of(side) == name_of(arm) for side in (pair.method, *peer.groups, pair.floor)):
        raise NotComparable(f"{arm.name} is a side of the comparison itself")
    try:
        found = planned_sides(arm, peer, measure, book, floor=pair.floor, plan=plan)
    except NotComparable as why:
        raise NotComparable(f"{arm.name}: {why}") from why
    sides = found.sides
    if rule.needs_zero and sides.zero is None:
        raise NotComparable(f"no base was scored beside {arm.name}")
    # Later looks of the weakest arm may not change an answer that stands.
    ended = set.intersection(*_ended(weakest.sides, measure).values())
    ended &= ended if found.usable is None else found.usable
    reached = [number for number in range(last_look + 1) if set(plan.of_look(number)) <= ended]
    if not reached or len(sides.of(plan.of_look(reached[-1])).seeds) < 2:
        raise NotComparable(f"{arm.name} does not have the seeds of a look")
    seen = sides.of(plan.of_look(reached[-1]))
    if rule.sees_too_little(seen, plan.levels[reached[-1]]):
        raise NotComparable(f"{arm.name}: {ALIKE}")
    return arm.name, reached[-1], seen


def _measure(claim: Claim, method: RunGroup, split: str) -> Measure:
    """What the claim compares: the metric that it names for the task, or the task's first.

    Raises:
        NotComparable: no run of the method is scored by it.
    """
    scored = method.metrics(split)
    if not scored and not _has_planned(claim, method):
        # The runs of a search of rates are not scored, and need not be.
        raise NotComparable(f"{method.name} has none of these seeds")
    if not scored:
        raise NotComparable(f"not scored on {split}")
    metric = claim.metric_on(method.task, scored[0])
    if metric not in scored:
        raise NotComparable(f"{split} has no {metric}; it has {', '.join(scored)}")
    return Measure(split, metric)


def _has_planned(claim: Claim, method: RunGroup) -> bool:
    """Whether one of its runs has a seed of the claim's plan."""
    return any(run.seed in claim.plan.seeds for run in method.runs)


def _decide(claim: Claim, zero: str, found: PlannedSides, ended: Mapping[str, set[int]]) -> _Decision:
    """Take every look of the plan whose seeds have ended, up to the first one that decides.

    Args:
        zero: what a gain is measured from, in words.
        ended: group -> its seeds that have ended.
    """
    plan, rule, sides = claim.plan, claim.rule, found.sides
    looks: list[Look] = []
    reason, needs = "", ""

    def undecided(reason: str, needed: Next) -> _Decision:
        return _Decision(tuple(looks), Verdict.UNDECIDED, reason, needed)

    if missing := _never_decided(rule, sides):
        reason, needs = missing
        return undecided(reason, Next(needs))
    for number in range(len(plan.looks)):
        declared = plan.of_look(number)
        taken = {look.number: look.seeds for look in looks}
        if needed := before_look(claim, found, number, ended, taken):
            if number == 0 and needed.lacking:
                common = set(declared).intersection(*ended.values())
                reason = f"before the first look: {len(common)} of {plan.looks[0]} seeds"
            return undecided(reason, needed)
        seen = sides.of(declared)
        if len(seen.seeds) < 2:
            reason = f"seeds {number_list(declared)}: fewer than 2 of them finished on both sides"
        elif rule.sees_too_little(seen, plan.levels[number]):
            reason, needs = f"seeds {number_list(declared)}: {ALIKE}", "more rows, or clusters"
        else:
            looks.append(_look(claim, zero, seen, number))
            reason, needs = looks[-1].reason, ""
            if looks[-1].verdict != Verdict.UNDECIDED:
                return _Decision(tuple(looks), looks[-1].verdict, reason, Next(looks[-1].decide))
    return undecided(reason, Next(needs or "no planned look is left; a new plan with new seeds"))


def _never_decided(rule: Rule, sides: Sides) -> tuple[str, str] | None:
    """Why no number of seeds can give a verdict on these sides, and what can; None if seeds can."""
    if rule.needs_zero and sides.zero is None:
        needs = "the base model's scores (scripts/score.py RUN --split SPLIT --again)"
        return "the base model was not scored", needs
    if sides.method.shape[1] < 2:
        return "one row has no interval", "two or more rows"
    return None


def _look(claim: Claim, zero: str, seen: Sides, number: int) -> Look:
    """Take one look, with the scores of its seeds."""
    plan, rule, count = claim.plan, claim.rule, len(claim.plan.looks)
    level, evidence = plan.levels[number], rule.evidence(seen)
    gain_may_be_zero = evidence.gain is not None and evidence.gain > level
    missing = len(plan.of_look(number)) - len(seen.seeds)
    verdict, decide, share = Verdict.UNDECIDED, "", _share(rule, seen, level)
    reason = f"look {number + 1} of {count}: {len(seen.seeds)} seeds at level {100 * level:.2g} %"
    reason += f", {missing} diverged" if missing else ""
    if evidence.supported <= level:
        verdict = Verdict.SUPPORTED
    elif evidence.contradicted <= level:
        verdict = Verdict.CONTRADICTED
    elif gain_may_be_zero and rule.needs_zero:
        reason += f": the comparator's own gain over {zero} may be 0"
        if number == count - 1:
            verdict, share = Verdict.UNINFORMATIVE, share and replace(share, kept=None)
            decide = f"a task, model or training on which the comparator beats {zero}"
    return Look(
        number=number,
        seeds=len(seen.seeds),
        verdict=verdict,
        reason=reason,
        decide=decide,
        contrast=intervals.both_interval(rule.contrast(seen), level, seen.clusters),
        share=share,
        retains_at_least=rules.retained_at_least(seen, level),
        gain_may_be_zero=gain_may_be_zero,
        supported_level=rules.adjusted(plan, number, evidence.supported),
        contradicted_level=rules.adjusted(plan, number, evidence.contradicted),
    )


def _share(rule: Rule, seen: Sides, level: float) -> GainShare | None:
    """The comparator's gain and the share of it that the method keeps, from these seeds at this level."""
    if seen.gain is None:
        return None
    gain = float(seen.gain.mean())
    if min(seen.method.shape) > 1:
        return GainShare(gain, rule.kept(seen, level))
    if gain <= 0:
        return GainShare(gain, None)
    # One seed has no interval over seeds, but one over rows. One row has none.
    found = Interval(float((seen.method - seen.comparator).mean()), math.nan, math.nan)
    if seen.method.shape[1] > 1:
        found = intervals.over_examples(seen.method, seen.comparator, seen.clusters)
    return GainShare(gain, Interval(1 + found.value / gain, 1 + found.low / gain, 1 + found.high / gain))


def test_of(answer: Answer) -> tuple[object, ...]:
    """Which test an answer gives: two sides by one measure, with the rule and the zero point."""
    rule, pair, measure = answer.claim.rule.words, answer.pair, answer.measure
    if not isinstance(pair, Pair) or measure is None:
        return answer.model, answer.task, answer.claim.name, rule, answer.zero
    comparator = tuple((weight, group.name) for weight, group in pair.comparator.parts)
    return pair.anchor.setting, pair.method.name, comparator, measure, rule, answer.zero


def _tested(answers: Iterable[Answer]) -> list[list[Answer]]:
    """The answers that rest on a look, by the test that they give."""
    tests: dict[tuple[object, ...], list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.findings.looks:
            tests[test_of(answer)].append(answer)
    return list(tests.values())


def with_survivors(answers: Sequence[Answer]) -> list[Answer]:
    """The answers, with which verdicts hold by Holm's procedure over all tests: one of them is wrong in at most 5 %."""
    tests = _tested(answers)
    levels = [own[0].findings.decided_level for own in tests]
    # A planned test that has had no look yet counts as one that decides nothing.
    rejected = rules.holm([*levels, *[1.0] * (_planned(answers) - len(tests))])
    holding = {id(answer) for own in itertools.compress(tests, rejected) for answer in own}
    return [replace(answer, survives_holm=id(answer) in holding and answer.verdict in DECIDED) for answer in answers]


def _planned(answers: Iterable[Answer]) -> int:
    """How many tests the claims' file says that there will be; 0 if it does not."""
    return max((answer.claim.plan.tests for answer in answers), default=0)


def error_note(answers: Sequence[Answer]) -> str:
    """How many verdicts there are, how many wrong ones the levels allow, and how many hold over all tests."""
    tests = _tested(answers)
    if not tests:
        return "No planned look has been taken yet."
    decided = [own for own in tests if any(answer.verdict in DECIDED for answer in own)]
    surviving = sum(any(answer.survives_holm for answer in own) for own in decided)
    over = "these tests"
    if (planned := _planned(answers)) > len(tests):
        over = f"the {planned} tests that are planned"
    elif any(not answer.findings.looks for answer in answers):
        over = "these tests (one that has its first look later may remove a *)"
    return (
        f"Verdicts (supported or contradicted): {len(decided)}, from {len(tests)} different tests that have had a "
        f"look. If every true contrast were 0, on average at most {100 * rules.TOTAL:g} % of the tests "
        f"({rules.TOTAL * len(tests):.1f}) would get a wrong verdict. By Holm's procedure over {over}, "
        f"{surviving} of the {len(decided)} verdicts hold (*)."
    )
