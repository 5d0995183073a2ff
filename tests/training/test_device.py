"""What a GPU needs, shown without one: by tensors on torch's meta device, which have a device and no values."""

import torch
from helpers.tiny import tying_option
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiedlora.adapter import TiedAdapter
from tiedlora.adapter.architectures import FAMILIES
from tiedlora.config.schema import TrainConfig
from tiedlora.training import checkpoint, loop
from tiedlora.training.checkpoint import RunInputs
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
