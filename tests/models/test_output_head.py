"""What a model does with its logits after the head: our losses are those of its own logits, or the model is refused."""

import pytest
import torch
from helpers.families import FAMILIES, SCALED, family_model
from helpers.tiny import mask_of, randomise
from torch.nn import functional as F

import tiedlora
from tiedlora.data.batching import collate
from tiedlora.data.encoding import Encoded
from tiedlora.errors import UserError
from tiedlora.models import output_head
from tiedlora.scoring.decoding import choice_log_likelihoods
from tiedlora.training.loss import row_losses, target_loss

LAYOUT = tiedlora.Layout("model.layers", {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]})
ROWS = [Encoded((3, 4, 5), (6, 7, 8, 1)), Encoded((9, 4), (12, 13, 1))]


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_losses_and_gradients_are_those_of_the_models_own_logits(family):
    model = family_model(family)
    output_head.check(model)
    attached = tiedlora.attach(model, "TABuv", 4, layout=LAYOUT if family in SCALED else None)
    randomise(attached.adapter, scale=0.2)
    batch = collate(ROWS, 1)
    whole = model(input_ids=batch.input_ids, attention_mask=mask_of(ROWS), use_cache=False).logits
    logits = whole.flatten(0, 1)[batch.positions]
    expected = F.cross_entropy(logits, batch.targets, reduction="sum")
    output_head.check(family_model(family).bfloat16())
    ours = target_loss(model, batch)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sum(loss for loss, _ in row_losses(model, batch)) == pytest.approx(expected.item(), rel=1e-5)
    trained = list(attached.trained_parts().values())
    for own, theirs in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(expected, trained), strict=True):
        assert (own - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("family", SCALED)
def test_likelihoods_of_choices_are_those_of_the_models_own_logits(family):
    model = family_model(family)
    ((found,),) = choice_log_likelihoods(model, [[3, 4, 5]], [[[6, 7, 8]]])
    logits = model(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]])).logits[0, 2:5]
    expected = F.log_softmax(logits, -1).gather(1, torch.tensor([[6], [7], [8]])).sum()
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_without_a_body_of_its_own_is_refused():
    model = family_model("llama")
    model.base_model_prefix = "nowhere"
    with pytest.raises(UserError, match="LlamaForCausalLM has no body that ends before its output head"):
        output_head.check(model)


def test_a_model_with_an_unknown_rule_is_refused():
    model = family_model("llama")
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output)
    output_head.check(model)
    forward = model.forward

    def scaled(*arguments, **options):
        output = forward(*arguments, **options)
        output.logits = output.logits / 2
        return output

    model.forward = scaled
    with pytest.raises(UserError, match="the logits of LlamaForCausalLM are not those of its output head"):
        output_head.check(model)
