"""What training and answering cost on a base model, by arithmetic: FLOP and bytes. No torch, and no model is loaded."""

from __future__ import annotations

from pathlib import Path

from tiedlora.config.schema import Config
from tiedlora.other_methods import FULL
from tiedlora.tying import Architecture, target_shape

UNGATED_FAMILIES = ("gpt2", "gpt_neox")
"""Families whose feed-forward block has two products; others have a third one, the gate."""
CPU_CHUNK_ROWS = 256
"""The most positions of a chunk of the loss on a CPU. They are enough for the full speed of matrix products."""
GPU_DRIVERS = tuple(map(Path, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))
"""A driver of a GPU has made one of these (NVIDIA's, AMD's, that of WSL). To ask torch would cost a plan seconds."""
PROCESS_BYTES = 500_000_000
"""A process on a CPU that has imported torch and transformers, without a model. A GPU's peak does not include it."""

FULL_BYTES = 20
"""Of full fine-tuning, for each weight: the base's own, a float32 one and its gradient, and Adam's two moments."""
CHECKPOINT_BYTES = 12
"""What a checkpoint of it holds for each weight: the float32 weight, and the two moments."""


def block_weights(a: Architecture) -> int:
    """The weights that every token is multiplied with, in all layers."""
    names = ["q", "k", "v", "o", "up", "down"] + ([] if a.family in UNGATED_FAMILIES else ["gate"])
    return a.layers * sum(d_in * d_out for d_in, d_out in (target_shape(a, name) for name in names))


def attention_flop(a: Architecture, tokens: float) -> float:
    """FLOP of attention's two products in one row's forward pass, with 2 x head size for each pair of tokens.

    A token attends to itself and earlier ones, so there are tokens^2 / 2 pairs.
    """
    return 4 * a.layers * a.heads * a.head_dim * tokens * tokens / 2


def head_flop(a: Architecture, tokens: float) -> float:
    """FLOP of the output head. With a large vocabulary and a small model, this is most of the work of a target."""
    return 2 * a.vocabulary * a.hidden * tokens


def forward_flop(a: Architecture, tokens: float, head_tokens: float) -> float:
    """FLOP of one row's forward pass: two for each weight and token, and those of attention.

    Args:
        head_tokens: how many tokens the output head is applied to.
    """
    return 2 * block_weights(a) * tokens + attention_flop(a, tokens) + head_flop(a, head_tokens)


def training_flop(a: Architecture, tokens: float, target_tokens: float, trains_weights: bool = False) -> float:
    """FLOP of one row's training pass: forward, and backward through the weights to the activations.

    The backward pass has one more product for each weight, and two for each of attention's two. The products of the
    adapter, a few per cent, are left out.

    Args:
        trains_weights: as full fine-tuning does; each weight's gradient is one more product.
    """
    forward, attention = forward_flop(a, tokens, target_tokens), attention_flop(a, tokens)
    return 2 * forward + attention + (forward - attention if trains_weights else 0.0)


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
    if config.tying.method == FULL:
        weights = FULL_BYTES * (block_weights(a) + 2 * a.vocabulary * a.hidden)
    tokens = longest_row * min(train.microbatch_size or train.batch_size, train.batch_size)
    for limit in (train.microbatch_tokens, train.batch_tokens):
        tokens = max(longest_row, min(tokens, limit or tokens))
    kept = 8 * a.hidden + 3 * a.head_dim * (a.heads + 2 * a.kv_heads) + 3 * a.intermediate
    # Recomputed, only one block's activations are kept at a time, and the input of each block.
    activations = kept + a.layers * a.hidden if train.recompute_activations else a.layers * kept
    return int(weights + number * tokens * activations + loss_bytes(config, tokens))


def loss_bytes(config: Config, tokens: int) -> int:
    """The memory of a chunk's logits in training.loss: in float32, and in the head's dtype if it is another one.

    Args:
        tokens: of a forward pass. On a GPU, they are one chunk if the memory allows.
    """
    train = config.train
    row = config.model.architecture.vocabulary * (4 if train.dtype == "float32" else 6)
    on_cpu = train.device == "cpu" or (train.device == "auto" and not any(map(Path.exists, GPU_DRIVERS)))
    rows = min(tokens, CPU_CHUNK_ROWS) if on_cpu else tokens
    return max(row, min(rows * row, train.loss_memory_mb * 10**6))
