"""Scoring by several processes: each scores some of the batches, and every process gets the rows of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tiedlora.errors import UserError, is_out_of_memory
from tiedlora.records.rows import PredictionRow
from tiedlora.tasks import Example
from tiedlora.training.distributed import World
from tiedlora.training.sharding import equal_passes, is_sharded


def score_in_shares(
    world: World,
    model: Any,
    examples: Sequence[Example],
    batches: Sequence[list[int]],
    rows_of: Callable[[Sequence[Example]], list[PredictionRow]],
) -> list[PredictionRow]:
    """The rows of all examples, in their order.

    Args:
        batches: the numbers of the examples of each batch. A row's rounding depends on its batch, so the rows are those
            that one process would compute.
        rows_of: scores the examples of one batch.

    Raises:
        MemoryError: memory ran out in one of the processes. All of them raise it, so that all can start again.
        UserError: memory ran out, and the model is sharded: then the processes cannot start again together.
    """
    own: list[tuple[int, PredictionRow]] = []
    failed = False
    try:
        with equal_passes(model, world):
            for batch in world.local_rows(batches):
                # In the order of the split: rows of equal length must keep their order.
                numbers = sorted(batch)
                own += zip(numbers, rows_of([examples[number] for number in numbers]), strict=True)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if is_sharded(model):
            raise UserError(
                "scoring: out of memory in one of the processes that share the model (train.shard=true); the trained "
                "adapter is kept: the same command continues with scoring, with more processes or more memory"
            ) from error
        failed = True
    if world.any(failed):
        raise MemoryError("scoring: memory ran out in one of the processes")
    rows = dict(row for share in world.gather(own) for row in share)
    return [rows[number] for number in range(len(examples))]
