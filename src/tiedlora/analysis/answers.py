"""The answer of the runs to each claim, for every model and task, and one verdict over all tasks of a claim.

docs/results.md (Claims) says when each verdict is given: at the first planned look that decides, which later seeds do
not change. A claim over several tasks is contradicted by Holm's procedure, so that many tasks do not make a wrong
verdict more likely.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Literal

from tiedlora.analysis import claims, compare, intervals, rules
from tiedlora.analysis.claims import Claim, Pair
from tiedlora.analysis.compare import Estimate
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.rules import Sides
from tiedlora.analysis.runs import Measure, Scorebook
from tiedlora.errors import UserError
from tiedlora.records.interval import Interval
from tiedlora.text import number_list


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
BASE = "the base"
"""The zero point of claims without a floor."""


@dataclass
class Answer:
    """The answer to a claim for one model and task."""

    claim: Claim
    model: str
    task: str
    """The task, with the variant of its setting if there are several."""
    pair: Pair | None = None
    """The groups that were compared; None if no run of the claim exists."""
    verdict: Verdict = Verdict.UNDECIDED
    is_futile: bool = False
    """Whether no later look is likely to decide."""
    reason: str = ""
    measure: Measure | None = None
    difference: Estimate | None = None
    contrast: Interval | None = None
    """The number that the rule compares with 0, with its interval at the level of the look. More is better."""
    sensitivity: Literal["", "shown", "not shown", "lacking"] = ""
    """Whether the weakest arm was shown to fail, so that the trial can fail; lacking if it passes. Empty before the
    first look, or if the claim names no weakest arm."""
    retained: Interval | None = None
    """The share of the comparator's gain, over all common seeds."""
    retains_at_least: float | None = None
    """The largest share that the rule `retains` would support at the level of the look."""
    kept: Interval | None = None
    """The share that the method keeps, with the ends at which the rule decides (Rule.kept). Before the first look it is
    at level 5 %, on all common seeds; with one seed, the interval is over rows. None without a zero point or a gain of
    the comparator."""
    comparator_gain: float | None = None
    """The comparator's mean gain over the zero point, on the seeds of `kept`; None without a zero point."""
    gain_may_be_zero: bool = False
    """Whether the interval of the comparator's gain includes 0, so that a share of it means little."""
    contradicted_level: float = 1.0
    """The level of the whole plan at which the claim is contradicted, for Holm's procedure over tasks."""
    decided_level: float = 1.0
    """The level of the whole plan at which the claim is supported or contradicted, for Holm's procedure over all."""
    survives_holm: bool = False
    """Whether the verdict holds by Holm's procedure over all tests of the report (see `mark_survivors`)."""
    look: int | None = None
    """The look that the answer rests on, counted from 0."""
    seeds: int = 0
    """The number of seeds of the look, or of all common seeds before the first one."""
    rows: int = 0
    decide: str = ""
    """What would decide the claim, in planned looks."""

    @property
    def difference_seeds(self) -> int:
        """The number of seeds of `difference`, which uses all that both sides have."""
        return self.difference.count if self.difference is not None else 0

    @property
    def has_more_seeds(self) -> bool:
        """Whether `difference` has other seeds than the look that the verdict rests on."""
        return self.look is not None and self.seeds != self.difference_seeds

    @property
    def zero(self) -> str:
        """What a gain is measured from."""
        if self.pair is not None and self.pair.floor is not None:
            return self.pair.floor.name
        return str(self.claim.floor) if self.claim.floor and self.claim.rule.needs_zero else BASE

    @property
    def is_firm(self) -> bool:
        """Whether a verdict can rest on `kept`. It cannot before the first look, or while the gain may be 0."""
        return self.look is not None and not (self.gain_may_be_zero and self.claim.rule.needs_zero)

    @property
    def zone(self) -> tuple[float, float] | None:
        """The shares of the comparator's gain that the rule asks for; None without `kept`."""
        return self.claim.rule.zone(self.comparator_gain) if self.kept and self.comparator_gain else None


def answer_claims(
    stated: Iterable[Claim], groups: Sequence[RunGroup], book: Scorebook, split: str | None = None
) -> list[Answer]:
    """The answers to all claims, for every setting with a run of the claim, and for tasks without such a run."""
    splits = compare.shown_splits(groups, split)
    answers = []
    for claim in stated:
        pairs = claims.pairs(claim, groups, splits)
        answers += [_answer(claim, pair, splits[pair.anchor.model, pair.anchor.task], book) for pair in pairs]
        reason, decide = f"no finished run of {claim.anchor}", next_look(claim, 0, {})
        for model in sorted({group.model for group in groups}) or [""]:
            run_on = {pair.anchor.task for pair in pairs if pair.anchor.model == model}
            # Without tasks, a claim is about those that its anchor was run on; what other arms were run on changes
            # nothing. If it was run on none, the claim is about all tasks of the model.
            asked = set(claim.tasks) or (run_on or {group.task for group in groups if group.model == model})
            answers += [
                Answer(claim, model, task, verdict=Verdict.NOT_RUN, reason=reason, decide=decide)
                for task in sorted(asked - run_on)
            ]
    mark_survivors(answers)
    return answers


def _answer(claim: Claim, pair: Pair, split: str, book: Scorebook) -> Answer:
    answer = Answer(claim, pair.anchor.model, pair.anchor.task_in_words, pair, reason=pair.problem)
    method, comparator = pair.method, pair.comparator
    # Usually the arm is beyond the curve, where no seed helps.
    answer.decide = "" if pair.problem and claim.comparator.frontier else next_look(claim, 0, {})
    if method is None or comparator is None:
        answer.verdict = Verdict.NOT_RUN if pair.lacks_method else answer.verdict
        return answer
    over = f" (over {pair.floor.name})" if pair.floor is not None else ""
    sides = pair.sides
    try:
        answer.measure = measure = _measure(claim, method, split)
        ended = _ended(sides, measure)
        answer.decide = next_look(claim, 0, ended)
        scores = compare.paired_scores(method, comparator, measure, book, pair.floor, claim.plan.seeds)
    except UserError as error:
        answer.reason = f"{method.name} and {comparator.name}{over}: {error}"
        return answer
    answer.difference, _ = compare.difference(method, comparator, measure, book)
    answer.retained = rules.share(scores)
    answer.rows = scores.method.shape[1]
    _set_share(answer, scores, rules.TOTAL)
    _decide(answer, scores, ended)
    notes = [f"{answer.reason}{over} ({method.name} against {comparator.name}, {split}, {measure.metric})"]
    if scores.clusters is not None:
        notes.append(f"{answer.rows:,} rows in {len(scores.clusters.sizes)} clusters")
    if answer.look is not None and pair.weakest is not None:
        notes.append(_check_sensitivity(answer, pair, pair.weakest, book))
    if compare.other_ends([group.runs for group in sides], measure):
        notes.append(compare.OTHER_ENDS)
    efforts = {group.name: len(group.rates) for group in (method, *comparator.groups)}
    searched = {name: count for name, count in efforts.items() if count > 1}
    if searched and (given := [name for name in efforts if name not in searched]):
        notes.append(f"the rate of {', '.join(given)} was given, not searched in these folders")
    if len(set(searched.values())) > 1:
        words = [f"{count} rates of {name}" for name, count in searched.items()]
        notes.append(f"unequal search: {' against '.join(words)}")
    for group in sides:
        may_change, seeds = len(group.rates) > 1 and not group.has_recorded_rate, {trial.seed for trial in group.trials}
        if answer.look is not None and may_change and len(seeds) > claim.plan.looks[answer.look]:
            notes.append(
                f"the rate of {group.name} was chosen on later seeds too, so they can change this: record the choice "
                "at the look with scripts/sweep.py select"
            )
    answer.reason = "; ".join(notes)
    return answer


def _ended(sides: Iterable[RunGroup], measure: Measure) -> dict[str, set[int]]:
    """Group -> the seeds that are scored, or have diverged and never will be. Any other failure can be repaired."""
    return {side.name: {run.seed for run in measure.scored(side.runs)} | side.diverged_seeds for side in sides}


def _check_sensitivity(answer: Answer, pair: Pair, weakest: Pair, book: Scorebook) -> str:
    """Ask the claim's rule of its weakest arm, at the answer's look or the latest before it that the arm's seeds reach.

    Returns:
        What it says, in words.
    """
    arm, peer, rule, plan = weakest.method, weakest.comparator, answer.claim.rule, answer.claim.plan
    answer.sensitivity = "not shown"
    if arm is None or peer is None or answer.measure is None:
        return f"sensitivity not shown: {weakest.problem}"
    # An arm is the same with other seeds, too.
    name_of = attrgetter("setting", "label", "rank", "params")
    if any(side is not None and name_of(side) == name_of(arm) for side in (pair.method, *peer.groups, pair.floor)):
        return f"sensitivity not shown: {arm.name} is a side of the comparison itself"
    try:
        scores = compare.paired_scores(arm, peer, answer.measure, book, pair.floor, plan.seeds)
    except UserError as error:
        return f"sensitivity not shown: {arm.name}: {error}"
    if rule.needs_zero and scores.zero is None:
        return f"sensitivity not shown: no base was scored beside {arm.name}"
    # Later looks of the weakest arm may not change an answer that stands.
    taken = range((answer.look or 0) + 1)
    ended = _ended(weakest.sides, answer.measure)
    reached = [number for number in taken if set(plan.of_look(number)) <= set.intersection(*ended.values())]
    if not reached or len(scores.of(plan.of_look(reached[-1])).seeds) < 2:
        return f"sensitivity not shown: {arm.name} does not have the seeds of a look"
    look, who = reached[-1], f"{arm.name}, the weakest arm at look {reached[-1] + 1}"
    seen, level = scores.of(plan.of_look(look)), plan.levels[look]
    if rule.sees_too_little(seen):
        return f"sensitivity not shown: {arm.name}: {ALIKE}"
    evidence = rule.evidence(seen)
    if evidence.supported <= level and answer.verdict == Verdict.CONTRADICTED:
        return f"the same is supported for {who}"
    if evidence.supported <= level:
        answer.sensitivity, answer.verdict = "lacking", Verdict.CANNOT_FAIL
        answer.decide = "a task or a zero point at which the weakest arm fails"
        return f"cannot fail here: the same is supported for {who}"
    if evidence.contradicted <= level:
        answer.sensitivity = "shown"
        return f"sensitivity shown: the same is contradicted for {who}"
    return f"sensitivity not shown: the same is undecided for {who}"


def _measure(claim: Claim, method: RunGroup, split: str) -> Measure:
    """What the claim compares: the metric that it names for the task, or the task's first."""
    scored = [run.splits[split] for run in method.runs if split in run.splits]
    if not method.runs:
        raise UserError(f"{method.name} has none of these seeds")
    if not scored:
        raise UserError(f"not scored on {split}")
    metric = claim.metric_on(method.task, scored[0].first_metric)
    if all(metric not in scores.metrics for scores in scored):
        raise UserError(f"{split} has no {metric}; it has {', '.join(scored[0].metrics)}")
    return Measure(split, metric)


def _decide(answer: Answer, scores: Sides, ended: Mapping[str, set[int]]) -> None:
    """Take every look of the plan whose seeds have ended, up to the first one that decides.

    Args:
        ended: group -> its seeds that have ended.
    """
    plan = answer.claim.plan
    answer.seeds = len(scores.seeds)
    if answer.claim.rule.needs_zero and scores.zero is None:
        answer.reason = "the base model was not scored"
        answer.decide = "the base model's scores (the run again, with score.base=true force=true)"
        return
    if answer.rows < 2:
        answer.reason, answer.decide = "one row has no interval", "two or more rows"
        return
    needs = ""
    for number in range(len(plan.looks)):
        declared = plan.of_look(number)
        if answer.claim.shared_seeds(number):
            answer.decide = (
                f"a larger seed_offset: with {plan.looks[number]} seeds, both sides would have the same runs"
            )
            return
        if not all(set(declared) <= own for own in ended.values()):
            _wait_for(answer, scores, number, ended)
            return
        seen = scores.of(declared)
        if len(seen.seeds) < 2:
            answer.reason = f"seeds {number_list(declared)}: fewer than 2 of them finished on both sides"
            continue
        if answer.claim.rule.sees_too_little(seen):
            answer.reason = f"seeds {number_list(declared)}: {ALIKE}"
            needs = f"{rules.FEWEST_ALIKE} or more rows, or clusters"
            continue
        _look(answer, seen, number)
        needs = ""
        if answer.verdict != Verdict.UNDECIDED:
            return
    answer.decide = needs or "no planned look is left; a new plan with new seeds"


def _look(answer: Answer, seen: Sides, number: int) -> None:
    """Take one look: set the verdict, its reason, and the numbers behind it."""
    plan, rule, count = answer.claim.plan, answer.claim.rule, len(answer.claim.plan.looks)
    level, evidence = plan.levels[number], rule.evidence(seen)
    answer.look, answer.seeds, answer.decide = number, len(seen.seeds), ""
    answer.contrast = intervals.both_interval(rule.contrast(seen), level, seen.clusters)
    answer.retains_at_least = rules.retained_at_least(seen, level)
    _set_share(answer, seen, level)
    supported, contradicted = (rules.adjusted(plan, number, p) for p in (evidence.supported, evidence.contradicted))
    answer.contradicted_level = min(answer.contradicted_level, contradicted)
    answer.decided_level = min(answer.decided_level, supported, contradicted)
    answer.gain_may_be_zero = evidence.gain is not None and evidence.gain > level
    missing = len(plan.of_look(number)) - len(seen.seeds)
    answer.reason = f"look {number + 1} of {count}: {len(seen.seeds)} seeds at level {100 * level:.2g} %"
    answer.reason += f", {missing} diverged" if missing else ""
    if evidence.supported <= level:
        answer.verdict = Verdict.SUPPORTED
    elif evidence.contradicted <= level:
        answer.verdict = Verdict.CONTRADICTED
    elif answer.gain_may_be_zero and rule.needs_zero:
        answer.reason += f": the comparator's own gain over {answer.zero} may be 0"
        if number == count - 1:
            answer.verdict, answer.kept = Verdict.UNINFORMATIVE, None
            answer.decide = f"a task, model or training on which the comparator beats {answer.zero}"


def _set_share(answer: Answer, seen: Sides, level: float) -> None:
    """Set the comparator's gain and the share of it that the method keeps, from these seeds at this level."""
    if seen.gain is None:
        return
    gain = answer.comparator_gain = float(seen.gain.mean())
    if min(seen.method.shape) > 1:
        answer.kept = answer.claim.rule.kept(seen, level)
    elif gain > 0:
        # One seed has no interval over seeds, but one over rows. One row has none.
        found = Interval(float((seen.method - seen.comparator).mean()), math.nan, math.nan)
        if seen.method.shape[1] > 1:
            found = intervals.over_examples(seen.method, seen.comparator, seen.clusters)
        answer.kept = Interval(1 + found.value / gain, 1 + found.low / gain, 1 + found.high / gain)


def _wait_for(answer: Answer, scores: Sides, number: int, ended: Mapping[str, set[int]]) -> None:
    """Say what the next look needs, and how likely a later look decides, from the seeds of the last one."""
    plan, look = answer.claim.plan, answer.look
    answer.decide = next_look(answer.claim, number, ended)
    if number == 0:
        common = set(plan.of_look(0)).intersection(*ended.values())
        answer.reason = f"before the first look: {len(common)} of {plan.looks[0]} seeds"
    elif look is not None and len((seen := scores.of(plan.of_look(look))).seeds) == plan.looks[look]:
        chance = rules.chance_of_decision(answer.claim.rule, seen, plan, look)
        answer.is_futile = chance < rules.FUTILE
        if answer.is_futile:
            answer.decide = f"no planned look is likely to change it (chance {100 * chance:.0f} %)"
        else:
            answer.decide += f"; a later look decides with a chance of {100 * chance:.0f} %"


def next_look(claim: Claim, number: int, ended: Mapping[str, set[int]]) -> str:
    """The look with this number in words, and the seeds that it still needs; empty if it has all of them.

    Args:
        ended: group -> its seeds that have ended; empty if no group is known.
    """
    declared = claim.plan.of_look(number)
    seeds = {name: number_list(set(declared) - own) for name, own in ended.items()} or {"": number_list(declared)}
    missing = [f"seeds {lacking} of {name}" for name, lacking in seeds.items() if lacking]
    if not missing:
        return ""
    if len(set(seeds.values())) == 1:
        missing = [f"seeds {next(iter(seeds.values()))} {'on both sides' if len(seeds) <= 2 else 'of every arm'}"]
    words = f"the look at {claim.plan.looks[number]} seeds: needs {', '.join(missing)}"
    offsets = {"method": claim.method.seed_offset, "comparator": claim.comparator.seed_offset}
    later = [f"those of the {name} are counted from {offset}" for name, offset in offsets.items() if offset]
    return f"{words} ({'; '.join(later)})" if later else words


@dataclass(frozen=True)
class ClaimVerdict:
    """The verdict on a claim for one model, and the answers that it rests on."""

    claim: Claim
    model: str
    """Empty if no run of the claim exists."""
    verdict: Verdict
    reason: str
    answers: tuple[Answer, ...]


def claim_verdicts(answers: Sequence[Answer]) -> list[ClaimVerdict]:
    """The verdicts over all tasks, in the order of the claims. Tasks without a run of a model are part of its verdict.

    Args:
        answers: those of one claim follow each other, as answer_claims returns them.
    """
    of_claim: dict[tuple[int, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        of_claim[id(answer.claim), answer.model].append(answer)
    return list(map(_over_tasks, of_claim.values()))


def _over_tasks(answers: Sequence[Answer]) -> ClaimVerdict:
    silent = (Verdict.UNINFORMATIVE, Verdict.CANNOT_FAIL, Verdict.NOT_RUN)
    informative = [answer for answer in answers if answer.verdict not in silent]
    rejected = rules.holm([answer.contradicted_level for answer in answers])
    contradicting = list(itertools.compress(answers, rejected))
    supporting = [answer for answer in informative if answer.verdict == Verdict.SUPPORTED]
    counts = f"{len(supporting)} of {len(informative)} informative tasks support it"
    alone = [answer.task for answer in answers if answer.verdict == Verdict.CONTRADICTED]
    counts += f"; contradicted on {', '.join(alone)}, not by Holm over {len(answers)} tasks" if alone else ""
    not_run = [answer.task for answer in answers if answer.verdict == Verdict.NOT_RUN]
    counts += f"; not run: {', '.join(not_run)}" if not_run else ""
    if contradicting:
        names = ", ".join(answer.task for answer in contradicting)
        verdict, reason = Verdict.CONTRADICTED, f"contradicted on {names} (Holm over {len(answers)} tasks)"
    elif all(answer.verdict == Verdict.NOT_RUN for answer in answers):
        verdict, reason = Verdict.NOT_RUN, "no task is run"
    elif not informative and not not_run:
        verdict, reason = Verdict.UNINFORMATIVE, "no task is informative"
    elif len(supporting) == len(informative) and not not_run:
        verdict, reason = Verdict.SUPPORTED, counts
    else:
        verdict, reason = Verdict.UNDECIDED, counts
    return ClaimVerdict(answers[0].claim, answers[0].model, verdict, reason, tuple(answers))


def test_of(answer: Answer) -> tuple[object, ...]:
    """Which test an answer gives: two sides by one measure, with the rule and the zero point."""
    rule, pair, measure = answer.claim.rule.words, answer.pair, answer.measure
    if pair is None or pair.method is None or pair.comparator is None or measure is None:
        return answer.model, answer.task, answer.claim.name, rule, answer.zero
    comparator = tuple((weight, group.name) for weight, group in pair.comparator.parts)
    return pair.anchor.setting, pair.method.name, comparator, measure, rule, answer.zero


def _tested(answers: Iterable[Answer]) -> list[list[Answer]]:
    """The answers that rest on a look, by the test that they give."""
    tests: dict[tuple[object, ...], list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.look is not None:
            tests[test_of(answer)].append(answer)
    return list(tests.values())


def mark_survivors(answers: Sequence[Answer]) -> None:
    """Mark the verdicts that hold by Holm's procedure over all tests: one of them is wrong in at most 5 %."""
    tests = _tested(answers)
    for own, rejected in zip(tests, rules.holm([own[0].decided_level for own in tests]), strict=True):
        for answer in own:
            answer.survives_holm = rejected and answer.verdict in DECIDED


def error_note(answers: Sequence[Answer]) -> str:
    """How many verdicts there are, how many wrong ones the levels allow, and how many hold over all tests."""
    tests = _tested(answers)
    if not tests:
        return "No planned look has been taken yet."
    decided = [own for own in tests if any(answer.verdict in DECIDED for answer in own)]
    surviving = sum(any(answer.survives_holm for answer in own) for own in decided)
    return (
        f"Verdicts (supported or contradicted): {len(decided)}, from {len(tests)} different tests that have had a "
        f"look. If every true contrast were 0, on average at most {100 * rules.TOTAL:g} % of the tests "
        f"({rules.TOTAL * len(tests):.1f}) would get a wrong verdict. By Holm's procedure over these tests, "
        f"{surviving} of the {len(decided)} verdicts hold (*)."
    )
