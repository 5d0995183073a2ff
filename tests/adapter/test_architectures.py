"""Every family of models: where Q, K and V are; outputs and gradients against the formula; merging."""

import pytest
import torch
from helpers.families import FAMILIES, family_model, model_of_images
from helpers.tiny import EIGHT, logits, randomise
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiedlora
from tiedlora import Layout, named
from tiedlora.adapter import architectures, attach, load
from tiedlora.errors import UserError

RANK, ALPHA = 4, 6.0
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def literal_weights(model, attached):
    """Every adapted weight with its update, computed by the paper's formula and differentiable in the parts.

    The layouts are written by hand here for each family; nothing of architectures.py is used.
    """
    a = attached.adapter.architecture
    parts = attached.adapter.targets["qkv"]
    weights = {}
    for layer in range(a.layers):
        A, B = parts.A[layer // parts.shares["A"]], parts.B[layer // parts.shares["B"]]
        u = parts.u[layer] if parts.u is not None else torch.ones(RANK)
        v = parts.v[layer] if parts.v is not None else torch.ones(len(B))
        update = (ALPHA / RANK) * torch.diag(v) @ B @ torch.diag(u) @ A
        d_q, d_kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        if a.family == "gpt2":
            named_updates = {f"transformer.h.{layer}.attn.c_attn": update.T}
        elif a.family == "phi3":
            named_updates = {f"model.layers.{layer}.self_attn.qkv_proj": update}
        elif a.family == "gpt_neox":
            heads = zip(*(block.split(a.head_dim) for block in update.split(d_q)), strict=True)
            mixed = torch.cat([block for head in heads for block in head])
            named_updates = {f"gpt_neox.layers.{layer}.attention.query_key_value": mixed}
        else:
            blocks = zip("qkv", update.split([d_q, d_kv, d_kv]), strict=True)
            named_updates = {f"model.layers.{layer}.self_attn.{name}_proj": block for name, block in blocks}
        for path, value in named_updates.items():
            weights[f"{path}.weight"] = model.get_submodule(path).weight + value
    return weights


@pytest.mark.parametrize("name", [*EIGHT, "TAB in twos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_the_literal_update(family, name, ids):
    model, spec = family_model(family), named(name.split()[0])
    if name not in EIGHT:
        # Of three layers, the last one does not share.
        spec.A.share = spec.B.share = 2
    before = logits(model, ids)
    attached = attach(model, spec, RANK, ALPHA)
    assert torch.equal(logits(model, ids), before), "the untrained adapter changes a logit"
    randomise(attached.adapter, scale=0.25)
    parts = attached.adapter.trained_parts()

    ours = model(ids).logits
    weighting = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    our_gradients = torch.autograd.grad((ours * weighting).sum(), list(parts.values()))
    attached.disable()
    literal = torch.func.functional_call(model, literal_weights(model, attached), (ids,)).logits
    gradients = torch.autograd.grad((literal * weighting).sum(), list(parts.values()))
    attached.enable()

    assert (ours - before).abs().max() > 0.1
    assert (ours - literal).abs().max() <= 1e-5 * literal.abs().max()
    for key, mine, theirs in zip(parts, our_gradients, gradients, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max(), key
    attached.merge()
    assert (logits(model, ids) - ours).abs().max() <= 1e-5 * ours.abs().max()
    attached.detach()
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("target", ["q", "k", "v"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_reaches_what_attention_takes_as_that_part(family, target, ids, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def probe(module, query, key, value, *args, **kwargs):
        seen.append({"q": query.detach(), "k": key.detach(), "v": value.detach()})
        # Only Gemma 2's eager function caps the attention scores, which does not matter here.
        return attention(module, query, key, value, *args, **{**kwargs, "softcap": None})

    # A known name is used, so that transformers makes the masks for it.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "eager", probe)
    model = family_model(family, attn_implementation="eager")
    spec = named("TABuv")
    spec.targets = [target]
    logits(model, ids)
    plain = seen[0]
    seen.clear()
    randomise(attach(model, spec, RANK).adapter)
    logits(model, ids)
    changed = {part for part in "qkv" if not torch.equal(plain[part], seen[0][part])}
    assert changed == {target}
    # Every head must change: with interleaved heads, a wrong block would change q, k and v of some heads.
    assert (plain[target] != seen[0][target]).flatten(2).any(-1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_can_be_adapted(family, ids):
    model = family_model(family)
    before = logits(model, ids)
    for target in architectures.FAMILIES[family].sites:
        spec = named("TABuv")
        spec.targets = [target]
        attached = attach(model, spec, RANK)
        randomise(attached.adapter, scale=0.25)
        adapted = logits(model, ids)
        assert (adapted - before).abs().max() > 1e-2, target
        attached.merge()
        assert (logits(model, ids) - adapted).abs().max() <= 1e-5 * adapted.abs().max(), target
        attached.detach()
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    "model",
    [
        "gpt2",
        nn.Linear(3, 3),
        BertModel(BertConfig(**SIZES)),
        LlamaModel(LlamaConfig(**SIZES)),
        LlamaForSequenceClassification(LlamaConfig(**SIZES)),
        T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=64, vocab_size=50)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_what_is_no_causal_language_model_is_named(model):
    with pytest.raises(UserError, match=rf"attach: {type(model).__name__} is no causal language model") as caught:
        attach(model, "TABuv", rank=2)
    assert "\n" not in str(caught.value)
    assert "AutoModelForCausalLM" in str(caught.value)


class TestUnknownFamilies:
    """A model of the OPT family: q, k and v are three modules with other names."""

    LAYOUT = Layout(
        layers="model.decoder.layers",
        sites={"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o": ["self_attn.out_proj"]},
    )

    @pytest.fixture
    def model(self):
        numbers = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
        config = AutoConfig.for_model("opt", vocab_size=260, max_position_embeddings=64, **numbers)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def test_the_error_lists_candidates_and_named_by_hand_it_saves_and_loads(self, model, ids, tmp_path):
        says = r"self_attn\.q_proj \(32 x 32\).*\+model\.architecture\.layout=.*layout=tiedlora\.Layout\("
        with pytest.raises(UserError, match=says):
            attach(model, "TABuv")
        attached = attach(model, "TABuv", RANK, layout=self.LAYOUT)
        randomise(attached.adapter, scale=0.25)
        adapted = logits(model, ids)
        attached.save_pretrained(tmp_path / "adapter")
        attached.detach()
        assert load(tmp_path / "adapter")[0].architecture.layout == self.LAYOUT
        tiedlora.load(tmp_path / "adapter", model)
        assert torch.equal(logits(model, ids), adapted)

    def test_fused_heads_of_one_key_and_value(self, ids):
        model = family_model("falcon")
        before = logits(model, ids)
        layout = Layout(layers="transformer.h", sites={"qkv": ["self_attention.query_key_value"]})
        attached = attach(model, "TABuv", RANK, layout=layout)
        assert attached.adapter.architecture.kv_heads == 1
        randomise(attached.adapter, scale=0.25)
        assert not torch.equal(logits(model, ids), before)
        grouped = family_model("falcon", new_decoder_architecture=True, num_kv_heads=2)
        assert attach(grouped, "TABuv", RANK, layout=layout).adapter.architecture.kv_heads == 2

    def test_a_model_that_reads_images_is_told_where_its_layers_are(self):
        model = model_of_images()
        says = (
            r"gemma3_text in model\.language_model\.layers; .*layout='{layers: model\.language_model\.layers, sites: "
        )
        with pytest.raises(UserError, match=says):
            attach(model, "TABuv", RANK)
        assert "vision" not in architectures.candidates(model)[0]

    def test_a_wrong_layout_names_the_module(self, model):
        wrong = Layout(layers="model.decoder.layers", sites={"qkv": ["self_attn.c_attn"]})
        with pytest.raises(UserError, match=r"no module model.decoder.layers.0.self_attn.c_attn.*candidates are"):
            attach(model, "TABuv", layout=wrong)
        fused = Layout(layers="model.decoder.layers", sites={"qkv": ["self_attn.q_proj"]})
        with pytest.raises(UserError, match=r"q_proj has a weight of \(32, 32\), the layout of 'qkv' says \(96, 32\)"):
            attach(model, "TABuv", layout=fused)

    def test_a_module_that_is_not_linear_is_named(self):
        model = family_model("llama")
        model.model.layers[1].self_attn.k_proj = torch.nn.Identity()
        with pytest.raises(UserError, match=r"layers.1.self_attn.k_proj is a Identity, not a plain linear"):
            attach(model, "TABuv")
        model.model.layers[1].self_attn.k_proj = torch.nn.Linear(64, 32).to(torch.float8_e4m3fn)
        with pytest.raises(UserError, match=r"layers.1.self_attn.k_proj is a Linear, not a plain linear"):
            attach(model, "TABuv")
        # Packed weights of some quantisers are buffers with other names.
        del model.model.layers[1].self_attn.k_proj.weight
        for layout in (None, Layout("model.layers", {"qkv": ["q"]})):
            with pytest.raises(UserError, match=r"k_proj is a Linear, not a plain linear|its candidates are"):
                attach(model, "TABuv", layout=layout)

    def test_a_weight_that_only_looks_like_floats_is_named(self):
        """torchao and quanto keep 4 or 8 bits in classes of their own."""

        class Packed(torch.Tensor):
            pass

        model = family_model("llama")
        module = model.model.layers[1].self_attn.k_proj
        module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(Packed), requires_grad=False)
        with pytest.raises(UserError, match=r"layers.1.self_attn.k_proj is a Linear, not a plain linear"):
            attach(model, "TABuv")
