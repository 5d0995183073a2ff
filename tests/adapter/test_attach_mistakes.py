"""attach on what is no causal language model says so."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import tiedlora
from tiedlora.errors import UserError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


class OddConfig(nn.Module):
    """A module whose configuration is not that of transformers."""

    config = {"model_type": "llama"}


@pytest.mark.parametrize(
    "model",
    [
        "gpt2",
        None,
        nn.Sequential(nn.Linear(3, 3)),
        OddConfig(),
        BertModel(BertConfig(**SIZES)),
        LlamaModel(LlamaConfig(**SIZES)),
        T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=64, vocab_size=50)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_what_is_no_causal_language_model_is_named(model):
    with pytest.raises(UserError, match=rf"attach: {type(model).__name__} is no causal language model") as caught:
        tiedlora.attach(model, "TABuv", rank=2)
    assert "\n" not in str(caught.value)
    assert "AutoModelForCausalLM" in str(caught.value)


def test_a_replica_of_data_parallel_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    tiedlora.attach(model, "TABuv", rank=2)
    ids = torch.tensor([[1, 2]])
    model(input_ids=ids)
    # What nn.DataParallel makes for each GPU.
    model.model.__dict__["_is_replica"] = True
    with pytest.raises(UserError, match=r"^nn\.DataParallel copies the model without the adapter's factors"):
        model(input_ids=ids)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        *(({"rank": rank}, rf"^rank={rank!r}: must be an int from 1") for rank in (0, 2.0, True)),
        *(({"alpha": alpha}, rf"^alpha={alpha!r}: must be a positive int") for alpha in (0.0, float("nan"), "16")),
        ({"seed": "a"}, "^seed='a': must be an int"),
    ],
)
def test_a_wrong_number_is_named_before_the_model_is_changed(words, says):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(UserError, match=says):
        tiedlora.attach(model, "TABuv", **words)
    assert not hasattr(model, "tied_adapter")


def test_reentrant_checkpoints_are_refused_where_u_or_v_scale_the_factors_and_only_in_training(ids):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    tiedlora.attach(model, "TABuv", 4)
    ids = ids % SIZES["vocab_size"]
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.eval()
    model(input_ids=ids)
    model.train()
    with torch.no_grad():
        model(input_ids=ids)
    with pytest.raises(UserError, match="use_reentrant=True does not work for an adapter with u or v"):
        model(input_ids=ids)
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids).logits.sum().backward()


@pytest.mark.parametrize("tying", ["LoRA", "TAB", "TA"])
def test_reentrant_checkpoints_train_as_without_them_where_nothing_scales_the_factors(tying, ids):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    adapter = tiedlora.attach(model, tying, 4).adapter
    model.enable_input_require_grads()
    model.train()
    ids = ids % SIZES["vocab_size"]
    gradients = []
    for settings in (None, {"use_reentrant": True}):
        if settings:
            model.gradient_checkpointing_enable(settings)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: part.grad.clone() for name, part in adapter.trained_parts().items()})
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])
    assert any(gradient.any() for gradient in gradients[0].values())
