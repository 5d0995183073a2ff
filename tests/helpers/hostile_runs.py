"""A finished run for tests to break: `pytest_plugins = ["helpers.hostile_runs"]` brings its fixtures."""

import shutil

import pytest

from tiedlora.config.compose import compose_config


@pytest.fixture(scope="session")
def place(tmp_path_factory, finish):
    """A finished run that is never changed, and its command's words."""
    root = tmp_path_factory.mktemp("whole")
    words = [
        "model=tiny_llama",
        "task=chain_sum",
        "task.options.rows={train: 12, validation: 6, test: 6}",
        "task.rows.validation=null",
        "task.max_new_tokens=4",
        "train.steps=1",
        "train.batch_size=4",
        "train.warmup_steps=0",
        "train.dtype=float32",
        "train.threads=1",
        "rank.r=2",
        f"cache={root}/cache",
    ]
    record = finish(compose_config([*words, f"outputs={root}/outputs"]))
    return root / "outputs" / record.run_id, words


@pytest.fixture
def folder(place, tmp_path):
    """A copy of the run, in its own outputs/, for a test to break."""
    shutil.copytree(place[0], tmp_path / "outputs" / place[0].name)
    return tmp_path / "outputs" / place[0].name


@pytest.fixture
def words(place, tmp_path):
    return [*place[1], f"outputs={tmp_path}/outputs"]
