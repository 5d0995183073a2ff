"""The forecast of a sweep's cost: its arithmetic against the models themselves, and its sums."""

import json
import os
import shutil
from dataclasses import replace
from statistics import mean

import pytest
import torch
from helpers.hostile import put
from helpers.sweeping import compose_sweep
from helpers.tiny import TINY, folder_of, model_option, tiny
from torch.utils.flop_counter import FlopCounterMode

from tiedlora.config.compose import compose_config
from tiedlora.models import arithmetic
from tiedlora.records.scores import read_scores
from tiedlora.runs import run
from tiedlora.sweeps import forecast
from tiedlora.sweeps.cells import SweepCell
from tiedlora.sweeps.forecast import Speeds, cost, examples_here, split_rows

ROWS = {"validation": 8}
SPEEDS = Speeds(row_tokens=10.0, training=100.0, scoring=4.0, peak_memory_bytes=10**9, source="a test")


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
    model.requires_grad_(True)
    with FlopCounterMode(display=False) as full:
        model(inputs_embeds=embedded).logits.sum().backward()
    trained = arithmetic.training_flop(a, tokens, tokens, trains_weights=True) + 3 * hidden_pairs
    assert full.get_total_flops() == pytest.approx(trained, abs=small)


def test_full_fine_tuning_has_a_forecast_of_its_own(tiny_config):
    cells = [SweepCell((), tiny_config(*words)) for words in (["tying=full"], ["tying=LoRA"])]
    full, lora = forecast.forecast(cells)[0]
    assert (full.cells, lora.cells, full.tokens) == (1, 1, lora.tokens)
    assert (full.task, lora.task) == ("chain_sum (full)", "chain_sum")
    assert 1.2 * lora.seconds < full.seconds < 1.6 * lora.seconds


def test_a_runs_cost_is_its_rows_at_its_speeds(tiny_config):
    words = ["train.steps=100", "train.batch_size=4", "train.validate_every=30", "train.validation_rows=5"]
    config = tiny_config(*words, "task.rows.validation=8")
    # 400 rows of 10 tokens. 2 validations at the ends and at steps 30, 60 and 90, of 5 rows. 8 answers and losses.
    assert cost(config, SPEEDS, ROWS) == (4000, 40 + 5 * 50 / 200 + 8 / 4 + 8 * 10 / 200)
    only_loss = tiny_config(*words, "task.rows.validation=8", "score.metrics=[target_loss]")
    assert cost(only_loss, SPEEDS, ROWS) == (4000, pytest.approx(40 + 5 * 50 / 200 + 8 * 10 / 200))
    limited = tiny_config(*words, "task.rows.validation=8", "train.batch_tokens=20")
    assert cost(limited, SPEEDS, ROWS)[0] == 2000


def test_a_reward_costs_its_answers_and_their_training(tiny_config):
    words = ["train.steps=100", "train.batch_size=4", "train.validate_every=0", "score.splits=[]"]
    plain = cost(tiny_config(*words), SPEEDS, ROWS)
    reward = cost(tiny_config(*words, "objective=reward", "objective.samples=6"), SPEEDS, ROWS)
    # Six answers to each of 400 prompts: they are trained as rows, and four a second are sampled.
    assert reward[0] == 6 * plain[0] == 24_000
    assert reward[1] - plain[1] == pytest.approx(5 * 40 + 2400 / 4)
    finished = replace(SPEEDS, has_sampling=True)
    assert cost(tiny_config(*words, "objective=reward"), finished, ROWS)[0] == 8 * plain[0]


def test_a_large_vocabulary_costs_its_head(tiny_config):
    small, large = (tiny_config(f"model.architecture.vocabulary={size}").model.architecture for size in (300, 262_144))
    extra = arithmetic.training_flop(large, 100, 20) - arithmetic.training_flop(small, 100, 20)
    assert extra == 2 * arithmetic.head_flop(large, 20) * (1 - 300 / 262_144)
    gemma = tiny_config("model.architecture.vocabulary=262144", "train.dtype=bfloat16", "train.device=cpu")
    assert arithmetic.loss_bytes(gemma, 2048) == 256 * 262_144 * 6
    gemma.train.loss_memory_mb = 100
    assert arithmetic.loss_bytes(gemma, 2048) == 100_000_000


@pytest.mark.parametrize(
    ("device", "has_driver", "rows"),
    [("auto", False, 256), ("auto", True, 600), ("cpu", True, 256), ("cuda:1", False, 600), ("mps", False, 600)],
)
def test_a_chunk_of_the_loss_is_larger_on_a_gpu(tiny_config, tmp_path, monkeypatch, device, has_driver, rows):
    monkeypatch.setattr(arithmetic, "GPU_DRIVERS", (tmp_path / "none", driver := tmp_path / "driver"))
    if has_driver:
        driver.touch()
    config = tiny_config()
    config.train.device = device
    assert arithmetic.loss_bytes(config, 600) == rows * 4 * config.model.architecture.vocabulary


def test_finished_runs_forecast_themselves(tiny_run):
    # A name with a hyphen, as most models have one too.
    words = tiny_run("tying=LoRA,TABuv", "train.steps=20", "seed=0,1", "task.name=chain-sum")
    swept = compose_sweep(words)
    run.main(config := swept.cells[0].config)
    record = swept.cells[0].folder.finished_record()
    ((row,), []) = forecast.forecast(swept.cells)
    assert row.source == f"1 finished runs ({record.execution})"
    assert "cpu, 1 threads, " in row.source, "and the processor, because another one has other speeds"
    assert row.tokens == pytest.approx(4 * record.training.tokens)
    assert row.peak_memory_bytes == record.training.peak_memory_bytes
    _, own = cost(config, forecast.observed_speeds(config), {"validation": 12})
    answers = read_scores(swept.cells[0].folder.scores_file("validation", "answers")).record
    assert own > 0.99 * (record.training.seconds + answers.seconds)
    assert row.seconds == pytest.approx(4 * own)
    assert row.seconds_left == pytest.approx(row.seconds * 3 / 4)
    shutil.rmtree(swept.cells[0].folder.scores)
    computed = forecast.computed_speeds(config, forecast.TFLOPS)
    assert forecast.observed_speeds(config).scoring == computed.scoring, "answers are not free"
    put(swept.cells[0].folder.path, "config.model", {})
    assert forecast.observed_speeds(config) is None, "a damaged record"


def test_only_runs_on_the_device_of_the_newest_one_count(finished_run, tiny_config):
    folders = [folder_of(finished_run("train.steps=2", f"seed={seed}")) for seed in range(3)]
    for age, (folder, device) in enumerate(zip(folders, ("a GPU", "a GPU", "cpu"), strict=True)):
        put(folder.path, "execution.device", device)
        put(folder.path, "training.tokens_per_s", 1000.0 if device == "a GPU" else 10.0)
        os.utime(folder.result_file, (age, age))
    config = tiny_config("train.steps=2")
    assert forecast.observed_speeds(config).training == 10
    os.utime(folders[0].result_file, (9, 9))
    found = forecast.observed_speeds(config)
    assert found.training == 1000
    assert found.source.startswith("2 finished runs (a GPU")


def test_without_finished_runs_the_arithmetic_at_a_rate_decides(tiny_config):
    config = tiny_config()
    rows = examples_here(config, "train")
    slow, fast = (forecast.computed_speeds(config, tflops) for tflops in (1e-3, 2e-3))
    # A token for each byte, and one for the end.
    assert slow.row_tokens == pytest.approx(mean(len(row.prompt + row.target) + 1 for row in rows))
    target = mean(len(row.target) + 1 for row in rows)
    flop = arithmetic.training_flop(config.model.architecture, slow.row_tokens, target)
    assert slow.training == pytest.approx(slow.row_tokens * 1e9 / flop)
    assert (fast.training, fast.scoring) == pytest.approx((2 * slow.training, 2 * slow.scoring))


def test_cells_that_score_other_splits_have_one_forecast(tiny_config):
    cells = [SweepCell((), tiny_config(f"score.splits={splits}")) for splits in ("[]", "[test]")]
    assert [row.cells for row in forecast.forecast(cells)[0]] == [2]


@pytest.mark.parametrize(
    ("words", "split", "rows"),
    [
        (["task.rows.test=7"], "test", 7),
        ([], "test", 12),
        (["task=gsm8k", "task.rows.validation=null"], "validation", 500),
        (["task=gsm8k"], "test", 0),
        (["task=gsm8k", "data_root=/no/such/folder"], "test", 0),
    ],
)
def test_the_rows_of_a_split_are_counted_if_they_are_here(tiny_run, words, split, rows):
    config = compose_config(words if str(words).startswith("['task=") else tiny_run(*words))
    assert split_rows(config, split) == rows


def test_a_plan_shows_the_cost(tiny_run, script):
    words = tiny_run("train.lr=1e-3,1e-2,1e-1", "seed=0,1")
    code, out, err = script("scripts/sweep.py", "plan", "--tflops", "0.01", *words)
    assert code == 0, err
    assert "arithmetic at 0.01 TFLOP/s" in out
    code, out, err = script("scripts/sweep.py", "plan", "--json", *words)
    ((row,), cells) = (json.loads(out)[key] for key in ("forecast", "cells"))
    assert (row["task"], row["cells"], len(cells)) == ("chain_sum", 6, 6)
    assert 0 < row["seconds"] == row["seconds_left"]
    assert script("scripts/sweep.py", "plan", "--tflops", "0", *words)[0] == 2


def test_a_task_whose_rows_are_not_here_has_no_forecast(script):
    code, out, err = script("scripts/sweep.py", "plan", "model=gpt2", "task=gsm8k", "seed=0,1", "+grid=configurations")
    assert code == 0, err
    assert out.count("gsm8k: its rows are not here, so its cost is unknown") == 1
