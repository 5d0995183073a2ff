"""PEFT as the reference, with dropout 0, lora_alpha = alpha, and all parts random and non-zero on both sides.

GPT-2's fused c_attn is one module, so everything is equal. With separate q, k and v, VeRA has vectors for each: ours
are copied into all three, and the gradient of u is the sum of theirs.
"""

import copy

import pytest
import torch
from helpers.tiny import randomise, tiny, tying_option
from peft import LoraConfig, VeraConfig, get_peft_model

from tiedlora.adapter import attach
from tiedlora.adapter.attach import Attached

RANK, ALPHA = 4, 8.0
QKV = ["q_proj", "k_proj", "v_proj"]


def adapted(model_name: str, option: str, alpha: float) -> tuple[Attached, torch.nn.Module]:
    """Our adapter with random parts, and an unchanged copy of the base for PEFT."""
    base = tiny(model_name)
    twin = copy.deepcopy(base.model)
    attached = attach(base.model, tying_option(option), RANK, alpha)
    randomise(attached.adapter, scale=0.2)
    return attached, twin


def peft_lora(twin: torch.nn.Module, attached: Attached, targets: list[str], fan_in_fan_out: bool) -> torch.nn.Module:
    model = get_peft_model(
        twin,
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            target_modules=targets,
            bias="none",
            fan_in_fan_out=fan_in_fan_out,
            task_type="CAUSAL_LM",
        ),
    )
    reached = 0
    for path, (A_l, B_l) in attached.adapter.pairs().items():
        module = model.base_model.model.get_submodule(path)
        module.lora_A["default"].weight.data.copy_(A_l.detach())
        module.lora_B["default"].weight.data.copy_(B_l.detach())
        reached += 1
    assert reached == sum(".lora_A." in name for name, _ in model.named_parameters())
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Compare float32 tensors within 1e-4 of the largest entry."""
    assert theirs.abs().max() > 0
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def test_lora_on_gpt2_equals_peft_over_twenty_steps(ids):
    attached, twin = adapted("tiny_gpt2", "LoRA", ALPHA)
    theirs = peft_lora(twin, attached, ["c_attn"], fan_in_fan_out=True)
    parts = attached.adapter.trained_parts()
    our_steps = torch.optim.AdamW(parts.values(), lr=1e-2, weight_decay=0.0)
    their_parts = [p for p in theirs.parameters() if p.requires_grad]
    their_steps = torch.optim.AdamW(their_parts, lr=1e-2, weight_decay=0.0)
    for step in range(20):
        assert close(attached.model(ids).logits, theirs(input_ids=ids).logits)
        ours_loss, theirs_loss = loss_of(attached.model, ids), loss_of(theirs, ids)
        assert ours_loss.item() == pytest.approx(theirs_loss.item(), rel=1e-4), f"step {step}"
        ours_loss.backward()
        theirs_loss.backward()
        for layer in range(3):
            module = theirs.base_model.model.transformer.h[layer].attn.c_attn
            assert close(parts["qkv.A"].grad[layer], module.lora_A["default"].weight.grad)
            assert close(parts["qkv.B"].grad[layer], module.lora_B["default"].weight.grad)
        for optimizer in (our_steps, their_steps):
            optimizer.step()
            optimizer.zero_grad()


def projections(model: torch.nn.Module, layer: int) -> list[torch.nn.Module]:
    """PEFT's modules of q, k and v in one layer of a Llama."""
    return [getattr(model.base_model.model.model.layers[layer].self_attn, name) for name in QKV]


def passes_agree(attached: Attached, theirs: torch.nn.Module, ids: torch.Tensor) -> None:
    """Compare the logits, and give both models the gradients of one pass."""
    assert close(attached.model(ids).logits, theirs(input_ids=ids).logits)
    loss_of(attached.model, ids).backward()
    loss_of(theirs, ids).backward()


def test_lora_qkv_is_pefts_lora(ids):
    """tying=LoRA_qkv has exactly PEFT's parameters: outputs, counts and all gradients are equal."""
    attached, twin = adapted("tiny_llama", "LoRA_qkv", ALPHA)
    theirs = peft_lora(twin, attached, QKV, fan_in_fan_out=False)
    assert attached.adapter.trainable_params() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    passes_agree(attached, theirs, ids)
    parts = attached.adapter.parts()
    for layer in range(3):
        for target, module in zip("qkv", projections(theirs, layer), strict=True):
            assert close(parts[f"{target}.A"].grad[layer], module.lora_A["default"].weight.grad)
            assert close(parts[f"{target}.B"].grad[layer], module.lora_B["default"].weight.grad)


def test_tuv_on_separate_projections_equals_vera(ids):
    """VeRA slices one B for q, k and v: B = [vera_B[:d_q]; vera_B[:d_kv]; vera_B[:d_kv]], lambda_d = u in all."""
    attached, twin = adapted("tiny_llama", "Tuv", RANK)  # VeRA has no alpha: s = 1
    theirs = get_peft_model(twin, VeraConfig(r=RANK, target_modules=QKV, vera_dropout=0.0))
    parts = attached.adapter.targets["qkv"]
    d_q, d_kv = 32, 16
    parts.B.data[0, d_q : d_q + d_kv] = parts.B.data[0, :d_kv]
    parts.B.data[0, d_q + d_kv :] = parts.B.data[0, :d_kv]
    for layer in range(3):
        for module, v in zip(projections(theirs, layer), parts.v[layer].split([d_q, d_kv, d_kv]), strict=True):
            module.vera_A["default"].copy_(parts.A[0].detach())
            module.vera_B["default"].copy_(parts.B[0, :d_q].detach())
            module.vera_lambda_d["default"].data.copy_(parts.u[layer].detach())
            module.vera_lambda_b["default"].data.copy_(v.detach())
    passes_agree(attached, theirs, ids)
    for layer in range(3):
        modules = projections(theirs, layer)
        assert close(parts.u.grad[layer], sum(module.vera_lambda_d["default"].grad for module in modules))
        assert close(parts.v.grad[layer], torch.cat([module.vera_lambda_b["default"].grad for module in modules]))
