"""The simulated device refuses and counts what a GPU refuses and waits for, and leaves the process as it was."""

import os

import numpy as np
import pytest
import torch
from helpers.second_device import NAME, MixedDevices, OnDevice, second_device


@pytest.mark.usefixtures("device")
def test_it_refuses_to_mix():
    here, there = torch.ones(3, device=NAME), torch.ones(3)
    for mix in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: torch.where(torch.tensor([True, False, True]), here, here),
        lambda: torch.nn.functional.linear(there, here[None]),
        lambda: there[torch.tensor([0], device=NAME)],
        lambda: here.normal_(generator=torch.Generator()),
        lambda: np.asarray(here),
        here.numpy,
    ):
        with pytest.raises(MixedDevices, match=r"^test_the_device_itself\.py:\d+: "):
            mix()
    # As a GPU does, it takes scalars, indices and copies.
    assert (here * torch.tensor(2.0) + 1).tolist() == [3.0] * 3
    assert here[torch.tensor([0, 2])].shape == (2,)
    assert torch.equal(here.cpu(), there)
    here.copy_(2 * there)
    assert here.sum().item() == 6


def test_it_counts_waits_with_their_lines(device):
    here = torch.ones(3, device=NAME)
    device.waits.clear()
    for wait in (
        lambda: here.sum().item(),
        lambda: bool(here.sum() > 0),
        lambda: (here + 1).tolist(),
        lambda: here.add(1).cpu(),
        lambda: here.add(1).nonzero(),
        lambda: here[here > 0],
        lambda: here.mul(2) + torch.ones(3).to(NAME),
    ):
        with device.counted() as waits:
            wait()
        ((line, count),) = waits.items()
        assert (count, "test_the_device_itself.py:" in line) == (1, True), line
    with device.counted() as waits:
        here.add(1)
        torch.ones(3).pin_memory().to(NAME, non_blocking=True)
        here.view(1, 3).detach().expand(2, 3)
    assert not waits
    with device.counted() as waits:
        (here + 1).tolist()
        (here.tolist(), here.cpu())
    assert waits.total() == 1, "after a wait, nothing is left to wait for"


@pytest.mark.usefixtures("device")
def test_parameters_that_move_stay_the_same_objects_and_shared_ones_shared():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3, bias=False) for name in "ab"})
    model["b"].weight = model["a"].weight
    weight, values = model["a"].weight, model["a"].weight.detach().clone()
    model.to(NAME)
    assert model["a"].weight is weight is model["b"].weight
    assert isinstance(weight, OnDevice)
    assert isinstance(weight, torch.nn.Parameter)
    model["a"](torch.ones(2, 3, device=NAME)).sum().backward()
    assert weight.grad.device == weight.device == torch.device(f"{NAME}:0")
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    model.cpu()
    assert model["a"].weight is weight
    assert not torch.equal(weight, values)


def test_after_it_the_process_is_as_before():
    def state():
        values = torch.nn.Linear(2, 2).weight
        values.sum().backward()
        return torch.accelerator.is_available(), torch.accelerator.device_count(), torch.tensor, type(values.grad)

    with second_device():
        torch.ones(2, device=NAME, requires_grad=True).sum().backward()
        assert torch.accelerator.is_available()
        left = torch.ones(2, device=NAME)
    before = state()
    assert before[:2] == (False, 0)
    with pytest.raises(RuntimeError, match="outside of its block"):
        left + 1
    # Autograd forbids backward passes in a fork of a process that has threads for devices.
    child = os.fork()
    if not child:
        try:
            state()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
