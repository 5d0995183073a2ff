"""Greedy decoding of a base model, adapted or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tiedlora.models.placement import input_device, without_gradients
from tiedlora.scoring.batches import batches_by_length, hidden_states, new_cache, padded_left

MIN_STOP_SEARCH_TOKENS = 12
"""At least so many of the last tokens are decoded to look for a stop string."""
ENDED_SHARE_TO_COMPACT = 1 / 8
"""Finished rows leave their batch when they are this share of it. (To remove rows copies the cache.)"""


@dataclass
class Output:
    """The answer that was generated for one prompt."""

    text: str
    """The text before the stop string or the end-of-text token."""
    tokens: int
    ended: str
    """end (end-of-text token), stop (stop string) or length (max_new_tokens)."""


def generation_batches(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, batch_tokens: int | None
) -> list[list[int]]:
    """The prompt numbers of each batch of `generate`, with the longest prompts first.

    A batch stays the same if other batches are left out. So a part of a split can be scored again in the same batches.
    """
    return batches_by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_size, batch_tokens)


@without_gradients
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
    """Generate greedy continuations, in the order of `prompts`.

    Prompts are sorted by length and padded on the left. Finished rows leave their batch a few at a time, and a batch
    ends with its last row.

    Args:
        prompts: token ids, none empty.
        stop: strings that end an answer. They count only after the answer's first character that is not blank.
        batch_size: the most rows that are decoded together.
        batch_tokens: the most tokens of those rows, with padding and space for their answers; None sets no limit.
        progress: is called with the number of rows that have just finished.
    """
    outputs: dict[int, Output] = {}
    for batch in generation_batches(prompts, max_new_tokens, batch_size, batch_tokens):
        batch_outputs = _decode(model, tokenizer, [prompts[i] for i in batch], max_new_tokens, stop, progress)
        outputs.update(zip(batch, batch_outputs, strict=True))
    return [outputs[i] for i in range(len(prompts))]


def _decode(
    model: Any,
    tokenizer: Any,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    progress: Callable[[int], None],
) -> list[Output]:
    device, end_id = input_device(model), tokenizer.eos_token_id
    ids, mask, positions = padded_left(prompts, end_id, device)
    cache = new_cache(model)
    written: list[list[int]] = [[] for _ in prompts]
    outputs: list[Output | None] = [None] * len(prompts)
    batch_rows = list(range(len(prompts)))  # the prompt at each index of the batch, which becomes smaller

    while None in outputs:
        next_ids = _next_tokens(model, ids, mask, positions, cache).tolist()
        running = [index for index, row in enumerate(batch_rows) if outputs[row] is None]
        for index in running:
            row = batch_rows[index]
            written[row].append(next_ids[index])
            outputs[row] = _finished_output(tokenizer, written[row], end_id, stop, max_new_tokens)
        still_running = [index for index in running if outputs[batch_rows[index]] is None]
        progress(len(running) - len(still_running))
        ids = torch.tensor(next_ids, device=device).unsqueeze(1)
        mask = F.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
        if still_running and len(still_running) <= (1 - ENDED_SHARE_TO_COMPACT) * len(batch_rows):
            kept = torch.tensor(still_running, device=device)
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            batch_rows = [batch_rows[index] for index in still_running]
    return [output for output in outputs if output is not None]


def _next_tokens(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """The most likely next token of each row. The output head is computed at only one position of each row."""
    logits: Tensor = model.get_output_embeddings()(hidden_states(model, ids, mask, positions, cache)[:, -1])
    return logits.argmax(-1)


def _finished_output(
    tokenizer: Any, written: list[int], end_id: int, stop: Sequence[str], max_new_tokens: int
) -> Output | None:
    """The output, if its last token ends it; otherwise None."""
    if written[-1] == end_id:
        return Output(tokenizer.decode(written[:-1], skip_special_tokens=True), len(written), "end")
    if stop and _is_near_end(tokenizer, written, stop):
        text = tokenizer.decode(written, skip_special_tokens=True)
        # An answer may start on a new line, so a stop string does not count among the blanks at its start.
        first = len(text) - len(text.lstrip())
        stops = [index for string in stop if (index := text.find(string, first)) >= 0]
        if stops:
            return Output(text[: min(stops)], len(written), "stop")
    if len(written) == max_new_tokens:
        return Output(tokenizer.decode(written, skip_special_tokens=True), len(written), "length")
    return None


def _is_near_end(tokenizer: Any, written: list[int], stop: Sequence[str]) -> bool:
    """Whether a stop string is in the last tokens. To decode only these is faster than to decode the whole answer."""
    # A stop string has at most as many tokens as bytes.
    longest = max(len(string.encode("utf-8", "surrogatepass")) for string in stop)
    tail = tokenizer.decode(written[-max(longest, MIN_STOP_SEARCH_TOKENS) :], skip_special_tokens=True)
    return any(string in tail for string in stop)
