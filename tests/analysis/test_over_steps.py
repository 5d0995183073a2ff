"""The lead over steps: its numbers by hand, and which arms have none."""

import math
import shutil

import numpy as np
import pytest
from helpers.report_runs import BASE, GOOD, scored_run, write_lines
from scipy.stats import t

from tiedlora.page import write
from tiedlora.records.rows import ValidationLosses

TOKENS = [1, 3, 4]
STEPS = (0, 32, 64)


def trained(root, name, rank, seed, losses, tokens=TOKENS, steps=STEPS, changes=None):
    """A run whose rows have the loss 2 at step 0, and from there go evenly to these losses at step 64."""
    folder = scored_run(root, GOOD, BASE, name=name, rank=rank, seed=seed, changes=changes)
    rows = [
        ValidationLosses(step, [2 + (loss - 2) * step / 64 for loss in np.broadcast_to(losses, len(tokens))], tokens)
        for step in steps
    ]
    write_lines(folder / "validation_losses.jsonl", rows)
    return folder


def leads(root):
    found = {}
    for own in write.build([root]).leads:
        assert own[0].group.label not in found
        found[own[0].group.label] = own
    return found


def test_a_lead_is_the_paired_difference_from_the_point_of_loras_curve_at_each_step(tmp_path):
    ends = {
        ("LoRA", 1): [[1.7, 1.9, 1.5], [1.6, 1.8, 1.7]],
        ("LoRA", 8): [[1.4, 1.2, 1.5], [1.3, 1.5, 1.1]],
        ("TABuv", 32): [[1.5, 1.6, 1.2], [1.7, 1.3, 1.5]],
    }
    for (name, rank), losses in ends.items():
        for seed in (0, 1):
            trained(tmp_path, name, rank, seed, losses[seed])
    (own,) = leads(tmp_path).values()
    (small, one), (large, eight) = own[0].lora.parts
    assert (one.rank, eight.rank) == (1, 8)
    assert 0 < small < 1
    assert small + large == pytest.approx(1)
    assert [lead.step for lead in own] == list(STEPS)
    assert {lead.seeds for lead in own} == {2}
    one, eight, arm = (np.array(losses) for losses in ends.values())
    differences = arm - small * one - large * eight
    # Of each seed, the mean over target tokens.
    of_seed = differences @ TOKENS / sum(TOKENS)
    at_end = of_seed.mean()
    assert [lead.difference.value for lead in own] == pytest.approx([0, at_end / 2, at_end], abs=1e-12)
    assert [lead.change.value for lead in own] == pytest.approx([at_end, at_end / 2, 0], abs=1e-12)
    # The interval over seeds and rows, from the mean squares of the linearised ratio.
    table = at_end + np.array(TOKENS) * 3 / 8 * (differences - at_end)
    of_seeds, of_rows = 3 * table.mean(1).var(ddof=1), 2 * table.mean(0).var(ddof=1)
    rest = (np.square(table - at_end).sum() - of_seeds - 2 * of_rows) / 2
    both = t.isf(0.025, 1) ** 2 * of_seeds + t.isf(0.025, 2) ** 2 * max(0, of_rows - rest)
    half = math.sqrt(max(both, t.isf(0.025, 2) ** 2 * of_rows) / 6)
    assert (own[2].difference.low, own[2].difference.high) == pytest.approx((at_end - half, at_end + half))
    assert own[1].change.high - own[1].change.low == pytest.approx(half)


def test_steps_and_seeds_are_those_that_both_have(tmp_path):
    for seed in (0, 1, 2):
        trained(tmp_path, "LoRA", 8, seed, 1.4, steps=(0, 32, 64) if seed else (0, 64))
    for seed in (0, 1):
        trained(tmp_path, "TABuv", 8, seed, 1.5)
    # Seeds of a search, which are not scored.
    for name in ("LoRA", "TABuv"):
        shutil.rmtree(trained(tmp_path, name, 8, 30, 1.0) / "scores")
    # Scored, but without the losses of rows.
    scored_run(tmp_path, GOOD, BASE, name="TABuv", rank=8, seed=2)
    (own,) = leads(tmp_path).values()
    assert [(lead.step, lead.seeds) for lead in own] == [(0, 2), (64, 2)]


def test_one_seed_has_no_interval(tmp_path):
    trained(tmp_path, "LoRA", 8, 0, 1.4)
    trained(tmp_path, "TABuv", 8, 0, 1.5)
    (own,) = leads(tmp_path).values()
    assert math.isnan(own[-1].difference.low)
    assert own[-1].difference.value == pytest.approx(0.1)
    write.write(write.build([tmp_path]), tmp_path / "report")
    lines = (tmp_path / "report/over-steps.csv").read_text().splitlines()
    assert lines[-2].split(",")[-7:] == ["32", "+0.050", "–", "–", "+0.050", "–", "–"]
    assert (tmp_path / "report/over-steps.png").is_file()


def test_what_cannot_be_compared_has_no_lead(tmp_path):
    trained(tmp_path, "LoRA", 8, 0, 1.4)
    trained(tmp_path, "TABuv", 8, 0, 1.5)
    trained(tmp_path, "LoRA_l10", 2, 0, 1.5)
    trained(tmp_path, "TAuv", 8, 0, 1.5, tokens=[1, 3, 5])
    trained(tmp_path, "Tuv", 8, 0, 1.5, changes={"data.train.digest": "1" * 64})
    trained(tmp_path, "TAB", 8, 0, 1.5, steps=(64,))
    trained(tmp_path, "TB", 8, 0, 1.5, changes={"config.objective.name": "reward"})
    trained(tmp_path, "TBuv", 8, 0, 1.5, changes={"config.task.shuffle_targets": True})
    scored_run(tmp_path, GOOD, BASE, name="TA")
    assert set(leads(tmp_path)) == {"TABuv"}
