"""From token ids to batches: which rows make up a step, and how they become tensors."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiedlora.config.schema import TrainConfig
from tiedlora.data.encoding import Encoded

BUCKET_BATCHES = 16
"""Batches sorted by length together: enough to make their rows alike, few enough to keep them shuffled."""


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass, padded on the right: no token sees what comes after, so no mask is needed."""

    input_ids: Tensor
    """(rows, length)"""
    positions: Tensor
    """(target tokens,) places in the flattened (rows * length) whose next token is a target."""
    targets: Tensor
    """(target tokens,) those next tokens."""
    tokens: int
    """Real tokens, padding not counted."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, without waiting for the copy."""
        if device.type != "cuda":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(move(self.input_ids), move(self.positions), move(self.targets), self.tokens)


def split_by_limits(lengths: Sequence[int], rows: int | None, tokens: int | None) -> list[slice]:
    """Cut rows into runs of at most `rows` rows and `tokens` tokens, padding counted.

    Args:
        rows, tokens: None sets no limit. A row that is longer than `tokens` is a run of its own.
    """
    runs, start, longest = [], 0, 0
    for end, length in enumerate(lengths):
        number, longest = end + 1 - start, max(longest, length)
        if end > start and ((rows and number > rows) or (tokens and number * longest > tokens)):
            runs.append(slice(start, end))
            start, longest = end, length
    return [*runs, slice(start, len(lengths))] if lengths else []


class BatchSampler:
    """Which rows make up each optimizer step: a pure function of (lengths, train's settings, seed, step).

    Every row comes exactly once an epoch, and the last step of an epoch may be smaller. With `train.bucket`,
    rows of like length share a step: shuffled rows are sorted within BUCKET_BATCHES batches and the
    batches shuffled again. With `train.batch_tokens` a step ends early at that many tokens.
    """

    def __init__(self, lengths: Sequence[int], train: TrainConfig, seed: int) -> None:
        self.lengths, self.train, self.seed = lengths, train, seed
        self._first_steps = [1]
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def rows_of_step(self, step: int) -> list[int]:
        """Row numbers of optimizer step `step`, counted from 1."""
        epoch = bisect.bisect_right(self._first_steps, step) - 1
        while True:
            place, batches = step - self._first_steps[epoch], self.epoch(epoch)
            if place < len(batches):
                return batches[place]
            epoch += 1
            if epoch == len(self._first_steps):
                self._first_steps.append(self._first_steps[-1] + len(batches))

    def epoch(self, epoch: int) -> list[list[int]]:
        """Row numbers of each step of an epoch, counted from 0."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        train = self.train
        generator = random.Random(f"order/{self.seed}/{epoch}")
        rows = list(range(len(self.lengths)))
        generator.shuffle(rows)
        if train.bucket:
            size = BUCKET_BATCHES * train.batch_size
            chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
            rows = [row for chunk in chunks for row in sorted(chunk, key=lambda row: self.lengths[row])]
        batches = [
            rows[run]
            for run in split_by_limits([self.lengths[row] for row in rows], train.batch_size, train.batch_tokens)
        ]
        if train.bucket:
            generator.shuffle(batches)
        return batches


ALIGNED = 16
"""Matrix products are up to a fifth faster over a multiple of so many tokens."""


def collate(rows: Sequence[Encoded], pad_id: int, context: int = 0) -> Batch:
    """Pad on the right and mark the target positions.

    Args:
        context: rows are padded somewhat further than to the longest, to a multiple of ALIGNED tokens in all, as long
            as they are no longer than this.
    """
    longest = max(len(row) for row in rows)
    each = ALIGNED // math.gcd(ALIGNED, len(rows))
    length = min(-(-longest // each) * each, max(context, longest))
    input_ids = torch.full((len(rows), length), pad_id)
    positions: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor(row.prompt + row.target)
        first = number * length + len(row.prompt) - 1
        positions.extend(range(first, first + len(row.target)))
        targets.extend(row.target)
    return Batch(input_ids, torch.tensor(positions), torch.tensor(targets), sum(len(row) for row in rows))


def microbatches(
    rows: Sequence[Encoded], pad_id: int, size: int | None = None, tokens: int | None = None, context: int = 0
) -> list[Batch]:
    """The rows of one optimizer step in passes of at most `size` rows and `tokens` tokens (but see `collate`).

    As few passes as that allows, and as even: the largest decides the memory, and a last pass of one row would cost
    a whole reading of the weights (and, where blocks are compiled, a graph of its own). Shortest rows first, so that
    each pass pads little.
    """
    if not rows:
        return []
    ordered = sorted(rows, key=len)
    lengths = [len(row) for row in ordered]
    few, longest = len(split_by_limits(lengths, size, tokens)), lengths[-1]
    most = tokens or longest * len(lengths)
    limits = range(longest, most)
    even = min(
        most, longest + bisect.bisect_left(limits, True, key=lambda n: len(split_by_limits(lengths, size, n)) <= few)
    )
    return [collate(ordered[run], pad_id, context) for run in split_by_limits(lengths, size, even)]
