"""The cross-entropy of the target positions, computed in chunks.

Logits determine the peak of memory (several times batch x length x vocabulary). Most of them belong to prompt or
padding positions, which the loss does not need. Here the output head is applied only to target positions, one chunk at
a time. The head is frozen. So the gradient of a chunk with respect to the hidden states is computed in the forward
pass, and the chunk's logits are freed. Memory then does not grow with the vocabulary times the batch, and there are
two products with the head instead of three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tiedlora.data.batching import Batch
from tiedlora.errors import UserError
from tiedlora.models import output_head
from tiedlora.models.placement import weights_in_place, without_gradients

CHUNK = 256
"""The most target positions of a chunk. They are enough for the full speed of matrix products."""
LOGITS = CHUNK * 49_152
"""The most logits of a chunk, 50 MB in float32. A larger vocabulary gives shorter chunks, so memory does not grow."""


def chunk_rows(vocabulary: int) -> int:
    """How many positions a chunk has: CHUNK, or as many as LOGITS allows."""
    return max(1, min(CHUNK, LOGITS // vocabulary))


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


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.zeros(len(labels), dtype=_summed_in(hidden.dtype), device=hidden.device)
        size = chunk_rows(weight.shape[0])
        for start in range(0, len(labels), size):
            places = slice(start, start + size)
            logits, targets = F.linear(hidden[places], weight, bias).to(losses.dtype), labels[places]
            slope = None
            if softcap is not None:
                squashed = torch.tanh(logits / softcap)
                logits, slope = softcap * squashed, 1 - squashed.square()
            log_probs, sums = log_likelihoods_(logits, targets)
            losses[places] = -log_probs
            if gradient is not None:
                # What log_likelihoods_ has left in the logits becomes the softmax, less 1 at each target.
                delta = logits.div_(sums)
                delta[torch.arange(len(targets), device=delta.device), targets] -= 1
                if slope is not None:
                    delta *= slope
                gradient[places] = delta.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype).unsqueeze(1), None, None, None, None


def target_loss(model: Any, batch: Batch) -> Tensor:
    """The sum of the cross-entropy over a batch's target tokens, a scalar in float32 (float64 for a float64 model).

    Args:
        model: a causal language model of transformers with a frozen output head.

    Raises:
        ValueError: the output head is trained. This loss gives no gradient for it.
    """
    return token_losses(model, batch).sum().to(batch.targets.device)


def token_losses(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The cross-entropy of each of a batch's target tokens, (target tokens,), on the device of the head's inputs.

    Args:
        temperature: divides the logits.

    Raises:
        ValueError: as target_loss.
        UserError: the temperature is not 1, and the model's logits are not linear in its hidden states.
    """
    head = model.get_output_embeddings()
    if head.weight.requires_grad:
        raise ValueError("target_loss needs a frozen output head")
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
    with _head_inputs(model, states, tokens, temperature) as inputs:
        losses: Tensor = _TokenLosses.apply(*inputs)  # type: ignore[no-untyped-call]
    return losses


def _states(model: Any, batch: Batch) -> Tensor:
    """The hidden states of a batch's target positions."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.positions.to(hidden.device))  # type: ignore[no-any-return]


@contextmanager
def _head_inputs(
    model: Any, states: Tensor, tokens: Tensor, temperature: float = 1.0
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor, float | None]]:
    """The hidden states and the tokens where the head runs, its weight and bias, and the softcap.

    The logits are linear in the hidden states, so a model's factor on its logits is put on the states. (No model of
    transformers with such a factor has a bias in its head; output_head.check would refuse it.)
    """
    head, factor = model.get_output_embeddings(), output_head.factor(model) / temperature
    with weights_in_place(head, states if factor == 1 else factor * states, tokens) as (states, tokens):
        yield states, head.weight, getattr(head, "bias", None), tokens, output_head.softcap(model)


@without_gradients
def row_losses(model: Any, batch: Batch) -> list[tuple[float, int]]:
    """Of each of a batch's rows the sum of the cross-entropy over its target tokens, in nats, and their number.

    Raises:
        ValueError: as target_loss.
    """
    sums = batch.sums_by_row(token_losses(model, batch).double().to(batch.targets.device))
    return list(zip(sums.tolist(), [len(row.target) for row in batch.rows], strict=True))


@without_gradients
def row_divergences(model: Any, batch: Batch, as_base: Callable[[], AbstractContextManager[object]]) -> Tensor:
    """The Kullback-Leibler divergence of the adapted from the base model at each row's target tokens.

    It is the mean over a row's target positions of sum_t p(t) (log p(t) - log q(t)), with p the distribution of the
    next token of the adapted model and q that of the base model, in nats, (rows,), float64.

    Args:
        as_base: a context inside which `model` computes as the base model.
    """
    with _head_inputs(model, _states(model, batch), batch.targets) as inputs:
        adapted = inputs[0]
    found = []
    with as_base(), _head_inputs(model, _states(model, batch), batch.targets) as (base, weight, bias, _, softcap):
        size = chunk_rows(weight.shape[0])
        for states in zip(torch.split(adapted, size), torch.split(base, size), strict=True):
            log_p, log_q = (_log_softmax(own, weight, bias, softcap) for own in states)
            found.append((log_p.exp() * (log_p - log_q)).sum(-1).double())
    divergences = torch.cat(found).to(batch.targets.device)
    return batch.sums_by_row(divergences) / batch.sums_by_row(torch.ones_like(batch.targets))


def _log_softmax(states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = F.linear(states, weight, bias).to(_summed_in(states.dtype))
    return F.log_softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), -1)
