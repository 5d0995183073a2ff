"""Data parallel training: `torchrun --nproc-per-node N train.py ...`, one process a device.

Every process holds the whole model and takes every N-th row of each step; gradients are summed, and the loss is
normalised by the target tokens of all processes. So the result is the one-process result up to rounding, and the number
of processes is a fact of execution. An adapter's gradient is small (0.1 to 1 % of the model), so it is summed as it is,
after the step's last microbatch: no buckets, no wrapped module.
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
    """This process among those of a run; alone, every call is free."""

    process_index: int = 0
    size: int = 1
    local_index: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and scores."""
        return self.process_index == 0

    def local_rows(self, rows: Sequence[Any]) -> list[Any]:
        """This process's part: each row is in exactly one. Rows sorted by length give like parts."""
        return list(rows[self.process_index :: self.size])

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size == 1:
            return
        # NCCL sums on its device alone; a step's counts are made on the CPU.
        on_gpu = dist.get_backend() == "nccl"
        for tensor in tensors:
            there = tensor.cuda() if on_gpu else tensor
            dist.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)

    def any(self, flag: bool) -> bool:
        """Whether it holds for one of them. All wait here for each other."""
        if self.size == 1:
            return flag
        votes = torch.tensor([float(flag)])
        self.all_reduce_sum([votes])
        return bool(votes.item())


@contextmanager
def join_world(cuda: bool) -> Iterator[World]:
    """The processes that torchrun or accelerate started, or this one alone.

    Args:
        cuda: whether the run wants GPUs (then over NCCL, else over gloo).

    Raises:
        UserError: they were told to shard the model, or there are more of them than GPUs.
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
