"""The answer of the runs to each claim, for every model and task.

A claim's plan fixes the numbers of seeds at which it is looked at. A look uses the first seeds in the declared order,
and is taken when all of them have ended on both sides. The first look that decides stands; later seeds change nothing.

- supported, contradicted: the rule is, at the level of the look (statistics.rules);
- uninformative: at the last look, the comparator's own gain over the base may be 0, so any method would do as well
  (only for rules that need this gain: who is better can be known without it);
- undecided: none of these. `decide` says which look comes next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tiedlora.analysis import compare, crossed, estimates, looks, partners, rules, shares
from tiedlora.analysis.claims import Claim, Plan
from tiedlora.analysis.estimates import Estimate, Measure, PairedScores
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.planning import slack
from tiedlora.analysis.scorebook import Scorebook
from tiedlora.errors import UserError
from tiedlora.records.interval import Interval
from tiedlora.text import number_list


class Verdict(StrEnum):
    """The verdict on a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    UNINFORMATIVE = "uninformative"


@dataclass
class Answer:
    """The answer to a claim for one model and task."""

    claim: Claim
    model: str
    task: str
    """The task, with the variant of its setting if there are several."""
    pair: partners.Pair | None = None
    """The groups that were compared; None if no run of the claim exists."""
    verdict: Verdict = Verdict.UNDECIDED
    exploratory: bool = False
    """Whether the verdict rests on seeds outside the plan."""
    is_futile: bool = False
    """Whether no later look is likely to decide."""
    reason: str = ""
    measure: Measure | None = None
    difference: Estimate | None = None
    contrast: Interval | None = None
    """The number that the rule compares with 0, with its interval at the level of the look. More is better."""
    retained: Interval | None = None
    """The share of the comparator's gain, with Fieller's interval."""
    retains_at_least: float | None = None
    """The largest share that the rule `retains` would support at the level of the look."""
    kept: Interval | None = None
    """The share that the method keeps, with the ends at which the rule decides (shares.kept). Before the first look it
    has the level 5 % and all common seeds. None without two seeds, base scores or a gain of the comparator."""
    comparator_gain: float | None = None
    """The comparator's mean gain over the base, on the seeds of `kept`; None without base scores."""
    gain_may_be_zero: bool = False
    """Whether the interval of the comparator's gain includes 0, so that a share of it means little."""
    contradicted_level: float = 1.0
    """The level of the whole plan at which the claim is contradicted, for Holm's procedure over tasks."""
    gain_needed: float | None = None
    """The comparator's gain at which the last look decides in 4 of 5 tries, if the method equals the comparator."""
    look: int | None = None
    """The look that the answer rests on, counted from 0."""
    seeds: int = 0
    """The number of seeds of the look, or of all common seeds before the first one."""
    difference_seeds: int = 0
    """The number of seeds of `difference`, which uses all that both sides have."""
    rows: int = 0
    decide: str = ""
    """What would decide the claim, in planned looks."""


def answer_claims(
    claims: Iterable[Claim], groups: Sequence[RunGroup], book: Scorebook, split: str | None = None
) -> list[Answer]:
    """The answers to all claims, for every setting with a run of the claim, and for tasks without such a run."""
    shown = compare.shown_splits(groups)
    answers = []
    for claim in claims:
        pairs = partners.pairs(claim, groups)
        answers += [_answer(claim, pair, split or shown[pair.task], book) for pair in pairs]
        reason, decide = f"{partners.in_words(claim)} was not run on it", next_look(claim.plan, 0)
        for model in sorted({pair.model for pair in pairs}) or [""]:
            tasks = set(claim.metrics) or {group.task for group in groups if model in (group.model, "")}
            missing = tasks - {pair.task for pair in pairs if pair.model == model}
            answers += [Answer(claim, model, task, reason=reason, decide=decide) for task in sorted(missing)]
    return answers


def _answer(claim: Claim, pair: partners.Pair, split: str, book: Scorebook) -> Answer:
    answer = Answer(claim, pair.model, pair.task_in_words, pair, reason=pair.problem, decide=next_look(claim.plan, 0))
    if pair.method is None or pair.comparator is None:
        return answer
    method, comparator = pair.method, pair.comparator
    try:
        answer.measure = measure = _measure(claim, method, split)
        scores = estimates.paired_scores(method, comparator, measure, book)
    except UserError as error:
        answer.reason = f"{method.name} and {comparator.name}: {error}"
        return answer
    answer.difference, _ = estimates.difference(method, comparator, measure, book)
    answer.retained = estimates.retained(method, comparator, measure)
    answer.rows, answer.difference_seeds = scores.method.shape[1], len(scores.seeds)
    _set_share(answer, scores, looks.TOTAL)
    _decide(answer, scores, _ended(method, measure) & _ended(comparator, measure))
    answer.reason += f" ({method.name} against {comparator.name}, {split}, {measure.metric})"
    if estimates.other_ends(method.runs, comparator.runs, measure):
        answer.reason += f"; {estimates.OTHER_ENDS}"
    if effort := partners.unequal_effort(method, comparator):
        answer.reason += f"; {effort}"
    for group in (method, comparator):
        if answer.look is not None and _may_change_its_rate(group, answer.seeds):
            answer.reason += (
                f"; the rate of {group.name} was chosen on later seeds too, so they can change this: record the choice "
                "at the look with scripts/sweep.py select"
            )
    return answer


def _measure(claim: Claim, method: RunGroup, split: str) -> Measure:
    """What the claim compares: the metric that it names for the task, or the task's first.

    Raises:
        UserError: the split was not scored, or not by this metric.
    """
    scored = [run.splits[split] for run in method.runs if split in run.splits]
    if not scored:
        raise UserError(f"not scored on {split}")
    metric = claim.metric_on(method.task, scored[0].first_metric)
    if all(metric not in scores.metrics for scores in scored):
        raise UserError(f"{split} has no {metric}; it has {', '.join(scored[0].metrics)}")
    return Measure(split, metric)


def _ended(group: RunGroup, measure: Measure) -> set[int]:
    """The seeds that are scored, and those that diverged and never will be. Another failure can be repaired."""
    return {run.seed for run in measure.scored(group)} | group.diverged_seeds


def _may_change_its_rate(group: RunGroup, seeds: int) -> bool:
    """Whether seeds after a look chose the rate too: several rates, no recorded choice, more seeds than the look."""
    return len(group.rates) > 1 and not group.has_recorded_rate and len({trial.seed for trial in group.trials}) > seeds


def _decide(answer: Answer, scores: PairedScores, ended: set[int]) -> None:
    """Take every look of the plan whose seeds have ended, up to the first one that decides."""
    plan = answer.claim.plan
    answer.seeds = len(scores.seeds)
    if answer.claim.rule.needs_base and scores.base is None:
        answer.reason, answer.decide = "the base model was not scored", "scores of the base model (score.base=true)"
        return
    if answer.rows < 2:
        answer.reason, answer.decide = "one row has no interval", "two or more rows"
        return
    for number in range(len(plan.looks.seeds)):
        declared = plan.of_look(number)
        if not set(declared) <= ended:
            _wait_for(answer, scores, number, ended)
            return
        seen = scores.of(declared)
        if len(seen.seeds) < 2:
            answer.reason = f"seeds {number_list(declared)}: fewer than 2 of them finished on both sides"
            continue
        if _look(answer, seen, number):
            return
    if answer.verdict == Verdict.UNDECIDED:
        answer.decide = "no planned look is left; a new plan with new seeds"


def _look(answer: Answer, seen: PairedScores, number: int) -> bool:
    """Take one look, and return whether it decides. A decided claim needs nothing more."""
    planned, count = answer.claim.plan.looks, len(answer.claim.plan.looks.seeds)
    level = planned.levels[number]
    evidence = _test(answer, seen, level)
    answer.look, answer.seeds = number, len(seen.seeds)
    answer.contradicted_level = min(answer.contradicted_level, looks.adjusted(planned, number, evidence.contradicted))
    missing = len(answer.claim.plan.of_look(number)) - len(seen.seeds)
    answer.reason = f"look {number + 1} of {count}: {len(seen.seeds)} seeds at level {100 * level:.2g} %"
    answer.reason += f", {missing} diverged" if missing else ""
    if answer.claim.rule.needs_base and evidence.gain is not None and evidence.gain > level:
        answer.reason += ": the comparator's own gain over the base may be 0"
        if number == count - 1:
            answer.verdict = Verdict.UNINFORMATIVE
            answer.decide = "a task, model or training on which the comparator beats the base"
            return True
    if answer.verdict == Verdict.UNDECIDED:
        return False
    answer.decide = ""
    return True


def _test(answer: Answer, seen: PairedScores, level: float) -> rules.Evidence:
    """Set the contrast, the verdict and the least share that is kept, from these seeds at this level."""
    rule, sides = answer.claim.rule, (seen.method, seen.comparator, seen.base)
    evidence = rule.evidence(*sides)
    answer.contrast = crossed.both_interval(rule.contrast(*sides), level)
    _set_share(answer, seen, level)
    answer.gain_may_be_zero = evidence.gain is not None and evidence.gain > level
    if seen.base is not None:
        answer.retains_at_least = rules.retained_at_least(seen.method, seen.comparator, seen.base, level)
    if evidence.supported <= level:
        answer.verdict = Verdict.SUPPORTED
    elif evidence.contradicted <= level:
        answer.verdict = Verdict.CONTRADICTED
    return evidence


def _set_share(answer: Answer, seen: PairedScores, level: float) -> None:
    """Set the comparator's gain and the share of it that the method keeps, from these seeds at this level."""
    if seen.base is None:
        return
    answer.comparator_gain = float((seen.comparator - seen.base).mean())
    if min(seen.method.shape) > 1:
        answer.kept = shares.kept(answer.claim.rule, (seen.method, seen.comparator, seen.base), level)


def _wait_for(answer: Answer, scores: PairedScores, number: int, ended: set[int]) -> None:
    """Say what the next look needs. Without any look so far, give an exploratory verdict on the seeds there are."""
    plan = answer.claim.plan
    answer.decide = next_look(plan, number, ended)
    if answer.look is not None:
        _predict(answer, scores)
    elif len(scores.seeds) >= plan.looks.seeds[0]:
        answer.exploratory = True
        answer.contradicted_level = _test(answer, scores, looks.TOTAL).contradicted
        answer.reason = f"exploratory: seeds {number_list(scores.seeds)} are not the planned ones"
    else:
        answer.reason = f"before the first look: {len(scores.seeds)} of {plan.looks.seeds[0]} seeds"


def _predict(answer: Answer, scores: PairedScores) -> None:
    """Say how likely a later look decides, from the seeds of the last look."""
    plan, look = answer.claim.plan, answer.look
    assert look is not None
    seen = scores.of(plan.of_look(look))
    if len(seen.seeds) < plan.looks.seeds[look]:
        return
    sides = (seen.method, seen.comparator, seen.base)
    chance = looks.chance_of_decision(answer.claim.rule, *sides, plan.looks, look)
    if (share := slack(answer.claim.rule)) is not None:
        spread = crossed.measured_spread(answer.claim.rule.contrast(*sides))
        answer.gain_needed = looks.gain_needed_at_last_look(
            1 - share, spread, answer.rows, plan.looks, both_sides=isinstance(answer.claim.rule, rules.Level)
        )
    answer.is_futile = looks.is_futile(chance)
    if answer.is_futile:
        answer.decide = f"no planned look is likely to change it (chance {100 * chance:.0f} %)"
    else:
        answer.decide += f"; a later look decides with a chance of {100 * chance:.0f} %"
    if answer.gain_needed is not None and answer.measure is not None:
        unit = answer.measure.unit
        gain = f"{unit.factor * answer.gain_needed:.{unit.decimals}f} {unit.words}"
        answer.decide += (
            f"; if the two are equal, the plan decides in 4 of 5 tries where the comparator gains {gain} or more"
        )


def next_look(plan: Plan, number: int, ended: Iterable[int] = ()) -> str:
    """The look with this number in words, and the seeds that it still needs."""
    missing = [seed for seed in plan.of_look(number) if seed not in set(ended)]
    return f"the look at {plan.looks.seeds[number]} seeds: needs seeds {number_list(missing)} on both sides"
