"""The decisions of the staged search, on simulated runs without a model."""

from dataclasses import replace

import numpy as np
import pytest

from tiedlora.analysis.intervals import mean_loss, paired_difference
from tiedlora.analysis.rate_choice import regret_bound
from tiedlora.records.rows import ValidationLosses
from tiedlora.sweeps.staged_search import Observation, SearchPlan, SearchStage, next_rate, rung_steps

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
STEPS = 80
PLAN = SearchPlan(GRID, (0, 1, 2, 3, 4), rungs=(20, 40), lowest=1e-5, highest=1.0)


class Population:
    """Simulated runs. A rate's loss grows with its distance from the best rate, in decades.

    Args:
        row_noise: the standard deviation of a row's loss, which the rates do not share.
        apart: what a decade beside the best rate costs, in a loss that falls by 2.
        diverges: (rate, seed) -> the step at which the run diverges.
    """

    def __init__(self, best: float, row_noise: float = 0.02, diverges=(), apart: float = 0.5) -> None:
        self.best, self.row_noise, self.diverges, self.apart = best, row_noise, dict(diverges), apart
        self.reached: dict[tuple[float, int], int] = {}
        self.scored: set[tuple[float, int]] = set()
        self.steps = 0

    def losses(self, lr: float, seed: int, step: int) -> ValidationLosses:
        generator = np.random.default_rng([round(1e9 * lr), seed, step])
        mean = 3.0 - 2 * step / STEPS + self.apart * abs(np.log10(lr / self.best)) * step / STEPS
        return ValidationLosses(step, (mean + generator.normal(0, self.row_noise, 64)).tolist(), [10] * 64)

    def __call__(self, lr: float, seed: int) -> Observation:
        reached = self.reached.get((lr, seed), 0)
        if (end := self.diverges.get((lr, seed), STEPS + 1)) <= reached:
            return Observation({step: self.losses(lr, seed, step) for step in range(0, end, 20)}, diverged=True)
        evaluations = {step: self.losses(lr, seed, step) for step in range(0, reached + 1, 20)} if reached else {}
        loss = mean_loss(evaluations[STEPS]) if reached == STEPS else None
        return Observation(evaluations, loss, scored=(lr, seed) in self.scored)

    def run(self, requests) -> None:
        for request in requests:
            key, until = (request.lr, request.seed), request.until or STEPS
            self.steps += max(0, until - self.reached.get(key, 0))
            self.reached[key] = max(until, self.reached.get(key, 0))
            if request.score:
                self.scored.add(key)


def finish(population: Population, plan: SearchPlan = PLAN):
    """Run the search to its end. Returns its last stage."""
    for _ in range(100):
        stage = SearchStage(plan, population)
        if not stage.requests:
            return stage
        population.run(stage.requests)
    raise AssertionError("the search does not end")


def actions(stage) -> list[tuple[str, float]]:
    return [(made.action, made.lr) for made in stage.decisions]


@pytest.mark.parametrize("best", GRID[1:-1])
def test_it_finds_the_best_rate_at_under_a_third_of_the_steps(best):
    population = Population(best)
    stage = finish(population)
    assert stage.chosen.lr == best
    assert population.steps <= 0.3 * STEPS * len(GRID) * len(PLAN.seeds)
    assert population.scored == {(best, seed) for seed in PLAN.seeds}, "only the chosen runs are scored"


def test_the_two_best_never_stop_and_nobody_within_the_noise():
    clear = finish(Population(3e-3, apart=2.0))
    stopped = [lr for action, lr in actions(clear) if action == "stopped"]
    assert [made.step for made in clear.decisions if made.step] == [20] * 3 + [40] * 2, "the better half goes on"
    assert not {1e-3, 3e-3, 1e-2} <= set(stopped)
    assert 3e-3 not in stopped
    noisy = Population(3e-3, row_noise=2.0, apart=2.0)
    decisions = [made for made in finish(noisy).decisions if made.action == "stopped"]
    assert len({(made.lr, made.seed) for made in decisions}) == len(decisions)
    for made in decisions:
        losses = [noisy.losses(lr, 0, made.step) for lr in GRID]
        best = min(losses, key=mean_loss)
        difference, error = paired_difference(noisy.losses(made.lr, 0, made.step), best)
        assert difference > error
    few = finish(Population(3e-3, apart=2.0), replace(PLAN, rates=(1e-3, 3e-3)))
    assert "stopped" not in dict(actions(few))


def test_a_rate_that_is_behind_until_the_schedule_falls_is_not_stopped():
    """As LoRA on 27 layers at 3e-2: at a quarter of 256 steps 6 % of the gain behind, and level at the end."""

    class Late(Population):
        def losses(self, lr, seed, step):
            own = super().losses(self.best, seed, step)
            worse = (0.05 if step < STEPS else -0.05) if lr == self.best and step else 0.0
            return replace(own, losses=[loss + worse for loss in own.losses])

    population = Late(1e-2)
    difference, error = paired_difference(*(population.losses(lr, 0, 20) for lr in (1e-2, 3e-3)))
    assert difference > 2 * error, "it is clearly behind"
    stage = finish(population)
    assert "stopped" not in dict(actions(stage))
    assert stage.chosen.lr == 1e-2


def test_a_winner_at_the_edge_is_followed_outward_within_the_bounds():
    stage = finish(Population(0.3))
    assert (stage.chosen.lr, stage.chosen.edge) == (0.3, False)
    assert [lr for action, lr in actions(stage) if action == "outward"] == [0.3, 1.0]
    stage = finish(Population(0.3), replace(PLAN, highest=0.2))
    assert (stage.chosen.lr, stage.chosen.edge) == (0.1, True)
    assert actions(stage).count(("edge", 0.1)) == 1
    stage = finish(Population(1e-5))
    assert [lr for action, lr in actions(stage) if action == "outward"] == [3e-5, 1e-5]
    assert next_rate(2e-3, upward=True) == 6e-3, "also beside the ladder"


def test_a_rate_that_diverges_later_falls_back_to_the_next_best_and_says_so():
    population = Population(1e-2, diverges={(1e-2, 3): 30})
    stage = finish(population)
    assert stage.chosen.lr in (3e-3, 3e-2)
    assert actions(stage)[-2:] == [("diverged", 1e-2), ("fallback", stage.chosen.lr)]
    assert population.scored == {(stage.chosen.lr, seed) for seed in PLAN.seeds}


def test_a_finalist_that_diverges_is_replaced():
    population = Population(1e-2, diverges={(1e-2, 1): 10, (3e-2, 1): 10})
    stage = finish(population, replace(PLAN, rungs=()))
    finalists = {lr for lr, seed in population.reached if seed == 1}
    assert finalists >= {3e-3, 1e-2, 3e-2}
    assert len(finalists) > 3, "the next best rates take the places of those that diverged"
    assert stage.chosen.lr == 3e-3


def test_if_every_rate_diverges_there_is_no_choice():
    population = Population(1e-2, diverges={(lr, seed): 10 for lr in GRID for seed in PLAN.seeds})
    stage = finish(population)
    assert stage.chosen is None
    assert actions(stage)[-1][0] == "none"
    assert not population.scored


def test_a_search_stopped_at_any_moment_takes_the_same_decisions():
    expected = finish(Population(1e-1))
    generator = np.random.default_rng(0)
    population = Population(1e-1)
    for _ in range(500):
        stage = SearchStage(PLAN, population)
        if not stage.requests:
            break
        # A killed launch: one of its cells came as far as it should.
        population.run([stage.requests[generator.integers(len(stage.requests))]])
    assert (stage.decisions, stage.chosen) == (expected.decisions, expected.chosen)


def test_a_full_grid_that_ran_before_or_after_changes_no_decision():
    expected = finish(Population(1e-2))
    full = Population(1e-2)
    full.reached = {(lr, seed): STEPS for lr in GRID for seed in PLAN.seeds}
    stage = finish(full)
    assert (stage.decisions, stage.chosen, stage.trials()) == (expected.decisions, expected.chosen, expected.trials())
    assert full.steps == 0


def test_one_rate_or_one_seed_needs_no_search():
    population = Population(1e-2)
    stage = finish(population, replace(PLAN, rates=(3e-3,)))
    assert (stage.chosen.lr, stage.chosen.edge) == (3e-3, False)
    assert set(population.reached) == {(3e-3, seed) for seed in PLAN.seeds}
    population = Population(1e-2)
    stage = finish(population, replace(PLAN, seeds=(4,)))
    assert stage.chosen.lr == 1e-2
    assert population.scored == {(1e-2, 4)}


def test_rungs_are_evaluations_before_the_last_step():
    assert rung_steps(80, 20, (0.25, 0.5)) == (20, 40)
    assert rung_steps(100, 50, (0.25, 0.5)) == (50,)
    assert rung_steps(100, 30, (0.25, 0.5, 0.95)) == (30, 60)
    assert rung_steps(100, 5, (0.55,)) == (55,), "0.55 * 100 is a little more than 55"
    assert rung_steps(100, 0, (0.25,)) == rung_steps(100, 20, ()) == rung_steps(8, 50, (0.25,)) == ()


RACE = replace(PLAN, seeds=(10, 11), named_seeds=(0, 1, 2, 3, 4, 5), race_level=0.1, race_within=0.0)


class Neighbours(Population):
    """Rates whose losses are given (3.0 for the others), with noise between seeds that all rows share."""

    def __init__(self, means, seed_noise: float = 0.02, row_noise: float = 0.001) -> None:
        super().__init__(best=1e-2, row_noise=row_noise)
        self.means, self.seed_noise = means, seed_noise

    def losses(self, lr: float, seed: int, step: int) -> ValidationLosses:
        generator = np.random.default_rng([round(1e9 * lr), seed])
        mean = self.means.get(lr, 3.0) + generator.normal(0, self.seed_noise)
        return ValidationLosses(step, (mean + generator.normal(0, self.row_noise, 64)).tolist(), [10] * 64)


def seeds_of(population, lr) -> set[int]:
    return {seed for rate, seed in population.reached if rate == lr and seed in RACE.named_seeds}


def test_a_race_goes_on_to_further_seeds_until_one_rate_is_left():
    """Two rates differ by 0.03, and seeds by 0.02: two seeds cannot tell them apart, and a few more can."""
    population = Neighbours({3e-3: 1.03, 1e-2: 1.0})
    stage = finish(population, replace(RACE, rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1)))
    assert stage.chosen.lr == 1e-2
    (left,) = [made for made in stage.decisions if made.action == "behind"]
    assert left.lr == 3e-3
    raced = seeds_of(population, 3e-3)
    assert raced == seeds_of(population, 1e-2)
    assert 2 < len(raced) < 6, "the other four seeds are not run"
    assert stage.tied() == []
    assert {seed for lr, seed in population.scored} == {10, 11}, "the seeds of the race are not scored"
    assert {lr for lr, _ in population.scored} == {1e-2}


def test_a_rate_leaves_a_race_at_the_level_of_the_plan():
    for level, left in ((0.1, [3e-3]), (1e-6, [])):
        population = Neighbours({3e-3: 1.03, 1e-2: 1.0})
        stage = finish(population, replace(RACE, rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), race_level=level))
        assert [made.lr for made in stage.decisions if made.action == "behind" and made.lr == 3e-3] == left


def test_a_rate_that_has_left_a_race_has_no_say_in_who_is_best():
    """Over the first two seeds, which it has too, another rate is the best one; over all six, 3e-2 is."""

    class Given(Population):
        def losses(self, lr: float, seed: int, step: int) -> ValidationLosses:
            above = {3e-3: [0.0] * 6, 1e-2: [0.03, 0.035], 3e-2: [0.04, 0.1, *[-0.1] * 4]}.get(lr, [2.0] * 6)
            mean = 1.0 + (above[seed] if seed in RACE.named_seeds else 0.0)
            noise = np.random.default_rng([round(1e9 * lr), seed]).normal(0, 0.2 if lr == 3e-2 else 0.001, 64)
            return ValidationLosses(step, (mean + noise - noise.mean()).tolist(), [10] * 64)

    stage = finish(Given(best=3e-2), replace(RACE, rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1)))
    assert [made.lr for made in stage.decisions if made.action == "behind"] == [1e-2]
    assert (stage.chosen.lr, stage.tied()) == (3e-2, [3e-3])


def test_a_race_without_a_winner_tries_a_rate_between_and_says_that_it_is_a_tie():
    population = Neighbours(dict.fromkeys((3e-3, 5.5e-3, 1e-2), 1.0))
    stage = finish(population, replace(RACE, rates=(1e-3, 3e-3, 1e-2, 3e-2)))
    assert [lr for action, lr in actions(stage) if action == "finer"] == [5.5e-3]
    assert seeds_of(population, 3e-3) == seeds_of(population, 1e-2) == set(RACE.named_seeds)
    assert stage.tied()
    assert stage.chosen.lr not in stage.tied()
    assert [lr for action, lr in actions(stage) if action == "tied"] == [stage.chosen.lr] * len(stage.tied())
    assert {lr for lr, _ in population.scored} == {stage.chosen.lr}


@pytest.mark.parametrize(("within", "raced", "before_finer"), [(0.0, 6, 6), (0.002, 3, 2), (0.02, 2, 2)])
def test_a_race_ends_when_its_rates_are_level_within_what_the_plan_names(within, raced, before_finer):
    """The rate between is not level with the two others at two seeds within 0.002, so all three go on."""
    means = dict.fromkeys((3e-3, 5.5e-3, 1e-2), 1.0)
    population = Neighbours(means, seed_noise=0.0005, row_noise=0.0001)
    stage = finish(population, replace(RACE, rates=(1e-3, 3e-3, 1e-2, 3e-2), race_level=0.001, race_within=within))
    assert {lr: len(seeds_of(population, lr)) for lr in means} == dict.fromkeys(means, raced)
    assert len(stage.tied()) == 2
    (finer,) = [made for made in stage.decisions if made.action == "finer"]
    assert finer.reason == f"0.003 and 0.01 are left after {before_finer} seeds"
    (choice,) = [trial for trial in stage.trials() if trial.lr == stage.chosen.lr]
    losses = {lr: {seed: population.losses(lr, seed, STEPS) for seed in seeds_of(population, lr)} for lr in means}
    assert raced == 6 or regret_bound(losses, choice.lr).nats <= within


def test_a_race_within_nothing_goes_on_though_the_best_rate_is_shown_to_be_better():
    """At 95 %, and the plan lets a rate leave at 99 % alone."""
    population = Neighbours({3e-3: 1.016, 5.5e-3: 1.03, 1e-2: 1.0}, seed_noise=0.006)
    plan = replace(RACE, rates=(1e-3, 3e-3, 1e-2, 3e-2), race_level=1e-4, race_within=0.0)
    stage = finish(population, plan)
    losses = {lr: {seed: population.losses(lr, seed, STEPS) for seed in range(3)} for lr in (3e-3, 1e-2)}
    assert (stage.chosen.lr, regret_bound(losses, 1e-2).nats) == (1e-2, 0.0)
    assert len(seeds_of(population, 3e-3)) == 6


def test_a_race_goes_on_if_a_rate_may_still_be_better_by_more_than_that():
    """Rows differ by 0.3: no seed makes the bound small, though all seeds agree."""
    population = Neighbours(dict.fromkeys((3e-3, 5.5e-3, 1e-2), 1.0), seed_noise=0.0, row_noise=0.3)
    finish(population, replace(RACE, rates=(3e-3, 1e-2), highest=1e-2, lowest=3e-3, race_within=0.005))
    assert len(seeds_of(population, 3e-3)) == 6


def test_a_rate_between_that_is_better_wins_the_race():
    population = Neighbours({3e-3: 1.1, 1e-2: 1.1, 5.5e-3: 1.0})
    stage = finish(population, replace(RACE, rates=(1e-3, 3e-3, 1e-2, 3e-2)))
    assert (stage.chosen.lr, stage.tied()) == (5.5e-3, [])
    assert 3 <= len(seeds_of(population, 5.5e-3)) <= 6


def test_rows_that_disagree_keep_a_race_open_though_all_seeds_agree():
    """The interval is over rows too: 64 rows are too few for a difference of 0.01 where rows differ by 0.3."""
    population = Neighbours({3e-3: 1.01, 5.5e-3: 1.005, 1e-2: 1.0}, seed_noise=0.0, row_noise=0.3)
    stage = finish(population, replace(RACE, rates=(3e-3, 1e-2), highest=1e-2, lowest=3e-3))
    assert stage.tied()


@pytest.mark.parametrize("within", [0.0, 0.03])
def test_a_race_that_was_stopped_at_any_moment_chooses_the_same(within):
    rates = replace(RACE, rates=(1e-3, 3e-3, 1e-2, 3e-2), race_within=within)
    means = {3e-3: 1.01, 5.5e-3: 1.0, 1e-2: 1.0}
    expected = finish(Neighbours(means), rates)
    assert [action for action, _ in actions(expected)].count("finer") == 1
    generator, population = np.random.default_rng(0), Neighbours(means)
    for _ in range(500):
        stage = SearchStage(rates, population)
        if not stage.requests:
            break
        population.run([stage.requests[generator.integers(len(stage.requests))]])
    assert (stage.decisions, stage.chosen, stage.tied()) == (expected.decisions, expected.chosen, expected.tied())


def test_a_rate_that_diverges_in_a_race_is_out_and_the_next_best_takes_its_place():
    population = Neighbours({3e-3: 1.01, 1e-2: 1.0, 3e-2: 1.05})
    population.diverges = {(1e-2, 2): 30}
    stage = finish(population, replace(RACE, rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1)))
    assert ("diverged", 1e-2) in actions(stage)
    assert stage.chosen.lr == 3e-3
    assert 1e-2 not in stage.tied()


def test_two_seeds_or_none_that_are_named_decide_as_ever():
    expected, named = finish(Population(1e-2)), finish(Population(1e-2), replace(PLAN, named_seeds=(0, 1)))
    assert (named.decisions, named.chosen) == (expected.decisions, expected.chosen)
