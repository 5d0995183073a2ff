"""score.engine=continuous: transformers' continuous batching. A new row takes the place of one that has ended.

It has no batches of its own that end with their slowest row, and its cache is in pages, so rows of different lengths
waste no memory. On a GPU it is untried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from tiedlora.models.placement import without_gradients
from tiedlora.scoring.answer_ends import AnswerEnds, Output

PAGE = 32
"""Tokens of a page of the cache."""
PASS_TOKENS = 1024
"""Most tokens of a pass. A longer prompt is divided."""
SECONDS_BETWEEN_CHECKS = 1.0


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
) -> list[Output]:
    """As decoding.generate. All rows are known before the first pass, so the passes are the same in every run.

    transformers knows no stop strings here. An answer is written to its end or to max_new_tokens, and cut
    afterwards.

    Args:
        batch_size: the most rows at once.
        batch_tokens: the most tokens in the cache, up to whole pages; None sets no limit.

    Raises:
        RuntimeError: it failed; also if memory ran out.
    """
    ends = AnswerEnds(tokenizer, stop, max_new_tokens, more_ends)
    pages = sorted((-(-(len(prompt) + max_new_tokens) // PAGE) for prompt in prompts), reverse=True)
    enough = sum(pages[:batch_size])
    blocks = enough if batch_tokens is None else max(pages[0], min(enough, batch_tokens // PAGE))
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends.end_ids,
        pad_token_id=ends.end_ids[0],
    )
    batching = ContinuousBatchingConfig(
        # One page more, because a part of the cache is kept free.
        num_blocks=blocks + 1,
        page_size=PAGE,
        max_batch_tokens=PASS_TOKENS,
        max_requests_per_batch=batch_size,
        # Flash attention would be looked for on the hub.
        auto_switch_to_flash=False,
    )
    with _sdpa(model):
        manager = model.init_continuous_batching(generation, batching)
        names = manager.add_requests([list(prompt) for prompt in prompts], max_new_tokens=max_new_tokens)
        manager.start()
        try:
            tokens = dict(_finished(manager, len(prompts), progress))
        finally:
            manager.stop(block=True)
            manager.destroy()
    return [ends.first_output(tokens[name]) for name in names]


def _finished(manager: Any, rows: int, progress: Callable[[int], None]) -> Iterator[tuple[str, list[int]]]:
    """The name and the tokens of each row, in the order in which they end."""
    left = rows
    while left:
        result = manager.get_result(timeout=SECONDS_BETWEEN_CHECKS)
        if result is None and not manager.is_running():
            raise RuntimeError(f"continuous batching ended with {left} of {rows} answers missing")
        if result is None or not result.is_finished():
            continue
        if result.error is not None:
            raise RuntimeError(f"continuous batching: {result.error}")
        left -= 1
        progress(1)
        yield result.request_id, result.generated_tokens


@contextmanager
def _sdpa(model: Any) -> Iterator[None]:
    """Inside the block, the model uses torch's attention, which continuous batching knows."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
