"""The lead over steps: its numbers by hand, and which arms have none."""

import math

import numpy as np
import pytest
from helpers.report_runs import BASE, GOOD, scored_run, write_lines

from tiedlora.page import write
from tiedlora.records.rows import ValidationLosses

TOKENS = [1, 3, 4]
STEPS = (0, 32, 64)


def trained(root, name, rank, seed, shift, tokens=TOKENS, steps=STEPS):
    """A run whose rows have the losses 2 + shift * step / 64, and one row 0.2 more."""
    folder = scored_run(root, GOOD, BASE, name=name, rank=rank, seed=seed)
    losses = {step: [2 + shift * step / 64] * len(tokens) for step in steps}
    for own in losses.values():
        own[1] += 0.2
    write_lines(folder / "validation_losses.jsonl", [ValidationLosses(s, own, tokens) for s, own in losses.items()])
    return folder


def leads(root):
    return {own[0].group.label: own for own in write.build([root]).leads}


def test_a_lead_is_the_paired_difference_from_the_point_of_loras_curve_at_each_step(tmp_path):
    for seed, own in ((0, -0.50), (1, -0.54)):
        trained(tmp_path, "LoRA", 1, seed, -0.30)
        trained(tmp_path, "LoRA", 8, seed, -0.60)
        trained(tmp_path, "TABuv", 32, seed, own)
    (own,) = leads(tmp_path).values()
    (small, one), (large, eight) = own[0].lora.parts
    assert (one.rank, eight.rank) == (1, 8)
    assert 0 < small < 1
    assert small + large == pytest.approx(1)
    assert [lead.step for lead in own] == list(STEPS)
    at_end = np.mean([-0.50, -0.54]) - (small * -0.30 + large * -0.60)
    assert [lead.difference.value for lead in own] == pytest.approx([0, at_end / 2, at_end], abs=1e-12)
    assert {lead.seeds for lead in own} == {2}
    # Only the seeds differ, and their difference grows with the steps.
    widths = [lead.difference.high - lead.difference.low for lead in own]
    assert widths[0] == 0
    assert widths[1] == pytest.approx(widths[2] / 2)
    assert own[2].difference.low < at_end < own[2].difference.high


def test_steps_and_seeds_are_those_that_both_have(tmp_path):
    for seed in (0, 1, 2):
        trained(tmp_path, "LoRA", 8, seed, -0.6, steps=(0, 32, 64) if seed else (0, 64))
    for seed in (0, 1):
        trained(tmp_path, "TABuv", 8, seed, -0.5)
    (own,) = leads(tmp_path).values()
    assert [(lead.step, lead.seeds) for lead in own] == [(0, 2), (64, 2)]


def test_one_seed_has_no_interval_and_other_rows_no_lead(tmp_path):
    trained(tmp_path, "LoRA", 8, 0, -0.6)
    trained(tmp_path, "TABuv", 8, 0, -0.5)
    trained(tmp_path, "TAB", 8, 0, -0.5, tokens=[1, 3, 5])
    scored_run(tmp_path, GOOD, BASE, name="TA")
    found = leads(tmp_path)
    assert set(found) == {"TABuv"}, "TAB has other rows, TA no losses by row, and LoRA is no rival of itself"
    assert math.isnan(found["TABuv"][-1].difference.low)
    assert found["TABuv"][-1].difference.value == pytest.approx(0.1)
    write.write(write.build([tmp_path]), tmp_path / "report")
    lines = (tmp_path / "report/over-steps.csv").read_text().splitlines()
    assert lines[-1].split(",")[-4:] == ["64", "+0.100", "–", "–"]
    assert (tmp_path / "report/over-steps.png").is_file()
