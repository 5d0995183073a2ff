"""Models that name more tokens that end an answer than their tokenizer does, in generation_config.json."""

import json
import string

import pytest
from helpers.tiny import folder_of, rows_of, saved_tiny, score_more, tiny

from tiedlora.models.base_model import BaseModel
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import loading, run, verify
from tiedlora.runs.inputs import SingleSlotCache

ENDS = sorted(tiny("tiny_llama").tokenizer(string.ascii_letters, add_special_tokens=False).input_ids)
"""Tokens that end an answer: the tiny tokenizer has a token for each letter."""


@pytest.fixture
def config(tiny_config, tmp_path, monkeypatch):
    saved_tiny("tiny_llama", tmp_path / "model")
    ends = [tiny("tiny_llama").tokenizer.eos_token_id, *ENDS]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    # No model in memory, as in another process.
    monkeypatch.setattr(loading, "_BASE", SingleSlotCache())
    return tiny_config("model.source=hub", f"model.path={tmp_path}/model", "score.metrics=[exact_match_strict]")


def has_letters(folder: RunFolder, split: str, base: bool = False) -> bool:
    return any(letter in string.ascii_letters for output, _ in answers(folder, split, base) for letter in output)


def answers(folder: RunFolder, split: str, base: bool = False) -> list[tuple[str, str]]:
    return [(row.output, row.ended) for row in rows_of(folder, split, base=base)]


def test_only_the_models_own_ends_count():
    base = tiny("tiny_llama")
    settings = base.model.generation_config
    eos = base.tokenizer.eos_token_id
    for named, from_class, more in (
        (None, False, ()),
        (eos, False, ()),
        (7, False, (7,)),
        # transformers fills in the number of the model's class where the files name none.
        (7, True, ()),
        ([9, eos, 7], True, (7, 9)),
        ([9, -1, 10**6], False, (9,)),
    ):
        settings.eos_token_id, settings._from_model_config = named, from_class
        assert base.more_ends == more


def test_answers_end_at_every_end_of_the_model_and_the_record_names_them(config):
    record, folder = run.main(config), folder_of(config)
    assert record.more_ends == folder.record().more_ends == ENDS
    assert not has_letters(folder, "validation")
    assert not has_letters(folder, "validation", base=True)
    assert "end" in {ended for _, ended in answers(folder, "validation", base=True)}
    assert not [finding for finding in verify.verify(folder.path, rows=100) if finding.ok is False]


def test_a_run_of_an_earlier_version_keeps_its_ends(config, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(BaseModel, "more_ends", ())
        assert run.main(config).more_ends is None
    folder = folder_of(config)
    before = answers(folder, "validation", base=True)
    assert has_letters(folder, "validation", base=True)
    score_more(folder, splits=["validation", "test"])
    assert answers(folder, "validation", base=True) == before
    assert has_letters(folder, "test", base=True)
    assert not [finding for finding in verify.verify(folder.path, rows=100) if finding.ok is False]
