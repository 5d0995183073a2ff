"""docs/extending.md is applied exactly to a copy of the project, and one run uses everything that the page adds."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import processes
from safetensors.torch import load_file

from tiedlora.config.compose import compose_config
from tiedlora.places import PROJECT
from tiedlora.records.loss_metrics import LOSS_METRICS, TARGET_LOSS
from tiedlora.tying import trainable_params

PAGE = PROJECT / "docs" / "extending.md"
BASIC = ["task=antonyms", "data_root=rows", "train=tiny", "model=tiny_llama"]
"""The copy's training without the page's optimizer, schedule, tracker and part."""
METRICS = ["exact_match", "first_letter", *LOSS_METRICS, "target_loss_by_row"]
"""Those of the task, and then the losses, with those that the page adds."""
EXECUTION = ["train.threads=1", "train.dtype=float32", "outputs=outputs", "cache=cache"]


def blocks() -> list[tuple[str, str, str]]:
    """(language, file, text) of the page's code blocks; the first line of each names its file."""
    return re.findall(r"```(\w+)\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    """The overrides of the page's commands."""
    return [shlex.split(words) for words in re.findall(r"^    python train\.py (.*)$", PAGE.read_text(), re.MULTILINE)]


def apply(language: str, path: Path, block: str) -> None:
    """Write the block's file. If the block is a diff, change the places that it shows."""
    if language != "diff":
        assert not path.exists(), path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    for hunk in block.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        assert text.count(before) == 1, f"{path} has another text than the page's diff:\n{before}"
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


def start(root: Path, *arguments: str) -> str:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "HOME": str(root)}
    done = processes.run_python(*arguments, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the project with everything that the page adds."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("src", "conf", "scripts", "claims"):
        shutil.copytree(PROJECT / name, root / name)
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(PROJECT / name, root / name)
    for language, name, block in blocks():
        apply(language, root / name, block)
    return root


def test_the_page_is_read_completely():
    text = PAGE.read_text(encoding="utf-8")
    assert len(blocks()) == text.count("```") / 2
    assert len(commands()) == text.count("    python train.py") == 4


@pytest.fixture(scope="module")
def folder(extended) -> Path:
    """The folder of a run that uses everything that the page adds."""
    overrides = dict.fromkeys([*BASIC, *(override for command in commands() for override in command)])
    start(extended, "train.py", *overrides, *EXECUTION)
    (result,) = (extended / "outputs").glob("*/result.json")
    return result.parent


def test_one_run_uses_everything(folder):
    record = json.loads((folder / "result.json").read_text())
    train = record["identity"]["train"]
    files = [folder / "scores" / f"validation.{kind}.jsonl" for kind in ("answers", "losses")]
    firsts = [json.loads(file.read_text().splitlines()[0]) for file in files]
    assert [metric for first in firsts for metric in first["metrics"]] == METRICS
    assert (train["optimizer"], train["momentum"]) == ("sgd", 0.9)

    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        tracked = [(int(row["step"]), row["metric"], float(row["value"])) for row in csv.DictReader(file)]
    assert tracked == [(row["step"], name, value) for row in logged for name, value in row.items() if name != "step"]
    # The schedule falls in equal steps to zero.
    rates = [row["train/lr"] for row in logged if "train/lr" in row]
    after_warmup = train["steps"] - train["warmup_steps"]
    expected = [train["lr"] * (1 - (k + 1) / after_warmup) for k in range(after_warmup)]
    assert rates[train["warmup_steps"] :] == pytest.approx(expected)

    # The part w adds L d_in numbers, and is no longer 1.
    config = compose_config(["model=tiny_llama"])
    architecture = config.model.architecture
    without = trainable_params(config.tying, config.rank.r, architecture)
    assert record["trainable_params"] == without + architecture.layers * architecture.hidden
    w = load_file(folder / "adapter" / "adapter.safetensors")["qkv.w"]
    assert tuple(w.shape) == (architecture.layers, architecture.hidden)
    assert (w != 1).any()


def test_the_report_shows_the_numbers_that_the_page_adds(extended, folder):
    start(extended, "scripts/report.py", "outputs", "--out", "report")
    with open(extended / "report" / "results.csv", encoding="utf-8", newline="") as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    assert list(rows) == METRICS
    # Of one seed, it is the score itself: a loss in nats too.
    assert all(row["worst seed"] == row["score"] for row in rows.values())
    loss, by_row = (float(rows[name]["score"]) for name in (TARGET_LOSS, METRICS[-1]))
    assert by_row > loss, "a target has more than one token"
    recorded = json.loads((folder / "result.json").read_text())["training"]["validation_loss_last"]
    assert {row["validation loss"] for row in rows.values()} == {f"{recorded:.3f}"}
    page = (extended / "report" / "index.html").read_text(encoding="utf-8")
    assert all(name in page for name in (*METRICS, "worst seed", "validation loss"))


def test_ids_of_earlier_runs_stay(extended):
    overrides = ["model=tiny_llama", "tying=TAuv", "train=tiny"]
    code = "import sys; from tiedlora.config import compose, identity; "
    code += "print(identity.run_id(compose.compose_config(sys.argv[1:])))"
    assert start(extended, "-c", code, *overrides) == start(PROJECT, "-c", code, *overrides)
