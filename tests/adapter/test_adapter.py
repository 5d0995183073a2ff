"""The method: the formula, ties, initial values, attaching and its refusals, detaching, merging, the adapter's file."""

import copy
import json
import os
from dataclasses import replace
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from helpers.families import family_model
from helpers.tiny import EIGHT, TINY, close, logits, randomise, tiny, tying_option
from safetensors.torch import load_file

from tiedlora import storage, tying
from tiedlora.adapter import architectures, attach, attach_adapter, load, save
from tiedlora.adapter.files import start_from
from tiedlora.adapter.parts import draw
from tiedlora.config.schema import TrainConfig
from tiedlora.errors import UserError
from tiedlora.training.optimizer import build_optimizer
from tiedlora.tying import LrFactors, Tying


@pytest.mark.parametrize("name", [*EIGHT, *tying.OTHER_NAMES])
@pytest.mark.parametrize("model_name", TINY)
class TestEveryConfiguration:
    def test_counts_equal_the_formula_and_ties_appear_once(self, model_name, name):
        base = tiny(model_name)
        spec = tying_option(name)
        attached = attach(base.model, spec, 4)
        architecture = architectures.read(base.model)
        trained = [p for p in base.model.parameters() if p.requires_grad]
        assert attached.adapter.trainable_params() == tying.trainable_params(spec, 4, architecture)
        assert sum(p.numel() for p in trained) == attached.adapter.trainable_params()
        if tying.name_of(spec) in EIGHT[1:]:
            assert attached.adapter.parts()["qkv.A"].shape[0] == attached.adapter.parts()["qkv.B"].shape[0] == 1

    def test_only_the_zero_part_has_a_gradient_at_first_and_all_move_by_the_third_step(self, model_name, name, ids):
        base = tiny(model_name)
        attached = attach(base.model, tying_option(name), 4)
        parts = attached.adapter.trained_parts()
        optimizer = build_optimizer(attached.parameter_groups(LrFactors()), TrainConfig(lr=1e-2))
        zeros = {key for key in parts if attached.adapter.specification(key).init == 0.0}
        start = {key: p.detach().clone() for key, p in parts.items()}
        for step in range(3):
            base.model(ids, labels=ids).loss.backward()
            if step == 0:
                moving = {key for key, p in parts.items() if p.grad is not None and p.grad.abs().sum() > 0}
                assert moving == zeros
            optimizer.step()
            optimizer.zero_grad()
        for key, p in parts.items():
            assert not torch.equal(p, start[key]), f"{key} never moved"

    def test_merge_and_unmerge(self, model_name, name, ids):
        base = tiny(model_name)
        weights = {key: value.clone() for key, value in base.model.state_dict().items()}
        plain = logits(base.model, ids)
        attached = attach(base.model, tying_option(name), 4)
        randomise(attached.adapter)
        adapted = logits(base.model, ids)
        attached.merge()
        merged = logits(base.model, ids)
        attached.enable()
        assert torch.equal(logits(base.model, ids), merged), "the update is in the weights already"
        with attached.folded_once():
            attached.unmerge()
            assert torch.equal(logits(base.model, ids), adapted)
            attached.merge()
            attached.disable()
            assert torch.equal(logits(base.model, ids), plain)
            attached.enable()
            assert torch.equal(logits(base.model, ids), adapted), "it is folded again after it was disabled"
        attached.detach()
        for action in (attached.enable, attached.merge, attached.fuse):
            with pytest.raises(UserError, match=r"^\w+: the adapter is not in the model any more"):
                action()
        after = base.model.state_dict()
        assert after.keys() == weights.keys()
        assert all(torch.equal(after[key], weights[key]) for key in weights)

    def test_file_holds_each_part_once_and_loads_back(self, model_name, name, ids, tmp_path):
        base = tiny(model_name)
        attached = attach(base.model, tying_option(name), 4)
        for parameter in attached.adapter.trained_parts().values():
            parameter.data.normal_(std=0.3)
        adapted = logits(base.model, ids)
        size = save(attached.adapter, tmp_path / "adapter", base.record)
        stored = load_file(tmp_path / "adapter" / "adapter.safetensors")
        assert set(attached.adapter.trained_parts()) <= set(stored)
        description = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
        assert (description["format"], {"layers", "scaling"} & {*description, *description["tying"]}) == (1, set())
        assert size < 4 * sum(p.numel() for p in attached.adapter.parts().values()) + 4000
        attached.detach()
        loaded, trained_on = load(tmp_path / "adapter")
        assert trained_on == base.record
        again = attach_adapter(base.model, loaded)
        assert torch.equal(logits(base.model, ids), adapted)
        assert again.adapter.trained_parts().keys() == attached.adapter.trained_parts().keys()


@pytest.mark.parametrize("action", ["merge", "fuse"])
def test_a_merge_that_fails_halfway_is_undone(ids, monkeypatch, action):
    base = tiny("tiny_llama")
    attached = attach(base.model, "TABuv", 4)
    randomise(attached.adapter)
    adapted = logits(base.model, ids)
    weights = {key: value.clone() for key, value in base.model.state_dict().items()}
    with monkeypatch.context() as patch:
        clone, memory = torch.Tensor.clone, iter(range(2))

        def limited(tensor):
            if next(memory, None) is None:
                raise MemoryError
            return clone(tensor)

        patch.setattr(torch.Tensor, "clone", limited)
        with pytest.raises(MemoryError):
            getattr(attached, action)()
    assert (attached.active, attached.merged) == (True, False)
    assert all(torch.equal(value, weights[key]) for key, value in base.model.state_dict().items())
    assert torch.equal(logits(base.model, ids), adapted)
    attached.fuse()
    assert close(logits(base.model, ids), adapted)


def test_identity_survives_moves_and_casts():
    base = tiny("tiny_llama", "bfloat16")
    attached = attach(base.model, tying_option("TABuv"), 4)
    assert {p.dtype for p in attached.adapter.parameters()} == {torch.float32}
    ids = torch.arange(5).unsqueeze(0)
    assert base.model(ids).logits.requires_grad, "a model that has run can be copied, too"
    before = {name: id(p) for name, p in attached.adapter.parts().items()}
    values = {name: p.clone() for name, p in attached.adapter.parts().items()}
    base.model.to("cpu").to(torch.bfloat16)
    assert all(torch.equal(p, values[name]) for name, p in attached.adapter.parts().items()), "nothing is rounded"
    base.model.to(torch.float32)
    assert {name: id(p) for name, p in attached.adapter.parts().items()} == before
    twin = copy.deepcopy(base.model)
    randomise(twin.tied_adapter)
    assert not torch.equal(logits(twin, ids), logits(base.model, ids)), "a copy must use its own parts"


@pytest.mark.parametrize("name", TINY)
def test_a_model_with_an_adapter_can_be_saved_whole(name, ids, tmp_path):
    """torch.save, and what sends a model to another process, pickle it."""
    model = tiny(name).model
    attached = attach(model, "TABuv", 4)
    randomise(attached.adapter)
    adapted = logits(model, ids)
    torch.save(model, tmp_path / "model.pt")
    copied = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(copied, ids), adapted)
    randomise(copied.tied_adapter, seed=2)
    assert not torch.equal(logits(copied, ids), adapted), "it uses its own parts"
    assert torch.equal(logits(model, ids), adapted)


def test_dropout_acts_in_training_alone(ids):
    base = tiny("tiny_llama")
    attached = attach(base.model, tying_option("TABuv", "tying.dropout=0.5"), 4)
    randomise(attached.adapter)
    base.model.eval()
    assert torch.equal(logits(base.model, ids), logits(base.model, ids))
    base.model.train()
    assert not torch.equal(logits(base.model, ids), logits(base.model, ids))


def test_attach_refuses_a_second_adapter_and_unknown_targets():
    base = tiny("tiny_gpt2")
    with pytest.raises(UserError, match="no 'gate' projection"):
        attach(base.model, Tying(targets=["gate"]), 4)
    attach(base.model, Tying(), 4)
    with pytest.raises(UserError, match="already"):
        attach(base.model, Tying(), 4)
    with pytest.raises(UserError, match=r"tying\.method=VeraConfig: is PEFT's"):
        attach(tiny("tiny_llama").model, tying_option("peft/vera"), 4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        *(({"rank": rank}, rf"^rank={rank!r}: must be an int from 1") for rank in (0, True)),
        *(({"alpha": alpha}, rf"^alpha={alpha!r}: must be a number from 1e-12 to 1e12") for alpha in (0.0, "16")),
        ({"seed": "a"}, "^seed='a': must be an int"),
    ],
)
def test_a_wrong_number_is_named_before_the_model_is_changed(words, says):
    model = tiny("tiny_llama").model
    with pytest.raises(UserError, match=says):
        attach(model, "TABuv", **words)
    assert not hasattr(model, "tied_adapter")


def test_an_adapter_on_a_model_says_in_one_line_what_it_is():
    """Not the whole model, which is what a notebook showed."""
    attached = attach(tiny("tiny_llama").model, "TABuv", 4)
    trained = sum(part.numel() for part in attached.trained_parts().values())
    about = f"<TABuv r=4 on LlamaForCausalLM: {trained:,} trained parameters, %s>"
    assert repr(attached) == about % "active"
    attached.merge()
    assert repr(attached) == about % "merged"
    attached.disable()
    assert repr(attached) == about % "disabled"


def test_a_replica_of_data_parallel_is_refused(ids):
    model = tiny("tiny_llama").model
    attach(model, "TABuv", rank=2)
    model(input_ids=ids)
    # What nn.DataParallel makes for each GPU.
    model.model.__dict__["_is_replica"] = True
    with pytest.raises(UserError, match=r"^nn\.DataParallel copies the model without the adapter's factors"):
        model(input_ids=ids)


@pytest.mark.parametrize(("name", "keywords"), [("TABuv", {"use_reentrant": True}), ("TABuv", {}), ("RaSA", {})])
def test_reentrant_checkpoints_are_refused_where_layers_share_a_product_and_only_in_training(ids, name, keywords):
    model = tiny("tiny_llama").model
    attach(model, name, 4)
    model.activation_checkpointing_enable({"preserve_rng_state": False, **keywords})
    model.eval()
    model(input_ids=ids)
    model.train()
    with torch.no_grad():
        model(input_ids=ids)
    with pytest.raises(
        UserError, match=r"use_reentrant=True does not work for an adapter with .*(u or v|tying\.terms)"
    ):
        model(input_ids=ids)
    model.activation_checkpointing_disable()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids).logits.sum().backward()


def test_parts_that_another_program_has_cast_are_not_trained(ids):
    """TRL's trainers cast every trained parameter of a model in 4 or 8 bits like this."""
    model = tiny("tiny_llama").model
    attached = attach(model, "TABuv", 4)
    for part in attached.trained_parts().values():
        part.data = part.data.to(torch.bfloat16)
    before = logits(model, ids)
    with pytest.raises(UserError, match=r"^qkv\.A: is torch\.bfloat16.*attached\.adapter\.float\(\)"):
        model(input_ids=ids)
    attached.adapter.float()
    assert torch.equal(logits(model, ids), before)
    model(input_ids=ids, labels=ids).loss.backward()
    assert {part.grad.dtype for part in attached.trained_parts().values()} == {torch.float32}


@pytest.mark.parametrize("between", ["disabled", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", ["TABuv", "TAB"])
def test_a_pass_between_forward_and_backward_changes_no_gradient(ids, name, between):
    """A checkpoint computes its block again in the backward pass. TRL's DPOTrainer asks the base model before it."""
    model = tiny("tiny_llama").model.train()
    attached = attach(model, name, 4)
    randomise(attached.adapter)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        if between == "disabled":
            attached.disable()
            logits(model, ids)
            attached.enable()
        else:
            with getattr(torch, between)():
                model(input_ids=ids)
        loss.backward()
        found.append({name: part.grad for name, part in attached.adapter.trained_parts().items()})
        model.activation_checkpointing_enable({"use_reentrant": False})
    plain, checkpointed = found
    for part, gradient in plain.items():
        assert torch.equal(checkpointed[part], gradient), part
        assert gradient.abs().max() > 0, part


@pytest.mark.parametrize(("family", "target", "alpha"), [("llama", "q", 16), ("phi3", "q", 4), ("gpt_neox", "qkv", 4)])
def test_reentrant_checkpoints_change_no_gradient_without_u_and_v(ids, family, target, alpha):
    model = family_model(family)
    attached = attach(model, replace(tying.named("LoRA"), targets=[target]), 4, alpha=alpha)
    randomise(attached.adapter)
    found = []
    for _ in range(2):
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: part.grad for name, part in attached.adapter.trained_parts().items()})
        model.activation_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": False})
    torch.testing.assert_close(*found)


def test_an_own_scale_that_differs_is_no_start(tmp_path):
    attach(tiny("tiny_llama").model, "RaSA", 8).save_pretrained(tmp_path)
    adapter = attach(tiny("tiny_llama").model, "RaSA", 8, alpha=8**0.5, scaling="rslora").adapter
    with pytest.raises(UserError, match=r"the scale of tying\.terms\.private \(own_scale\) is"):
        start_from(adapter, tmp_path, load(tmp_path)[1])


def test_values_of_other_types_are_taken_as_those_of_the_key():
    assert attach(tiny("tiny_llama").model, Tying(dropout="0.1")).adapter.tying.dropout == 0.1


def test_saving_keeps_the_other_files_of_a_folder(tmp_path):
    base = tiny("tiny_llama")
    attached = attach(base.model, tying_option("TABuv"), 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "thesis.tex").write_text("mine")
    for _ in range(2):
        size = attached.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            "data",
            "thesis.tex",
            "adapter.json",
            "adapter.safetensors",
        }
    assert size == sum((tmp_path / name).stat().st_size for name in ("adapter.json", "adapter.safetensors"))
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_folder_stays_if_its_replacement_is_interrupted(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "own")
    storage.write_folder(tmp_path / "link", {"file": b"old"})
    monkeypatch.setattr(os, "replace", Mock(wraps=os.replace, side_effect=[DEFAULT, KeyboardInterrupt, DEFAULT]))
    with pytest.raises(KeyboardInterrupt):
        storage.write_folder(tmp_path / "link", {"file": b"new"})
    assert [file.read_bytes() for file in tmp_path.rglob("own/file")] == [b"old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "own"]


def test_draws_depend_on_seed_part_target_and_group_alone():
    one = draw("uniform", (3, 4, 16), 0, "A", "qkv")
    assert torch.equal(one[:2], draw("uniform", (2, 4, 16), 0, "A", "qkv"))
    assert one.abs().max() <= 1 / 16**0.5
    assert not torch.equal(one[0], one[1])
    for seed, part, target in ((1, "A", "qkv"), (0, "B", "qkv"), (0, "A", "o")):
        assert not torch.equal(one, draw("uniform", (3, 4, 16), seed, part, target))
    # Every run of this project starts from these numbers.
    first = draw("uniform", (1, 1, 4), 0, "A", "qkv").flatten().tolist()
    assert first == pytest.approx([0.0028935, -0.0089974, -0.1342523, -0.2868977], abs=1e-6)
