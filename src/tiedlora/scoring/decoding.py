"""Greedy decoding of a base model, adapted or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tiedlora.models.placement import input_device, without_gradients
from tiedlora.scoring.answer_ends import AnswerEnds, Output
from tiedlora.scoring.batches import batches_by_length
from tiedlora.scoring.steps import GrowingSteps, Steps


def generation_batches(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, batch_tokens: int | None
) -> list[list[int]]:
    """The prompt numbers of each batch of `generate`, with the longest prompts first.

    A batch stays the same if other batches are left out. So a part of a split can be scored again in the same batches.
    """
    return batches_by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_size, batch_tokens)


@without_gradients
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    more_ends: Sequence[int] = (),
    batch_size: int,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    steps: Callable[[Any, Sequence[Sequence[int]], int, int], Steps] = GrowingSteps,
) -> list[Output]:
    """Generate greedy continuations, in the order of `prompts`.

    Prompts are sorted by length and padded on the left. Finished rows leave their batch a few at a time, and a batch
    ends with its last row.

    Args:
        prompts: token ids, none empty.
        stop: strings that end an answer. They count only after the answer's first character that is not blank.
        more_ends: ids of tokens that end an answer, besides the tokenizer's end-of-text token.
        batch_size: the most rows that are decoded together.
        batch_tokens: the most tokens of those rows, with padding and space for their answers; None sets no limit.
        progress: is called with the number of rows that have just finished.
        steps: computes the next tokens of a batch (see steps.py).
    """
    outputs: dict[int, Output] = {}
    ends = AnswerEnds(tokenizer, stop, max_new_tokens, more_ends)
    for batch in generation_batches(prompts, max_new_tokens, batch_size, batch_tokens):
        batch_steps = steps(model, [prompts[i] for i in batch], tokenizer.eos_token_id, max_new_tokens)
        outputs.update(zip(batch, _decode(model, batch_steps, len(batch), ends, progress), strict=True))
    return [outputs[i] for i in range(len(prompts))]


def _decode(model: Any, steps: Steps, rows: int, ends: AnswerEnds, progress: Callable[[int], None]) -> list[Output]:
    """The outputs of one batch, whose prompts `steps` continues."""
    device = input_device(model)
    written: list[list[int]] = [[] for _ in range(rows)]
    outputs: list[Output | None] = [None] * rows
    batch_rows = list(range(rows))  # the prompt at each index of the batch, which becomes smaller

    while None in outputs:
        next_ids = steps.next_tokens().tolist()
        running = [index for index, row in enumerate(batch_rows) if outputs[row] is None]
        for index in running:
            row = batch_rows[index]
            written[row].append(next_ids[index])
            outputs[row] = ends.output(written[row])
        still_running = [index for index in running if outputs[batch_rows[index]] is None]
        progress(len(running) - len(still_running))
        if still_running and len(still_running) <= (1 - steps.ended_share_to_compact) * len(batch_rows):
            steps.keep(torch.tensor(still_running, device=device))
            batch_rows = [batch_rows[index] for index in still_running]
    return [output for output in outputs if output is not None]
