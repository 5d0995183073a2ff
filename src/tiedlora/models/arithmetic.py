"""What training and answering cost on a base model, by arithmetic: FLOP and bytes. No torch, and no model is loaded."""

from __future__ import annotations

from tiedlora.config.schema import Config
from tiedlora.tying import Architecture, target_shape

UNGATED_FAMILIES = ("gpt2", "gpt_neox")
"""Families whose feed-forward block has two products; others have a third one, the gate."""
CHUNK_BYTES = 2 * 4 * 256 * 49_152
"""The logits of one chunk of training.loss and their gradient, in float32."""
PROCESS_BYTES = 500_000_000
"""A process on a CPU that has imported torch and transformers, without a model. A GPU's peak does not include it."""


def block_weights(a: Architecture) -> int:
    """The weights that every token is multiplied with, in all layers."""
    names = ["q", "k", "v", "o", "up", "down"] + ([] if a.family in UNGATED_FAMILIES else ["gate"])
    return a.layers * sum(d_in * d_out for d_in, d_out in (target_shape(a, name) for name in names))


def forward_flop(a: Architecture, tokens: float, head_tokens: float) -> float:
    """FLOP of one row's forward pass.

    Two for each weight and token, and for each pair of tokens two products of attention with 2 x head size each. A
    token attends to itself and earlier ones, so there are tokens^2 / 2 pairs.

    Args:
        head_tokens: how many tokens the output head is applied to.
    """
    attention = 4 * a.layers * a.heads * a.head_dim * tokens * tokens / 2
    return 2 * (block_weights(a) * tokens + a.vocabulary * a.hidden * head_tokens) + attention


def training_flop(a: Architecture, tokens: float, target_tokens: float) -> float:
    """FLOP of one row's training pass: forward, and backward through frozen weights to the activations.

    The backward pass has one more product for each weight, and two for each of attention's two. The products of the
    adapter, a few per cent, are left out.
    """
    forward = forward_flop(a, tokens, target_tokens)
    return 2 * forward + 4 * a.layers * a.heads * a.head_dim * tokens * tokens / 2


def training_bytes(config: Config, longest_row: int) -> int:
    """An estimate of the peak memory of training, in bytes. On a GPU it is untried.

    It is the sum of the weights (with an input and an output embedding), the activations that the backward pass needs,
    and a chunk of logits. A block keeps about 8 tensors of the hidden size, 3 of the heads' size for each of q, k, v,
    and 3 of the feed-forward size for each token of a forward pass.

    Args:
        longest_row: the tokens of the longest row.
    """
    a, train = config.model.architecture, config.train
    number = 4 if train.dtype == "float32" else 2
    in_blocks = {None: number, "nf4": 0.5, "int8": 1}[config.model.quantization]
    weights = in_blocks * block_weights(a) + number * 2 * a.vocabulary * a.hidden
    tokens = longest_row * min(train.microbatch_size or train.batch_size, train.batch_size)
    for limit in (train.microbatch_tokens, train.batch_tokens):
        tokens = max(longest_row, min(tokens, limit or tokens))
    kept = 8 * a.hidden + 3 * a.head_dim * (a.heads + 2 * a.kv_heads) + 3 * a.intermediate
    # Recomputed, only one block's activations are kept at a time, and the input of each block.
    activations = kept + a.layers * a.hidden if train.recompute_activations else a.layers * kept
    return int(weights + number * tokens * activations + CHUNK_BYTES)
