"""Adapters of some layers only, and of another scale: the update, the file, PEFT's format, a run."""

import json

import pytest
import torch
from helpers.families import family_model
from helpers.tiny import close, logits, randomise, tying_option
from peft import PeftModel

from tiedlora import attach, attach_adapter, named, to_peft
from tiedlora.adapter import files
from tiedlora.description import BaseModelRecord
from tiedlora.runs import run
from tiedlora.tying import trainable_params

RANK, ALPHA, SOME = 4, 6.0, [0, 2]
BASE = BaseModelRecord("a/base", None, "digest")
SHARED_BY_TWO = ("tying.A.share=2", "tying.B.share=2")


def some_layers(family, name, *overrides, layers=tuple(SOME), **more):
    """A model of three layers with random parts on some of them."""
    spec = tying_option(name, f"tying.layers={list(layers)}", *overrides)
    attached = attach(family_model(family), spec, RANK, ALPHA, **more)
    randomise(attached.adapter, scale=0.25)
    return attached


@pytest.mark.parametrize(
    ("name", "overrides"), [("LoRA", ()), ("TABuv", ()), ("TAB", SHARED_BY_TWO), ("Tuv", ()), ("LoRA_qkv", ())]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_other_layers_get_no_update(family, name, overrides, ids):
    """The same as a LoRA on every layer whose B is zero in the others."""
    attached = some_layers(family, name, *overrides)
    assert not any(".1." in path for path in attached.adapter.paths())
    assert len(attached.adapter.paths()) == 2 * (3 if family == "llama" else 1)
    adapter = attached.adapter
    assert adapter.trainable_params() == trainable_params(adapter.tying, RANK, adapter.architecture)
    full = attach(family_model(family), tying_option("LoRA_qkv" if name == "LoRA_qkv" else "LoRA"), RANK, ALPHA)
    for target, parts in adapter.targets.items():
        A, B = parts.folded()
        assert len(A) == len(B) == 2
        all_layers = full.adapter.targets[target]
        with torch.no_grad():
            all_layers.A[SOME], all_layers.B[SOME] = A, B
    adapted = logits(attached.model, ids)
    assert torch.equal(adapted, logits(full.model, ids))
    assert (adapted - logits(family_model(family), ids)).abs().max() > 0.1


@pytest.mark.parametrize(("scaling", "scale"), [("standard", 6 / 4), ("rslora", 6 / 4**0.5)])
def test_the_file_loads_back_also_with_layers_in_another_order(scaling, scale, ids, tmp_path):
    """A specification is an ordinary object: the order of the layers in it must not swap their u and v in the file."""
    spec = named("TABuv")
    spec.layers = [2, "0-0"]
    attached = attach(family_model("llama"), spec, RANK, ALPHA, scaling=scaling)
    randomise(attached.adapter, scale=0.25)
    files.save(attached.adapter, tmp_path / "adapter", BASE)
    again = attach_adapter(family_model("llama"), files.load(tmp_path / "adapter")[0])
    assert (again.adapter.tying.layers, again.adapter.scale) == (SOME, scale)
    assert torch.equal(logits(again.model, ids), logits(attached.model, ids))


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("targets", [["qkv"], ["q", "k", "v", "o"]])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_pefts_format_has_the_layers_and_the_scale(family, targets, scaling, ids, tmp_path):
    attached = some_layers(family, "TABuv", f"tying.targets=[{','.join(targets)}]", scaling=scaling)
    to_peft(attached.adapter, tmp_path, "a/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # Other programs know neither rsLoRA nor several ranks, so then the scale is in the factors.
    is_plain = scaling == "standard" and config["r"] == RANK
    assert config["lora_alpha"] == (ALPHA if is_plain else config["r"])
    assert config["layers_to_transform"] == SOME
    theirs = PeftModel.from_pretrained(family_model(family), tmp_path)
    assert close(logits(theirs, ids), logits(attached.model, ids))


def test_a_run_records_both_and_verifies(tiny_config, tmp_path, script):
    config = tiny_config("tying=LoRA", "tying.layers=[1]", "rank.scaling=rslora", "rank.alpha=16")
    record = run.main(config)
    assert record.share_of_lora == pytest.approx(1 / 3)
    assert record.identity.tree["tying"]["layers"] == [1]
    assert record.identity.tree["rank"] == {"r": 8, "alpha": 16.0, "scaling": "rslora"}
    folder = tmp_path / "outputs" / record.run_id
    code, printed, errors = script("scripts/verify.py", folder)
    assert code == 0, printed + errors
