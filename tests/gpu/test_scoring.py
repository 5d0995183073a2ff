"""Answers on a GPU: those of a CPU, and in smaller batches if memory runs out."""

from pathlib import Path

import pytest
import torch
from helpers.tiny import generate, randomise

from tiedlora.adapter import attach
from tiedlora.models.base_model import load_base
from tiedlora.runs import run
from tiedlora.scoring import decoding

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


def test_too_little_memory_halves_the_batches(gpu_config, monkeypatch):
    plain = decoding.padded_left

    def limited(prompts, *rest):
        if len(prompts) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. (a test)")
        return plain(prompts, *rest)

    monkeypatch.setattr(decoding, "padded_left", limited)
    assert run.main(gpu_config("halved")).scores["validation"].batch_halvings == 4
