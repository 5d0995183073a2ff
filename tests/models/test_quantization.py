"""model.quantization: gradients, footprint, resume, scoring and export on a base of 4 or 8 bits; merging is refused."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import model_option, randomise
from peft import PeftModel
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import tiedlora
from tiedlora.adapter import attach
from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.data.batching import microbatches
from tiedlora.data.encoding import Encoded
from tiedlora.errors import UserError
from tiedlora.export.folder import ExportOptions, export_run
from tiedlora.models.base_model import load_base
from tiedlora.places import PROJECT
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_run_scores
from tiedlora.runs import run, trainer
from tiedlora.runs.trainer import can_be_compiled
from tiedlora.training import compiling
from tiedlora.training.loss import row_losses, target_loss

bitsandbytes = pytest.importorskip("bitsandbytes")
dequantize_4bit = bitsandbytes.functional.dequantize_4bit
CPU = torch.device("cpu")


def quantised(name: str, kind: str, dtype: str = "bfloat16"):
    config = compose_config([f"model={name}", f"model.quantization={kind}"]).model
    return load_base(config, dtype, CPU, PROJECT / ".cache")


def dequantised(name: str, base, dtype: str = "bfloat16"):
    """The plain model, with the values that the 4-bit weights of `base` stand for."""
    plain = load_base(model_option(name), dtype, CPU, PROJECT / ".cache")
    for path, module in base.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            there = plain.model.get_submodule(path)
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            there.weight.data.copy_(values.T if isinstance(there, Conv1D) else values)
    return plain


def gradients(base, evaluations: int = 0):
    """The loss and the gradients of a random adapter, after some evaluation passes. The base stays as it was."""
    rows = [Encoded(tuple(range(5, 30)), tuple(range(40, 52))), Encoded(tuple(range(9, 20)), tuple(range(60, 67)))]
    (batch,) = microbatches(rows, base.tokenizer.eos_token_id)
    attached = attach(base.model, "TABuv", 4)
    randomise(attached.adapter)
    for _ in range(evaluations):
        row_losses(base.model, batch)
    loss = target_loss(base.model, batch)
    loss.backward()
    parts = {name: part.grad for name, part in attached.adapter.trained_parts().items()}
    attached.detach()
    return loss.detach(), parts


def same(one, two) -> bool:
    return torch.equal(one[0], two[0]) and all(torch.equal(one[1][name], two[1][name]) for name in one[1])


@pytest.mark.parametrize(
    ("name", "dtype"), [("tiny_llama", "float32"), ("tiny_gpt2", "float32"), ("tiny_gpt2", "bfloat16")]
)
def test_gradients_through_nf4_are_those_through_the_dequantised_weights(name, dtype):
    """Also after an evaluation pass: bitsandbytes would repack the weights in it, and drop gradients."""
    base = quantised(name, "nf4", dtype)
    plain = dequantised(name, base, dtype)
    through_nf4, through_plain = gradients(base), gradients(plain)
    # A Conv1D multiplies in another order than a linear layer.
    tolerance = 0.0 if name == "tiny_llama" else {"float32": 1e-4, "bfloat16": 5e-2}[dtype]
    for part, expected in through_plain[1].items():
        assert (through_nf4[1][part] - expected).abs().max() <= tolerance * expected.abs().max(), part
        assert expected.abs().max() > 0
    assert same(through_nf4, gradients(base, evaluations=1))


def test_int8_passes_the_gradient_of_its_dequantised_weight():
    """int8 rounds activations too, so only the gradient of one layer is that of the dequantised weight."""
    base = quantised("tiny_llama", "int8", "float32")
    layer = base.model.model.layers[0].self_attn.q_proj
    # A pass moves the weight to the layer's state, and loading has made one.
    values = layer.state.CB.float() * layer.state.SCB.unsqueeze(1) / 127
    plain = load_base(model_option("tiny_llama"), "float32", CPU, Path("unused")).model.model.layers[0].self_attn.q_proj
    assert (values - plain.weight).abs().max() < 0.01 * values.abs().max()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, values.sum(0).expand_as(x), rtol=1e-5, atol=1e-6)
    assert same(gradients(base), gradients(base, evaluations=2)), "an evaluation pass changes nothing"


@pytest.mark.filterwarnings("ignore:You passed")
@pytest.mark.parametrize(("stored", "wished"), [("nf4", None), ("nf4", "int8"), ("int8", "nf4")])
def test_a_folder_of_quantised_weights_is_what_it_is(stored, wished, tmp_path):
    base = quantised("tiny_llama", stored, "float32")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    config = replace(model_option("tiny_llama"), source="hub", path=str(tmp_path), quantization=wished)
    with pytest.raises(UserError, match=f"quantization={wished or 'null'}: the loaded weights are in {stored}; set it"):
        load_base(config, "float32", CPU, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
class TestRun:
    @pytest.fixture
    def config(self, kind, tiny_config):
        return tiny_config(f"model.quantization={kind}")

    def test_a_stopped_run_goes_on_exactly(self, config, tiny_config, finish, kind, tmp_path):
        """float32, so that plain weights would be scored merged: quantised ones are scored unmerged."""
        whole = finish(config)
        assert whole.base.quantization == kind
        assert whole.run_id != run_id(tiny_config())
        tensors = load_file(tmp_path / "outputs" / whole.run_id / "adapter" / "adapter.safetensors")
        assert whole.training.validation_loss_last < whole.training.validation_loss_first, "it trained"
        config.outputs = str(tmp_path / "again")
        config.train.pause_after = 3
        assert run.main(config) is None
        config.train.pause_after = None
        again = run.main(config)
        resumed = load_file(tmp_path / "again" / again.run_id / "adapter" / "adapter.safetensors")
        assert all(torch.equal(tensors[name], resumed[name]) for name in tensors)
        one, two = (read_run_scores(RunFolder(tmp_path / each / again.run_id)) for each in ("outputs", "again"))
        assert one.metrics("validation") == two.metrics("validation")

    def test_exports_keep_the_adapter_apart(self, config, finish, kind, tmp_path, ids):
        record = finish(config)
        folder = RunFolder(tmp_path / "outputs" / record.run_id)
        with pytest.raises(UserError, match=rf"^--to merged: .*model.quantization={kind}.*--to peft") as refused:
            export_run(folder, record, config, tmp_path / "merged", ExportOptions("merged"))
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "merged").exists()
        export_run(folder, record, config, tmp_path / "peft", ExportOptions("peft"))
        assert "BitsAndBytesConfig(load_in_" in (tmp_path / "peft" / "README.md").read_text()
        attached = tiedlora.load(folder.path)
        ours = attached.model(ids).logits
        twin = load_base(config.model, "float32", CPU, Path("unused")).model
        theirs = PeftModel.from_pretrained(twin, tmp_path / "peft")(ids).logits
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_is_refused_and_changes_nothing(kind, ids):
    attached = attach(quantised("tiny_llama", kind, "float32").model, "TABuv")
    randomise(attached.adapter)
    adapted = attached.model(ids).logits
    for merge in (attached.merge, attached.fuse):
        with pytest.raises(UserError, match=r"^merge: .*q_proj is quantised.*keep the adapter apart"):
            merge()
    assert torch.equal(attached.model(ids).logits, adapted)


def test_repacked_weights_are_refused():
    """Simulated, because bitsandbytes repacks only on a processor with AVX512-bf16."""
    model = quantised("tiny_llama", "nf4").model
    layer = model.model.layers[0].mlp.up_proj
    assert layer.support_avx512bf16_for_cpu is False
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match=r"repacked .*up_proj.*load the model again"):
        attach(model, "TABuv")


def test_without_bitsandbytes_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"^model.quantization=nf4: needs bitsandbytes.*tiedlora\[quantization\]"):
        quantised("tiny_llama", "nf4")


@pytest.mark.parametrize(
    ("kind", "device", "compiles"), [("int8", "cuda", False), ("int8", "cpu", True), ("nf4", "cuda", True)]
)
def test_int8_is_compiled_on_a_cpu_alone(kind, device, compiles):
    """On a GPU, bitsandbytes breaks a block into many graphs."""
    config = compose_config(["model=tiny_llama", f"model.quantization={kind}"]).model
    assert can_be_compiled(config, torch.device(device)) is compiles


def test_the_blocks_of_a_run_are_compiled_only_if_they_can_be(tiny_config, monkeypatch):
    wishes, short = [], ("train.compile=always", "train.steps=2", "score.splits=[]")
    monkeypatch.setattr(compiling, "decide", lambda wish, *_: wishes.append(wish))
    run.main(tiny_config(*short))
    monkeypatch.setattr(trainer, "can_be_compiled", lambda *_: False)
    run.main(tiny_config(*short, "seed=1"))
    assert wishes == ["always", "never"]
