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
from typing import TYPE_CHECKING, Any

from tiedlora.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; alone, every call is free."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and scores."""
        return self.rank == 0

    def share(self, rows: Sequence[Any]) -> list[Any]:
        """This process's part: each row is in exactly one. Rows sorted by length give like parts."""
        return list(rows[self.rank :: self.count])

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count == 1:
            return
        import torch.distributed as dist

        # NCCL sums on its device alone; a step's counts are made on the CPU.
        on_gpu = dist.get_backend() == "nccl"
        for tensor in tensors:
            there = tensor.cuda() if on_gpu else tensor
            dist.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)

    def any(self, flag: bool) -> bool:
        """Whether it holds for one of them. All wait here for each other."""
        if self.count == 1:
            return flag
        import torch

        votes = torch.tensor([float(flag)])
        self.add_up([votes])
        return bool(votes.item())


@contextmanager
def joined(cuda: bool) -> Iterator[Processes]:
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
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    import torch
    import torch.distributed as dist

    us = Processes(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", "0")))
    if cuda:
        if us.local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"torchrun: process {us.local_rank} of this machine has no GPU (there are {gpus}); "
                "lower --nproc-per-node, or train.device=cpu"
            )
        torch.cuda.set_device(us.local_rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield us
    finally:
        dist.destroy_process_group()
