"""Generation and likelihood scoring of a base model, adapted or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tiedlora.data.encoding import Batch, cut
from tiedlora.training.loss import chunk_rows, log_likelihoods_, target_loss

TAIL = 12
"""Tokens decoded to look for a stop string: longer than any stop string's own tokens."""
SPARE = 64
"""Tokens of room that a full cache is given: it is copied once in so many tokens."""
KEPT_UNTIL = 1 / 8
"""Share of a batch that may have ended before its rows leave, which copies the cache."""


@dataclass
class Output:
    """What was generated for one prompt."""

    text: str
    """Up to, not including, the stop string or the end-of-text token."""
    tokens: int
    ended: str
    """end (end-of-text token), stop (stop string) or length (max_new_tokens)."""


class _Roomy(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values at the start of larger buffers: transformers' own layer copies them at each token."""

    room: list[Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, news = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            self.device, self.is_initialized = key_states.device, True
            self.room = [new.new_empty(*new.shape[:2], end + SPARE, new.shape[3]) for new in news]
            if start:
                for buffer, old in zip(self.room, (self.keys, self.values), strict=True):
                    buffer[..., :start, :] = old  # type: ignore[assignment]
        for buffer, new in zip(self.room, news, strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


def _cache(model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [_Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    return cache


def generated_together(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, batch_tokens: int | None
) -> list[list[int]]:
    """Which prompts make up each batch of `generate`, the longest first.

    A batch does not change when others are left out, so a part of a split can be scored again as it was.
    """
    return _batches([len(prompt) + max_new_tokens for prompt in prompts], batch_size, batch_tokens)


def chosen_together(
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
    batch_tokens: int | None,
) -> list[list[int]]:
    """Which prompts make up each batch of `choice_log_likelihoods`, as `generated_together`."""
    each = max(map(len, choices))
    rows = zip(prompts, choices, strict=True)
    lengths = [(len(prompt) + max(map(len, texts))) * each for prompt, texts in rows]
    return _batches(lengths, max(1, batch_size // each), batch_tokens)


def _batches(lengths: Sequence[int], rows: int, tokens: int | None) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    return [order[run] for run in cut([lengths[i] for i in order], rows, tokens)]


@torch.inference_mode()
def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy a target token over all batches."""
    total = sum(target_loss(model, batch).double() for batch in batches)
    return float(total / sum(len(batch.targets) for batch in batches))


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Output]:
    """Greedy continuations, in the order of `prompts`.

    Prompts are sorted by length and padded on the left; rows that have ended leave their batch a few at a time, and a
    batch ends with its last row.

    Args:
        batch_size, batch_tokens: rows decoded together are at most so many, and with room for their answers at
            most so many tokens.
        progress: called with the number of rows that have just finished.
    """
    outputs: dict[int, Output] = {}
    for chosen in generated_together(prompts, max_new_tokens, batch_size, batch_tokens):
        found = _decode(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, stop, progress)
        outputs.update(zip(chosen, found, strict=True))
    return [outputs[i] for i in range(len(prompts))]


@torch.inference_mode()
def choice_log_likelihoods(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[list[float]]:
    """Each prompt's choices' log-likelihoods: the sum over a choice's tokens, in nats, in the given order.

    A prompt is encoded once; its choices then share its key-value cache.

    Args:
        choices: for each prompt the token ids of its choices, none empty.
        batch_size, batch_tokens: choices scored together are at most so many (but at least one prompt's), and with
            their prompts at most so many tokens.
        progress: called with the number of prompts that have just finished.
    """
    found: dict[int, list[float]] = {}
    for chosen in chosen_together(prompts, choices, batch_size, batch_tokens):
        scores = _score_choices(model, [prompts[i] for i in chosen], [choices[i] for i in chosen])
        found.update(zip(chosen, scores, strict=True))
        progress(len(chosen))
    return [found[i] for i in range(len(prompts))]


def _score_choices(
    model: Any, prompts: list[Sequence[int]], choices: list[Sequence[Sequence[int]]]
) -> list[list[float]]:
    device, pad = model.device, 0
    owners = torch.tensor([row for row, texts in enumerate(choices) for _ in texts], device=device)
    flat = [list(text) for texts in choices for text in texts]
    ids, mask, positions = _padded_left(prompts, pad, device)
    cache = _cache(model)
    hidden = [_hidden(model, ids, mask, positions, cache)[owners, -1:]]
    # The last hidden state of the prompt foretells a choice's first token, so its last token is not fed.
    longest = max(map(len, flat)) - 1
    if longest:
        cache.batch_select_indices(owners)
        fed = torch.tensor([text[:-1] + [pad] * (longest - len(text) + 1) for text in flat], device=device)
        fed_mask = torch.tensor(
            [[1] * (len(text) - 1) + [0] * (longest - len(text) + 1) for text in flat], device=device
        )
        fed_positions = positions[owners, -1:] + 1 + torch.arange(longest, device=device)
        hidden.append(_hidden(model, fed, torch.cat([mask[owners], fed_mask], 1), fed_positions, cache))
    states = torch.cat(hidden, 1)
    rows = torch.tensor([row for row, text in enumerate(flat) for _ in text], device=device)
    columns = torch.tensor([column for text in flat for column in range(len(text))], device=device)
    tokens = torch.tensor([token for text in flat for token in text], device=device)
    totals = torch.zeros(len(flat), dtype=torch.float64, device=device)
    totals.index_add_(0, rows, _token_log_likelihoods(model, states[rows, columns], tokens).double())
    each = iter(totals.tolist())
    return [[next(each) for _ in texts] for texts in choices]


def _token_log_likelihoods(model: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) from the hidden state before it, in chunks, since logits are the peak of memory."""
    head, softcap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    found = []
    size = chunk_rows(head.weight.shape[0])
    for states, wanted in zip(torch.split(hidden, size), torch.split(tokens, size), strict=True):
        logits = head(states).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        found.append(log_likelihoods_(logits, wanted)[0])
    return torch.cat(found)


def _padded_left(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and positions, each (prompts, longest prompt)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _decode(
    model: Any,
    tokenizer: Any,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    progress: Callable[[int], None],
) -> list[Output]:
    device = model.device
    end = tokenizer.eos_token_id
    ids, mask, positions = _padded_left(prompts, end, device)
    cache = _cache(model)
    written: list[list[int]] = [[] for _ in prompts]
    outputs: list[Output | None] = [None] * len(prompts)
    slots = list(range(len(prompts)))  # the row in each place of the batch

    while None in outputs:
        chosen = _next_tokens(model, ids, mask, positions, cache).tolist()
        running = [place for place, row in enumerate(slots) if outputs[row] is None]
        for place in running:
            row = slots[place]
            written[row].append(chosen[place])
            outputs[row] = _ended(tokenizer, written[row], end, stop, max_new_tokens)
        going = [place for place in running if outputs[slots[place]] is None]
        progress(len(running) - len(going))
        ids = torch.tensor(chosen, device=device).unsqueeze(1)
        mask = F.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
        if going and len(going) <= (1 - KEPT_UNTIL) * len(slots):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            slots = [slots[place] for place in going]
    return [output for output in outputs if output is not None]


def _next_tokens(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """The likeliest next token of each row; the head sees one position a row."""
    logits: Tensor = model.get_output_embeddings()(_hidden(model, ids, mask, positions, cache)[:, -1])
    return logits.argmax(-1)


def _hidden(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Last hidden states (rows, new tokens, hidden size), adding the new tokens to the cache."""
    states: Tensor = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
    ).last_hidden_state
    return states


def _ended(tokenizer: Any, written: list[int], end: int, stop: Sequence[str], max_new_tokens: int) -> Output | None:
    if written[-1] == end:
        return Output(tokenizer.decode(written[:-1], skip_special_tokens=True), len(written), "end")
    if stop:
        tail = tokenizer.decode(written[-TAIL:], skip_special_tokens=True)
        if any(text in tail for text in stop):
            whole = tokenizer.decode(written, skip_special_tokens=True)
            # An answer may start on a new line: what stops it is looked for after its first character.
            start = len(whole) - len(whole.lstrip())
            places = [place for text in stop if (place := whole.find(text, start)) >= 0]
            if places:
                return Output(whole[: min(places)], len(written), "stop")
    if len(written) == max_new_tokens:
        return Output(tokenizer.decode(written, skip_special_tokens=True), len(written), "length")
    return None
