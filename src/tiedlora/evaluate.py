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
from tiedlora.loss import target_loss

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


def _decode(
    model: Any,
    tokenizer: Any,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    progress: Callable[[int], None],
) -> list[Output]:
    device = model.device
    end, pad = tokenizer.eos_token_id, tokenizer.eos_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
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
    hidden = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
    ).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden[:, -1])
    return logits.argmax(-1)


def _ended(tokenizer: Any, written: list[int], end: int, stop: Sequence[str], max_new_tokens: int) -> Output | None:
    if written[-1] == end:
        return Output(tokenizer.decode(written[:-1], skip_special_tokens=True), len(written), "end")
    if stop:
        tail = tokenizer.decode(written[-TAIL:], skip_special_tokens=True)
        if any(text in tail for text in stop):
            whole = tokenizer.decode(written, skip_special_tokens=True)
            first = min(place for text in stop if (place := whole.find(text)) >= 0)
            return Output(whole[:first], len(written), "stop")
    if len(written) == max_new_tokens:
        return Output(tokenizer.decode(written, skip_special_tokens=True), len(written), "length")
    return None
