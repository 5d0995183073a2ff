"""The likelihoods of given texts after a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tiedlora.scoring.batches import batches_by_length, hidden_states, new_cache, padded_left
from tiedlora.training.loss import chunk_rows, log_likelihoods_


def choice_batches(
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
    batch_tokens: int | None,
) -> list[list[int]]:
    """Which prompts make up each batch of `choice_log_likelihoods`, the longest first."""
    each = max(map(len, choices))
    rows = zip(prompts, choices, strict=True)
    lengths = [(len(prompt) + max(map(len, texts))) * each for prompt, texts in rows]
    return batches_by_length(lengths, max(1, batch_size // each), batch_tokens)


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
    results: dict[int, list[float]] = {}
    for chosen in choice_batches(prompts, choices, batch_size, batch_tokens):
        scores = _score_choices(model, [prompts[i] for i in chosen], [choices[i] for i in chosen])
        results.update(zip(chosen, scores, strict=True))
        progress(len(chosen))
    return [results[i] for i in range(len(prompts))]


def _score_choices(
    model: Any, prompts: list[Sequence[int]], choices: list[Sequence[Sequence[int]]]
) -> list[list[float]]:
    device, pad = model.device, 0
    owners = torch.tensor([row for row, texts in enumerate(choices) for _ in texts], device=device)
    flat = [list(text) for texts in choices for text in texts]
    ids, mask, positions = padded_left(prompts, pad, device)
    cache = new_cache(model)
    hidden = [hidden_states(model, ids, mask, positions, cache)[owners, -1:]]
    # The last hidden state of the prompt foretells a choice's first token, so its last token is not fed.
    longest = max(map(len, flat)) - 1
    if longest:
        cache.batch_select_indices(owners)
        fed = torch.tensor([text[:-1] + [pad] * (longest - len(text) + 1) for text in flat], device=device)
        fed_mask = torch.tensor(
            [[1] * (len(text) - 1) + [0] * (longest - len(text) + 1) for text in flat], device=device
        )
        fed_positions = positions[owners, -1:] + 1 + torch.arange(longest, device=device)
        hidden.append(hidden_states(model, fed, torch.cat([mask[owners], fed_mask], 1), fed_positions, cache))
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
    results = []
    size = chunk_rows(head.weight.shape[0])
    for states, wanted in zip(torch.split(hidden, size), torch.split(tokens, size), strict=True):
        logits = head(states).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        results.append(log_likelihoods_(logits, wanted)[0])
    return torch.cat(results)
