"""TiedLoraConfig in PEFT: it is our adapter, trains in Trainer, saves each part once, loads parts tied, and merges."""

import pytest
import torch
from helpers.families import family_model
from helpers.tiny import EIGHT, logits, randomise
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from tiedlora import TiedLoraConfig, UserError, named
from tiedlora.adapter import attach
from tiedlora.adapter.architectures import FAMILIES

RANK = 4


def wrapped(name="TABuv", family="llama", **more):
    return get_peft_model(family_model(family), TiedLoraConfig(r=RANK, tying=name, task_type="CAUSAL_LM", **more))


@pytest.mark.parametrize("name", EIGHT)
def test_it_is_the_same_adapter(name, ids, tmp_path):
    model = wrapped(name)
    parts = model.base_model.attached.adapter.parts()
    ours = attach(family_model("llama"), name, RANK)
    for key, part in ours.adapter.parts().items():
        assert torch.equal(part, parts[key])
        assert part.requires_grad == parts[key].requires_grad
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == ours.adapter.trainable_params()
    assert len({id(p) for p in trained}) == len(trained) == len(ours.adapter.trained_parts())

    randomise(model.base_model.attached.adapter, scale=0.25)
    adapted = logits(model, ids)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition("targets.")[2] for key in stored} == set(parts)
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in parts.values())

    again = PeftModel.from_pretrained(family_model("llama"), tmp_path)
    assert torch.equal(logits(again, ids), adapted)
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(family_model("llama"), tmp_path, is_trainable=True)
    assert [p.shape for p in trainable.parameters() if p.requires_grad] == [p.shape for p in trained]
    plain = logits(family_model("llama"), ids)
    with again.disable_adapter():
        assert torch.equal(logits(again, ids), plain)
    assert torch.equal(logits(again, ids), adapted)
    again.merge_adapter()
    assert (logits(again, ids) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    again.unmerge_adapter()
    assert torch.equal(logits(again, ids), adapted)
    merged = again.merge_and_unload()
    with pytest.raises(UserError, match="not in the model any more"):
        again.merge_and_unload()
    assert (logits(merged, ids) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    assert set(merged.state_dict()) == set(family_model("llama").state_dict())


def test_safe_merge_refuses_what_is_no_number_and_a_name_is_the_adapters(ids):
    model = wrapped()
    randomise(model.base_model.attached.adapter, scale=0.25)
    with pytest.raises(UserError, match=r"^adapter_names=\['nope'\]: the model has one adapter, \['default'\]"):
        model.merge_adapter(adapter_names=["nope"])
    model.merge_adapter(adapter_names=["default"], safe_merge=True)
    model.unmerge_adapter()
    parts = model.base_model.attached.adapter.parts()
    parts["qkv.B"].data[..., 0] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            merge(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(family_model("llama"), ids))


def test_low_cpu_mem_usage_gives_the_same_adapter(ids, tmp_path):
    # PEFT then makes tensors without values, assigns those of the file, and moves them to the base.
    model = wrapped()
    randomise(model.base_model.attached.adapter, scale=0.25)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family_model("llama"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_trainer_trains_resumes_and_saves_each_part_once(tmp_path, ids):
    rows = torch.randint(0, 256, (16, 9), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]

    def trained(steps, resume=None):
        model = wrapped()
        settings = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=steps,
            # The schedule must not depend on the last step of this run.
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, settings, train_dataset=data).train(resume_from_checkpoint=resume)
        return model

    whole = trained(6)
    start = attach(family_model("llama"), "TABuv", RANK).adapter.parts()
    for key, part in whole.base_model.attached.adapter.parts().items():
        assert not torch.equal(part, start[key]), f"{key} never moved"
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert len(load_file(checkpoint / "adapter_model.safetensors")) == 4
    resumed = trained(6, resume=str(checkpoint))
    assert torch.equal(logits(resumed.eval(), ids), logits(whole.eval(), ids))


def test_a_specification_of_ones_own_survives_json(tmp_path, ids):
    spec = named("TAB")
    spec.B.share = 2
    layout = FAMILIES["gpt_neox"]
    own = {"targets": ["qkv", "o"], "layers": ["0-1"], "layout": layout, "scaling": "rslora"}
    config = TiedLoraConfig(r=RANK, alpha=8.0, tying=spec, dropout=0.1, seed=3, **own)
    model = get_peft_model(family_model("gpt_neox"), config)
    randomise(model.base_model.attached.adapter, scale=0.25)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family_model("gpt_neox"), tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    adapter = again.base_model.attached.adapter
    assert adapter.parts()["qkv.B"].shape[0] == 1
    assert (adapter.tying.layers, spec.layers) == ([0, 1], None)
    assert adapter.architecture.layout == layout
    assert (adapter.tying.dropout, adapter.scale, adapter.seed) == (0.1, 4.0, 3)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"task_type": "SEQ_CLS"}, r'^TiedLoraConfig\.task_type=SEQ_CLS: .*set task_type="CAUSAL_LM"$'),
        ({"tying": "TABv"}, "TABv: is not one of LoRA"),
        ({"tying": {"A": {"shared": 2}}}, r"TiedLoraConfig\.tying\.A\.shared: unknown key"),
        ({"layout": {"layers": 3, "nonsense": 1}}, r"TiedLoraConfig\.layout\.nonsense: unknown key"),
        # As a text it would be the three targets q, k and v.
        *(({key: "qkv"}, rf"^TiedLoraConfig\.tying\.{key}=qkv: .*must be a list") for key in ("targets", "layers")),
    ],
)
def test_mistakes_are_one_line(values, says):
    with pytest.raises(UserError, match=says) as raised:
        get_peft_model(family_model("llama"), TiedLoraConfig(r=RANK, **values))
    assert "\n" not in str(raised.value)


def test_a_second_adapter_is_refused_and_unloading_frees_the_model(ids):
    model = wrapped()
    with pytest.raises(UserError, match=r"takes one.*tiedlora.AdapterSet"):
        model.add_adapter("second", TiedLoraConfig())
    base = model.unload()
    assert torch.equal(logits(base, ids), logits(family_model("llama"), ids))
    attach(base, "TAB", RANK)
