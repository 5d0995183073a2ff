"""The cross-entropy of the target positions, computed in chunks.

Logits determine the peak of memory (several times batch x length x vocabulary). Most of them belong to prompt or
padding positions, which the loss does not need. Here the output head is applied only to target positions, one chunk at
a time. The head is frozen. So the gradient of a chunk with respect to the hidden states is computed in the forward
pass, and the chunk's logits are freed. Memory then does not grow with the vocabulary times the batch, and there are
two products with the head instead of three. (tying=full trains the head: each chunk is then computed twice.)

Each chunk reads all weights of the head, so short chunks are bound by the speed of the memory. A chunk has as many
positions as `train.loss_memory_mb` allows, and on a CPU no more than are enough for the full speed of a product.

The softmax of a chunk reads and writes each logit several times, in float32. On a CPU it takes so few positions at a
time that these stay in the processor's cache, and only the products' bfloat16 logits are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tiedlora.config.schema import TrainConfig
from tiedlora.data.batching import Batch
from tiedlora.errors import UserError
from tiedlora.models import attention, output_head
from tiedlora.models.arithmetic import CPU_CHUNK_ROWS
from tiedlora.models.placement import weights_in_place, without_gradients

CACHED_LOGITS = 2**20
"""So many logits stay in a CPU's cache while the softmax works on them; in float32 they are 4 MB."""
_memory_mb = TrainConfig().loss_memory_mb


@contextmanager
def chunks_within(megabytes: int) -> Iterator[None]:
    """Inside the block, a chunk's tensors of the logits' size have so much memory together (train.loss_memory_mb)."""
    global _memory_mb
    before, _memory_mb = _memory_mb, megabytes
    try:
        yield
    finally:
        _memory_mb = before


def chunk_rows(vocabulary: int, device: torch.device, bytes_per_logit: int) -> int:
    """How many positions a chunk has, at least one."""
    rows = _memory_mb * 10**6 // (bytes_per_logit * vocabulary)
    return max(1, min(rows, CPU_CHUNK_ROWS) if device.type == "cpu" else rows)


def loss_bytes_per_logit(dtype: torch.dtype, softcap: float | None) -> int:
    """The memory of each logit of a chunk of the loss: its sum's dtype, the head's if it is another one, the cap."""
    wide = _summed_in(dtype)
    return wide.itemsize * (1 if softcap is None else 2) + (0 if wide == dtype else dtype.itemsize)


def log_likelihoods_(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax at one token per row, in place. A second tensor of the logits' size would cost more than the
    arithmetic.

    Args:
        logits: (rows, vocabulary). They are overwritten by exp(logits - the largest logit of the row).
        token_ids: (rows,).

    Returns:
        log p of each row's token, (rows,), and the sums of the overwritten rows, (rows, 1).
    """
    logits -= logits.amax(-1, keepdim=True)
    shifted = logits.gather(1, token_ids.unsqueeze(1))
    sums = logits.exp_().sum(-1, keepdim=True)
    return (shifted - sums.log()).squeeze(1), sums


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, so that tests can compare to 1e-12. bfloat16 is summed in float32."""
    return torch.promote_types(dtype, torch.float32)


class _Head(NamedTuple):
    """An output head: logits = weight @ state + bias, and softcap * tanh(logits / softcap) of them."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    def linear(self, states: Tensor) -> Tensor:
        """The logits before the cap, (positions, vocabulary), in the head's dtype."""
        return F.linear(states, self.weight, self.bias)


def _chunk(hidden: Tensor, head: _Head, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The losses of some positions, and their gradient with respect to `hidden` if it is wanted.

    This is a function so that the logits of one chunk are freed before those of the next are computed.
    """
    logits = head.linear(hidden)
    most = max(1, CACHED_LOGITS // len(head.weight)) if logits.device.type == "cpu" else len(targets)
    # Even parts, because torch sums a single row in another order.
    count = math.ceil(len(targets) / most)
    parts = zip(logits.tensor_split(count), targets.tensor_split(count), strict=True)
    losses = torch.cat([_losses_(of_part, tokens, head.softcap, with_gradient) for of_part, tokens in parts])
    return losses, logits @ head.weight if with_gradient else None


def _losses_(logits: Tensor, targets: Tensor, softcap: float | None, with_gradient: bool) -> Tensor:
    """The losses of some positions. If the gradient is wanted, it overwrites the logits, (positions, vocabulary)."""
    wide, slope = logits.to(_summed_in(logits.dtype)), None
    if softcap is not None:
        wide.div_(softcap).tanh_()
        if with_gradient:
            # 1 - tanh^2
            slope = wide.square().neg_().add_(1)
        wide.mul_(softcap)
    log_probs, sums = log_likelihoods_(wide, targets)
    if with_gradient:
        # What log_likelihoods_ has left is divided to the softmax, less 1 at each target.
        wide.div_(sums)
        wide[torch.arange(len(targets), device=wide.device), targets] -= 1
        if slope is not None:
            wide *= slope
        logits.copy_(wide)
    return -log_probs


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: _Head, labels: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.zeros(len(labels), dtype=_summed_in(hidden.dtype), device=hidden.device)
        size = chunk_rows(len(head.weight), hidden.device, loss_bytes_per_logit(hidden.dtype, head.softcap))
        for start in range(0, len(labels), size):
            places = slice(start, start + size)
            losses[places], of_hidden = _chunk(hidden[places], head, labels[places], gradient is not None)
            if gradient is not None and of_hidden is not None:
                gradient[places] = of_hidden
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype).unsqueeze(1), None, None


def target_loss(model: Any, batch: Batch) -> Tensor:
    """The sum of the cross-entropy over a batch's target tokens, a scalar in float32 (float64 for a float64 model).

    Args:
        model: a causal language model of transformers.
    """
    return token_losses(model, batch).sum().to(batch.targets.device)


def token_losses(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The cross-entropy of each of a batch's target tokens, (target tokens,), on the device of the head's inputs.

    Args:
        temperature: divides the logits.

    Raises:
        UserError: the temperature is not 1, and the model's logits are not linear in its hidden states.
    """
    head = model.get_output_embeddings()
    if temperature != 1 and (output_head.softcap(model) is not None or getattr(head, "bias", None) is not None):
        raise UserError(
            f"objective.temperature={temperature:g}: the output head of {type(model).__name__} has a bias or a cap on "
            "its logits, which allows only 1"
        )
    return next_token_losses(model, _states(model, batch), batch.targets, temperature)


def next_token_losses(model: Any, states: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """The cross-entropy of each token, (tokens,), from the hidden state before it, (tokens, hidden size).

    `temperature` divides the hidden states, which is only right for a head without a bias and a softcap.
    """
    with _at_head(model, states, tokens, temperature) as (states, head, tokens):
        if head.weight.requires_grad and torch.is_grad_enabled():
            return _losses_of_trained_head(states, head, tokens)
        losses: Tensor = _TokenLosses.apply(states, head, tokens)  # type: ignore[no-untyped-call]
    return losses


def _losses_of_trained_head(states: Tensor, head: _Head, tokens: Tensor) -> Tensor:
    """As _TokenLosses, with gradients for the head too. The backward pass computes each chunk's logits again."""

    def of_chunk(states: Tensor, tokens: Tensor) -> Tensor:
        return -_log_softmax(states, head).gather(1, tokens.unsqueeze(1)).squeeze(1)

    # The logits, their logarithms, the gradients of both, and two more with a cap.
    size = chunk_rows(len(head.weight), states.device, 6 * _summed_in(states.dtype).itemsize)
    chunks = zip(torch.split(states, size), torch.split(tokens, size), strict=True)
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def _states(model: Any, batch: Batch) -> Tensor:
    """The hidden states of a batch's target positions."""
    with attention.rows_not_packed():
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.positions.to(hidden.device))  # type: ignore[no-any-return]


@contextmanager
def _at_head(
    model: Any, states: Tensor, tokens: Tensor, temperature: float = 1.0
) -> Iterator[tuple[Tensor, _Head, Tensor]]:
    """The hidden states where the head runs, the head, and the tokens there.

    The logits are linear in the hidden states, so a model's factor on its logits is put on the states. (No model of
    transformers with such a factor has a bias in its head; output_head.check would refuse it.)
    """
    head, factor = model.get_output_embeddings(), output_head.factor(model) / temperature
    with weights_in_place(head, states if factor == 1 else factor * states, tokens) as (states, tokens):
        yield states, _Head(head.weight, getattr(head, "bias", None), output_head.softcap(model)), tokens


@without_gradients
def row_losses(model: Any, batch: Batch) -> list[tuple[float, int]]:
    """Of each of a batch's rows the sum of the cross-entropy over its target tokens, in nats, and their number."""
    # In float64 on the CPU, because Apple's accelerator has no float64.
    sums = batch.sums_by_row(token_losses(model, batch).cpu().double())
    return list(zip(sums.tolist(), [len(row.target) for row in batch.rows], strict=True))


@without_gradients
def row_divergences(model: Any, batch: Batch, as_base: Callable[[], AbstractContextManager[object]]) -> Tensor:
    """The Kullback-Leibler divergence of the adapted from the base model at each row's target tokens.

    It is the mean over a row's target positions of sum_t p(t) (log p(t) - log q(t)), with p the distribution of the
    next token of the adapted model and q that of the base model, in nats, (rows,), float64.

    Args:
        as_base: a context inside which `model` computes as the base model.
    """
    with _at_head(model, _states(model, batch), batch.targets) as (adapted, head, _):
        # Full fine-tuning has another head than the base, and `as_base` gives the parameters the base's values.
        adapted_head = _Head(head.weight.detach(), head.bias if head.bias is None else head.bias.detach(), head.softcap)
    found = []
    with as_base(), _at_head(model, _states(model, batch), batch.targets) as (base, head, _):
        # The logits and their logarithms of both, and two more while these are multiplied.
        size = chunk_rows(len(head.weight), base.device, 6 * _summed_in(base.dtype).itemsize)
        for own, others in zip(torch.split(adapted, size), torch.split(base, size), strict=True):
            log_p, log_q = _log_softmax(own, adapted_head), _log_softmax(others, head)
            found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    divergences = torch.cat(found).cpu().double()
    return batch.sums_by_row(divergences) / batch.sums_by_row(torch.ones_like(divergences))


def _log_softmax(states: Tensor, head: _Head) -> Tensor:
    logits, softcap = head.linear(states).to(_summed_in(states.dtype)), head.softcap
    return F.log_softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), -1)
