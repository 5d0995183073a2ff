"""Tests on a real GPU. `make gpu` runs them; `make gpu REHEARSE=1` runs the same lines on a CPU.

Without a GPU and without the rehearsal, they are skipped.
"""

import os
from collections.abc import Callable

import pytest
import torch

from tiedlora.config.schema import Config

REHEARSED = os.environ.get("TIEDLORA_REHEARSE") == "1"


@pytest.fixture(scope="session", autouse=True)
def deterministic_products():
    """cuBLAS reads the variable when it is first used, and one of the tests wants deterministic products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
        yield


@pytest.fixture
def gpu() -> torch.device:
    """The GPU; in a rehearsal the CPU."""
    if REHEARSED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: `make gpu` on a machine with one (`make gpu REHEARSE=1` rehearses on a CPU)")
    return torch.device("cuda")


@pytest.fixture
def gpu_config(tiny_config, gpu, tmp_path) -> Callable[..., Config]:
    """A tiny run on the GPU. The first argument names the folder of its outputs, below tmp_path."""

    def build(name: str, *more: str) -> Config:
        return tiny_config(f"train.device={gpu.type}", f"outputs={tmp_path}/{name}", *more)

    return build
