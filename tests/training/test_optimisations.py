"""The optimisations of training and scoring give the same loss, gradients and outputs as the plain computation.

float64 within 1e-12, float32 within 1e-4 of a tensor's largest entry; the chunked loss is in test_loss.py, the folded
factors in test_adapter.py.
"""

import random
import shutil
import string
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import TINY, adapted, generate, tiny
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tiedlora.data.batching import collate, microbatches
from tiedlora.data.encoding import Encoded
from tiedlora.errors import UserError
from tiedlora.models import attention
from tiedlora.training import compiling
from tiedlora.training.loss import target_loss

ROWS = []
for prompt_length, target_length in ((5, 4), (9, 1), (2, 12), (7, 7)):
    ROWS.append(Encoded(tuple(range(10, 10 + prompt_length)), (*range(40, 40 + target_length), 256)))
EXACT = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])


def loss_and_gradients(base, attached, batches=None):
    torch.manual_seed(0)  # GPT-2 drops out activations of its own in training
    total = sum(target_loss(base.model, batch) for batch in batches or [collate(ROWS, 256)])
    return [total, *torch.autograd.grad(total, list(attached.adapter.parameters()))]


def close(ours, theirs, tolerance):
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(ours, theirs, strict=True))


WITH_COMPILER = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")]


@EXACT
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=WITH_COMPILER)])
def test_attention_by_products_is_torchs(dtype, tolerance, key_heads, compiled):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(3, 11, heads, 8, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (6, key_heads, key_heads)
    ]
    plain = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)
    attend = torch.compile(attention.by_products) if compiled else attention.by_products
    ours = attend(*inputs, scale=0.3)
    weight = torch.randn(plain.shape, generator=generator, dtype=dtype)
    assert close([ours], [plain], tolerance)
    assert close(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, plain)), tolerance)


def test_short_bfloat16_rows_take_products_and_masked_or_long_ones_torchs_kernel(monkeypatch):
    base = tiny("tiny_llama", "bfloat16")
    assert base.model.config._attn_implementation == attention.NAME
    hooks = []
    plain = attention.by_products
    monkeypatch.setattr(attention, "by_products", lambda *a: hooks.append(1) or plain(*a))
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = base.model(ids).logits.float()
        assert len(hooks) == 3, "once a layer"
        base.model(ids, attention_mask=(torch.arange(12) > 2).long().expand(2, -1))
        base.model.set_attn_implementation("sdpa")
        theirs = base.model(ids).logits.float()
    assert len(hooks) == 3
    assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()


@EXACT
@pytest.mark.parametrize("name", TINY)
def test_recomputed_activations_change_nothing(name, dtype, tolerance):
    base, attached = adapted(name, dtype)
    base.model.train()
    plain = loss_and_gradients(base, attached)
    base.model.activation_checkpointing_enable({"use_reentrant": False})
    assert close(loss_and_gradients(base, attached), plain, tolerance)


def lengths_of(passes):
    return [(batch.input_ids != 0).sum(1).tolist() for batch in passes]


def test_passes_are_as_few_as_the_limits_allow_and_even():
    rows = [Encoded((1,) * (length - 1), (2,)) for length in (10, 10, 10, 10, 10)]
    assert lengths_of(microbatches(rows, 0, tokens=40)) == [[10, 10, 10], [10, 10]]
    rows = [Encoded((1,) * (length - 1), (2,)) for length in (30, 4, 9, 5, 10)]
    assert lengths_of(microbatches(rows, 0, tokens=40)) == [[4, 5, 9, 10], [30]]
    assert lengths_of(microbatches(rows, 0, tokens=20)) == [[4, 5], [9, 10], [30]], "a long row is a pass of its own"
    assert lengths_of(microbatches(rows, 0, size=3)) == [[4, 5, 9], [10, 30]]
    assert microbatches([], 0, tokens=40) == []


@EXACT
@pytest.mark.parametrize("limits", [(1, None), (None, 30), (3, 17, 64)])
def test_passes_also_of_aligned_rows_add_up_to_the_batch(dtype, tolerance, limits):
    base, attached = adapted("tiny_llama", dtype)
    passes = microbatches(ROWS, 256, *limits)
    assert len(passes) > 1
    assert close(loss_and_gradients(base, attached, passes), loss_and_gradients(base, attached), tolerance)


@pytest.mark.parametrize(("context", "length"), [(0, 15), (15, 15), (64, 16)])
def test_aligned_rows_stay_within_the_context(context, length):
    assert collate(ROWS[1:], 256, context).input_ids.shape == (3, length)


@pytest.mark.parametrize(
    # Llama's norms always compute in float32.
    ("name", "dtype", "tolerance"),
    [
        pytest.param("tiny_gpt2", torch.float64, 1e-12, marks=WITH_COMPILER),
        pytest.param("tiny_llama", torch.float32, 1e-4, marks=WITH_COMPILER),
    ],
)
def test_compiled_blocks_share_one_graph_whatever_the_batch_and_change_nothing(name, dtype, tolerance):
    base, attached = adapted(name, dtype)
    blocks = base.model.model.layers if name == "tiny_llama" else base.model.transformer.h
    # As many rows and tokens as passes of SQuAD have: even passes, and smaller last ones.
    draw = random.Random(0)
    passes = [
        [
            Encoded(tuple(draw.choices(range(200), k=draw.randrange(9, 60))), (5, 256))
            for _ in range(draw.randrange(2, 9))
        ]
        for _ in range(20)
    ]
    batches = [collate(ROWS, 256), *(collate(rows, 256, 64) for rows in passes)]
    plain = [loss_and_gradients(base, attached, [batch]) for batch in batches]
    with compiling.compiled(blocks, base.model.get_input_embeddings()):
        torch._dynamo.utils.counters.clear()
        assert close(loss_and_gradients(base, attached, batches[:1]), plain[0], tolerance)
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch, wanted in zip(batches[1:], plain[1:], strict=True):
                assert close(loss_and_gradients(base, attached, [batch]), wanted, tolerance)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(target_loss(base.model, batches[0]), plain[0][0])
    assert all(block._compiled_call_impl is None for block in blocks)
    assert not base.model.get_input_embeddings()._forward_hooks


@EXACT
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_attention_by_repeated_keys_is_transformers(dtype, tolerance, key_heads):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(3, heads, 11, 8, generator=generator, dtype=dtype).requires_grad_()
        for heads in (6, key_heads, key_heads)
    ]
    module = SimpleNamespace(num_key_value_groups=6 // key_heads)
    plain = sdpa_attention_forward(module, *inputs, None, scaling=0.3)[0].transpose(1, 2)
    ours = attention.by_repeated_keys(*inputs, scale=0.3)
    weight = torch.randn(plain.shape, generator=generator, dtype=dtype)
    assert close([ours], [plain], tolerance)
    assert close(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, plain)), tolerance)


@pytest.mark.parametrize(
    ("settings", "repeats"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, False),
        ({"device": "cpu"}, False),
        ({"is_causal": False}, False),
        # A pass that answers with a cache: the weights are one row a head.
        ({"new": 1}, False),
    ],
)
def test_only_a_gpu_with_wide_numbers_repeats_the_keys(settings, repeats, monkeypatch):
    """torch has a kernel with shared keys for 16-bit types alone."""
    kind = {"device": "meta", "dtype": torch.float32, "new": 5, "is_causal": None} | settings
    asked, plain = [], F.scaled_dot_product_attention

    def noted(query, key, value, **named):
        asked.append((key.shape[1], named.get("enable_gqa", False), named["is_causal"]))
        return plain(query, key, value, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    module = SimpleNamespace(num_key_value_groups=3)
    query, key, value = (
        torch.zeros(2, heads, tokens, 8, device=kind["device"], dtype=kind["dtype"])
        for heads, tokens in ((6, kind["new"]), (2, 5), (2, 5))
    )
    mixed, _ = attention.attend(module, query, key, value, None, is_causal=kind["is_causal"])
    assert mixed.shape == (2, kind["new"], 6, 8)
    assert mixed.is_contiguous()
    assert asked == [(6, False, True) if repeats else (2, True, kind["new"] > 1 and kind["is_causal"] is None)]


@pytest.mark.parametrize(("device", "compiler"), [("cpu", "g++"), ("cuda", "gcc")])
def test_blocks_are_compiled_where_it_pays_and_a_compiler_is_there(monkeypatch, tmp_path, device, compiler):
    """On a CPU torch writes C++; on a GPU Triton compiles a launcher in C."""
    long = compiling.COMPILE_PAYS_FROM_FLOP[device] / 4
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_, **__: str(tmp_path))
    (header := tmp_path / "Python.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == compiler else None)
    assert compiling.decide("auto", device, weights=1, tokens=long)
    assert not compiling.decide("auto", device, weights=1, tokens=0.9 * long)
    assert not compiling.decide("never", device, weights=1, tokens=long)
    assert compiling.decide("always", device, weights=1, tokens=1)
    assert not compiling.decide("auto", device, weights=1, tokens=long, slow_bfloat16=True)
    with pytest.raises(UserError, match=r"train\.compile=always: compiled blocks would be slow.*train\.dtype=float32"):
        compiling.decide("always", device, weights=1, tokens=1, slow_bfloat16=True)
    header.unlink()
    assert not compiling.decide("auto", device, weights=1, tokens=long)
    with pytest.raises(
        UserError, match=r"train\.compile=always: there is no Python\.h .*python3-dev.* here; install it"
    ):
        compiling.decide("always", device, weights=1, tokens=1)
    header.touch()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not compiling.decide("auto", device, weights=1, tokens=long)
    with pytest.raises(UserError, match=r"train\.compile=always: there is no C"):
        compiling.decide("always", device, weights=1, tokens=1)
    if device == "cuda":
        monkeypatch.setenv("CC", "/opt/cc")
        assert compiling.decide("auto", device, weights=1, tokens=long)
        monkeypatch.setattr(compiling, "has_triton", lambda: False)
        assert not compiling.decide("auto", device, weights=1, tokens=long)


@pytest.mark.parametrize("name", TINY)
def test_generation_is_transformers_whatever_the_batch(name):
    """Rows end at different steps and leave their batch a few at a time, and the cache has to grow."""
    base, _ = adapted(name, torch.float64)
    texts = ["a", "some longer text", "xyz", "12 + 30 =", "b" * 30, "the end", "?", "one more", "and 1"]
    prompts = [base.tokenizer(text).input_ids for text in texts]
    new = 80
    wanted = []
    for ids in prompts:
        whole = base.model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=256)
        wanted.append(whole[0, len(ids) :].tolist())
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
    # Letters that some rows write early, some late and some never. (Random bytes form characters of several tokens.)
    letters = sorted(set("".join(texts)) & set(string.ascii_letters + string.digits + string.punctuation))
    stop = sorted(letters, key=lambda c: sum(c in text for text in texts))[:6]
    for limits in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 9, "batch_tokens": 90}):
        found = generate(base.model, base.tokenizer, prompts, max_new_tokens=new, stop=stop, **limits)
        ends = set()
        for output, text in zip(found, texts, strict=True):
            start = len(text) - len(text.lstrip())
            places = [text.find(end, start) for end in stop if text.find(end, start) >= 0]
            assert output.text == text[: min(places, default=len(text))], limits
            ends.add(len(output.ids))
        assert len(ends) > 2
