"""Every path on a device that is no CPU. No GPU is needed: helpers/second_device.py simulates one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from tiedlora.config.schema import Config

if TYPE_CHECKING:
    from helpers.second_device import SecondDevice

# torch 2.9 has no device whose hooks are written in Python.
collect_ignore_glob = [] if hasattr(torch._C, "_acc") else ["test_*.py"]

SHORT = (
    "task.options.rows={train: 8, validation: 3, test: 3}",
    "model.architecture.layers=2",
    "train.microbatch_size=2",
    "train.steps=2",
    "train.warmup_steps=0",
    "train.validate_every=1",
    "train.checkpoint_every=1",
)


@pytest.fixture
def device() -> Iterator[SecondDevice]:
    """Within the test, `train.device=auto` is the second device."""
    from helpers.second_device import second_device

    with second_device() as device:
        yield device


@pytest.fixture
def short(tiny_config) -> Callable[..., Config]:
    """A run of two steps of two passes on a model of two blocks."""
    return lambda *words, task="chain_sum": tiny_config(
        *(SHORT if task == "chain_sum" else SHORT[1:]), *words, task=task
    )
