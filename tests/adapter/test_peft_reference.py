"""PEFT as the reference: LoRA on GPT-2's fused c_attn is PEFT's, with its outputs and gradients over twenty steps.

Other configurations are compared with the written formula in test_architectures.py, and with PEFT's LoRA in the tests
of exports.
"""

import copy

import pytest
import torch
from helpers.tiny import randomise, tiny
from peft import LoraConfig, get_peft_model

from tiedlora.adapter import attach


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Compare float32 tensors within 1e-4 of the largest entry."""
    assert theirs.abs().max() > 0
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


def test_lora_on_gpt2_equals_peft_over_twenty_steps(ids):
    model = tiny("tiny_gpt2").model
    settings = LoraConfig(r=4, lora_alpha=8.0, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(model), settings)
    attached = attach(model, "LoRA", 4, 8.0)
    randomise(attached.adapter, scale=0.2)
    for path, (A_l, B_l) in attached.adapter.pairs().items():
        module = theirs.base_model.model.get_submodule(path)
        module.lora_A["default"].weight.data.copy_(A_l.detach())
        module.lora_B["default"].weight.data.copy_(B_l.detach())
    parts = attached.adapter.trained_parts()
    their_parts = [p for p in theirs.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0) for trained in (parts.values(), their_parts)]
    for step in range(20):
        ours, reference = (each(input_ids=ids, labels=ids) for each in (model, theirs))
        assert close(ours.logits, reference.logits)
        assert ours.loss.item() == pytest.approx(reference.loss.item(), rel=1e-4), f"step {step}"
        ours.loss.backward()
        reference.loss.backward()
        for layer in range(3):
            module = theirs.base_model.model.transformer.h[layer].attn.c_attn
            assert close(parts["qkv.A"].grad[layer], module.lora_A["default"].weight.grad)
            assert close(parts["qkv.B"].grad[layer], module.lora_B["default"].weight.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
