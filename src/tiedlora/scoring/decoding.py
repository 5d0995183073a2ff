"""What a base model, adapted or not, says after prompts: greedy answers, or the likelihoods of given texts (choices).

Here are a batch of prompts, its key-value cache, and the ends of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from tiedlora.data.batching import sent, split_by_limits
from tiedlora.models.placement import input_device, without_gradients
from tiedlora.training.loss import next_token_losses

ENDED_SHARE_TO_COMPACT = 1 / 8
"""Finished rows leave their batch when they are this share of it, because to remove rows copies the cache."""
LOOK_EVERY = 8
"""After so many tokens, ends of answers are looked for. A look waits for the device, which then has nothing to do. On a
CPU, ends are looked for at every token."""
PART_OF_A_CHARACTER = "\ufffd"
"""What a tokenizer decodes to if the bytes are no whole character."""


@dataclass
class Output:
    """The answer that was generated for one prompt."""

    text: str
    """The text before the stop string or the token that ends it."""
    ids: list[int]
    """All tokens of the answer, with those that end it."""
    ended: str
    """end (end-of-text token, or another one that ends), stop (stop string) or length (max_new_tokens)."""


def batches_by_length(lengths: Sequence[int], rows: int, tokens: int | None) -> list[list[int]]:
    """The row numbers of each batch, with the longest rows first. A batch has at most `rows` rows and `tokens` tokens.

    Args:
        lengths: the number of tokens of each row.
        tokens: padding included; None sets no limit.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    return [order[batch] for batch in split_by_limits([lengths[i] for i in order], rows, tokens)]


Choose = Callable[[Any, Tensor, Tensor, int], Tensor]
"""How the next token of each row is chosen: from the model, the outputs of its head (rows, vocabulary), the number of
the prompt of each row (rows,), and the number of tokens that the answers have so far -> token ids (rows,)."""


@without_gradients
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: AnswerEnds,
    progress: Callable[[int], None] = lambda _rows: None,
    choose: Choose | None = None,
) -> list[Output]:
    """Generate continuations of one batch, in the order of `prompts`.

    The prompts are padded on the left. Finished rows leave the batch a few at a time. On a GPU, a row may get a few
    tokens beyond its end before that is seen. They are cut off.

    Args:
        prompts: token ids, none empty.
        progress: is called with the number of rows that have just finished.
        choose: None takes the most likely token. The factor and the cap after the head do not change the order.
    """
    device = input_device(model)
    look_every = 1 if device.type == "cpu" else LOOK_EVERY
    ids, mask, positions = padded_left(prompts, ends.end_ids[0], device)
    # Allocated once, for the prompts and all new tokens.
    cache = new_cache(model, ids.shape[1] + ends.max_new_tokens)
    written: list[list[int]] = [[] for _ in prompts]
    outputs: list[Output | None] = [None] * len(prompts)
    batch_rows = list(range(len(prompts)))  # the prompt at each index of the batch, which becomes smaller
    numbers = torch.arange(len(prompts), device=device)
    unseen: list[Tensor] = []  # the tokens since the last look

    for position in range(ends.max_new_tokens):
        # 1. The next token of each row. The output head is computed at only one position of each row.
        head_outputs = model.get_output_embeddings()(hidden_states(model, ids, mask, positions, cache)[:, -1])
        tokens = choose(model, head_outputs, numbers, position) if choose else head_outputs.argmax(-1)
        # The head may be on another device than the embedding (model.device_map).
        ids, mask, positions = tokens.to(device).unsqueeze(1), F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        unseen.append(tokens)
        if len(unseen) < look_every and position + 1 < ends.max_new_tokens:
            continue
        # 2. The answers that end with one of these tokens.
        new_ids = torch.stack(unseen, 1).tolist()
        unseen = []
        running = [index for index, row in enumerate(batch_rows) if outputs[row] is None]
        for index in running:
            row = batch_rows[index]
            for token in new_ids[index]:
                written[row].append(token)
                outputs[row] = ends.output(written[row])
                if outputs[row]:
                    break
        still_running = [index for index in running if outputs[batch_rows[index]] is None]
        progress(len(running) - len(still_running))
        if not still_running:
            break
        # 3. The batch without them.
        if len(still_running) <= (1 - ENDED_SHARE_TO_COMPACT) * len(batch_rows):
            kept = torch.tensor(still_running, device=device)
            keep_rows(cache, kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            batch_rows = [batch_rows[index] for index in still_running]
            numbers = numbers[kept]
    return [output for output in outputs if output is not None]


def padded_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and positions, each (prompts, longest prompt)."""
    longest = max(map(len, prompts))
    ids = sent(torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts]), device)
    mask = sent(torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]), device)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The keys and values of a layer, at the start of buffers for all tokens that will come. (transformers' own layer
    copies all keys and values for every new token.)

    Args:
        tokens: the most tokens of a row, with padding.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = tokens
        self.buffers: list[Tensor] = []

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new_states = (key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.buffers:
            self.device, self.is_initialized = key_states.device, True
            self.buffers = [new.new_empty(*new.shape[:2], self.tokens, new.shape[3]) for new in new_states]
        for buffer, new in zip(self.buffers, new_states, strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        self.buffers = [buffer.index_select(0, indices) for buffer in self.buffers]
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)


def new_cache(model: Any, tokens: int) -> DynamicCache:
    """An empty key-value cache for the model.

    Args:
        tokens: the most tokens of a row, with padding.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep these rows of the cache, (rows,) their indices. With device_map, its layers are on several devices."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.batch_select_indices(rows.to(layer.keys.device))


def hidden_states(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """The last hidden states, (rows, new tokens, hidden size). Adds the new tokens' keys and values to the cache."""
    states: Tensor = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
    ).last_hidden_state
    # With device_map, the last layer may be on another device than the token ids.
    return states.to(ids.device)


@without_gradients
def choice_log_likelihoods(
    model: Any, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The log-likelihoods of each prompt's choices, in their order: sums over the tokens of a choice, in nats.

    A prompt passes through the model once, and its choices share its key-value cache.

    Args:
        choices: for each prompt, the token ids of its choices. An empty one has the log-likelihood 0.
    """
    device, pad_id = input_device(model), 0
    texts = [list(choice) for prompt_choices in choices for choice in prompt_choices]
    longest = max(1, *map(len, texts)) - 1
    padding = [longest - len(text[:-1]) for text in texts]
    # 1. What the device needs.
    ids, mask, positions = padded_left(prompts, pad_id, device)
    prompt_of = sent(torch.tensor([row for row, own in enumerate(choices) for _ in own]), device)
    # The choices without their last token, which predicts nothing that is scored.
    texts_ids = [text[:-1] + [pad_id] * pads for text, pads in zip(texts, padding, strict=True)]
    inputs = sent(torch.tensor(texts_ids, dtype=torch.long), device)
    inputs_mask = sent(torch.tensor([[1] * (longest - pads) + [0] * pads for pads in padding]), device)
    rows = torch.tensor([row for row, text in enumerate(texts) for _ in text], dtype=torch.long)
    columns = torch.tensor([column for text in texts for column in range(len(text))], dtype=torch.long)
    predicting = (sent(rows, device), sent(columns, device))
    tokens = sent(torch.tensor([token for text in texts for token in text], dtype=torch.long), device)
    # 2. The prompts. Their last hidden state predicts the first token of each of their choices.
    cache = new_cache(model, ids.shape[1] + longest)
    hidden = [hidden_states(model, ids, mask, positions, cache)[prompt_of, -1:]]
    # 3. The choices.
    if longest:
        keep_rows(cache, prompt_of)
        full_mask = torch.cat([mask[prompt_of], inputs_mask], 1)
        inputs_positions = positions[prompt_of, -1:] + 1 + torch.arange(longest, device=device)
        hidden.append(hidden_states(model, inputs, full_mask, inputs_positions, cache))
    # 4. The log-likelihood of each token, summed over each choice.
    losses = next_token_losses(model, torch.cat(hidden, 1)[predicting], tokens)
    # On the CPU, because Apple's accelerator has no float64.
    sums = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, rows, -losses.cpu().double())
    remaining = iter(sums.tolist())
    return [[next(remaining) for _ in own] for own in choices]


class AnswerEnds:
    """Finds the ends of answers: at the end-of-text token or another end, at a stop string, or at the limit of tokens.

    Args:
        stop: strings that end an answer. They count only after the answer's first character that is not blank.
        max_new_tokens: the most tokens of an answer.
        more_ends: ids of tokens that end an answer, besides the tokenizer's end-of-text token.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], max_new_tokens: int, more_ends: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop, self.max_new_tokens = tokenizer, stop, max_new_tokens
        self.end_ids: list[int] = [tokenizer.eos_token_id, *more_ends]
        """The end-of-text token is the first."""
        self.last_characters = {string[-1] for string in stop}
        self._may_end: dict[int, bool] = {}

    def output(self, written: list[int]) -> Output | None:
        """The output, if its last token ends it; otherwise None.

        Args:
            written: the ids of an answer's tokens, at least one.
        """
        if written[-1] in self.end_ids:
            return Output(self._text(written[:-1]), written, "end")
        if self.stop and self._may_end_stop(written[-1]):
            text = self._text(written)
            # An answer may start on a new line, so a stop string does not count among the blanks at its start.
            first = len(text) - len(text.lstrip())
            stops = [index for string in self.stop if (index := text.find(string, first)) >= 0]
            if stops:
                return Output(text[: min(stops)], written, "stop")
        if len(written) == self.max_new_tokens:
            return Output(self._text(written), written, "length")
        return None

    def _may_end_stop(self, token: int) -> bool:
        """Whether a stop string can end in this token: whether the token has the last character of one.

        Most tokens do not, so for most tokens the answer is not decoded.
        """
        if token not in self._may_end:
            text = self._text([token])
            # A blank at the start of a token may be lost if the token is decoded alone.
            self._may_end[token] = (
                " " in self.last_characters
                or PART_OF_A_CHARACTER in text
                or any(character in text for character in self.last_characters)
            )
        return self._may_end[token]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text
