"""The cross-entropy of the target positions, computed in chunks.

Logits determine the peak of memory (several times batch x length x vocabulary). Most of them belong to prompt or
padding positions, which the loss does not need. Here the output head is applied only to target positions, one chunk at
a time. The head is frozen. So the gradient of a chunk with respect to the hidden states is computed in the forward
pass, and the chunk's logits are freed. Memory then does not grow with the vocabulary times the batch, and there are
two products with the head instead of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tiedlora.data.batching import Batch
from tiedlora.models.placement import weights_in_place, without_gradients

CHUNK = 256
"""Most target positions of a chunk. These are enough for the full speed of matrix products."""
LOGITS = CHUNK * 49_152
"""Most logits of a chunk, 50 MB in float32. With a larger vocabulary chunks are shorter, so memory does not grow."""


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


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # float64 stays float64, so that tests can compare to 1e-12. bfloat16 is summed in float32.
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        size = chunk_rows(weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            rows, targets = hidden[start : start + size], labels[start : start + size]
            logits = F.linear(rows, weight, bias).to(total.dtype)
            slope = None
            if softcap is not None:
                squashed = torch.tanh(logits / softcap)
                logits, slope = softcap * squashed, 1 - squashed.square()
            log_probs, sums = log_likelihoods_(logits, targets)
            total -= log_probs.sum()
            if gradient is not None:
                delta = logits.div_(sums)
                delta[torch.arange(len(targets), device=delta.device), targets] -= 1
                if slope is not None:
                    delta *= slope
                gradient[start : start + size] = delta.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None, None


def target_loss(model: Any, batch: Batch) -> Tensor:
    """The sum of the cross-entropy over a batch's target tokens, a scalar in float32 (float64 for a float64 model).

    Args:
        model: a causal language model of transformers with a frozen output head.

    Raises:
        ValueError: the output head is trained. This loss gives no gradient for it.
    """
    head = model.get_output_embeddings()
    if head.weight.requires_grad:
        raise ValueError("target_loss needs a frozen output head")
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    states = hidden.flatten(0, 1).index_select(0, batch.positions.to(hidden.device))
    softcap = getattr(model.config, "final_logit_softcapping", None)
    with weights_in_place(head, states, batch.targets) as (states, targets):
        total: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            states, head.weight, getattr(head, "bias", None), targets, softcap
        )
    return total.to(batch.targets.device)


@without_gradients
def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """The mean cross-entropy per target token over all batches."""
    total = sum(target_loss(model, batch).double() for batch in batches)
    return float(total / sum(len(batch.targets) for batch in batches))
