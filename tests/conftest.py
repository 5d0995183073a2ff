"""Tests use tiny random models, real rows if they are available, and never the network."""

import os
import runpy
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# tracking=auto must find no account, whatever machine the tests run on; and no tracker may report its use.
os.environ["NETRC"] = os.environ["WANDB_CONFIG_DIR"] = "/nonexistent"
for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID"):
    os.environ.pop(name, None)
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# Two workers of pytest-xdist share two cores; more threads than cores would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
for name in ("TIEDLORA_DATA", "TIEDLORA_OUTPUTS", "TIEDLORA_CACHE"):
    os.environ.pop(name, None)

from pathlib import Path

import absl.logging
import pytest
import torch

from tiedlora.config import compose as configuration
from tiedlora.config.schema import Config

# absl, which rouge-score imports, keeps the stream that standard error is at its import, and closes it when Hydra sets
# up logging. Under pytest that would be the file that captures all output.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_configure(config: pytest.Config) -> None:
    # The other tests promise what a CPU computes, and some fork, which a process with a GPU must not do.
    if config.option.markexpr != "gpu" and torch.backends.cuda.is_built():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a file of the repository as a command in this process, because the start of a process would take longer.

    Returns (exit code, standard output, standard error).
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
