"""Tests use tiny random models, real rows where they are at hand, and never the network."""

import os
import runpy
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Two workers of pytest-xdist share two cores; more threads than cores would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
for name in ("TIEDLORA_DATA", "TIEDLORA_OUTPUTS", "TIEDLORA_CACHE"):
    os.environ.pop(name, None)

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tiedlora import config as configuration
from tiedlora.data import Encoded
from tiedlora.models import Base, load_base
from tiedlora.schema import Config, ModelConfig
from tiedlora.tasks import Task, load_task
from tiedlora.tying import Tying

EIGHT = ("LoRA", "TA", "TB", "TAB", "Tuv", "TAuv", "TBuv", "TABuv")
TINY = ("tiny_llama", "tiny_gpt2")


def tying_option(name: str, *overrides: str) -> Tying:
    return configuration.compose_config([f"tying={name}", *overrides]).tying


def model_option(name: str) -> ModelConfig:
    return configuration.compose_config([f"model={name}"]).model


def task_option(name: str, *overrides: str) -> Task:
    return load_task(configuration.compose_config([f"task={name}", *overrides]).task)


def tiny(name: str, dtype: str = "float32") -> Base:
    return load_base(model_option(name), dtype, torch.device("cpu"), Path("unused"))


def randomise(adapter: torch.nn.Module, seed: int = 1, scale: float = 0.5) -> None:
    """Make every part random and non-zero, so that no term of the formula can hide."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def mask_of(rows: Sequence[Encoded]) -> torch.Tensor:
    """The attention mask (rows, longest row) of rows that are padded on the right."""
    lengths = torch.tensor([[len(row)] for row in rows])
    return (torch.arange(int(lengths.max())) < lengths).long()


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a file of the repository as a command, in this process: start-up would cost more than all it does.

    Gives (exit code, standard output, standard error).
    """

    def start(path: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(configuration.PROJECT / path), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return start


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny_run(tmp_path: Path):
    """Overrides of a run of seconds on a random model, writing below tmp_path."""

    def overrides(*more: str, task: str = "chain_sum") -> list[str]:
        rows = ["task.options.rows={train: 40, validation: 12, test: 12}"] if task == "chain_sum" else []
        return [
            "model=tiny_llama",
            f"task={task}",
            *rows,
            "task.rows.validation=null",
            "task.max_new_tokens=6",
            "train.steps=6",
            "train.batch_size=4",
            "train.warmup_steps=2",
            "train.validate_every=3",
            "train.checkpoint_every=2",
            "train.dtype=float32",
            "train.threads=1",
            f"outputs={tmp_path}/outputs",
            f"cache={tmp_path}/cache",
            *more,
        ]

    return overrides


@pytest.fixture
def tiny_config(tiny_run):
    def build(*more: str, task: str = "chain_sum") -> Config:
        return configuration.compose_config(tiny_run(*more, task=task))

    return build
