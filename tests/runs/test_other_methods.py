"""Runs of other methods: record, exact resume, kill, more scores, verification, export and report."""

import pytest
from helpers import processes
from helpers.forks import killed_after
from helpers.leak import BiasArm, MeanArm
from helpers.tiny import folder_of
from safetensors.torch import load_file

from tiedlora import other_methods
from tiedlora.adapter import arms
from tiedlora.config.compose import read_config
from tiedlora.errors import UserError
from tiedlora.export.folder import ExportOptions, export_run
from tiedlora.places import PROJECT
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_run_scores
from tiedlora.runs import library, run
from tiedlora.runs.verify import verify


@pytest.fixture
def third_kinds():
    """Two kinds of arms that no file of src/ knows."""
    arms.register("bias", BiasArm)
    arms.register("mean", MeanArm)
    yield
    other_methods.REGISTERED.clear()


def adapter_bytes(folder: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.adapter.iterdir()}


def test_a_method_of_peft_is_a_run_like_any_other(tiny_config, tmp_path):
    words = ["tying=peft/vera", "tying.arguments.r=8", "score.splits=[validation]"]
    record = run.main(tiny_config(*words, f"outputs={tmp_path}/whole"))
    whole = folder_of(tiny_config(*words, f"outputs={tmp_path}/whole"))
    assert record == whole.record()
    assert record.admission.marks() == {}
    assert record.admission.moves
    assert record.trainable_params == 3 * 3 * 8 + 3 * (32 + 16 + 16)  # L targets r, and L d_out of q, k and v
    assert record.stored_params > record.trainable_params
    assert set(record.files) == {f"adapter/{name}" for name in adapter_bytes(whole)}
    # Killed after its first checkpoint, the same command continues to the same bytes.
    config = tiny_config(*words, f"outputs={tmp_path}/killed")
    killed_after(lambda: run.main(config), lambda state: state.step > 0)
    assert folder_of(config).state() == "interrupted"
    again = run.main(tiny_config(*words, f"outputs={tmp_path}/killed"))
    assert adapter_bytes(folder_of(config)) == adapter_bytes(whole)
    assert again.training.validation_loss_last == record.training.validation_loss_last
    ours, theirs = (read_run_scores(folder).metrics("validation") for folder in (folder_of(config), whole))
    assert ours == theirs
    # It is verified, scored on another split, loaded, exported and reported.
    assert [finding for finding in verify(whole.path) if finding.ok is False] == []
    scored = library.load(whole.path)
    assert len(scored.trained_parts()) == 2 * 9
    scored.detach()
    options = ExportOptions(form="peft", split="validation")
    export_run(whole, record, read_config(whole.config_file), tmp_path / "exported", options)
    files = {path.name for path in (tmp_path / "exported").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    assert "VeraConfig of PEFT" in (tmp_path / "exported" / "README.md").read_text()
    with pytest.raises(UserError, match="--to merged"):
        export_run(
            whole, record, read_config(whole.config_file), tmp_path / "m", ExportOptions(form="merged", split="test")
        )


@pytest.mark.usefixtures("third_kinds")
def test_a_third_kind_is_trained_scored_verified_and_exported(tiny_config, tmp_path):
    config = tiny_config("tying=peft", "tying.method=bias", "tying.name=bias")
    record = run.main(config)
    assert record.run_id.startswith("bias-")
    assert record.trainable_params == 32
    assert record.training.validation_loss_last < record.training.validation_loss_first
    assert set(read_run_scores(folder_of(config)).metrics("validation")) >= {"exact_match_strict", "target_loss"}
    assert load_file(folder_of(config).adapter / "adapter.safetensors")["bias"].abs().sum() > 0
    assert [finding for finding in verify(folder_of(config).path) if finding.ok is False] == []
    # PEFT does not know it, but its own program loads a copy of it.
    with pytest.raises(UserError, match="--to peft: PEFT does not know bias"):
        export_run(folder_of(config), record, config, tmp_path / "peft", ExportOptions(form="peft"))
    assert not (tmp_path / "peft").exists()
    export_run(folder_of(config), record, config, tmp_path / "card", ExportOptions(form="hub-card"))
    assert "PEFT" not in (tmp_path / "card" / "README.md").read_text()
    attached = library.load(tmp_path / "card", library.base_of(folder_of(config).path))
    assert attached.trained_parts()["bias"].abs().sum() > 0


@pytest.mark.usefixtures("third_kinds")
def test_the_loss_of_what_is_not_causal_is_refused_before_training(tiny_config):
    config = tiny_config("tying=peft", "tying.method=mean")
    with pytest.raises(UserError, match=r"is not causal .*score\.metrics=\[METRIC\]"):
        run.main(config)
    assert not folder_of(config).path.exists()
    record = run.main(tiny_config("tying=peft", "tying.method=mean", "score.metrics=[exact_match_strict]"))
    assert list(record.admission.marks()) == ["not causal"]
    with pytest.raises(UserError, match="is not causal"):
        run.main(tiny_config("tying=peft", "tying.method=mean", "score.splits=[test]"))


@pytest.mark.slow
def test_arms_stand_beside_ours_in_a_report(tiny_config, tmp_path):
    for seed in (0, 1):
        for tying in ("tying=LoRA", "tying=peft/unilora"):
            run.main(tiny_config(tying, f"seed={seed}", "budget=768"))
    program = (
        "import runpy, sys; sys.argv[0] = 'report.py'\n"
        f"runpy.run_path({str(PROJECT / 'scripts/report.py')!r}, run_name='__main__')\n"
        "assert not {'peft', 'bitsandbytes'} & set(sys.modules)"
    )
    words = [tiny_config().outputs, "--out", str(tmp_path / "report")]
    done = processes.run_python("-c", program, *words)
    # What these packages print when they are imported is no business of a report's reader.
    assert (done.returncode, done.stderr) == (0, "")
    text = "".join(path.read_text() for path in (tmp_path / "report").glob("*.csv"))
    assert "peft/unilora" in text
    assert "starts with other logits than the base model" in text
