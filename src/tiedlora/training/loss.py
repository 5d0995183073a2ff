"""Cross-entropy of the target positions, in chunks.

Logits are the peak of memory (batch x length x vocabulary, several times over), and most of them
belong to prompt or padding positions that no loss looks at. Here only target positions meet the output
head, a chunk at a time; since the head is frozen, each chunk's gradient with respect to the hidden
states is computed at once and its logits are dropped, so memory does not grow with the vocabulary
times the batch, and the head is multiplied twice, not three times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tiedlora.data.batching import Batch

CHUNK = 256
"""Target positions a chunk at most: enough for full matrix-product speed."""
LOGITS = CHUNK * 49_152
"""Logits a chunk at most, 50 MB in float32: a larger vocabulary has shorter chunks, so memory does not grow with it."""


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits a chunk: CHUNK, or as many as LOGITS allows."""
    return max(1, min(CHUNK, LOGITS // vocabulary))


def log_likelihoods_(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax at one token a row, in place: a second tensor of the logits' size costs more than the arithmetic.

    Args:
        logits: (rows, vocabulary); they become exp(logits - their row's largest).
        wanted: (rows,) token ids.

    Returns:
        log p of each row's token (rows,), and the sums of the new rows (rows, 1).
    """
    logits -= logits.amax(-1, keepdim=True)
    ours = logits.gather(1, wanted.unsqueeze(1))
    sums = logits.exp_().sum(-1, keepdim=True)
    return (ours - sums.log()).squeeze(1), sums


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        # float64 stays float64, so that tests can compare to 1e-12; bfloat16 sums in float32.
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
    """Summed cross-entropy of a batch's target tokens, float32 (float64 for a float64 model).

    Args:
        model: a causal language model of transformers, its head frozen.

    Raises:
        ValueError: the output head is trained, which this loss gives no gradient for.
    """
    head = model.get_output_embeddings()
    if head.weight.requires_grad:
        raise ValueError("target_loss needs a frozen output head")
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    states = hidden.flatten(0, 1).index_select(0, batch.positions)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    total: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states, head.weight, getattr(head, "bias", None), batch.targets, softcap
    )
    return total


@torch.inference_mode()
def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy per target token over all batches."""
    total = sum(target_loss(model, batch).double() for batch in batches)
    return float(total / sum(len(batch.targets) for batch in batches))
