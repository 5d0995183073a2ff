"""Tests use tiny random models, real rows if they are available, and never the network."""

import contextlib
import copy
import functools
import gc
import hashlib
import io
import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace

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
import yaml
from filelock import FileLock
from helpers import processes
from helpers.tiny import PLACES, composed
from hydra._internal.hydra import Hydra
from omegaconf import OmegaConf

from tiedlora.config.identity import config_tree, run_id
from tiedlora.config.schema import Config
from tiedlora.places import PROJECT
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord
from tiedlora.runs import run
from tiedlora.training.signals import SIGNALS

# No test cuts the power. To wait for the disk at each of a run's forty flushes would take longer than its training.
os.fsync = lambda _descriptor: None

# Hydra parses fifteen files for each composition, mostly those of the composition before.
_load_yaml = OmegaConf.load
_parsed = functools.cache(lambda text: OmegaConf.to_container(_load_yaml(io.StringIO(text))))


def _load_once(file):
    if isinstance(file, str | Path):
        return _load_yaml(file)
    try:
        return OmegaConf.create(_parsed(file.read()))
    except yaml.YAMLError:
        # The message names the file.
        file.seek(0)
        return _load_yaml(file)


OmegaConf.load = staticmethod(_load_once)

# absl, which rouge-score imports, keeps the stream that standard error is at its import, and closes it when Hydra sets
# up logging. Under pytest that would be the file that captures all output.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


ENVIRONMENT = pytest.StashKey[dict[str, str]]()
"""The environment before the tests are collected."""
CHANGED = pytest.StashKey[dict[str, tuple[str | None, str | None]]]()
"""Variable -> its values before and after the collection, for those that it has changed."""


def pytest_configure(config: pytest.Config) -> None:
    # The other tests promise what a CPU computes, and some fork, which a process with a GPU must not do.
    if config.option.markexpr != "gpu" and torch.backends.cuda.is_built():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config.stash[ENVIRONMENT] = dict(os.environ)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A search with hypothesis takes seconds, and one case of each rule is in the tests beside it.
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("slow")


def pytest_collection_finish(session: pytest.Session) -> None:
    before, after = session.config.stash[ENVIRONMENT], dict(os.environ)
    session.config.stash[CHANGED] = {
        name: (before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }
    # Runs collect garbage several times. Without this, each collection would visit all objects of all modules.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def processes_end_with_their_test():
    """Also those of a test that has failed, or that has reached its time limit."""
    yield
    processes.end_all()


@pytest.fixture
def changed_by_collecting(pytestconfig) -> dict[str, tuple[str | None, str | None]]:
    return pytestconfig.stash[CHANGED]


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a file of the repository as a command in this process, because the start of a process would take longer.

    Returns (exit code, standard output, standard error).
    """

    # Hydra composes everything once more to learn whether hydra.mode is set, as it is in a grid. Tests of this fixture
    # name grids with --multirun, and config/test_config.py has the mode of each grid.
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)

    def start(path: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        code, handlers = 0, {number: signal.getsignal(number) for number in SIGNALS}
        try:
            runpy.run_path(str(PROJECT / path), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
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


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the project."""
    folder = tmp_path_factory.mktemp("dist")
    processes.run_python("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=PROJECT, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def tiny_config(tiny_run):
    def build(*more: str, task: str = "chain_sum") -> Config:
        return composed(tiny_run(*more, task=task))

    return build


@pytest.fixture(scope="session")
def finish(tmp_path_factory) -> Callable[[Config], RunRecord]:
    """As run.main, for a test that needs a finished run and not its training: equal runs are trained once for all.

    What it left in outputs/ is copied into the outputs of the configuration, where the test may change it. Call it
    before anything is patched, because other tests get the same run.
    """
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "trained-once"
    shared.mkdir(exist_ok=True)

    def finished(config: Config) -> RunRecord:
        values = {name: value for name, value in config_tree(config).items() if name not in PLACES}
        place = shared / hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
        with FileLock(f"{place}.lock"):
            if not place.exists():
                begun = place.with_suffix(".begun")
                shutil.rmtree(begun, ignore_errors=True)
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    run.main(replace(copy.deepcopy(config), outputs=str(begun), cache=str(shared / "cache")))
                begun.rename(place)
        shutil.copytree(place, config.outputs, dirs_exist_ok=True)
        return RunFolder(Path(config.outputs) / run_id(config)).finished_record()

    return finished


@pytest.fixture
def finished_run(tiny_config, finish) -> Callable[..., Config]:
    """As `tiny_config`, and the run is finished in its outputs; see `finish`."""

    def finished(*more: str, task: str = "chain_sum") -> Config:
        config = tiny_config(*more, task=task)
        finish(config)
        return config

    return finished
