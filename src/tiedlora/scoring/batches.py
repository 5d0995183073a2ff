"""Code that decoding and likelihoods share: batches, padding on the left, the key-value cache, hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tiedlora.data.batching import split_by_limits

SPARE_TOKENS = 64
"""How many tokens a full cache grows by. So it is copied only once per so many new tokens."""


def batches_by_length(lengths: Sequence[int], rows: int, tokens: int | None) -> list[list[int]]:
    """The row numbers of each batch, with the longest rows first. A batch has at most `rows` rows and `tokens` tokens.

    Args:
        lengths: the number of tokens of each row.
        tokens: padding included; None sets no limit.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    return [order[batch] for batch in split_by_limits([lengths[i] for i in order], rows, tokens)]


def padded_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and positions, each (prompts, longest prompt)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The keys and values of a layer, at the start of larger buffers. (transformers' own layer copies all of them for
    every new token.)
    """

    buffers: list[Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, new_states = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            self.device, self.is_initialized = key_states.device, True
            self.buffers = [new.new_empty(*new.shape[:2], end + SPARE_TOKENS, new.shape[3]) for new in new_states]
            if start:
                for buffer, old in zip(self.buffers, (self.keys, self.values), strict=True):
                    buffer[..., :start, :] = old  # type: ignore[assignment]
        for buffer, new in zip(self.buffers, new_states, strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices.to(self.keys.device))  # type: ignore[union-attr]
        self.buffers = None


def new_cache(model: Any) -> DynamicCache:
    """An empty key-value cache for the model."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    return cache


def hidden_states(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """The last hidden states, (rows, new tokens, hidden size). Adds the new tokens' keys and values to the cache."""
    states: Tensor = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
    ).last_hidden_state
    # With device_map, the last layer may be on another device than the token ids.
    return states.to(ids.device)
