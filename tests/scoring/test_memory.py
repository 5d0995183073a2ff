"""Memory runs out while scoring: the batches are halved, for the adapted model and the base model alike."""

import threading
from pathlib import Path

import pytest
import torch
from helpers.tiny import folder_of, little_memory, randomise, rows_of, tiny

from tiedlora.adapter import attach
from tiedlora.errors import UserError
from tiedlora.page import write
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_score_record
from tiedlora.runs import run, verify
from tiedlora.scoring.split import scored_model, with_halved_batches


def test_the_limit_on_tokens_is_halved_too(tiny_config):
    score = with_halved_batches(tiny_config("score.batch_size=4", "score.batch_tokens=100"), 3).score
    assert (score.batch_size, score.batch_tokens) == (1, 12)


def halvings(folder: RunFolder) -> int:
    return read_score_record(folder.scores_file("validation", "answers")).batch_halvings


def test_a_split_is_scored_in_halved_batches_with_its_base(tiny_config, tmp_path, monkeypatch, caplog):
    threes = tiny_config(f"outputs={tmp_path}/threes", "score.batch_size=3", "train.steps=2")
    run.main(threes)
    config, second = (tiny_config("score.batch_size=12", "train.steps=2", f"seed={seed}") for seed in (0, 1))
    sizes, threads = little_memory(monkeypatch, rows=4), threading.active_count()
    run.main(config)
    assert threading.active_count() == threads, "the clock of a progress bar goes on"
    assert halvings(folder_of(config)) == 2
    assert "score.batch_size=12 is halved to 6" in caplog.text
    assert "score.batch_size=6 is halved to 3" in caplog.text
    assert sizes == [3] * 8, "the base's batches, and the adapted model's"
    for base in (False, True):
        ours, theirs = (rows_of(folder_of(each), "validation", base=base) for each in (config, threes))
        assert ours == theirs
    # Another arm finds the base's scores of batches that fit.
    sizes.clear()
    run.main(second)
    assert halvings(folder_of(second)) == 2
    assert sizes == [3] * 4
    # The record says enough to make the outputs again, and the report marks the numbers.
    monkeypatch.undo()
    findings = verify.verify(folder_of(config).path, rows=12, cache=Path(config.cache))
    assert [finding.check for finding in findings if finding.ok is not True] == ["result.json", "first lines"]
    (group,) = write.build([Path(config.outputs)]).groups
    assert "too little memory: seeds 0, 1 scored in smaller batches than score.batch_size" in group.marks


def test_no_memory_for_one_row_keeps_the_trained_run(tiny_config, monkeypatch):
    config = tiny_config("train.steps=2")
    sizes = little_memory(monkeypatch, rows=0)
    with pytest.raises(UserError, match=r"^score\.batch_size: memory runs out even at 1; the adapter and its"):
        run.main(config)
    assert not sizes
    folder = folder_of(config)
    assert folder.state() == "failed"
    assert "Traceback" in folder.error_file.read_text()
    monkeypatch.undo()
    trained = folder.path / "adapter" / "adapter.safetensors"
    before = trained.read_bytes()
    run.main(config)
    assert folder.state() == "done"
    assert not folder.error_file.exists()
    assert halvings(folder) == 0
    assert trained.read_bytes() == before


def test_no_memory_in_the_middle_of_a_merge_leaves_the_weights_as_they_were(tiny_config, monkeypatch, ids):
    base = tiny("tiny_llama")
    attached = attach(base.model, "TABuv", 4)
    randomise(attached.adapter)
    expected = base.model(ids).logits
    clone, clones = torch.Tensor.clone, []

    def fails_at_the_fourth_weight(tensor, *rest, **more):
        clones.append(1)
        if len(clones) == 4:
            raise MemoryError
        return clone(tensor, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", fails_at_the_fourth_weight)
        with pytest.raises(MemoryError), scored_model(attached, tiny_config()):
            pass
    assert attached.active
    assert torch.equal(base.model(ids).logits, expected)
