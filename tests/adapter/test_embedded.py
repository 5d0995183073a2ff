"""The eight configurations on the embedded pretrained model."""

import pytest
import torch
from helpers.tiny import EIGHT, model_option, tying_option

from tiedlora import tying
from tiedlora.adapter import attach
from tiedlora.adapter.arms import groups_by_part
from tiedlora.config.compose import compose_config
from tiedlora.config.project import PROJECT
from tiedlora.config.schema import LrFactors, TrainConfig
from tiedlora.data.batching import microbatches
from tiedlora.data.encoding import Encoder
from tiedlora.models.base_model import load_base
from tiedlora.tasks import load_examples, load_task
from tiedlora.training.loss import target_loss
from tiedlora.training.optimizer import build_optimizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base():
    return load_base(model_option("smollm2_135m"), "bfloat16", torch.device("cpu"), PROJECT / ".cache")


@pytest.fixture(scope="module")
def batch(base):
    task = load_task(compose_config(["task.options.rows={train: 8, validation: 4, test: 4}"]).task)
    encoder = Encoder(base.tokenizer, task.config, context=8192)
    rows = [encoder.example(example) for example in load_examples(task, "train", None)[:4]]
    (batch,) = microbatches(rows, base.tokenizer.eos_token_id)
    return batch


@pytest.fixture(scope="module")
def base_logits(base, batch):
    with torch.no_grad():
        return base.model(batch.input_ids).logits


@pytest.mark.parametrize("name", EIGHT)
def test_it_starts_at_the_base_moves_at_once_and_counts_as_the_formula(base, batch, base_logits, name):
    spec = tying_option(name)
    attached = attach(base.model, spec, 8)
    try:
        with torch.no_grad():
            assert torch.equal(base.model(batch.input_ids).logits, base_logits), "the untrained adapter changes a logit"
        architecture = model_option("smollm2_135m").architecture
        assert attached.adapter.trainable_params() == tying.trainable_params(spec, 8, architecture)
        parts = attached.adapter.trained_parts()
        start = {key: p.detach().clone() for key, p in parts.items()}
        optimizer = build_optimizer(groups_by_part(parts, LrFactors()), TrainConfig(lr=spec.suggested_lr))
        losses = []
        for group in optimizer.param_groups:
            group["lr"] = spec.suggested_lr
        for _ in range(2):
            loss = target_loss(base.model, batch) / len(batch.targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert any(not torch.equal(p, start[key]) for key, p in parts.items())
        assert losses[1] < losses[0]
    finally:
        attached.detach()


def test_the_end_of_text_is_the_models_own(base):
    assert base.tokenizer.eos_token == "<|im_end|>"
    assert base.record.digest.startswith("gguf-sha256:")
