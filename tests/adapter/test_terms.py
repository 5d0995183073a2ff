"""A tying that is a sum of terms: RaSA and others. Every test of a configuration has them too (test_adapter.py)."""

import pytest
import torch
from helpers.tiny import logits, model_option, randomise, tiny, tying_option

from tiedlora import tying
from tiedlora.adapter import TiedAdapter, attach, load, save
from tiedlora.config.compose import compose_config
from tiedlora.config.identity import identity, run_id
from tiedlora.errors import UserError
from tiedlora.tying import Factor, Term, Tying

SUMS = ("RaSA", "TAuv_LoRA1")
"""The named arms of several terms."""

TWO = {"all": Term(), "some": Term(layers=["evenly 1"], rank="2", A=Factor(init="uniform", share=1))}


def test_rasa_counts_as_in_its_paper():
    """L (r - k) + L k ranks of d_in + d_out numbers as LoRA has, and u of r - k + L k ranks for each layer."""
    for model, r in (("smollm2_135m", 8), ("llama2_7b", 32), ("gpt2", 4)):
        architecture, k = model_option(model).architecture, max(1, r // 8)
        layers, spec = architecture.layers, tying_option("RaSA")
        expected = tying.lora_params(r, architecture) + layers * (r - k + layers * k)
        assert tying.trainable_params(spec, r, architecture) == expected


@pytest.mark.parametrize("name", SUMS)
def test_a_named_sum_is_its_option_and_has_its_name(name):
    spec = tying_option(name)
    assert identity(spec) == identity(tying.named(name))
    assert tying.name_of(spec) == spec.name == name
    assert run_id(compose_config([f"tying={name}", "model=tiny_llama"])).startswith(f"{name}-r8-")
    assert tying.name_of(tying_option(name, "tying.terms.private.rank=2")) is None


def test_a_sum_of_one_term_is_that_term(ids):
    """The same count, start and gradients as the tying without terms; only the random values have other names."""
    one, sum_of_one = tiny("tiny_llama"), tiny("tiny_llama")
    plain = attach(one.model, "TABuv", 4)
    term = attach(sum_of_one.model, Tying(terms={"only": Term()}), 4)
    for name, part in plain.adapter.parts().items():
        term.adapter.parts()[name.replace(".", ":only.")].data.copy_(part)
    for base, attached in ((one, plain), (sum_of_one, term)):
        randomise(attached.adapter)
        base.model(ids, labels=ids).loss.backward()
    for name, part in plain.adapter.parts().items():
        assert torch.equal(part.grad, term.adapter.parts()[name.replace(".", ":only.")].grad)


def test_a_term_adapts_its_own_layers_and_is_saved(ids, tmp_path):
    base = tiny("tiny_llama")
    attached = attach(base.model, Tying(terms=TWO), 4)
    randomise(attached.adapter)
    A, B = attached.adapter.folded("qkv")
    layers = base.model.config.num_hidden_layers
    assert A.shape[:2] == (layers, 6)
    (adapted,) = attached.adapter.targets["qkv:some"].layers
    for layer in range(layers):
        assert bool(B[layer, :, 4:].any()) == (layer == adapted)
    expected = logits(base.model, ids)
    save(attached.adapter, tmp_path / "adapter", base.record)
    adapter, _ = load(tmp_path / "adapter")
    for name, part in attached.adapter.parts().items():
        assert torch.equal(adapter.parts()[name], part)
    attached.detach()
    assert not torch.equal(logits(base.model, ids), expected)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tying=RaSA", "rank.r=1"], "tying.terms: a term's rank of r-r/8 is 0 at rank.r=1; raise rank.r"),
        (["tying=RaSA", "tying.terms.shared.rank=r+1"], "tying.terms.shared.rank=r+1: "),
        (["tying=RaSA", "tying.terms.shared.B.init=1"], "tying.terms.shared: no part starts at zero"),
        (["tying=RaSA", "tying.terms.shared.rank=08"], "tying.terms.shared.rank=08: write a number, r, r/8, r-r/8 or"),
        (["tying=RaSA", "tying.terms.shared.rank=999"], "tying.terms.shared.rank=999: is more than a projection's"),
        (["tying=RaSA", "tying.terms.shared.layers=[40]"], "tying.terms.shared.layers: holds 40, but the model has"),
        (["tying=RaSA", "tying.A.share=2"], "tying.A: has no meaning beside tying.terms; set tying.terms.TERM.A, TERM"),
        (["tying.terms={}"], "tying.terms={}: an empty mapping is merged into the present one and changes nothing"),
        (["tying.terms={a.b:{}}"], "tying.terms.a.b"),
        (["tying=peft/vera", "tying.terms={one:{}}"], "tying.terms: VeraConfig has no terms; set tying.terms=null"),
    ],
)
def test_a_wrong_sum_is_one_line(words, says):
    with pytest.raises(UserError) as caught:
        compose_config(["model=tiny_llama", *words])
    assert str(caught.value).startswith(says)


def test_every_layer_by_number_is_the_same_run_as_null():
    words = ["tying=RaSA", "model=tiny_llama"]
    layers = model_option("tiny_llama").architecture.layers
    named = compose_config([*words, f"tying.terms.shared.layers=[0-{layers - 1}]"])
    assert run_id(named) == run_id(compose_config(words))
    by_number = compose_config([*words, "tying.terms.shared.layers=[evenly 1]"]).tying.terms["shared"].layers
    assert by_number == tying.evenly_spaced(1, layers)


def test_a_budget_finds_the_rank_of_a_sum(script):
    assert compose_config(["tying=RaSA", "model=smollm2_135m", "budget=93090"]).rank.r == 2
    code, out, err = script("scripts/params.py", "model=smollm2_135m", "rank=r1")
    assert code == 0, err
    assert "not possible here: RaSA: tying.terms: a term's rank of r-r/8 is 0 at rank.r=1" in out


def test_gradients_are_those_of_a_literal_loop():
    """Of sum_l <G_l, W_l> with W_l the sum of the terms' s diag(v_l) B diag(u_l) A, written out layer by layer."""
    architecture = model_option("tiny_llama").architecture
    adapter = TiedAdapter(tying.named("RaSA"), 4, 6.0, architecture, seed=0).double()
    randomise(adapter)
    layers, (d_in, d_out) = architecture.layers, tying.target_shape(architecture, "qkv")
    G = torch.randn(layers, d_out, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A, B = adapter.folded("qkv")
    names, parts = zip(*adapter.trained_parts().items(), strict=True)
    found = torch.autograd.grad((G * (adapter.scale * B @ A)).sum(), parts)

    literal = torch.zeros((), dtype=torch.float64)
    own = dict(zip(names, parts, strict=True))
    for layer in range(layers):
        for term, share, r in (("private", 1, 3), ("shared", layers, layers)):
            A_l, B_l = (own[f"qkv:{term}.{part}"][layer // share] for part in ("A", "B"))
            u_l = own[f"qkv:{term}.u"][layer]
            for rank in range(r):
                literal = literal + (6.0 / r) * u_l[rank] * (G[layer] * torch.outer(B_l[:, rank], A_l[rank])).sum()
    for name, one, other in zip(names, found, torch.autograd.grad(literal, parts), strict=True):
        assert torch.allclose(one, other, rtol=1e-10), name
