"""Generation and likelihood scoring of a base model, adapted or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from tiedlora.data import Batch
from tiedlora.loss import CHUNK, target_loss

TAIL = 12
"""Tokens decoded to look for a stop string: longer than any stop string's own tokens."""


@dataclass
class Output:
    """What was generated for one prompt."""

    text: str
    """Up to, not including, the stop string or the end-of-text token."""
    tokens: int
    ended: str
    """end (end-of-text token), stop (stop string) or length (max_new_tokens)."""


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
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Output]:
    """Greedy continuations, in the order of `prompts`.

    Prompts are sorted by length and padded on the left; a row that has ended leaves its batch, and a
    batch ends with its last row.

    Args:
        progress: called with the number of rows that have just finished.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    outputs: dict[int, Output] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        found = _decode(model, tokenizer, [prompts[i] for i in chunk], max_new_tokens, stop, progress)
        outputs.update(zip(chunk, found, strict=True))
    return [outputs[i] for i in range(len(prompts))]


@torch.inference_mode()
def choice_log_likelihoods(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[list[float]]:
    """Each prompt's choices' log-likelihoods: the sum over a choice's tokens, in nats, in the given order.

    A prompt is encoded once; its choices then share its key-value cache.

    Args:
        choices: for each prompt the token ids of its choices, none empty.
        batch_size: prompts and choices together are at most this many sequences (but at least one prompt's).
        progress: called with the number of prompts that have just finished.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    found: dict[int, list[float]] = {}
    size = max(1, batch_size // max(map(len, choices)))
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        scores = _score_choices(model, [prompts[i] for i in chunk], [choices[i] for i in chunk])
        found.update(zip(chunk, scores, strict=True))
        progress(len(chunk))
    return [found[i] for i in range(len(prompts))]


def _score_choices(
    model: Any, prompts: list[Sequence[int]], choices: list[Sequence[Sequence[int]]]
) -> list[list[float]]:
    device, pad = model.device, 0
    owners = torch.tensor([row for row, texts in enumerate(choices) for _ in texts], device=device)
    flat = [list(text) for texts in choices for text in texts]
    ids, mask, positions = _padded_left(prompts, pad, device)
    cache = DynamicCache(config=model.config)
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
    for states, wanted in zip(torch.split(hidden, CHUNK), torch.split(tokens, CHUNK), strict=True):
        logits = head(states).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        found.append(F.log_softmax(logits, dim=-1).gather(1, wanted.unsqueeze(1)).squeeze(1))
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
    cache = DynamicCache(config=model.config)
    written: list[list[int]] = [[] for _ in prompts]
    outputs: list[Output | None] = [None] * len(prompts)
    alive = list(range(len(prompts)))

    for _ in range(max_new_tokens):
        chosen = _next_tokens(model, ids, mask, positions, cache).tolist()
        going = []
        for place, row in enumerate(alive):
            written[row].append(chosen[place])
            outputs[row] = _ended(tokenizer, written[row], end, stop, max_new_tokens)
            if outputs[row] is None:
                going.append(place)
        progress(len(alive) - len(going))
        if not going:
            break
        if len(going) < len(alive):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            mask, positions = mask[kept], positions[kept]
            alive = [alive[place] for place in going]
        ids = torch.tensor([[written[row][-1]] for row in alive], device=device)
        mask = F.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
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
