"""One rule for the choice of a learning rate."""

from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiedlora.analysis.intervals import both_interval, mean_loss, paired_difference
from tiedlora.analysis.rate_choice import RateTrial, choose_rate, rate_contrast, regret_bound
from tiedlora.records.rows import ValidationLosses

LOSSES = st.sampled_from([0.5, 1.0, 1.5, 2.0])
"""Few values, so that ties are common."""


def trial(lr: float, losses=(), scores=(), failed=()) -> RateTrial:
    return RateTrial(lr, dict(enumerate(losses)), dict(enumerate(scores)), frozenset(failed))


@given(st.lists(st.tuples(st.lists(LOSSES, min_size=3, max_size=3), st.booleans()), min_size=1, max_size=5))
def test_on_equal_seeds_it_is_the_best_mean_of_the_rates_that_did_not_fail(rates):
    trials = [trial(lr, losses, failed=[2] if failed else []) for lr, (losses, failed) in enumerate(rates, start=1)]
    chosen = choose_rate(trials)
    usable = {lr: mean(losses) for lr, (losses, failed) in enumerate(rates, start=1) if not failed}
    if not usable:
        assert chosen is None
        return
    assert (chosen.lr, chosen.by) == (min(usable, key=lambda lr: (usable[lr], lr)), "loss")
    assert chosen.value == chosen.loss == usable[chosen.lr]
    assert (chosen.seeds, chosen.usable, chosen.paired) == ((0, 1, 2), tuple(usable), True)
    assert chosen.edge == (len(rates) > 1 and chosen.lr in (1, len(rates)))


@given(
    st.dictionaries(st.integers(1, 5), st.dictionaries(st.integers(0, 2), st.tuples(LOSSES, LOSSES), max_size=3)),
    st.randoms(),
)
def test_the_order_of_trials_and_seeds_does_not_matter(rates, random):
    def trials(order):
        found = []
        for lr, runs in order(rates.items()):
            losses = {seed: runs[seed][0] for seed in order(runs)}
            scores = {seed: runs[seed][1] for seed in order(runs)}
            found.append(RateTrial(lr, losses, scores))
        return found

    assert choose_rate(trials(list)) == choose_rate(trials(lambda items: random.sample(list(items), len(items))))


def test_finalists_are_compared_on_the_seeds_that_only_they_have():
    search = {1: [1.0], 2: [0.5, 0.9], 3: [0.6, 0.7], 4: [1.1]}
    chosen = choose_rate([trial(lr, losses) for lr, losses in search.items()])
    assert (chosen.lr, chosen.seeds, chosen.loss) == (3, (0, 1), mean([0.6, 0.7]))
    # Further seeds at the chosen rate alone change nothing.
    repeated = {**search, 3: [0.6, 0.7, 2.0, 2.0]}
    assert choose_rate([trial(lr, losses) for lr, losses in repeated.items()]) == chosen
    # Until one of them diverges. Then the next best is chosen.
    trials = [trial(lr, losses, failed=[4] if lr == 3 else []) for lr, losses in repeated.items()]
    assert choose_rate(trials).lr == 2


def test_ties_go_to_the_lower_loss_and_then_to_the_lower_rate():
    equal = [trial(lr, [1.0, loss], scores=[0.5, 0.5]) for lr, loss in ((3e-2, 1.0), (1e-2, 1.0), (1e-3, 1.5))]
    chosen = choose_rate(equal)
    assert (chosen.lr, chosen.by, chosen.value, chosen.loss) == (1e-2, "score", 0.5, 1.0)


def test_the_score_chooses_only_if_all_rates_have_it_on_the_shared_seeds():
    scored = trial(1e-3, [2.0, 2.0], scores=[0.9, 0.9])
    assert choose_rate([scored, trial(1e-2, [1.0, 1.0], scores=[0.1, 0.1])]).lr == 1e-3
    chosen = choose_rate([scored, trial(1e-2, [1.0, 1.0], scores=[0.1])])
    assert (chosen.lr, chosen.by) == (1e-2, "loss")
    assert choose_rate([scored, trial(1e-2, [1.0], scores=[0.1])]).by == "score"
    assert choose_rate([scored, trial(1e-2, [1.0, 1.0], scores=[0.1, 0.1])], by="loss").lr == 1e-2


def test_if_every_rate_failed_there_is_a_choice_only_when_it_is_asked_for():
    rates = [trial(1e-3, [1.0], failed=[1]), trial(1e-2, [0.5], failed=[1, 2]), trial(1e-1, failed=[0])]
    assert choose_rate(rates) is None
    chosen = choose_rate(rates, accept_failed=True)
    assert (chosen.lr, chosen.failed, chosen.seeds) == (1e-3, True, (0,))
    assert choose_rate([trial(1e-1, failed=[0])], accept_failed=True) is None
    assert choose_rate([]) is None


def test_rates_without_a_shared_seed_are_compared_by_their_own_and_it_is_said():
    chosen = choose_rate([RateTrial(1e-3, {0: 1.0}), RateTrial(1e-2, {1: 0.5})])
    assert (chosen.lr, chosen.paired, chosen.seeds) == (1e-2, False, (1,))


def test_a_rate_that_has_left_the_race_is_not_chosen_but_still_counts_as_tried():
    trials = [trial(1, [1.0]), trial(2, [0.5, 0.9]), trial(3, [0.6, 0.7]), trial(4, [0.4], failed=[1])]
    chosen = choose_rate(trials, among=[1, 2])
    assert (chosen.lr, chosen.tried, chosen.usable) == (2, (1, 2, 3, 4), (1, 2))
    assert choose_rate(trials, among=[4]).lr == 3, "those of the race have all failed"


def runs(means, seeds=4, rows=40, noise=0.01) -> dict[float, dict[int, ValidationLosses]]:
    """Rate -> seed -> losses around its mean. Rows have unequal numbers of tokens."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 30, rows).tolist()

    def losses(mean):
        return ValidationLosses(64, (mean + generator.normal(0, noise, rows)).tolist(), tokens)

    return {lr: {seed: losses(mean) for seed in range(seeds)} for lr, mean in means.items()}


def test_the_contrast_of_two_rates_is_the_difference_of_their_losses_per_token_at_every_seed():
    first, second = runs({1e-3: 1.2, 1e-2: 1.0}).values()
    table = rate_contrast(first, {**second, 3: None, 7: first[0]})
    expected = [mean_loss(first[seed]) - mean_loss(second[seed]) for seed in range(3)]
    assert table.mean(1) == pytest.approx(expected, abs=1e-12), "only seeds that both have, with their files"
    # With one seed twice, the interval over rows is that of a single pair.
    twice = rate_contrast({0: first[0], 1: first[0]}, {0: second[0], 1: second[0]})
    _, error = paired_difference(first[0], second[0])
    assert twice.mean(0).std(ddof=1) / np.sqrt(40) == pytest.approx(error)
    assert rate_contrast(first, {0: second[0]}) is None
    with pytest.raises(ValueError, match="not those of the same rows"):
        rate_contrast(first, {seed: ValidationLosses(64, [1.0, 2.0], [3, 4]) for seed in range(4)})


def test_the_bound_of_the_regret_is_that_of_the_rate_that_may_be_best():
    losses = runs({1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.001}, noise=0.05)
    bound = regret_bound(losses, 3e-3)
    near = both_interval(rate_contrast(losses[3e-3], losses[1e-2]), 0.1)
    assert (bound.nats, bound.rates, bound.seeds) == (pytest.approx(near.high), 2, 4)
    assert regret_bound(losses, 1e-3).nats > 0.99, "of a rate that is clearly the worst"
    assert regret_bound(runs({1e-3: 2.0, 3e-3: 1.0}), 3e-3).nats == 0
    assert regret_bound({3e-3: losses[3e-3], 1e-2: {0: losses[1e-2][0]}}, 3e-3) is None
