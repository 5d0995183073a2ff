"""Greedy decoding of a base model, adapted or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tiedlora.scoring.batches import batches_by_length, hidden_states, new_cache, padded_left

STOP_WINDOW = 12
"""Tokens decoded to look for a stop string: longer than any stop string's own tokens."""
COMPACT_AT_ENDED_SHARE = 1 / 8
"""Share of a batch that may have ended before its rows leave, which copies the cache."""


@dataclass
class Output:
    """What was generated for one prompt."""

    text: str
    """Up to, not including, the stop string or the end-of-text token."""
    tokens: int
    ended: str
    """end (end-of-text token), stop (stop string) or length (max_new_tokens)."""


def generation_batches(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, batch_tokens: int | None
) -> list[list[int]]:
    """Which prompts make up each batch of `generate`, the longest first.

    A batch does not change when others are left out, so a part of a split can be scored again as it was.
    """
    return batches_by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_size, batch_tokens)


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
    for chosen in generation_batches(prompts, max_new_tokens, batch_size, batch_tokens):
        found = _decode(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, stop, progress)
        outputs.update(zip(chosen, found, strict=True))
    return [outputs[i] for i in range(len(prompts))]


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
    ids, mask, positions = padded_left(prompts, end, device)
    cache = new_cache(model)
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
        if going and len(going) <= (1 - COMPACT_AT_ENDED_SHARE) * len(slots):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            slots = [slots[place] for place in going]
    return [output for output in outputs if output is not None]


def _next_tokens(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """The likeliest next token of each row; the head sees one position a row."""
    logits: Tensor = model.get_output_embeddings()(hidden_states(model, ids, mask, positions, cache)[:, -1])
    return logits.argmax(-1)


def _ended(tokenizer: Any, written: list[int], end: int, stop: Sequence[str], max_new_tokens: int) -> Output | None:
    if written[-1] == end:
        return Output(tokenizer.decode(written[:-1], skip_special_tokens=True), len(written), "end")
    if stop:
        tail = tokenizer.decode(written[-STOP_WINDOW:], skip_special_tokens=True)
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
