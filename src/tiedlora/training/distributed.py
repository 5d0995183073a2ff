"""Data parallel training: `torchrun --nproc-per-node N train.py ...`, with one process for each device.

Every process holds the whole model and takes every N-th row of each step. Gradients are summed, and the loss is
normalised by the target tokens of all processes. So the result is that of one process up to rounding, and the number
of processes is a fact of execution. The gradient of an adapter is small (0.1 to 1 % of the model). So it is summed
directly after the step's last microbatch, without buckets or a wrapped module.

With train.shard=true, torch's FSDP2 spreads the frozen base model over the processes: each keeps a part of every block,
and gathers a block only while it runs. Gathering needs every process, so all of them must make the same number of
passes. Embeddings, output head and adapter are whole in every process: the loss and the update use them outside of the
blocks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tiedlora.errors import StoppedEarly, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=1)
"""How long a process waits for the others in one message, also at the start. torch's own limit of 10 or 30 minutes
would end a run whose first process waits for a lock, because another job scores the same base model. A process that has
died is noticed without it: torchrun then ends the others."""

TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""What torchrun should pass on to its processes: what it does by default, and the signals of clusters."""


@dataclass(frozen=True)
class World:
    """This process, and how many processes the run has. With one process, the methods cost nothing."""

    process_index: int = 0
    size: int = 1
    local_index: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.process_index == 0

    def local_rows(self, rows: Sequence[Any]) -> list[Any]:
        """The share of this process. Each row is in exactly one share. Rows sorted by length give similar shares."""
        return list(rows[self.process_index :: self.size])

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes. All have one dtype, so one message is enough."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Each number, summed over all processes. Every process waits here for the others, but not for a GPU."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. Every process waits here for the others."""
        return self.smallest(-int(flag)) < 0

    def smallest(self, number: int) -> int:
        """The smallest `number` of all processes. Every process waits here for the others, but not for a GPU."""
        return self._reduced([number], dist.ReduceOp.MIN)[0]

    def _reduced(self, numbers: Sequence[int], operation: dist.ReduceOp.RedOpType) -> list[int]:
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, operation)
        return list(map(int, tensor))

    def gather(self, share: T) -> list[T]:
        """The shares of all processes, by process number, in every process. Tensors in them must be on the CPU."""
        shares: list[Any] = [share] * self.size
        if self.size > 1:
            dist.all_gather_object(shares, share)
        return shares

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give each tensor the values that it has in the first process, where it is. Only one is there twice at a time.

        Args:
            tensors: the same ones, in the same order, in every process.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            values = tensor.contiguous()
            dist.broadcast(values, src=0)
            tensor.copy_(values)

    def leave(self) -> None:
        """End the communication. Every process calls this at the same point, after the last message.

        With NCCL, a process that does so alone waits here for the others, for up to LONGEST_WAIT.
        """
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = World()
"""The only process of a run."""


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun or accelerate started; without them, this is the only process.

    The communication ends with the block, if all processes end it: as usual, or stopped after a step.

    Args:
        device: the type of device that the run uses. Tensors on GPUs are summed with NCCL, and all others with gloo.

    Raises:
        UserError: accelerate would shard the model, there are more processes than GPUs, or RANK is missing.
    """
    for wish, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(wish, "false").lower() in ("1", "true"):
            raise UserError(
                f"{wish}: {name} would shard the adapter too, and a tied factor belongs to every layer; not supported. "
                "Start torchrun --nproc-per-node N train.py ..., with train.shard=true for a model larger than one GPU"
            )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("RANK", "0") == "0":
        _warn_of_lost_signals()
    if size == 1:
        yield ALONE
        return
    if "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE={size} without RANK: start the processes with torchrun, or unset WORLD_SIZE")
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    backend = "gloo"
    if device != "cpu":
        if world.local_index >= (gpus := torch.accelerator.device_count()):
            raise UserError(
                f"torchrun: process {world.local_index} of this machine has no GPU (there are {gpus}); "
                "lower --nproc-per-node, or train.device=cpu"
            )
        torch.accelerator.set_device_index(world.local_index)
        # Gradients are summed where they are. Counts and votes stay on the CPU, so no step waits for its GPU.
        backend = f"cpu:gloo,{device}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    if device != "cpu":
        # NCCL makes its buffers at the first message, and outside of torch's memory. The first one of training would
        # come when activations may have filled the GPU.
        dist.all_reduce(torch.zeros(1, device=device))
    try:
        yield world
    except StoppedEarly:
        # All have stopped after the same step. After any other error this process may be the only one that ends. It
        # must not wait for the others, who wait for it: torchrun ends them when it has ended.
        world.leave()
        raise
    world.leave()


def _warn_of_lost_signals() -> None:
    """Warn if torchrun would end at SIGUSR1 or SIGUSR2 without a word to its processes, as it does by default."""
    # torchrun gives its processes this list, whatever it was before.
    passed_on = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "").split(",")
    if "TORCHELASTIC_RUN_ID" in os.environ and not {"SIGUSR1", "SIGUSR2"} <= {*passed_on}:
        log.warning(
            "torchrun does not pass on SIGUSR1 and SIGUSR2, so they save no checkpoint; for a cluster that sends them, "
            "start torchrun --signals-to-handle %s",
            TORCHRUN_SIGNALS,
        )


def shard(model: Any, layers: str, device: torch.device, world: World) -> None:
    """Spread the blocks of a model over all processes. The rest of the model goes to `device`.

    Args:
        model: a frozen model on the CPU, equal in every process. A block goes to the device when it is spread, so the
            device never holds the whole model.
        layers: the path of the list of blocks.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    blocks: Any = model.get_submodule(layers)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The body is the common root. Without one, every block would stay gathered after its pass. The whole model cannot
    # be the root, because the loss calls the body.
    in_blocks = set(blocks.parameters())
    whole = {parameter for parameter in model.parameters() if parameter not in in_blocks}
    fully_shard(model.base_model, mesh=mesh, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def is_sharded(model: Any) -> bool:
    """Whether `shard` has spread the model."""
    return isinstance(getattr(model, "base_model", None), FSDPModule)


@contextmanager
def equal_passes(model: Any, world: World) -> Iterator[None]:
    """Inside the block, each process may make any number of passes through a sharded model, without gradients.

    A process that has left the block takes part in the passes of the others with one token, until all have left it.
    """
    if not is_sharded(model):
        yield
        return
    body = model.base_model

    def announce(*_: Any) -> None:
        world.any(True)

    announcement = body.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        announcement.remove()
    token = torch.zeros((1, 1), dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with torch.no_grad():
        while world.any(False):
            body(input_ids=token, use_cache=False)
