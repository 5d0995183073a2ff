"""One cell of a sweep in the sweep's process."""

import weakref

import torch

from tiedlora.models import device
from tiedlora.runs import run
from tiedlora.sweeps.run_cell import run_cell


def test_a_failed_cells_tensors_are_gone_when_its_memory_is_freed(tiny_config, monkeypatch):
    """Otherwise the next cell of the process has as much less memory."""
    tensors, alive = [], []

    def fail(config):
        tensor = torch.zeros(1)
        tensors.append(weakref.ref(tensor))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run, "main", fail)
    monkeypatch.setattr(device, "free_memory", lambda: alive.append(tensors[0]()))
    run_cell(tiny_config())
    assert alive == [None]
