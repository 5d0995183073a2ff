"""Data parallel training: `torchrun --nproc-per-node N train.py ...`, with one process for each device.

Every process holds the whole model and takes every N-th row of each step. Gradients are summed, and the loss is
normalised by the target tokens of all processes. So the result is that of one process up to rounding, and the number
of processes is a fact of execution. The gradient of an adapter is small (0.1 to 1 % of the model). So it is summed
directly after the step's last microbatch, without buckets or a wrapped module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tiedlora.errors import UserError


@dataclass(frozen=True)
class World:
    """This process, and how many processes the run has. With one process, the methods cost nothing."""

    process_index: int = 0
    size: int = 1
    local_index: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and scores."""
        return self.process_index == 0

    def local_rows(self, rows: Sequence[Any]) -> list[Any]:
        """The share of this process. Each row is in exactly one share. Rows sorted by length give similar shares."""
        return list(rows[self.process_index :: self.size])

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size == 1:
            return
        # NCCL sums only on a GPU, but the counts of a step are on the CPU.
        on_gpu = dist.get_backend() == "nccl"
        for tensor in tensors:
            there = tensor.cuda() if on_gpu else tensor
            dist.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. Every process waits here for the others."""
        if self.size == 1:
            return flag
        votes = torch.tensor([float(flag)])
        self.all_reduce_sum([votes])
        return bool(votes.item())


@contextmanager
def join_world(cuda: bool) -> Iterator[World]:
    """Join the processes that torchrun or accelerate started; without them, this is the only process.

    Args:
        cuda: whether the run uses GPUs (then the processes communicate with NCCL, otherwise with gloo).

    Raises:
        UserError: accelerate is configured to shard the model, or there are more processes than GPUs.
    """
    for wish, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(wish, "false").lower() in ("1", "true"):
            raise UserError(
                f"{wish}: {name} shards the model, and a tied factor belongs to every layer; not supported. "
                "Start data parallel training: torchrun --nproc-per-node N train.py ..."
            )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if cuda:
        if world.local_index >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"torchrun: process {world.local_index} of this machine has no GPU (there are {gpus}); "
                "lower --nproc-per-node, or train.device=cpu"
            )
        torch.cuda.set_device(world.local_index)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield world
    finally:
        dist.destroy_process_group()
