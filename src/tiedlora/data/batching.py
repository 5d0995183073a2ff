"""From token ids to batches: which rows are in a step, and how they become tensors."""

from __future__ import annotations

import bisect
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiedlora.config.schema import TrainConfig
from tiedlora.data.encoding import Encoded
from tiedlora.errors import UserError

BUCKET_BATCHES = 16
"""How many batches are sorted by length together. More batches give rows of more similar length, but a less random
order."""
TOKEN_MULTIPLE = 16
"""Matrix products are up to a fifth faster if the number of tokens is a multiple of this."""


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass, padded on the right. No token attends to later tokens, so no mask is needed."""

    rows: Sequence[Encoded]
    """Without padding, in the order of `input_ids`."""
    input_ids: Tensor
    """(rows, length)"""
    positions: Tensor
    """(target tokens,) positions in the flattened (rows * length) ids whose next token is a target."""
    targets: Tensor
    """(target tokens,) ids of those next tokens."""

    @property
    def tokens(self) -> int:
        """The number of tokens in the rows; padding is not counted."""
        return sum(map(len, self.rows))

    def sums_by_row(self, values: Tensor) -> Tensor:
        """The sum of `values` over each row's target tokens, (rows,).

        Args:
            values: (target tokens,), one for each of `targets`.
        """
        # A sum over a padded table has one order of additions on every device; index_add_ has none on a GPU.
        table = values.new_zeros(self.input_ids.numel())
        table[self.positions.to(values.device)] = values
        return table.view(self.input_ids.shape).sum(1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`. The copy to a GPU is asynchronous."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            input_ids=sent(self.input_ids, device),
            positions=sent(self.positions, device),
            targets=sent(self.targets, device),
        )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`. A GPU gets it while the program goes on."""
    if device.type in ("cpu", "mps"):
        # Apple's accelerator shares the memory of the CPU.
        return tensor.to(device)
    # Out of memory that is not pinned, a copy waits for all that the GPU has to do.
    return tensor.pin_memory().to(device, non_blocking=True)


def split_by_limits(lengths: Sequence[int], rows: int | None, tokens: int | None) -> list[slice]:
    """Split consecutive rows into slices of at most `rows` rows and `tokens` tokens, padding included.

    Args:
        lengths: the number of tokens of each row.
        rows, tokens: None sets no limit. A row that is longer than `tokens` is a separate slice.
    """
    slices, start, longest = [], 0, 0
    for end, length in enumerate(lengths):
        number, longest = end + 1 - start, max(longest, length)
        if end > start and ((rows and number > rows) or (tokens and number * longest > tokens)):
            slices.append(slice(start, end))
            start, longest = end, length
    return [*slices, slice(start, len(lengths))] if lengths else []


def check_batch_tokens(rows: Sequence[Encoded], train: TrainConfig) -> None:
    """Refuse a limit on the tokens of a step that no training row can keep.

    Raises:
        UserError: naming the shortest row's tokens.
    """
    shortest = min(map(len, rows))
    if train.batch_tokens is not None and train.batch_tokens < shortest:
        raise UserError(
            f"train.batch_tokens={train.batch_tokens}: the shortest training row has {shortest} tokens already; raise "
            "it, or limit the rows of a step with train.batch_size"
        )


class BatchSampler:
    """Which rows are in each optimizer step: a pure function of (lengths, settings of `train`, seed, step).

    An epoch has every row exactly once, and its last step may be smaller. With `train.bucket`, rows of similar length
    share a step: the rows are shuffled, sorted by length within groups of BUCKET_BATCHES batches, and then the batches
    are shuffled. With `train.batch_tokens`, a step has at most that many tokens.
    """

    def __init__(self, lengths: Sequence[int], train: TrainConfig, seed: int) -> None:
        self.lengths, self.train, self.seed = lengths, train, seed
        self._first_steps = [1]
        # One epoch is kept, because consecutive steps ask for the same one.
        self.epoch = functools.lru_cache(1)(self._epoch)

    def rows_of_step(self, step: int) -> list[int]:
        """The row numbers of optimizer step `step` (counted from 1)."""
        while step >= self._first_steps[-1]:
            batches = self.epoch(len(self._first_steps) - 1)
            self._first_steps.append(self._first_steps[-1] + len(batches))
        epoch = bisect.bisect_right(self._first_steps, step) - 1
        return self.epoch(epoch)[step - self._first_steps[epoch]]

    def _epoch(self, epoch: int) -> list[list[int]]:
        """The row numbers of each step of epoch `epoch` (counted from 0)."""
        train = self.train
        generator = random.Random(f"order/{self.seed}/{epoch}")
        rows = list(range(len(self.lengths)))
        generator.shuffle(rows)
        if train.bucket:
            size = BUCKET_BATCHES * train.batch_size
            for start in range(0, len(rows), size):
                chunk = slice(start, start + size)
                rows[chunk] = sorted(rows[chunk], key=self.lengths.__getitem__)
        batches = [
            rows[batch]
            for batch in split_by_limits([self.lengths[row] for row in rows], train.batch_size, train.batch_tokens)
        ]
        if train.bucket:
            generator.shuffle(batches)
        return batches


def empty_batch(pad_id: int) -> Batch:
    """A batch of one padding token, without targets: its loss and its gradients are zero."""
    nothing = torch.zeros(0, dtype=torch.long)
    return Batch((), torch.tensor([[pad_id]]), nothing, nothing)


def collate(rows: Sequence[Encoded], pad_id: int, context: int = 0) -> Batch:
    """Pad rows on the right, and mark the target positions.

    Args:
        context: the greatest length after padding. Up to this length, rows are padded beyond the longest row until the
            batch has a multiple of TOKEN_MULTIPLE tokens.
    """
    longest = max(len(row) for row in rows)
    length_multiple = TOKEN_MULTIPLE // math.gcd(TOKEN_MULTIPLE, len(rows))
    length = min(math.ceil(longest / length_multiple) * length_multiple, max(context, longest))
    input_ids = torch.full((len(rows), length), pad_id)
    positions: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor(row.prompt + row.target)
        first = number * length + len(row.prompt) - 1
        positions.extend(range(first, first + len(row.target)))
        targets.extend(row.target)
    return Batch(rows, input_ids, torch.tensor(positions), torch.tensor(targets))


def even_passes(rows: Sequence[Encoded], size: int | None = None, tokens: int | None = None) -> list[list[int]]:
    """Split rows into passes of at most `size` rows and `tokens` tokens. Returns the row numbers of each.

    There are as few passes as the limits allow, and they have nearly equal numbers of tokens. The reason: the largest
    pass determines the memory, and a last pass of one row would read all weights for little work (and need its own
    graph if blocks are compiled). The rows are sorted by length, the shortest first, so each pass has little padding.
    """
    if not rows:
        return []
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    lengths = [len(rows[number]) for number in order]
    fewest_passes = len(split_by_limits(lengths, size, tokens))
    # The smallest limit on the tokens of a pass that needs no more passes, by bisection.
    limits = range(lengths[-1], tokens or lengths[-1] * len(lengths))
    index = bisect.bisect_left(
        limits, True, key=lambda limit: len(split_by_limits(lengths, size, limit)) <= fewest_passes
    )
    limit = limits[index] if index < len(limits) else limits.stop
    return [order[taken] for taken in split_by_limits(lengths, size, limit)]


def microbatches(
    rows: Sequence[Encoded], pad_id: int, size: int | None = None, tokens: int | None = None, context: int = 0
) -> list[Batch]:
    """The rows of one optimizer step in `even_passes`. `collate` may pad one a little beyond `tokens`."""
    return [collate([rows[n] for n in numbers], pad_id, context) for numbers in even_passes(rows, size, tokens)]
