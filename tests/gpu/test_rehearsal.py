"""benchmarks/gpu.py without a GPU: a page from tiny measurements, failures as lines of it, and refusals.

`make gpu REHEARSE=1` runs all parts, each in a process of its own. Here the quick ones run, in this process.
"""

import json
import sys
from dataclasses import replace

import pytest

from tiedlora.config.project import PROJECT
from tiedlora.runs import trainer

sys.path.append(str(PROJECT / "benchmarks"))

import gpu
import gpu_parts

PLAN = replace(gpu_parts.REHEARSAL, skipped=1, timed=1, rows=2, product=64)
QUICK = {
    ("machine",),
    ("training", "tiny Llama", "not compiled"),
    ("peft", "tiny Llama", "grouped"),
    ("losses", 64, 32, 260),
}


def measure(part, arguments):
    if part == "scoring" or (part, *arguments) in QUICK:
        # Each part has a model of its own, as it would in its own process.
        trainer._BASE.clear()
        return gpu_parts.measure(PLAN, part, arguments)
    raise RuntimeError(f"not {part} here")


@pytest.fixture(autouse=True)
def _no_model_left():
    yield
    trainer._BASE.clear()


@pytest.mark.slow
def test_the_page_has_a_table_of_each_part_and_says_what_failed(tmp_path):
    out = tmp_path / "new" / "page.md"
    reporter = gpu.Reporter(out, PLAN, measure, "python benchmarks/gpu.py --rehearse", minutes=60)
    results = reporter.run(["machine", "training", "peft", "losses", "scoring", "smoke"], gpus=0)
    page = out.read_text()
    assert "This is a rehearsal on a CPU with a tiny model" in page
    for title in ("Machine", "Training", "Loss", "Scoring", "Not measured"):
        assert f"\n## {title}\n" in page, page
    assert "| PEFT LoRA + Trainer, tiny Llama, bfloat16, grouped |" in page
    assert "- smoke: not smoke here" in page
    trained = results["training", "tiny Llama", "not compiled"]
    assert trained["tokens_per_s"] > 0
    assert trained["share"] > 0
    assert results["scoring", "ours"]["tokens"] > 0
    assert results["scoring", "generate"]["outputs"] == results["scoring", "ours"]["outputs"]
    losses = results["losses", 64, 32, 260]
    assert losses["ours"]["loss"] == pytest.approx(losses["torch, whole logits"]["loss"], rel=1e-2)
    assert losses["ours"]["gradient"] == pytest.approx(losses["torch, whole logits"]["gradient"], rel=1e-2)
    assert "liger, fused: 64 positions" in page
    (block,) = [line for line in page.splitlines() if line.startswith("[[")]
    assert json.loads(block)
    assert str(tmp_path) not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no CUDA device here"),
        (["--rehearse", "--out", str(gpu.REPORT)], "a rehearsal does not write gpu-report.md"),
        (["--only", "speed"], "choose from smoke, machine"),
    ],
)
def test_refusals(script, words, message):
    code, _, error = script("benchmarks/gpu.py", *words)
    assert code == 2
    assert message in error
    assert not gpu.REPORT.exists() or gpu.REPORT.read_text().startswith("# GPU report")
