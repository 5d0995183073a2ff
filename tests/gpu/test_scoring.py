"""Answers on a GPU: those of a CPU, the same by every engine, and in smaller batches if memory runs out."""

from pathlib import Path

import pytest
import torch
from helpers.tiny import randomise

from tiedlora.adapter import attach
from tiedlora.config.identity import run_id
from tiedlora.models.base_model import load_base
from tiedlora.records.rows import read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run
from tiedlora.scoring import continuous, steps
from tiedlora.scoring.decoding import generate

pytestmark = pytest.mark.gpu
TEXTS = ["a", "some longer text", "xyz", "12 + 30 =", "b" * 30, "the end", "?", "one more", "and 1"]
LIMITS = {"max_new_tokens": 40, "batch_size": 4}


def on(device, gpu_config, unused):
    config = gpu_config("unused")
    base = load_base(config.model, "float32", device, Path(unused))
    attached = attach(base.model, "TABuv", 4)
    randomise(attached.adapter, scale=0.2)
    return base, attached, [base.tokenizer(text).input_ids for text in TEXTS]


@pytest.fixture
def here(gpu, gpu_config, tmp_path):
    return on(gpu, gpu_config, tmp_path)


def same(ours, theirs) -> int:
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def test_answers_are_those_of_a_cpu(here, gpu_config, tmp_path):
    base, _, prompts = here
    on_cpu, *_ = on(torch.device("cpu"), gpu_config, tmp_path)
    expected = generate(on_cpu.model, on_cpu.tokenizer, prompts, **LIMITS)
    # In float32, rounding rarely changes an answer of this model.
    assert same(generate(base.model, base.tokenizer, prompts, **LIMITS), expected) >= len(prompts) - 1


def test_static_steps_write_the_same_answers_as_a_cuda_graph(here, gpu, monkeypatch):
    base, attached, prompts = here
    expected, graphs = generate(base.model, base.tokenizer, prompts, **LIMITS), []
    plain = steps.StaticSteps._replay
    monkeypatch.setattr(steps.StaticSteps, "_replay", lambda self: (plain(self), graphs.append(self.graph)))
    with attached.folded_once():
        answers = generate(base.model, base.tokenizer, prompts, **LIMITS, steps=steps.StaticSteps)
    assert same(answers, expected) >= len(prompts) - 1
    assert bool(graphs) == (gpu.type == "cuda")
    # Three batches, and each may become smaller a few times.
    assert len({id(graph) for graph in graphs}) <= 12


def test_continuous_batching_writes_the_same_answers(here):
    base, _, prompts = here
    expected = generate(base.model, base.tokenizer, prompts, **LIMITS)
    assert same(continuous.generate(base.model, base.tokenizer, prompts, **LIMITS), expected) >= len(prompts) - 1


@pytest.mark.parametrize("engine", ["static", "continuous"])
def test_a_run_with_another_engine_says_how_its_answers_compare(gpu_config, engine):
    config = gpu_config("engine", f"score.engine={engine}")
    record = run.main(config)
    assert record.scores["validation"].engine.compared == 12
    assert record.scores["validation"].engine.same >= 11
    assert len(read_predictions(RunFolder(Path(config.outputs) / run_id(config)).predictions_file("validation"))) == 12


def test_too_little_memory_halves_the_batches(gpu_config, monkeypatch):
    plain = steps.padded_left

    def limited(prompts, *rest):
        if len(prompts) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. (a test)")
        return plain(prompts, *rest)

    monkeypatch.setattr(steps, "padded_left", limited)
    assert run.main(gpu_config("halved")).scores["validation"].batch_halvings == 4
