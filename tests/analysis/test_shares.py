"""What a rule tests, in words, and what every arm keeps of a reference's gain."""

import math

import pytest
from helpers.report_runs import report_of_claim, scored_run, world

from tiedlora.analysis import rules, shares
from tiedlora.analysis.comparison import compare
from tiedlora.analysis.runs import Scorebook
from tiedlora.analysis.tested import number_tested
from tiedlora.records.interval import Interval


def test_what_a_rule_tests_lies_on_its_side_of_the_zone_and_says_why_it_is_missing(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.62}, rows=1000, seed_sd=0.002)
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.3}, rows=1000, seed_sd=0.002, task="squad")
    world(tmp_path / "runs", {"LoRA": 0.11, "TABuv": 0.1}, rows=200, task="gsm8k")
    lines = {line.task: line for line in report_of_claim(tmp_path).answers}
    supported, contradicted, floor = lines["chain_sum"], lines["squad"], lines["gsm8k"]
    assert supported.is_firm
    assert number_tested(supported).interval.low > number_tested(supported).zone[0] == 0.9
    assert number_tested(contradicted).interval.high < 0.9
    assert number_tested(floor) is None
    assert shares.tested_in_words(floor) == "the comparator's gain may be 0"


def test_a_difference_has_the_level_and_the_seeds_of_its_look_and_the_sign_of_a_loss(tmp_path):
    for seed in range(5):
        for name, loss in (("LoRA", 1.0), ("TABuv", 0.9 + 0.001 * seed)):
            losses = [loss + 0.01 * (place % 7) for place in range(60)]
            scored_run(tmp_path / "runs", losses, [2.0] * 60, metric="target_loss", name=name, seed=seed)
    (answer,) = report_of_claim(tmp_path, "better_by: 0", top="looks: [3, 5]").answers
    assert (answer.verdict, answer.findings.seeds, answer.findings.difference_seeds) == ("supported", 3, 5)
    found = number_tested(answer)
    # The mean of 0.9, 0.901 and 0.902, minus 1: the seeds of the look alone.
    assert found.interval.value == pytest.approx(-0.099)
    assert found.interval.low < found.interval.value < found.interval.high < 0
    assert (found.sign, found.zone) == (-1.0, (0.0, math.inf))
    wide, all_seeds = found.interval, answer.findings.difference.widest
    assert wide.high - wide.low > all_seeds.high - all_seeds.low
    assert shares.tested_in_words(answer).startswith("-0.099 nats [")
    assert shares.tested_in_words(answer).endswith("], 3 seeds")


def test_one_seed_has_an_interval_over_rows_and_no_planned_look(tmp_path):
    for name, right in (("LoRA", 30), ("TABuv", 24)):
        scored_run(tmp_path / "runs", [1.0] * right + [0.0] * (50 - right), [1.0] * 10 + [0.0] * 40, name=name)
    (line,) = report_of_claim(tmp_path).answers
    assert not line.is_firm
    kept = number_tested(line).interval
    assert kept.value == pytest.approx((24 - 10) / (30 - 10))
    assert kept.low < kept.value < kept.high
    assert shares.tested_in_words(line).endswith(", 1 seed")


def test_the_axis_holds_the_comparator_and_what_is_drawn_and_is_bounded():
    usual = shares.axis([Interval(0.9, 0.88, 1.0)], [(0.9, math.inf)])
    assert 0.7 < usual.low <= 0.88 < 1 < usual.high, "no room is empty"
    assert 1.0 in usual.ticks
    wide = shares.axis([Interval(5.0, -20.0, 30.0)], [(0.9, math.inf)])
    assert (wide.low, wide.high) == (shares.LEAST, shares.MOST)
    assert [wide.nearest(share) for share in (30.0, 0.5, -20.0)] == [shares.MOST, 0.5, shares.LEAST]


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((0.97, 0.88, 1.06), "97 % [88, 106]"),
        ((0.9976, 0.9956, 0.9994), "99.8 % [99.6, 99.9]"),
        ((0.5, math.nan, math.nan), "50 %"),
        ((0.965, 0.934, 0.9954), "96.5 % [93.4, 99.5]"),
        ((12.0, 1.0, 30.0), "> 999 % [100.0, > 999]"),
    ],
)
def test_a_short_interval_shows_on_which_side_of_the_zone_it_ends(ends, words):
    assert shares.share_in_words(Interval(*ends), (1.0, math.inf)) == words


def test_the_share_is_that_of_the_gains_and_its_interval_takes_in_how_well_the_gain_is_known(tmp_path):
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.5, "TA": 0.3}, rows=1000, seed_sd=0.02)
    report = report_of_claim(tmp_path)
    (panel,) = report.share_panels
    assert panel.reference.name == "LoRA r=8"
    rows = {row.group.label: row for row in report.rows}
    gain = rows["LoRA"].gain.value
    for arm in panel.arms:
        row = rows[arm.group.label]
        assert arm.share.value == pytest.approx(row.gain.value / gain)
        assert arm.seeds == len(row.seeds)
        if arm.group is panel.reference:
            assert (arm.share.low, arm.share.high) == (1, 1)
        else:
            sides = compare(arm.group, panel.reference, row.measure, Scorebook()).sides
            exact, width = rules.retained_at_least(sides, 0.05), arm.share.high - arm.share.low
            assert arm.share.low == pytest.approx(exact, abs=0.05 * width)


def test_one_seed_has_no_interval_and_other_seeds_are_left_out(tmp_path):
    for name, seeds in (("LoRA", (0, 1)), ("TABuv", (1, 2)), ("TA", (5,))):
        for seed in seeds:
            scored_run(tmp_path / "runs", [1.0] * 30 + [0.0] * 20, [0.0] * 50, name=name, seed=seed)
    (panel,) = report_of_claim(tmp_path).share_panels
    by_name = {arm.group.label: arm for arm in panel.arms}
    assert set(by_name) == {"LoRA", "TABuv"}
    assert by_name["TABuv"].seeds == 1
    assert math.isnan(by_name["TABuv"].share.low)


def test_the_reference_has_all_its_seeds_where_the_claim_takes_later_ones(tmp_path):
    for name in ("LoRA", "TABuv"):
        for seed in range(4):
            scored_run(tmp_path / "runs", [1.0] * 30 + [0.0] * 20, [0.0] * 50, name=name, seed=seed)
    (panel,) = report_of_claim(tmp_path, comparator="configuration: LoRA, at: equal_rank, seed_offset: 2").share_panels
    assert panel.reference.name == "LoRA r=8"
    assert {arm.seeds for arm in panel.arms} == {4}
