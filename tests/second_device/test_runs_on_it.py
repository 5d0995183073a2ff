"""Runs on the second device, by every path: nothing mixes devices, and results are those of the CPU.

A mix of devices is a MixedDevices error, whose message has the line.
"""

import pytest
import torch
from helpers.families import FAMILIES, SCALED, family_model
from helpers.second_device import NAME
from helpers.task_rows import GOOD, write
from helpers.tiny import EIGHT, folder_of, losses_of, randomise, rows_of, score_more, tiny

import tiedlora
from tiedlora.config.compose import read_config
from tiedlora.data.batching import collate
from tiedlora.data.encoding import Encoded
from tiedlora.export.folder import ExportOptions, export_run
from tiedlora.models import device as devices
from tiedlora.runs import library, run
from tiedlora.runs.verify import verify
from tiedlora.scoring.decoding import AnswerEnds, choice_log_likelihoods, decode
from tiedlora.training.loss import row_losses, target_loss

ROWS = [Encoded((3, 4, 5), (6, 7, 8, 1)), Encoded((9, 4), (12, 13, 1))]
SCALED_LAYOUT = tiedlora.Layout("model.layers", {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]})
WITHOUT_BASE = ("score.base=false", "score.metrics=[exact_match_strict]", "train.validation_rows=1")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_a_family_computes_as_on_the_cpu(family):
    found = {}
    for where in ("cpu", NAME):
        model = family_model(family)
        attached = tiedlora.attach(model, "TABuv", 4, layout=SCALED_LAYOUT if family in SCALED else None)
        randomise(attached.adapter, scale=0.2)
        model.to(where)
        batch = collate(ROWS, 1).to(torch.device(where))
        target_loss(model, batch).backward()
        gradients = [part.grad.cpu() for part in attached.trained_parts().values()]
        ends = AnswerEnds(tiny("tiny_llama").tokenizer, ["x"], 10)
        tokens = [output.ids for output in decode(model, [[3, 4, 5], [9]], ends)]
        likelihoods = choice_log_likelihoods(model, [[3, 4], [5]], [[[6, 7], [8]], [[1, 2, 3]]])
        found[where] = gradients, row_losses(model, batch), tokens, likelihoods
    for ours, theirs in zip(found[NAME][0], found["cpu"][0], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    for (ours, _), (theirs, _) in zip(found[NAME][1], found["cpu"][1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert found[NAME][2] == found["cpu"][2]
    for ours, theirs in zip(found[NAME][3], found["cpu"][3], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", [*EIGHT, "RaSA"])
def test_a_configuration_trains_as_on_the_cpu(short, tmp_path, name):
    here, there = (
        short(f"tying={name}", *WITHOUT_BASE),
        short(f"tying={name}", *WITHOUT_BASE, f"outputs={tmp_path}/cpu", "train.device=cpu"),
    )
    record, expected = run.main(here), run.main(there)
    assert (record.execution.device, expected.execution.device) == ("a second device", "cpu")
    assert record.run_id == expected.run_id
    assert losses_of(folder_of(here)) == pytest.approx(losses_of(folder_of(there)), rel=1e-5)
    ours, theirs = (rows_of(folder_of(each), "validation") for each in (here, there))
    assert [row.output for row in ours] == [row.output for row in theirs]


PATHS = {
    "bfloat16": ("train.dtype=bfloat16",),
    "gpt2": ("model=tiny_gpt2",),
    "dropout": ("tying.dropout=0.1", "train.recompute_activations=true"),
    "best": ("score.checkpoint=best", "train.validation_answers=2"),
    "skipping": ("train.skip_nonfinite=1", "train.clip=null"),
    "deterministic": ("train.deterministic=true",),
    "drift": ("score.drift=true", "score.splits=[validation,test]"),
    "reward": ("objective=reward", "objective.samples=2", "objective.ended_reward=0.5", "task.max_new_tokens=10"),
    "rslora": ("rank.scaling=rslora", "tying.layers=[1]"),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", PATHS)
def test_every_path_of_a_run_is_taken_on_the_device(short, name):
    config = short(*PATHS[name], *([] if name == "drift" else WITHOUT_BASE[2:]))
    assert run.main(config).execution.device == "a second device"
    assert len(rows_of(folder_of(config), "validation")) == 3


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("method", ["dora", "vera", "unilora", "tinylora"])
def test_an_arm_of_peft_moves_and_reloads_on_the_device(short, method):
    """Trained magnitudes, frozen buffers, indices, and one vector for all layers."""
    record = run.main(short(f"tying=peft/{method}", *WITHOUT_BASE))
    assert record.admission.moves
    assert record.admission.reload == 0


ROWS_OF = {
    "gsm8k": [{"question": f"What is {i} plus one?", "answer": f"{i}\n#### {i + 1}"} for i in range(9)],
    "hellaswag": [
        {**GOOD["hellaswag"], "ind": i, "ctx_a": f"Number {i}.", "endings": ["a", "bb", "c", "d"]} for i in range(9)
    ],
    "squad": [{**GOOD["squad"], "id": f"q{i}", "question": f"Who founded Rome {i}?"} for i in range(9)],
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("kind", ROWS_OF)
def test_every_kind_of_score_is_computed_on_the_device(short, tmp_path, kind):
    """A number, the likelihoods of choices, and a text."""
    taken = kind == "gsm8k"
    write(tmp_path / "rows", kind, *ROWS_OF[kind][: 9 if taken else 6], split="train")
    write(tmp_path / "rows", kind, *ROWS_OF[kind][6:], split="validation")
    words = (f"data_root={tmp_path}/rows", *(["task.validation_from_train=3"] if taken else []))
    config = short(*words, "score.base=false", "model.context=1024", task=kind)
    run.main(config)
    assert len(rows_of(folder_of(config), "validation")) == 3


@pytest.mark.usefixtures("device")
def test_a_finished_run_is_scored_verified_loaded_and_exported(short, script, tmp_path):
    config = short("score.splits=[]")
    run.main(config)
    folder = folder_of(config)
    (tmp_path / "text.txt").write_text("Some neutral text. " * 20)
    scores = score_more(folder, splits=["validation"], drift=True, forgetting=str(tmp_path / "text.txt"))
    assert scores.splits == ["validation", "forgetting"]
    assert [finding for finding in verify(folder.path) if finding.ok is False] == []
    code, out, err = script("scripts/generate.py", folder.path, "--prompt", "1 + 2")
    assert (code, "adapted" in out) == (0, True), err
    for form in ("peft", "merged"):
        options = ExportOptions(form=form, split="validation")
        export_run(folder, folder.finished_record(), read_config(folder.config_file), tmp_path / form, options)
    # An adapter that is read moves to the model.
    first = library.load(folder.path, device="auto")
    ids = torch.tensor([[1, 2, 3]], device=torch.device(NAME))
    expected = first.model(input_ids=ids).logits.detach().cpu()
    first.merge()
    assert torch.allclose(first.model(input_ids=ids).logits.cpu(), expected, atol=1e-4)
    first.unmerge()
    first.detach()
    adapters = tiedlora.AdapterSet(first.model)
    adapters.add("one", first.adapter)
    adapters.use("one")
    assert torch.equal(first.model(input_ids=ids).logits.cpu(), expected)
    adapters.use(None)


@pytest.mark.usefixtures("device")
def test_a_paused_run_continues_and_another_starts_from_it(short, tmp_path):
    whole, paused = (short(f"outputs={tmp_path}/{name}", *WITHOUT_BASE) for name in ("whole", "paused"))
    run.main(whole)
    paused.train.pause_after = 1
    assert run.main(paused) is None
    paused.train.pause_after = None
    run.main(paused)
    ours, theirs = ((folder_of(each).adapter / "adapter.safetensors").read_bytes() for each in (paused, whole))
    assert ours == theirs
    run.main(short(f"train.init_from={folder_of(whole).path}", *WITHOUT_BASE))


def test_if_memory_runs_out_passes_and_batches_are_halved(device, short, tmp_path):
    words = ("train.microbatch_size=null", "train.batch_size=8", *WITHOUT_BASE)
    plain = run.main(short(*words, f"outputs={tmp_path}/plain"))
    device.limit = device.largest * 2 // 3
    record = run.main(short(*words))
    assert record.training.halvings
    assert record.training.validation_loss_last == pytest.approx(plain.training.validation_loss_last, rel=1e-4)


@pytest.mark.usefixtures("device")
def test_the_device_is_there_by_name():
    assert devices.resolve_device("auto") == torch.device(NAME)
    assert devices.resolve_device(f"{NAME}:0").index == 0
    with pytest.raises(tiedlora.UserError, match="no such device here"):
        devices.resolve_device(f"{NAME}:1")
