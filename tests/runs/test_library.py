"""Loading runs and adapters, several adapters on one base, training that starts from an adapter, generate.py."""

import copy
import io
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import logits, randomise, tiny, tying_option
from safetensors.torch import load_file

import tiedlora
from tiedlora import UserError, tying
from tiedlora.adapter import attach
from tiedlora.commands import generate
from tiedlora.config.identity import run_id
from tiedlora.data.encoding import Encoder
from tiedlora.places import CONF
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import library, run


def test_the_named_arms_are_the_options_of_conf():
    of_other_methods = {"peft", "full"}
    files = {path.stem for path in (CONF / "tying").glob("*.yaml")} - of_other_methods
    assert files == {*tying.NAMES, *tying.OTHER_NAMES}
    for name in files:
        ours, option = asdict(tiedlora.named(name)), asdict(tying_option(name))
        # What only another method has is null.
        assert all(option.pop(key) is None for key in set(option) - set(ours))
        assert ours == option


class TestAdapters:
    def test_several_take_turns_on_one_base(self, ids):
        model = tiny("tiny_llama").model
        plain, expected = logits(model, ids), {}
        adapters = tiedlora.AdapterSet(model)
        for seed, name in enumerate(("LoRA", "Tuv", "TABuv"), start=1):
            attached = attach(model, name, 4)
            randomise(attached.adapter, seed)
            expected[name] = logits(model, ids)
            attached.detach()
            adapters.add(name, attached.adapter)
        assert adapters.names == ["LoRA", "Tuv", "TABuv"]
        for name in ("Tuv", "LoRA", "TABuv", "Tuv"):
            adapters.use(name)
            assert adapters.active == name
            assert torch.equal(logits(model, ids), expected[name])
        adapters.use("LoRA").merge()
        adapters.use(None)
        assert torch.equal(logits(model, ids), plain)
        adapters.use("Tuv")
        adapters.remove("Tuv")
        assert torch.equal(logits(model, ids), plain)

    def test_names_that_are_taken_or_unknown_and_another_models_adapter_are_refused(self):
        adapters = tiedlora.AdapterSet(tiny("tiny_llama").model)
        adapter = attach(tiny("tiny_gpt2").model, "TAB", 4).adapter
        adapters.add("a", adapter)
        with pytest.raises(UserError, match="'a' is taken"):
            adapters.add("a", adapter)
        for call in (adapters.use, adapters.remove):
            with pytest.raises(UserError, match="there is no 'b'; there are a"):
                call("b")
        with pytest.raises(UserError, match="family=gpt2"):
            adapters.use("a")
        assert adapters.active is None
        with pytest.raises(UserError, match=r"'c' is of Attached; give a TiedAdapter \(attached\.adapter\)"):
            adapters.add("c", attach(tiny("tiny_llama").model, "TAB", 4))

    def test_a_specification_and_a_layout_may_be_plain_data(self, ids):
        models = [tiny("tiny_llama").model for _ in range(2)]
        spec, layout = tiedlora.named("TABuv"), tiedlora.Layout("model.layers", {"v": ["self_attn.v_proj"]})
        spec.targets = ["v"]
        outputs = []
        for model, kind in zip(models, (lambda value: value, asdict), strict=True):
            randomise(attach(model, kind(spec), 4, layout=kind(layout)).adapter)
            outputs.append(logits(model, ids))
        assert torch.equal(*outputs)
        with pytest.raises(UserError, match=r"^tying\.AA: unknown key"):
            attach(tiny("tiny_llama").model, {"AA": {}}, 4)

    def test_the_values_of_another_sharing_are_refused(self, tmp_path):
        attached = attach(tiny("tiny_llama").model, "TABuv", 4)
        attached.save(tmp_path)
        other = attach(tiny("tiny_llama").model, "LoRA", 4)
        with pytest.raises(UserError, match="its parts have other names or shapes"):
            other.load_values(str(tmp_path))
        attached.load_values(str(tmp_path))


class TestRuns:
    @pytest.fixture
    def finished(self, tiny_config, finish, tmp_path):
        result = finish(tiny_config("tying=TAB"))
        return tmp_path / "outputs" / result.run_id

    def test_a_run_is_loaded_with_its_base(self, finished, ids):
        attached = tiedlora.load(finished)
        model = tiedlora.base_of(finished).model
        assert not torch.equal(logits(attached.model, ids), logits(model, ids))
        tiedlora.load(finished / "adapter", model)
        assert torch.equal(logits(attached.model, ids), logits(model, ids))
        with pytest.raises(UserError, match="are those of a base model that load"):
            tiedlora.load(finished, model, device="cuda")
        for path, dtype, says in (("adapter", None, "pass the base model"), ("", torch.half, "torch.float16: choose")):
            with pytest.raises(UserError, match=says):
                tiedlora.load(finished / path, dtype=dtype)

    def test_the_cache_of_the_environment_is_taken_before_the_runs_own(self, finished, monkeypatch):
        monkeypatch.setattr(library, "load_base", lambda *arguments: arguments[-1])
        of_run = library.base_of(finished)
        monkeypatch.setenv("TIEDLORA_CACHE", "/elsewhere")
        assert [str(library.base_of(finished, cache=cache)) for cache in (None, "/here")] == ["/elsewhere", "/here"]
        assert of_run == Path(library.config_of(finished).cache)

    def test_training_goes_on_from_a_saved_adapter(self, finished, tiny_config, tmp_path):
        """A TABuv_b0 run can start from a TAB adapter: u and v start at one."""
        first = RunFolder(finished).record()
        config = tiny_config("tying=TABuv_b0", f"train.init_from={finished}")
        with pytest.raises(UserError, match="holds another adapter than when this run was composed"):
            run.main(replace(config, train=replace(config.train, init_digest="0" * 64)))
        second = run.main(config)
        start, end = (record.training for record in (second, first))
        assert start.validation_loss_first == pytest.approx(end.validation_loss_last, abs=1e-6)
        assert run_id(config) != run_id(tiny_config("tying=TABuv_b0"))
        saved = load_file(tmp_path / "outputs" / second.run_id / "adapter" / "adapter.safetensors")
        assert not torch.equal(saved["qkv.u"], torch.ones_like(saved["qkv.u"]))

    def test_an_adapter_of_a_program_needs_the_same_architecture(self, finished, tiny_config, tmp_path, ids, caplog):
        """`save_pretrained` knows no digest of the model, so the weights cannot be compared."""
        base = tiedlora.base_of(finished)
        attached = attach(base.model, "TAB", 8)
        randomise(attached.adapter)
        attached.save_pretrained(tmp_path / "saved")
        adapted = logits(base.model, ids)
        attached.detach()
        tiedlora.load(tmp_path / "saved", base)
        assert torch.equal(logits(base.model, ids), adapted)
        config = tiny_config("tying=TAB", f"train.init_from={tmp_path}/saved", "score.splits=[]")
        assert run.main(config) is not None
        assert len([entry for entry in caplog.messages if "did not say which weights its base had" in entry]) == 2
        other = tiny_config("tying=TAB", f"train.init_from={tmp_path}/saved", "model=tiny_gpt2")
        with pytest.raises(UserError, match=r"saved: the adapter is for a model with family=llama, .* family=gpt2"):
            run.main(other)

    def test_identity_is_the_adapters_content(self, finished, tiny_config, tmp_path):
        shutil.copytree(finished / "adapter", tmp_path / "elsewhere")
        ids = {
            run_id(tiny_config("tying=TABuv_b0", f"train.init_from={path}"))
            for path in (finished, tmp_path / "elsewhere")
        }
        assert len(ids) == 1
        # The run's own record does not need the adapter any more.
        config = tiny_config("tying=TABuv_b0", f"train.init_from={finished}")
        shutil.rmtree(finished)
        again = tiny_config(
            "tying=TABuv_b0", f"train.init_from={finished}", f"train.init_digest={config.train.init_digest}"
        )
        assert {run_id(again)} == ids

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["tying=Tuv"], r"qkv.v is missing there, and \(3, 64\) here"),
            (["tying=TAB", "rank=r2"], r"rank\.r is 8 there, and 2 here"),
            (["tying=TAB", "rank.alpha=16"], r"the scale \(rank\.alpha, rank\.scaling\) is 1\.0 there, and 2\.0 here"),
            (["tying=TAB", "tying.layers=[0,2]"], r"tying\.layers is \[0, 1, 2\] there, and \[0, 2\] here"),
            (["tying=RaSA"], r"tying\.terms is \[''\] there, and \['private', 'shared'\] here"),
            (["tying=LoRA"], r"tying\.A\.share \(the layers that share one\) is 3 there, and 1 here"),
            (["tying=TAB", "tying.targets=[qkv,o]"], r"o.A is missing there"),
            (["tying=TAB", "model=tiny_gpt2"], r"was trained on"),
            (["tying=TAB", "tying.A.trained=false", "tying.A.init=0.5"], r"qkv\.A has other values there, .* a froz"),
        ],
    )
    def test_what_does_not_fit_is_named(self, finished, tiny_config, overrides, says):
        with pytest.raises(UserError, match=says):
            run.main(tiny_config(*overrides, f"train.init_from={finished}"))

    def test_generate_shows_base_and_adapted(self, finished, script):
        code, out, _ = script("scripts/generate.py", finished, "--prompt", "1 + 1", "--prompt", "2 + 2")
        assert code == 0
        assert "Question: 1 + 1\nAnswer:" in out
        assert out.count("| adapted") == 2

    def test_generate_fills_the_template_of_own_rows(self, tiny_config, finish, script, tmp_path):
        rows = tmp_path / "rows.csv"
        rows.write_text("Customer text,topic\n" + "".join(f"{number},{number % 3}\n" for number in range(60)))
        words = (f"task.files={rows}", 'task.prompt="{Customer text}? {{a}} {Customer text}"', 'task.target=" {topic}"')
        config = tiny_config(*words, "task.metrics=[exact_match]", task="rows")
        code, out, err = script("scripts/generate.py", tmp_path / "outputs" / finish(config).run_id, "--prompt", "7")
        assert code == 0, err
        assert out.startswith("7? {a} 7\n")

    def test_generate_asks_a_run_of_chat_messages_with_one_turn(self, finished, tiny_config):
        config = tiny_config("tying=TAB")
        config.task = replace(config.task, chat_template=True, messages="m")
        tokenizer = copy.deepcopy(tiny("tiny_llama").tokenizer)
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        encoder = Encoder(tokenizer, config.task, context=512)
        assert len(generate.answers(tiedlora.load(finished), encoder, config, "Two?", 2)) == 2

    @pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
    def test_typed_bytes_that_are_no_text_are_one_line(self, finished, script, monkeypatch, errors):
        typed = io.TextIOWrapper(io.BytesIO(b"1 + 1\n1 + \xff\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", typed)
        code, _, err = script("scripts/generate.py", finished)
        assert (code, err) == (2, "error: standard input: has bytes that are no UTF-8; give the text in UTF-8\n")
