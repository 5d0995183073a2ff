"""model.device_map and accelerate's hooks: the adapter is seen, its pairs are where their modules run, and the rest is
refused.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_submodules
from helpers.tiny import TINY, generate, randomise, saved_tiny, tiny

from tiedlora.adapter import attach, linear
from tiedlora.config.identity import run_id
from tiedlora.data.batching import microbatches
from tiedlora.data.encoding import Encoded
from tiedlora.errors import UserError
from tiedlora.models.base_model import load_base
from tiedlora.runs.loading import load
from tiedlora.scoring.decoding import choice_log_likelihoods
from tiedlora.training.distributed import World
from tiedlora.training.loss import row_losses, target_loss

CPU = torch.device("cpu")
PROMPTS = [tuple(range(5, 30)), tuple(range(9, 20))]
TARGETS = [tuple(range(40, 52)), tuple(range(60, 67))]


def spread(name: str, folder: Path):
    """The model with half of its weights in memory, and the rest on the disk."""
    config = saved_tiny(name, folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    config = replace(config, device_map="auto", cpu_memory=f"{size // 2000}KB")
    base = load_base(config, "float32", CPU, folder / "cache")
    assert set(base.model.hf_device_map.values()) == {"cpu", "disk"}
    return base


def everything(base, recompute: bool = False):
    """Losses, gradients, answers and likelihoods with a random adapter. The base stays as it was."""
    model, attached = base.model, attach(base.model, "TABuv", 4)
    randomise(attached.adapter)
    (batch,) = microbatches([Encoded(*row) for row in zip(PROMPTS, TARGETS, strict=True)], 256)
    before = row_losses(model, batch)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    # The blocks recompute activations only in training mode. GPT-2's own dropout needs the same seed each time.
    model.train(recompute)
    torch.manual_seed(0)
    loss = target_loss(model, batch)
    loss.backward()
    model.activation_checkpointing_disable()
    model.eval()
    gradients = {name: part.grad for name, part in attached.adapter.trained_parts().items()}
    outputs = generate(model, base.tokenizer, PROMPTS, max_new_tokens=6, batch_size=2)
    scores = choice_log_likelihoods(model, PROMPTS, [TARGETS, TARGETS])
    attached.detach()
    return before, loss.item(), gradients, outputs, scores


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("recompute", [False, True])
def test_half_on_the_disk_is_the_whole_model_bit_for_bit(name, recompute, tmp_path):
    whole, offloaded = tiny(name), spread(name, tmp_path)
    ours, theirs = everything(offloaded, recompute), everything(whole, recompute)
    assert all(torch.equal(ours[2][part], theirs[2][part]) for part in theirs[2])
    assert all(gradient.abs().max() > 0 for gradient in ours[2].values())
    assert (*ours[:2], *ours[3:]) == (*theirs[:2], *theirs[3:])
    assert everything(offloaded)[0] == ours[0], "a second adapter finds the base as the first did"


def test_a_head_with_several_hooks_has_its_weights():
    model = tiny("tiny_llama").model
    (batch,) = microbatches([Encoded(*row) for row in zip(PROMPTS, TARGETS, strict=True)], 256)
    plain = row_losses(model, batch)
    cpu_offload(model.lm_head, execution_device=CPU)
    add_hook_to_module(model.lm_head, ModelHook(), append=True)
    assert row_losses(model, batch) == plain


def test_an_offloaded_base_is_scored_unmerged_and_not_merged(tmp_path):
    attached = attach(spread("tiny_llama", tmp_path).model, "TABuv")
    with pytest.raises(UserError, match=r"^merge: the weight of .* is offloaded.*device_map=null"):
        attached.merge()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_are_not_offloaded(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = replace(saved_tiny("tiny_llama", tmp_path), device_map="auto", quantization=kind)
    with pytest.raises(UserError, match=rf"^model.quantization={kind}: the model does not fit.*model.gpu_memory"):
        load_base(replace(config, cpu_memory="90KB"), "float32", CPU, tmp_path / "cache")
    randomise(attach(load_base(config, "float32", CPU, tmp_path / "cache").model, "TABuv").adapter)


class TestHookedByTheUser:
    """tiedlora.attach on a model that another program has put hooks on."""

    @pytest.mark.parametrize("name", TINY)
    def test_on_a_dispatched_model_the_update_is_that_of_a_plain_one(self, name, ids):
        plain, hooked = tiny(name).model, tiny(name).model
        dispatch_model(hooked, {"": "cpu"}, force_hooks=True)
        first = attach(plain, "TABuv").adapter.paths()[0]
        add_hook_to_module(hooked.get_submodule(first), AlignDevicesHook("cpu"))
        attached = attach(hooked, "TABuv")
        before = hooked(ids).logits
        for model in (plain, hooked):
            randomise(model.tied_adapter)
        adapted = hooked(ids).logits
        assert torch.equal(adapted, plain(ids).logits)
        assert not torch.equal(adapted, before)
        attached.detach()
        assert torch.equal(hooked(ids).logits, before)

    def test_on_an_offloaded_model_the_gradients_are_those_of_a_plain_one(self, ids):
        plain, hooked = tiny("tiny_llama").model, cpu_offload(tiny("tiny_llama").model, CPU)
        for model in (plain, hooked):
            randomise(attach(model, "TABuv").adapter)
            model(ids).logits.sum().backward()
        for one, two in zip(plain.tied_adapter.parameters(), hooked.tied_adapter.parameters(), strict=True):
            assert two.device == CPU
            assert torch.equal(one.grad, two.grad)

    def test_offloaded_afterwards_is_refused(self, ids):
        attached = attach(tiny("tiny_llama").model, "TABuv")
        cpu_offload(attached.model, CPU)
        with pytest.raises(UserError, match=r"offloaded to the meta device.*offload the model first") as refused:
            attached.model(ids)
        assert "\n" not in str(refused.value)

    def test_a_forward_of_another_library_is_refused(self, ids):
        model = tiny("tiny_llama").model
        layer = model.model.layers[1].self_attn.v_proj
        layer.forward = lambda x: x[..., :16]
        with pytest.raises(UserError, match=r"layers.1.self_attn.v_proj has a forward of its own"):
            attach(model, "TABuv")
        del layer.forward
        # accelerate leaves the class's own forward on the instance when its hooks are removed.
        cpu_offload(model, CPU)
        remove_hook_from_submodules(model)
        before = model(ids).logits
        randomise(attach(model, "TABuv").adapter)
        assert not torch.equal(model(ids).logits, before)


def test_pairs_go_where_their_module_runs():
    """Two devices, on a machine with one: the folded pairs of a hooked layer are on the hook's device."""
    model = tiny("tiny_llama").model
    layer = model.model.layers[1].self_attn.q_proj
    add_hook_to_module(layer, AlignDevicesHook("meta", tied_params_map={}))
    attached = attach(model, "TABuv")
    assert {parameter.device.type for parameter in attached.adapter.parameters()} == {"cpu"}
    (fold,) = (hook for hook in model.model._forward_pre_hooks.values())
    fold(model.model)
    assert linear.execution_device(layer).type == "meta"
    assert layer.folded_A.device.type == "meta"
    assert model.model.layers[0].self_attn.q_proj.folded_A.device.type == "cpu"


def test_several_processes_cannot_spread_one_model(tiny_config):
    config = tiny_config("model.source=hub", "model.device_map=auto")
    assert run_id(config) == run_id(tiny_config("model.source=hub")), "where the weights are is not in the identity"
    with pytest.raises(UserError, match=r"^model.device_map=auto: every process would spread"):
        load(config, World(0, 2))
