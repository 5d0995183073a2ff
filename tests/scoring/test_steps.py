"""Decoding step by step: the cache is allocated once, factors are folded once, a static step is always the same list of
operations, and most answers are not decoded at most tokens. None of it changes an answer.
"""

import random

import pytest
import torch
from helpers.tiny import TINY, randomise, tiny
from tokenizers import Tokenizer, decoders, models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedTokenizerFast

from tiedlora.adapter import TiedAdapter, attach
from tiedlora.errors import UserError
from tiedlora.scoring import split
from tiedlora.scoring.answer_ends import MIN_STOP_SEARCH_TOKENS, AnswerEnds, Output
from tiedlora.scoring.batches import hidden_states, padded_left
from tiedlora.scoring.decoding import generate
from tiedlora.scoring.steps import GrowingSteps, StaticSteps

END = 256


def adapted(name, dtype):
    base = tiny(name, "float32")
    attached = attach(base.model, "TABuv", 4)
    base.model.to(dtype)
    attached.adapter.to(torch.promote_types(dtype, torch.float32))
    randomise(attached.adapter, scale=0.2)
    return base, attached


def prompts_of(base):
    return [
        base.tokenizer(text).input_ids for text in ("12 + 30 = what is it", "a", "some longer text", "xyz", "b" * 9)
    ]


def with_transformers_cache(model, prompts, steps, kept):
    """The hidden states of each step, with transformers' own cache; after step 3 only the rows `kept` go on."""
    ids, mask, positions = padded_left(prompts, END, torch.device("cpu"))
    cache, states = DynamicCache(config=model.config), []
    for step in range(steps):
        states.append(hidden_states(model, ids, mask, positions, cache)[:, -1])
        ids = model.get_output_embeddings()(states[-1]).argmax(-1, keepdim=True)
        mask, positions = torch.nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        if step == 2:
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_one_allocation_gives_the_bits_of_transformers_cache(name, dtype, monkeypatch):
    base, _ = adapted(name, dtype)
    prompts, kept, states = prompts_of(base), torch.tensor([0, 2, 3]), []
    expected = with_transformers_cache(base.model, prompts, 8, kept)

    def watched(*arguments):
        states.append(hidden_states(*arguments))
        return states[-1]

    monkeypatch.setattr("tiedlora.scoring.steps.hidden_states", watched)
    steps = GrowingSteps(base.model, prompts, END, 8)
    places = []
    for step in range(8):
        steps.next_tokens()
        places.append([buffer.data_ptr() for layer in steps.cache.layers for buffer in layer.buffers])
        if step == 2:
            steps.keep(kept)
    for ours, theirs in zip(states, expected, strict=True):
        assert torch.equal(ours[:, -1], theirs)
    assert places[0] == places[1] == places[2]
    assert places[3] == places[7] != places[2], "only a smaller batch is copied"


class Operations(TorchDispatchMode):
    """Keeps each operation with the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.seen.append((str(func), repr(shapes)))
        return func(*args, **(kwargs or {}))


def operations_of(work):
    with Operations() as operations:
        work()
    return operations.seen


READS_A_VALUE = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")


@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_a_static_step_is_always_the_same_operations_and_reads_no_value(name):
    """This is what a CUDA graph needs. (To record one needs a GPU: tests/gpu.)"""
    base, attached = adapted(name, torch.float32)
    with attached.folded_once():
        static = StaticSteps(base.model, prompts_of(base), END, 9)
        static.next_tokens()
        second, third = (operations_of(static.next_tokens) for _ in range(2))
        assert second == third
        assert len(operations_of(static.step)) > 50
        assert not [name for name, _ in operations_of(static.step) if any(word in name for word in READS_A_VALUE)]
        growing = GrowingSteps(base.model, prompts_of(base), END, 9)
        growing.next_tokens()
        second, third = (operations_of(growing.next_tokens) for _ in range(2))
        assert second != third


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batch_size", [2, 9])
def test_static_steps_give_the_same_answers(name, batch_size):
    """Rows end at different steps, and leave their batch when half of it has ended."""
    base, _ = adapted(name, torch.float64)
    texts = ["a", "some longer text", "xyz", "12 + 30 =", "b" * 30, "the end", "?", "one more", "and 1"]
    prompts = [base.tokenizer(text).input_ids for text in texts]
    settings = {"max_new_tokens": 60, "batch_size": batch_size}
    free = generate(base.model, base.tokenizer, prompts, **settings)
    letters = {letter for output in free for letter in output.text if letter.isascii() and letter.isprintable()}
    # Letters that few texts have, so that some answers end early and some late.
    settings["stop"] = sorted(letters, key=lambda letter: (sum(letter in output.text for output in free), letter))[:6]
    plain = generate(base.model, base.tokenizer, prompts, **settings)
    assert generate(base.model, base.tokenizer, prompts, **settings, steps=StaticSteps) == plain
    assert len({output.tokens for output in plain}) > 2


def test_static_steps_refuse_a_sliding_window():
    base = tiny("tiny_llama")
    base.model.config.sliding_window, base.model.config.layer_types = 4, ["sliding_attention"] * 3
    with pytest.raises(UserError, match=r"score\.engine=static: some layers of this model attend to the last tokens"):
        StaticSteps(base.model, [[1, 2]], END, 3)


def test_factors_are_folded_once_while_scoring_and_again_afterwards(monkeypatch):
    base, attached = adapted("tiny_llama", torch.float32)
    prompts, folds, plain = prompts_of(base), [], TiedAdapter.pairs
    monkeypatch.setattr(TiedAdapter, "pairs", lambda self, *arguments: folds.append(1) or plain(self, *arguments))

    def answers():
        return [o.text for o in generate(base.model, base.tokenizer, prompts, max_new_tokens=6, batch_size=2)]

    expected = answers()
    assert len(folds) == 18, "three batches of six steps"
    with attached.folded_once():
        assert answers() == expected
    assert len(folds) == 19
    randomise(attached.adapter, seed=2, scale=2.0)
    assert answers() != expected
    attached.merge()
    with attached.folded_once():
        assert answers() != expected, "a merged adapter has nothing to fold"


def test_scoring_folds_once(tiny_config, monkeypatch):
    base, attached = adapted("tiny_llama", torch.bfloat16)
    config, folds, plain = tiny_config("train.dtype=bfloat16"), [], TiedAdapter.pairs
    monkeypatch.setattr(TiedAdapter, "pairs", lambda self, *arguments: folds.append(1) or plain(self, *arguments))
    with split.merged_for_scoring(attached, config) as model:
        generate(model, base.tokenizer, prompts_of(base), max_new_tokens=6, batch_size=2)
    assert len(folds) == 1


def metaspace_tokenizer():
    """As Llama 2's: a blank at the start of a text is lost, and characters outside of the vocabulary are bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁a", "▁Quest", "ion", ":", "▁:", "x", "▁.", ".", "▁yes", "Answer:", "▁▁", "y", "\n\n", "a\nb"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def by_decoding_everything(tokenizer, written, stop, limit):
    """The definition: every text is decoded at every token."""
    if written[-1] == tokenizer.eos_token_id:
        return Output(tokenizer.decode(written[:-1], skip_special_tokens=True), len(written), "end")
    text = tokenizer.decode(written, skip_special_tokens=True)
    first = len(text) - len(text.lstrip())
    stops = [index for string in stop if (index := text.find(string, first)) >= 0]
    if stops:
        return Output(text[: min(stops)], len(written), "stop")
    return Output(text, len(written), "length") if len(written) == limit else None


def pieces_of(tokenizer, text, draw):
    """The text as tokens, divided at random."""
    pieces = {piece.replace("▁", " "): token for piece, token in tokenizer.get_vocab().items()}
    ids, place = [], 0
    while place < len(text):
        fitting = [piece for piece in pieces if text.startswith(piece, place) and not piece.startswith("<")]
        if fitting and draw.random() < 0.7:
            piece = draw.choice(fitting)
            ids.append(pieces[piece])
            place += len(piece)
        else:
            ids += [pieces[f"<0x{byte:02X}>"] for byte in text[place].encode()]
            place += 1
    return ids


def test_a_tail_that_begins_within_a_character_hides_no_stop_string():
    """A run of bytes that is no text decodes to no text at all, also where a stop string follows in it."""
    tokenizer = metaspace_tokenizer()
    vocabulary = tokenizer.get_vocab()
    written = [vocabulary[f"<0x{byte:02X}>"] for byte in "aééQuestion:".encode()]
    ends = AnswerEnds(tokenizer, ["Question:"], 100)
    assert len(written) > ends.tail_tokens
    assert ends.output(written) == Output("aéé", len(written), "stop")


@pytest.mark.parametrize("stop", [["\n"], ["Question:"], ["é"], [" ."], ["x y "], ["a\nb", "Answer:"], []])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_ends_are_those_of_decoding_every_answer_at_every_token(kind, stop):
    tokenizer = tiny("tiny_llama").tokenizer if kind == "bytes" else metaspace_tokenizer()
    draw, ended = random.Random(0), set()
    for _ in range(100):
        words = draw.choices([" ", "\n", "a", "x y", " yes", "é", ":", ".", "Quest", "ion", *stop, *stop], k=8)
        text = "".join(words)
        written = tokenizer(text).input_ids if kind == "bytes" else pieces_of(tokenizer, text, draw)
        if draw.random() < 0.2:
            written.insert(draw.randrange(len(written)), tokenizer.eos_token_id)
        limit = len(written)
        ends = AnswerEnds(tokenizer, stop, limit)
        for count in range(1, limit + 1):
            expected = by_decoding_everything(tokenizer, written[:count], stop, limit)
            assert ends.output(written[:count]) == expected, (stop, written)
            if expected:
                break
        ended.add(expected.ended)
        assert ends.first_output(written) == expected
    assert ended == ({"end", "stop", "length"} if stop else {"end", "length"})


def test_most_tokens_are_decoded_once_in_all():
    tokenizer, decoded = tiny("tiny_llama").tokenizer, []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def decode(self, ids, **settings):
            decoded.append(len(ids))
            return tokenizer.decode(ids, **settings)

    ends = AnswerEnds(Counting(), ["Question:"], 1000)
    text = "a long answer without any end " * 8
    for answer in range(5):
        written = []
        for token in tokenizer(text).input_ids:
            written.append(token)
            assert ends.output(written) is None
        assert decoded == [1] * len(set(text)), answer
    assert max(decoded) < MIN_STOP_SEARCH_TOKENS


def test_an_answer_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="an answer of 2 tokens has no end"):
        AnswerEnds(tiny("tiny_llama").tokenizer, [], 9).first_output([65, 66])
