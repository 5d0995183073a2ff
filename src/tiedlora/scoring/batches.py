"""Code that decoding and likelihoods share: batches, padding on the left, the key-value cache, hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tiedlora.data.batching import split_by_limits


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
    """The keys and values of a layer, at the start of buffers for all tokens that will come. (transformers' own layer
    copies all keys and values for every new token.)

    Args:
        tokens: the most tokens of a row, with padding.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = tokens
        self.buffers: list[Tensor] = []
        self.column: Tensor | None = None
        """With `fix_shapes`: where the next token goes, (1,)."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new_states = (key_states, value_states)
        if self.column is not None:
            for buffer, new in zip(self.buffers, new_states, strict=True):
                buffer.index_copy_(2, self.column, new)
            return self.keys, self.values  # type: ignore[return-value]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.buffers:
            self.device, self.is_initialized = key_states.device, True
            self.buffers = [new.new_empty(*new.shape[:2], self.tokens, new.shape[3]) for new in new_states]
        for buffer, new in zip(self.buffers, new_states, strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def fix_shapes(self, column: Tensor) -> None:
        """From now on, write one token a pass at `column`, and return the whole buffers. Then every pass has the same
        shapes, and a mask must hide the columns that are not written yet.
        """
        self.column = column
        for buffer in self.buffers:
            # A hidden value is multiplied by zero, which only a finite value survives.
            buffer[..., self.get_seq_length() :, :] = 0
        self.keys, self.values = self.buffers

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
