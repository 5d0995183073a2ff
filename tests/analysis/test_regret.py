"""How much worse an arm's rate may be than the best one: in the report, and in the claims for which it matters."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from helpers.report_runs import report_of_claim, scored_run

from tiedlora.analysis.regret import SHORT_MARK, claim_margin
from tiedlora.analysis.rules import Sides, better_by, level_within, retains
from tiedlora.records.rows import ValidationLosses
from tiedlora.records.run_folder import RunFolder

SAME = (0.0, 0.0, 0.0)


def arm(root, name, loss, rates):
    """Runs at these rates, with what each of its three seeds is above the arm's loss."""
    generator = np.random.default_rng(len(name))
    rows = generator.gamma(4, 0.1, 200)
    for lr, of_seeds in rates.items():
        for seed, above in enumerate(of_seeds):
            own = rows + loss + above + generator.normal(0, 0.001, 200)
            run = scored_run(root, own, rows + 2.0, metric="target_loss", name=name, seed=seed, lr=lr)
            (RunFolder(run).validation_losses_file).write_text(
                json.dumps(asdict(ValidationLosses(100, own.tolist(), [5] * 200))) + "\n"
            )


def found(root, rule="better_by: 0.0"):
    report = report_of_claim(root, rule, top="looks: [3]", comparator="configuration: LoRA, rank: 8")
    (answer,) = report.answers
    return {group.label: group for group in report.groups}, answer


def test_an_arm_with_two_rates_that_seeds_cannot_tell_apart_is_marked_and_its_claim_says_so(tmp_path):
    arm(tmp_path / "runs", "TABuv", 0.0, {1e-2: SAME})
    arm(tmp_path / "runs", "LoRA", 0.02, {1e-3: (0.03, -0.02, 0.02), 1e-2: (0.0, 0.01, -0.01), 3e-2: (1.0, 1.0, 1.0)})
    groups, answer = found(tmp_path)
    assert groups["TABuv"].regret is None, "one rate alone"
    assert groups["TABuv"].short_marks == []
    assert groups["LoRA"].regret.nats > 0.01
    assert groups["LoRA"].regret.rates == 2
    assert SHORT_MARK in groups["LoRA"].short_marks
    assert "the rate of LoRA r=8 is in doubt: it may be worse than the best one by" in answer.reason
    assert [rate.group for rate in answer.doubtful_rates] == [groups["LoRA"]]


def test_a_run_whose_last_losses_are_gone_is_left_out_of_the_bound(tmp_path):
    arm(tmp_path / "runs", "TABuv", 0.0, {1e-2: SAME})
    arm(tmp_path / "runs", "LoRA", 0.02, {1e-3: (0.03, -0.02, 0.02), 1e-2: (0.0, 0.01, -0.01)})
    before = found(tmp_path)[0]["LoRA"].regret
    for file in tmp_path.glob("runs/LoRA-*-s0-*/validation_losses.jsonl"):
        # Of an earlier step, which is far above.
        file.write_text(json.dumps(asdict(ValidationLosses(50, [9.0] * 200, [5] * 200))) + "\n")
    after = found(tmp_path)[0]["LoRA"].regret
    assert (before.seeds, after.seeds) == (3, 2)
    assert after.nats < 1


def test_a_rate_that_is_clearly_the_best_is_in_no_doubt(tmp_path):
    arm(tmp_path / "runs", "TABuv", 0.0, {1e-2: SAME})
    arm(tmp_path / "runs", "LoRA", 0.2, {1e-3: (0.1, 0.1, 0.1), 1e-2: SAME})
    groups, answer = found(tmp_path)
    assert groups["LoRA"].regret.nats == 0
    assert not answer.doubtful_rates
    assert "doubt" not in answer.reason


def test_runs_that_have_lost_their_row_losses_give_no_bound(tmp_path):
    arm(tmp_path / "runs", "LoRA", 0.2, {1e-3: (0.1, 0.1, 0.1), 1e-2: SAME})
    for file in tmp_path.glob("runs/*/validation_losses.jsonl"):
        file.unlink()
    groups, _ = found(tmp_path)
    assert groups["LoRA"].regret is None


@pytest.mark.parametrize(
    ("rule", "margin"),
    [
        (retains(0.9), 0.1),
        (level_within(0.2), 0.05),
        (level_within(0.5), 0.25),
        (better_by(0.0), 0.25),
        (better_by(0.3), 0.05),
        (retains(0.5), 0.5),
    ],
)
def test_the_margin_of_a_claim(rule, margin):
    """A comparator that gains 1 nat, and a method that is 0.25 better."""
    comparator, zero = np.full((3, 4), -1.0), np.full(4, -2.0)
    assert claim_margin(rule, Sides(comparator + 0.25, comparator, zero)) == pytest.approx(margin)
    without = claim_margin(rule, Sides(comparator, comparator, None))
    assert (without is None) == rule.needs_zero
