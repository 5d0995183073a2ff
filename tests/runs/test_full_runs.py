"""Runs of full fine-tuning: the loop's steps are plain torch's; resume, scores, verification, export and report."""

import pytest
import torch
from helpers.forks import killed_after
from helpers.tiny import folder_of, rows_of, score_more, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiedlora.analysis.groups import curve, group_runs
from tiedlora.analysis.runs import read_runs
from tiedlora.config.compose import command, read_config
from tiedlora.data.batching import BatchSampler
from tiedlora.errors import UserError
from tiedlora.export.folder import ExportOptions, export_run
from tiedlora.runs import library, loading, run
from tiedlora.runs.verify import verify
from tiedlora.training.distributed import ALONE
from tiedlora.training.loop import learning_rate


def adapter_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.adapter.iterdir()}


def test_the_loop_makes_the_updates_of_plain_torch(tiny_config):
    """AdamW on the float32 weights of transformers' model, on the rows that the seed gives, clipped and scheduled."""
    # Where a gradient is nearly 0, Adam divides rounding by rounding, unless eps is larger.
    config = tiny_config("tying=full", "train.eps=1e-4", "train.lr=1e-2", "train.microbatch_size=2")
    run.main(config)
    trained = load_file(folder_of(config).adapter / "adapter.safetensors")
    loaded = loading.load(config, ALONE)
    encoded = loaded.rows["train"].encoded
    loaded.release()
    rows_of_step = BatchSampler([len(row) for row in encoded], config.train, config.seed).rows_of_step
    model = tiny("tiny_llama").model.requires_grad_(True)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0)
    for step in range(1, config.train.steps + 1):
        rows = [encoded[number] for number in rows_of_step(step)]
        total = torch.zeros(())
        for row in rows:
            ids = torch.tensor([[*row.prompt, *row.target]])
            of_targets = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(of_targets, torch.tensor(row.target), reduction="sum")
        (total / sum(len(row.target) for row in rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        update, expected = trained[name] - start[name], parameter.detach() - start[name]
        assert expected.abs().max() > 1e-4, name
        assert (update - expected).abs().max() <= 1e-3 * expected.abs().max(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_a_run_like_any_other(dtype, tiny_config, tmp_path, script, caplog):
    text = tmp_path / "neutral.txt"
    text.write_text("A neutral text of a few words, to see what is forgotten. " * 40)
    words = ["tying=full", "train.lr=3e-3", f"train.dtype={dtype}", "score.splits=[validation]", "score.drift=true"]
    whole = folder_of(tiny_config(*words, f"outputs={tmp_path}/whole"))
    with caplog.at_level("INFO"):
        record = run.main(tiny_config(*words, f"outputs={tmp_path}/whole"))
    said = [line for line in caplog.messages if line.startswith("full fine-tuning: ")]
    count = sum(parameter.numel() for parameter in tiny("tiny_llama").model.parameters())
    assert len(said) == 1
    assert f"{20 * count / 1e9:.1f} GB for weights" in said[0]
    assert record.run_id.startswith("full-")
    assert record.trainable_params == count
    assert record.stored_params is None
    assert record.admission is None
    assert record.training.validation_loss_last < record.training.validation_loss_first
    assert "tying=full" in command(read_config(whole.config_file))
    # The base is the one of every arm: the same file of its scores, with the loss that training starts from.
    lora = tiny_config("tying=LoRA", *words[2:], f"outputs={tmp_path}/whole")
    run.main(lora)
    assert len({path.name for path in (tmp_path / "whole" / "base").glob("*losses*.jsonl")}) == 1
    assert rows_of(whole, "validation", "losses", base=True) == rows_of(
        folder_of(lora), "validation", "losses", base=True
    )
    first = folder_of(lora).record().training.validation_loss_first
    assert record.training.validation_loss_first == first
    # Killed after its first checkpoint, the same command continues to the same bytes.
    config = tiny_config(*words, f"outputs={tmp_path}/killed")
    killed_after(lambda: run.main(config), lambda state: state.step > 0)
    assert folder_of(config).state() == "interrupted"
    run.main(tiny_config(*words, f"outputs={tmp_path}/killed"))
    assert adapter_bytes(folder_of(config)) == adapter_bytes(whole)
    for kind in ("answers", "losses", "drift"):
        assert rows_of(folder_of(config), "validation", kind) == rows_of(whole, "validation", kind)
    # It is scored later, verified, loaded and asked.
    score_more(whole, splits=["test"], forgetting=str(text))
    findings = verify(whole.path)
    assert [finding for finding in findings if finding.ok is False] == []
    # Its file has what is trained, and nothing else.
    assert "stored_params" in next(finding.keys for finding in findings if finding.check == "parameters")
    arm = library.load(whole.path)
    assert set(arm.trained_parts()) == set(load_file(whole.adapter / "adapter.safetensors"))
    arm.detach()
    code, shown, told = script("scripts/generate.py", whole.path, "--prompt", "1 + 1 =", "--max-new-tokens", "3")
    assert (code, "adapted" in shown) == (0, True), told


def test_the_best_step_activations_again_and_a_reward(tiny_config, tmp_path):
    words = ["tying=full", "train.lr=3e-3", "train.dtype=bfloat16", "score.metrics=[target_loss]"]
    plain = tiny_config(*words, f"outputs={tmp_path}/plain")
    again = tiny_config(*words, "train.recompute_activations=true", f"outputs={tmp_path}/again")
    for config in (plain, again):
        run.main(config)
    assert adapter_bytes(folder_of(plain)) == adapter_bytes(folder_of(again))
    base = loading.cached_base(again, torch.device("cpu"))
    assert not base.model.get_input_embeddings()._forward_hooks, "the base is as it was"
    # A rate that ruins the model: the step of the lowest loss is an earlier one than the last.
    best = tiny_config("tying=full", "train.lr=1", "train.warmup_steps=0", "score.checkpoint=best", *words[3:])
    record = run.main(best)
    assert record.training.scored_step < record.training.steps
    assert [finding for finding in verify(folder_of(best).path) if finding.ok is False] == []
    rewarded = tiny_config(*words, "objective=reward", "objective.samples=2", "train.steps=2", "train.warmup_steps=0")
    assert run.main(rewarded).training.steps == 2


def test_the_whole_model_is_exported_and_an_adapter_is_not(tiny_config, tmp_path, ids):
    config = tiny_config("tying=full", "train.lr=3e-3", "score.splits=[validation]", "score.metrics=[target_loss]")
    record, folder = run.main(config), folder_of(config)
    for form in ("peft", "hub-card"):
        with pytest.raises(UserError, match=rf"--to {form}: full fine-tuning has no adapter; --to merged writes"):
            export_run(folder, record, config, tmp_path / form, ExportOptions(form=form))
        assert not (tmp_path / form).exists()
    export_run(folder, record, config, tmp_path / "merged", ExportOptions(form="merged"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    arm = library.load(folder.path)
    with torch.no_grad():
        assert torch.equal(exported(input_ids=ids).logits, arm.model(input_ids=ids).logits)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "A fully fine-tuned model trained with" in card
    assert "PEFT" not in card
    with pytest.raises(UserError, match=r"adapter\.json: describes an arm of another method"):
        run.main(tiny_config("tying=LoRA", f"train.init_from={folder.path}"))
    with pytest.raises(UserError, match=r"train\.init_from: starts an adapter of A, B, u and v; full has none"):
        run.main(tiny_config("tying=full", f"train.init_from={folder.path}"))


@pytest.mark.slow
def test_it_stands_beside_the_curve_of_lora_and_not_on_it(tiny_config, script, tmp_path):
    for tying in ("tying=full", "tying=LoRA", "tying=LoRA rank=r1", "tying=TABuv"):
        for seed in (0, 1):
            run.main(tiny_config(*tying.split(), f"seed={seed}", "score.metrics=[target_loss]", "train.steps=2"))
    groups = group_runs(read_runs([folder_of(tiny_config("tying=full")).path.parent])[0])
    assert len(groups) == 4
    assert [(group.label, group.rank) for group in curve("LoRA", groups[0].setting, groups)] == [
        ("LoRA", 1),
        ("LoRA", 8),
    ]
    # It is the largest, wherever groups are sorted by their size.
    assert max(groups, key=lambda group: group.params).name == "full"
    code, _, told = script("scripts/report.py", tiny_config().outputs, "--out", tmp_path / "report")
    assert code == 0, told
    text = "".join(path.read_text() for path in (tmp_path / "report").glob("*.csv"))
    assert "full" in text
    # Its size is that of the model, which only the loaded model says.
    code, shown, told = script("scripts/params.py", "model=tiny_llama")
    assert (code, "full" in shown) == (0, False), told
    code, _, told = script("scripts/params.py", "model=tiny_llama", "tying=full")
    assert (code, told.count("\n")) == (2, 1)
    assert "tying.method=full: can be counted only on the loaded model" in told
