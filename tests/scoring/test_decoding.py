"""Answers and likelihoods: batches, padding, the cache and the shortcuts of decoding change no result."""

import random

import pytest
import torch
from helpers.tiny import TINY, adapted, generate, randomise, tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tiedlora.adapter import TiedAdapter
from tiedlora.scoring import split
from tiedlora.scoring.decoding import AnswerEnds, Output, choice_log_likelihoods

TEXTS = ("12 + 30 = what is it", "a", "some longer text", "xyz", "b" * 9)


def alone(model, prompt, choice):
    """The definition: one complete sequence, without cache and padding."""
    ids = torch.tensor([[*prompt, *choice]])
    log_probs = torch.log_softmax(model(ids).logits[0].double(), -1)
    return sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(choice))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batches", [[[0], [1], [2], [3], [4], [5], [6]], [[1, 4], [6, 0, 3, 2, 5]], [range(7)]])
def test_choices_have_the_likelihoods_of_whole_sequences(name, batches):
    model, draw = tiny(name).model.double(), random.Random(0)

    def text(length):
        return [draw.randrange(256) for _ in range(length)]

    prompts = [text(n) for n in (3, 20, 9, 1, 4, 3, 3)]
    of_each = ((1, 7), (2, 4, 1, 6), (1,), (3, 3), (0, 2, 1), (0, 1), (0, 0))
    choices = [[text(n) for n in lengths] for lengths in of_each]
    with torch.inference_mode():
        expected = [[alone(model, p, c) for c in texts] for p, texts in zip(prompts, choices, strict=True)]
    for batch in batches:
        found = choice_log_likelihoods(model, [prompts[i] for i in batch], [choices[i] for i in batch])
        for number, ours in zip(batch, found, strict=True):
            # Log-probabilities are computed in float32.
            assert ours == pytest.approx(expected[number], abs=1e-4)


def test_factors_are_folded_once_while_scoring_and_again_afterwards(tiny_config, monkeypatch):
    base, attached = adapted("tiny_llama", torch.bfloat16)
    config, folds, plain = tiny_config("train.dtype=bfloat16"), [], TiedAdapter.pairs
    monkeypatch.setattr(TiedAdapter, "pairs", lambda self, *arguments: folds.append(1) or plain(self, *arguments))

    def answers():
        prompts = [base.tokenizer(text).input_ids for text in TEXTS]
        return generate(base.model, base.tokenizer, prompts, max_new_tokens=6, batch_size=2)

    expected = answers()
    assert len(folds) == 18, "three batches of six steps"
    weights = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    with split.scored_model(attached, config):
        assert answers() == expected
        assert all(torch.equal(weights[name], parameter) for name, parameter in base.model.named_parameters())
    assert len(folds) == 19
    randomise(attached.adapter, seed=2, scale=2.0)
    with split.scored_model(attached, config):
        assert answers() != expected


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
        return Output(tokenizer.decode(written[:-1], skip_special_tokens=True), written, "end")
    text = tokenizer.decode(written, skip_special_tokens=True)
    first = len(text) - len(text.lstrip())
    stops = [index for string in stop if (index := text.find(string, first)) >= 0]
    if stops:
        return Output(text[: min(stops)], written, "stop")
    return Output(text, written, "length") if len(written) == limit else None


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


@pytest.mark.parametrize("stop", [["\n"], ["Question:"], ["é"], [" ."], ["a\nb", "the end of this: Answer:"], []])
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
