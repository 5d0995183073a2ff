"""Attention as plain matrix products, for short bfloat16 rows on a CPU. Every other case uses torch's own attention.

torch's fused attention computes over blocks of keys. This saves memory, but costs time if there are only one or two
blocks. Measured for a layer of SmolLM2-135M, forward and backward, 8 rows of 200 tokens, on an AVX512-bf16 core: plain
matrix products take 31 ms, the fused kernel 43 ms, and the fused kernel with a mask 50 ms.

On a GPU in float32, torch's own attention gets keys that are repeated for all heads that share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tiedlora"
HALVES = (torch.bfloat16, torch.float16)
LONGEST_ROW = 512
"""Most tokens of a row. The memory of the weights grows with the square of the length, and costs more beyond this."""


def use(model: Any) -> None:
    """Replace torch's attention in a model by this one. Any other (eager, flash, flex) was chosen, and stays."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    # cuDNN's attention makes a plan for every new shape, and the batches of a run have many shapes.
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def rows_not_packed() -> Iterator[None]:
    """Inside the block, transformers takes every row for one sequence, as the rows of this project are.

    Otherwise, each forward pass without a mask and a cache asks the device whether a row has several sequences (whose
    positions start again at 0), and Python waits for the answer.
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        query: (rows, heads, new tokens, head_dim); key and value: (rows, key-value heads, tokens, head_dim).
        attention_mask: None if each token attends to itself and to every token before it.

    Returns:
        (rows, new tokens, heads, head_dim), and None in place of the attention weights.
    """
    changed = any(settings.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    causal = is_causal is not False and getattr(module, "is_causal", True)
    plain = attention_mask is None and not dropout and causal and not changed
    fast = query.device.type == "cpu" and query.dtype == torch.bfloat16
    shares_keys = query.device.type != "cpu" and query.dtype not in HALVES and key.shape[1] < query.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Lengths are compared last: torch.compile makes a graph for each answer of the first comparison, and on a GPU none
    # is needed. The second one is true in every pass without a cache.
    if plain and fast and query.shape[2] == key.shape[2] <= LONGEST_ROW:
        mixed = by_products(query, key, value, scale)
    elif plain and shares_keys and query.shape[2] == key.shape[2]:
        mixed = by_repeated_keys(query, key, value, scale)
    else:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **settings
        )
    return mixed.transpose(1, 2).contiguous(), None


def by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention by its definition, softmax(s Q K^T) V, with the weights of all pairs in memory at once.

    The queries of all heads that share a key head form one long row, so keys and values are not repeated.

    Args:
        query: (rows, heads, length, head_dim); key and value: (rows, key-value heads, length, head_dim).

    Returns:
        (rows, heads, length, head_dim).
    """
    rows, heads, length, size = query.shape
    groups = rows * key.shape[1]
    scores = torch.bmm((query * scale).reshape(groups, -1, size), key.reshape(groups, length, size).transpose(1, 2))
    future = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    masked = scores.view(groups, -1, length, length) + future
    weights = _opaque_softmax(masked) if torch.compiler.is_compiling() else masked.softmax(-1)
    mixed = torch.bmm(weights.view(groups, -1, length), value.reshape(groups, length, -1))
    return mixed.view(rows, heads, length, -1)


def by_repeated_keys(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention by torch's own, in which each head has keys and values of its own.

    transformers leaves the sharing of keys to torch, which on a GPU has a kernel for it in 16-bit types alone. Other
    types would get plain products, and keep the weights of all pairs: 9 GB for SmolLM2-135M in float32, with 2 rows of
    2,048 tokens. Repeated keys get a kernel that keeps none.

    Args:
        query: (rows, heads, length, head_dim); key and value: (rows, key-value heads, length, head_dim).

    Returns:
        (rows, heads, length, head_dim).
    """
    times = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, times), repeat_kv(value, times)
    return F.scaled_dot_product_attention(query, key, value, scale=scale, is_causal=True)


def mask(
    *, attention_mask: Tensor | None, device: torch.device, allow_is_causal_skip: bool = True, **settings: Any
) -> Tensor | None:
    """The mask function that transformers calls in every pass.

    transformers leaves out a mask without padding, which it asks the device. Python would wait for a GPU's answer at
    every token. So on a GPU a mask that is given stays.
    """
    can_skip = allow_is_causal_skip and (attention_mask is None or device.type == "cpu")
    return sdpa_mask(attention_mask=attention_mask, device=device, allow_is_causal_skip=can_skip, **settings)


@torch.library.custom_op("tiedlora::softmax", mutates_args=())
def _opaque_softmax(scores: Tensor) -> Tensor:
    """torch's softmax as one operator that torch.compile does not split. If it is split, it keeps float32 copies of all
    pairs. Attention then takes a fifth longer for rows of 243 tokens, and a third longer for rows of 400.
    """
    return scores.softmax(-1)


@torch.library.custom_op("tiedlora::softmax_backward", mutates_args=())
def _opaque_softmax_backward(gradient: Tensor, weights: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)  # type: ignore[no-any-return]


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    (weights,) = ctx.saved_tensors
    return _opaque_softmax_backward(gradient.contiguous(), weights)  # type: ignore[no-any-return]


_opaque_softmax.register_fake(lambda scores: torch.empty_like(scores))
_opaque_softmax_backward.register_fake(lambda _gradient, weights: torch.empty_like(weights))


def _keep_output(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG001  (torch gives it by name)
    ctx.save_for_backward(output)


_opaque_softmax.register_autograd(_backward, setup_context=_keep_output)

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
