"""Every claim on one scale: an interval is inside the zone exactly if the rule supports the claim."""

import math

import numpy as np
import pytest

from tiedlora.analysis import shares
from tiedlora.analysis.rules import Better, Level, Retains, WithinMargin

RULES = [Retains(0.9), Retains(0.5), Better(0.0), Better(0.05), Level(0.2), WithinMargin(0.02)]


def sides(generator, method: float, comparator: float, base: float = 0.1, seeds: int = 4, rows: int = 150):
    difficulty = generator.normal(0, 0.1, rows)
    scores = [
        (generator.random((seeds, rows)) < np.clip(truth + difficulty, 0, 1)).astype(float)
        for truth in (method, comparator)
    ]
    return *scores, (generator.random(rows) < np.clip(base + difficulty, 0, 1)).astype(float)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_bar_is_inside_the_zone_exactly_if_the_rule_supports_and_outside_exactly_if_it_contradicts(rule):
    generator = np.random.default_rng(0)
    seen = set()
    for method in np.linspace(0.2, 0.95, 16):
        for comparator in (0.45, 0.6):
            tables = sides(generator, method, comparator)
            kept = shares.kept(rule, tables, 0.05)
            gain = float((tables[1] - tables[2]).mean())
            low, high = shares.zone(rule, gain)
            evidence = rule.evidence(*tables)
            if rule.needs_base:
                assert evidence.gain <= 0.05, "these worlds have a clear gain"
            is_inside = kept.low > low and kept.high < high
            is_outside = kept.high < low or kept.low > high
            assert is_inside == (evidence.supported <= 0.05)
            assert is_outside == (evidence.contradicted <= 0.05)
            assert kept.low <= kept.value <= kept.high
            seen.add((is_inside, is_outside))
    assert seen == {(True, False), (False, True), (False, False)}, "every kind of answer was drawn"


def test_the_value_is_the_share_of_the_gain_whatever_the_rule():
    tables = sides(np.random.default_rng(1), 0.4, 0.7)
    method, comparator, base = (table.mean() for table in tables)
    for rule in RULES:
        assert shares.kept(rule, tables, 0.05).value == pytest.approx((method - base) / (comparator - base))


def test_without_a_gain_of_the_comparator_there_is_no_share():
    assert shares.kept(Retains(0.9), sides(np.random.default_rng(2), 0.5, 0.1, base=0.4), 0.05) is None


def test_the_zone_of_a_margin_in_points_depends_on_the_gain():
    assert shares.zone(Better(0.02), 0.2) == pytest.approx((1.1, math.inf))
    assert shares.zone(WithinMargin(0.02), 0.2) == pytest.approx((0.9, math.inf))
    assert shares.zone(Level(0.1), 0.2) == pytest.approx((0.9, 1.1))
