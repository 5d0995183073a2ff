"""How commands meet the outside: a reader that has ended, an old Python."""

import os
import shutil
import sys
from collections.abc import Sequence

import pytest
from helpers import processes

from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.errors import CLOSED_PIPE, STOPPED
from tiedlora.places import PROJECT


def assert_quiet(words: Sequence[str], *codes: int) -> None:
    """Run a script whose output nobody reads any more, as after `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = processes.run_python(*words, stdout=write, cwd=PROJECT)
    finally:
        os.close(write)
    for word in ("Traceback", "Exception ignored", "BrokenPipe", "Logging error"):
        assert word not in done.stderr
    assert done.returncode in codes, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "--cfg", "job"),
        pytest.param(("train.py", "--info"), marks=pytest.mark.slow),
        pytest.param(("scripts/verify.py", "--help"), marks=pytest.mark.slow),
        pytest.param(("scripts/params.py",), marks=pytest.mark.slow),
        pytest.param(
            ("scripts/sweep.py", "plan", "model=tiny_llama", "task=gsm8k", "tying=LoRA,TABuv"), marks=pytest.mark.slow
        ),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_output_ends_quietly(words):
    assert_quiet(words, 0, CLOSED_PIPE)


def test_a_closed_output_is_no_error():
    done = processes.run(["sh", "-c", f"{sys.executable} train.py --cfg job >&-"], cwd=PROJECT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_sweep_whose_reader_has_ended_stops_and_fails_no_cell(tiny_run):
    words = tiny_run("seed=0,1")
    assert_quiet(["train.py", "--multirun", *words], CLOSED_PIPE, STOPPED)
    first = compose_config([*words[:-1], "seed=0"])
    outputs = PROJECT / first.outputs
    assert (outputs / run_id(first) / "result.json").exists()
    assert not list(outputs.glob("*/error.txt"))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_names_an_old_python_in_one_line(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\ncase $1 in --version) echo Python 3.8.0;; *) exit 1;; esac\n")
    old.chmod(0o755)
    done = processes.run(["make", "run", f"PYTHON={old}"], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no Python 3.11 or newer (Python 3.8.0)" in done.stderr
    assert "make run PYTHON=python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()
