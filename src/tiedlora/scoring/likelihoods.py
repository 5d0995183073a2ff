"""The likelihoods of given texts (choices) after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiedlora.models import output_head
from tiedlora.models.placement import input_device, without_gradients
from tiedlora.scoring.decoding import hidden_states, keep_rows, new_cache, padded_left
from tiedlora.training.loss import chunk_rows, log_likelihoods_


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
    prompt_of = torch.tensor([row for row, own in enumerate(choices) for _ in own], device=device)
    # 1. The prompts. Their last hidden state predicts the first token of each of their choices.
    ids, mask, positions = padded_left(prompts, pad_id, device)
    longest = max(1, *map(len, texts)) - 1
    cache = new_cache(model, ids.shape[1] + longest)
    hidden = [hidden_states(model, ids, mask, positions, cache)[prompt_of, -1:]]
    # 2. The choices without their last token, which predicts nothing that is scored.
    if longest:
        keep_rows(cache, prompt_of)
        padding = [longest - len(text[:-1]) for text in texts]
        inputs = [text[:-1] + [pad_id] * pads for text, pads in zip(texts, padding, strict=True)]
        inputs_mask = [[1] * (longest - pads) + [0] * pads for pads in padding]
        full_mask = torch.cat([mask[prompt_of], torch.tensor(inputs_mask, device=device)], 1)
        inputs_positions = positions[prompt_of, -1:] + 1 + torch.arange(longest, device=device)
        hidden.append(hidden_states(model, torch.tensor(inputs, device=device), full_mask, inputs_positions, cache))
    # 3. The log-likelihood of each token, summed over each choice.
    states = torch.cat(hidden, 1)
    rows = torch.tensor([row for row, text in enumerate(texts) for _ in text], dtype=torch.long, device=device)
    columns = torch.tensor([column for text in texts for column in range(len(text))], dtype=torch.long, device=device)
    tokens = torch.tensor([token for text in texts for token in text], dtype=torch.long, device=device)
    sums = torch.zeros(len(texts), dtype=torch.float64, device=device)
    sums.index_add_(0, rows, _token_log_likelihoods(model, states[rows, columns], tokens).double())
    remaining = iter(sums.tolist())
    return [[next(remaining) for _ in own] for own in choices]


def _token_log_likelihoods(model: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) from the hidden state before it. It is computed in chunks, because logits are the peak of memory."""
    head, results = model.get_output_embeddings(), []
    size = chunk_rows(head.weight.shape[0])
    for states, chunk_tokens in zip(torch.split(hidden, size), torch.split(tokens, size), strict=True):
        logits = output_head.after(model, head(states).float())
        results.append(log_likelihoods_(logits, chunk_tokens.to(logits.device))[0].to(hidden.device))
    return torch.cat(results)
