"""The forecast of a sweep's cost: its arithmetic against the models themselves, and its sums."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.tiny import TINY, model_option, tiny
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from tiedlora.config.project import CONF
from tiedlora.models import arithmetic
from tiedlora.models.arithmetic import DeviceSpeed
from tiedlora.sweeps import forecast
from tiedlora.sweeps.expand import compose_sweep
from tiedlora.sweeps.forecast import Cost, Speeds, cost, staged_runs, staged_seconds
from tiedlora.sweeps.planned_rows import RowCounts, row_lengths
from tiedlora.sweeps.run_cell import run_cell
from tiedlora.sweeps.staged_search import LEAST_KEPT

SPEEDS = Speeds(
    row_tokens=10.0,
    training=100.0,
    validating=200.0,
    scoring=4.0,
    scoring_base=math.inf,
    peak_memory_bytes=10**9,
    source="a test",
)


@pytest.mark.parametrize("name", TINY)
def test_arithmetic_counts_the_products_of_the_model(name):
    a, model = model_option(name).architecture, tiny(name).model
    model.set_attn_implementation("eager")
    tokens, ids = 16, torch.arange(16)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(ids)
    embedded = model.get_input_embeddings()(ids).requires_grad_(True)
    with FlopCounterMode(display=False) as both:
        model(inputs_embeds=embedded).logits.sum().backward()
    # The counter takes every pair of tokens, the formula only those that the causal mask leaves.
    hidden_pairs = 4 * a.layers * a.heads * a.head_dim * tokens * tokens / 2
    # Llama's rotary frequencies are a product too: head_dim / 2 x tokens.
    small = a.head_dim * tokens
    assert forward.get_total_flops() == pytest.approx(
        arithmetic.forward_flop(a, tokens, tokens) + hidden_pairs, abs=small
    )
    trained = arithmetic.training_flop(a, tokens, tokens) + 3 * hidden_pairs
    assert both.get_total_flops() == pytest.approx(trained, abs=small)


def test_a_runs_cost_is_its_rows_at_its_speeds(tiny_config):
    words = ["train.steps=100", "train.batch_size=4", "train.validate_every=30", "train.validation_rows=5"]
    config = tiny_config(*words, "task.rows.validation=8")
    # 400 rows of 10 tokens. 2 validations at the ends and at steps 30, 60 and 90, of 5 rows. 8 answers and losses.
    assert cost(config, SPEEDS, RowCounts()) == Cost(4000, 40 + 5 * 50 / 200, 8 / 4 + 8 * 10 / 200)
    only_loss = tiny_config(*words, "task.rows.validation=8", "score.metrics=[target_loss]")
    assert cost(only_loss, SPEEDS, RowCounts()).scoring_seconds == pytest.approx(8 * 10 / 200)
    limited = tiny_config(*words, "task.rows.validation=8", "train.batch_tokens=20")
    assert cost(limited, SPEEDS, RowCounts()).tokens == 2000


def test_finished_runs_forecast_themselves(tiny_run):
    # A name with a hyphen, as most models have one too.
    words = tiny_run("tying=LoRA,TABuv", "train.steps=20", "seed=0,1", "task.name=chain-sum")
    swept = compose_sweep(words)
    run_cell(swept.cells[0].config)
    record = swept.cells[0].folder.finished_record()
    ((row,), unknown) = forecast.forecast(swept.cells)
    assert unknown == []
    assert row.source == f"1 finished runs ({record.execution})"
    assert "cpu, 1 threads, " in row.source, "and the processor, because another one has other speeds"
    assert row.tokens == pytest.approx(4 * record.training.tokens)
    assert row.peak_memory_bytes == record.training.peak_memory_bytes
    speeds = forecast.observed_speeds(swept.cells[0].config, [record])
    own = cost(swept.cells[0].config, speeds, RowCounts())
    scored = record.scores["validation"]
    assert own.scoring_seconds == pytest.approx(scored.seconds + scored.rows * speeds.row_tokens / speeds.validating)
    assert own.training_seconds > record.training.seconds * 0.99
    # The base model is scored already.
    assert row.seconds == pytest.approx(4 * (own.training_seconds + own.scoring_seconds))
    assert row.seconds_left == pytest.approx(row.seconds * 3 / 4)


def test_without_finished_runs_the_device_and_the_arithmetic_decide(tiny_config):
    config = tiny_config()
    rows = row_lengths(config)
    assert rows.is_exact
    speed = DeviceSpeed("cpu, 2 threads", False, 1e9, training_seconds=1e-5, answering_seconds=1e-4)
    twice = replace(speed, flop_per_s=2e9, training_seconds=5e-6, answering_seconds=5e-5)
    slow, fast = (forecast.computed_speeds(config, rows, known) for known in (speed, twice))
    assert fast.training == pytest.approx(2 * slow.training)
    assert fast.scoring == pytest.approx(2 * slow.scoring)
    # The backward pass costs as much as the forward pass.
    assert slow.validating == pytest.approx(2 * slow.training)
    a = config.model.architecture
    seconds = a.layers * 1e-5 + rows.target / slow.row_tokens * 4 * a.vocabulary * a.hidden / 0.3e9
    assert slow.training == pytest.approx(1 / seconds)
    assert slow.scoring_base <= slow.scoring
    assert forecast.computed_speeds(config, replace(rows, choices=4), speed).scoring != slow.scoring


def test_the_staged_sweeper_needs_what_its_plan_says():
    options = OmegaConf.load(CONF / "hydra/sweeper/staged.yaml")
    assert (tuple(options.rungs), options.finalists) == (forecast.RUNGS, forecast.FINALISTS[1])
    assert forecast.FINALISTS[0] == LEAST_KEPT
    # Seven rates, five seeds: two whole and five quarter runs, two finalists, three more seeds; or all in full.
    assert staged_runs(7, 5) == (2 + 5 / 4 + 2 + 3, 7 + 3 + 3)
    assert staged_runs(1, 5) == (5, 5)
    assert staged_runs(7, 1) == (2 + 5 / 4, 7)
    # Only the chosen runs are scored.
    assert staged_seconds([Cost(0, 100.0, 10.0)] * 35, 7, 5) == (825 + 50, 1300 + 50)


def test_a_plan_shows_the_cost(tiny_run, script, monkeypatch):
    monkeypatch.setattr(forecast, "MEASURED_SECONDS", 0.01)
    words = tiny_run("train.lr=1e-3,1e-2,1e-1", "seed=0,1")
    code, out, err = script("scripts/sweep.py", "plan", *words)
    assert code == 0, err
    assert "hours, staged" in out
    assert "a measured block and arithmetic (cpu" in out
    code, out, err = script("scripts/sweep.py", "plan", "--json", *words)
    ((row,), cells) = (json.loads(out)[key] for key in ("forecast", "cells"))
    assert (row["task"], row["cells"], len(cells)) == ("chain_sum", 6, 6)
    low, high = row["staged_seconds"]
    assert 0 < low < high < row["seconds"]


def test_a_task_whose_rows_are_not_here_has_no_forecast(script):
    code, out, err = script("scripts/sweep.py", "plan", "model=gpt2", "task=gsm8k", "seed=0,1", "+grid=configurations")
    assert code == 0, err
    assert out.count("gsm8k: its rows are not here, so its cost is unknown") == 1
