"""python tests/helpers/fake_gpu.py MODEL ...: the training loop on a GPU that does not exist.

Its tensors have a device and no values. To read one, as `.item()` or `bool()` do, raises DataDependentOutputException.
A copy between the CPU and the GPU waits too, and raises AssertionError.
"""

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers.tiny import tiny, tying_option
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiedlora.adapter import attach
from tiedlora.config.schema import TrainConfig
from tiedlora.data.batching import Batch, microbatches
from tiedlora.data.encoding import Encoded
from tiedlora.models import attention
from tiedlora.training.loop import Loop, TrainState
from tiedlora.training.loss import target_loss
from tiedlora.training.optimizer import build_optimizer


class TwoStepsDone(Exception):
    pass


class NoCopies(TorchDispatchMode):
    """Refuses an operation whose result is on another device than one of its tensors (a single number is allowed)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {
            value.device.type
            for value in tree_leaves((args, kwargs or {}, result))
            if isinstance(value, torch.Tensor) and (value.dim() or "copy" in str(func))
        }
        assert len(devices) <= 1, f"{func} copies between {devices}"
        return result


def train_two_steps_on_a_fake_gpu(model: str) -> None:
    """Forward and backward passes, clipping and fused AdamW."""
    base = tiny(model, "bfloat16")
    attached = attach(base.model, tying_option("TABuv"), 4)
    base.model.train()
    config = TrainConfig(steps=9, batch_size=3, lr=1e-2, warmup_steps=1, clip=0.5, log_every=9, checkpoint_every=9)
    rows = [Encoded((1, 2, 3), (*range(20, 24 + number), 256)) for number in range(9)]
    with FakeTensorMode():
        gpu = torch.device("gpu")
        for module in base.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, device=gpu)
            for name, old in module._parameters.items():
                if old is not None:
                    fake = torch.empty(old.shape, dtype=old.dtype, device=gpu)
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=old.requires_grad)
        groups = build_optimizer(attached.parameter_groups(config.lr_factor), config).param_groups
        optimizer = torch.optim.AdamW([{**group, "fused": True} for group in groups], lr=1e-2)

        def batches(step: int) -> list[Batch]:
            passes = microbatches(rows[3 * (step - 1) : 3 * step], 256, 2)
            assert len(passes) == 2
            names = ("input_ids", "positions", "targets")
            return [replace(batch, **{name: getattr(batch, name).to(gpu) for name in names}) for batch in passes]

        passes_of_step = {step: batches(step) for step in (1, 2)}
        state = TrainState(validation=[[0, 1.0]])

        def after_step() -> bool:
            # The loop asks this after each step, before it fetches numbers to log them.
            if state.step == 2:
                raise TwoStepsDone
            return False

        loop = Loop(
            state=state,
            optimizer=optimizer,
            config=config,
            seed=0,
            # Batch.to copies from pinned memory, without waiting: so these copies are made before.
            batches=passes_of_step.__getitem__,
            loss_sum=lambda batch: target_loss(base.model, batch),
            validate=lambda: 1.0,
            save_checkpoint=lambda _: None,
            log_metrics=lambda _: None,
            describe_rows=str,
            stop_requested=after_step,
        )
        with attention.rows_not_packed(), NoCopies(), suppress(TwoStepsDone):
            loop.train()
        assert state.step == 2
        for parameter in attached.adapter.trained_parts().values():
            assert optimizer.state[parameter]["step"].device.type == "gpu", "it took fused steps there"


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend("gpu")
    for name in sys.argv[1:]:
        train_two_steps_on_a_fake_gpu(name)
