"""A frozen base model that is spread over the processes of a run (train.shard=true), with torch's FSDP2.

Each process keeps a part of every block, and gathers a block only while it runs. Gathering needs every process, so all
of them must make the same number of passes through the model. Embeddings, output head and adapter are whole in every
process: the loss and the update use them outside of the blocks, and the gradients of the adapter are small enough to be
summed as without sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tiedlora.training.distributed import World


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
