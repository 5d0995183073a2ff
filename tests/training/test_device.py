"""What a GPU needs, shown without one: by tensors that have a device and no values (torch's meta and fake tensors)."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.forks import forked
from helpers.tiny import TINY, tiny, tying_option
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiedlora.adapter import TiedAdapter, attach
from tiedlora.adapter.architectures import FAMILIES
from tiedlora.config.identity import run_id
from tiedlora.config.schema import TrainConfig
from tiedlora.data.batching import Batch, microbatches
from tiedlora.data.encoding import Encoded
from tiedlora.models import attention
from tiedlora.runs import run, trainer
from tiedlora.training import checkpoint, loop
from tiedlora.training.checkpoint import RunInputs
from tiedlora.training.loss import target_loss
from tiedlora.training.optimizer import build_optimizer
from tiedlora.tying import Architecture

TRAIN = TrainConfig(lr=1e-2, betas=[0.8, 0.99])


def parts_on(device: str) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.ones(3, 2, device=device)) for name in ("qkv.u", "qkv.A", "qkv.B")}


def test_a_restored_fused_optimizer_has_its_whole_state_on_the_device(tmp_path):
    """A fused AdamW takes no step while its step count is on the CPU."""
    parts = parts_on("cpu")
    optimizer = build_optimizer(parts, TRAIN)
    for parameter in parts.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint.save(tmp_path, loop.TrainState(step=1), parts, optimizer, RunInputs())

    there = parts_on("meta")
    groups = build_optimizer(there, TRAIN).param_groups
    fused = torch.optim.AdamW([{**group, "fused": True} for group in groups], lr=TRAIN.lr)
    assert checkpoint.restore(tmp_path, there, fused, RunInputs()) == loop.TrainState(step=1)
    for parameter in there.values():
        state = fused.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert {value.device.type for value in state.values()} == {"meta"}
    assert [group["lr_factor"] for group in fused.param_groups] == [1.0] * 3


class OnlyOn(TorchDispatchMode):
    """Refuses an operation that takes a tensor of another device than `device`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, torch.Tensor):
                assert value.device.type == self.device, f"{func} takes a tensor on {value.device}"
        return func(*args, **(kwargs or {}))


def test_folding_copies_nothing_to_the_device_in_any_family():
    for family in FAMILIES:
        architecture = Architecture(family, 2, 8, 2, 2, 4, 16, 32)
        for option in ("TABuv", "LoRA"):
            adapter = TiedAdapter(tying_option(option), 2, 2, architecture, 0).to("meta")
            adapter.pairs()  # The sites are found once.
            with OnlyOn("meta"):
                adapter.pairs(0.5, torch.bfloat16)


class TwoStepsDone(Exception):
    pass


def train_two_steps_on_a_fake_gpu(model: str) -> None:
    """The loop with a model whose tensors have no values. To read one raises DataDependentOutputException."""
    backend_registration._setup_privateuseone_for_python_backend("gpu")
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
        groups = build_optimizer(attached.adapter.trained_parts(), config).param_groups
        optimizer = torch.optim.AdamW([{**group, "fused": True} for group in groups], lr=1e-2)

        def batches(step: int) -> list[Batch]:
            passes = microbatches(rows[3 * (step - 1) : 3 * step], 256, 2)
            assert len(passes) == 2
            names = ("input_ids", "positions", "targets")
            return [replace(batch, **{name: getattr(batch, name).to(gpu) for name in names}) for batch in passes]

        state = loop.TrainState(validation=[[0, 1.0]])

        def after_step() -> bool:
            # The loop asks this after each step, before it fetches numbers to log them.
            if state.step == 2:
                raise TwoStepsDone
            return False

        hooks = loop.LoopHooks(
            batches=batches,
            loss_sum=lambda batch: target_loss(base.model, batch),
            validate=lambda: 1.0,
            save_checkpoint=lambda _: None,
            log_metrics=lambda _: None,
            describe_rows=str,
            stop_requested=after_step,
        )
        with attention.rows_not_packed(), pytest.raises(TwoStepsDone):
            loop.train(state, hooks, optimizer, config, 0)
        for parameter in attached.adapter.trained_parts().values():
            assert optimizer.state[parameter]["step"].device.type == "gpu", "it took fused steps there"


@pytest.mark.parametrize("model", TINY)
def test_no_step_waits_for_the_device(model):
    code, told = forked(lambda: train_two_steps_on_a_fake_gpu(model))
    assert code == 0, told


def test_deterministic_switches_torch_for_the_run_only_and_changes_nothing_on_a_cpu(tiny_config, tmp_path, monkeypatch):
    # Set and deleted, so that the end of the test restores it.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    plain, wished = tiny_config(f"outputs={tmp_path}/plain"), tiny_config("train.deterministic=true")
    assert run_id(plain) == run_id(wished)
    run.main(plain)
    during, loss = [], trainer.target_loss

    def watched(model, batch):
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        during.append((torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))
        return loss(model, batch)

    monkeypatch.setattr(trainer, "target_loss", watched)
    run.main(wished)
    assert set(during) == {(True, ":4096:8")}
    assert not torch.are_deterministic_algorithms_enabled()
    first, second = (Path(config.outputs) / run_id(config) for config in (plain, wished))
    for name in ("adapter/adapter.safetensors", "predictions/validation.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
