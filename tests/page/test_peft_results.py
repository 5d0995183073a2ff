"""PEFT's method_comparison results: read as a labelled series, and ours written in the same schema."""

import json
import re

import pytest
from helpers.report_runs import scored_run

from tiedlora.analysis.runs import read_runs
from tiedlora.errors import UserError
from tiedlora.page import peft_results, write


def published(params=9_175_040, accuracy=0.4784, status="success", peft_type="LORA"):
    """What the comparison's files hold of what we read (huggingface/peft, method_comparison/MetaMathQA/results)."""
    return {
        "run_info": {
            "experiment_name": "lora/llama-3.2-3B-rank32",
            "train_config": {"model_id": "meta-llama/Llama-3.2-3B", "seed": 0},
            "peft_config": peft_type and {"peft_type": peft_type, "r": 32},
        },
        "train_info": {
            "accelerator_memory_max": 22_292_725_760,
            "train_time": 941.96,
            "file_size": 36_715_216,
            "num_trainable_params": params,
            "status": status,
            "metrics": [{"step": 250, "valid accuracy": 0.32}, {"step": 5000, "test accuracy": accuracy}],
        },
        "meta_info": {},
    }


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "results"
    place.mkdir()
    (place / "lora.json").write_text(json.dumps(published()))
    (place / "full.json").write_text(json.dumps(published(params=3_000_000_000, accuracy=0.47, peft_type=None)))
    (place / "canceled.json").write_text(json.dumps(published(status="canceled")))
    (place / "other.json").write_text("{}")
    return place


def test_published_runs_are_read_and_bad_files_listed(folder):
    peers, left_out = peft_results.read(folder)
    assert [peer.method for peer in peers] == ["LORA", "full fine-tuning"]
    interval = peers[0].interval()
    # 0.4784 of 1,319: a binomial half-width of 0.027.
    assert interval.high - interval.low == pytest.approx(0.054, abs=0.001)
    reasons = {file.path.name: file.reason for file in left_out}
    assert reasons == {
        "canceled.json": "its status is 'canceled', not 'success'",
        "other.json": "has no 'train_info', so it is not a results file of PEFT's comparison",
    }
    with pytest.raises(UserError, match="method_comparison"):
        peft_results.read(folder / "nowhere")


@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("train_info", "metrics", [], "'train_info.metrics' is \\[\\]"),
        ("train_info", "metrics", [{"step": 5}], "no 'test accuracy' in its last metrics"),
        ("train_info", "metrics", [{"test accuracy": 1.5}], "not in \\[0, 1\\]"),
        ("train_info", "num_trainable_params", "many", "'train_info.num_trainable_params' is 'many'"),
        ("train_info", "file_size", float("inf"), "'train_info.file_size' is not a finite number"),
        ("run_info", "train_config", {}, "no 'run_info.train_config.model_id'"),
        ("run_info", "peft_config", {"r": 8}, "no 'run_info.peft_config.peft_type'"),
    ],
)
def test_a_file_that_is_not_of_the_comparison_names_its_key(tmp_path, part, key, value, says):
    tree = published()
    tree[part][key] = value
    (tmp_path / "odd.json").write_text(json.dumps(tree))
    peers, (file,) = peft_results.read(tmp_path)
    assert not peers
    assert re.search(says, file.reason), file.reason


def test_they_are_a_series_of_their_own(folder, tmp_path):
    scored_run(tmp_path / "runs", [1.0, 0.0] * 20, [0.0] * 40)
    report = write.build([tmp_path / "runs"], peft_results_in=folder)
    write.write(report, tmp_path / "report")
    assert "LORA" not in (tmp_path / "report" / "results.md").read_text()
    assert "47.8" in (tmp_path / "report" / "peers.md").read_text()
    assert "Published by PEFT" in (tmp_path / "report" / "index.html").read_text()
    assert "PEFT method_comparison" in (tmp_path / "report" / "pareto.svg").read_text()


def test_ours_are_written_so_that_the_reader_of_theirs_reads_them(tmp_path):
    scored_run(tmp_path / "runs", [1.0, 0.0] * 20, [0.0] * 40, split="test", task="gsm8k")
    scored_run(tmp_path / "runs", [1.0, 0.0] * 20, [0.0] * 40, split="validation", task="gsm8k", seed=1)
    runs, _ = read_runs([tmp_path / "runs"])
    assert peft_results.export(runs, tmp_path / "out") == 1
    (peer,), left_out = peft_results.read(tmp_path / "out")
    assert not left_out
    assert peer.accuracy == 0.5
    assert peer.method == "TIED_LORA_TABUV"
    assert peer.params == runs[0].params
    (path,) = (tmp_path / "out").iterdir()
    record = json.loads(path.read_text())
    assert record["train_info"]["metrics"][-1]["train loss"] == pytest.approx(1.0)
    # Keys that the comparison's own app reads without a default.
    last = record["train_info"]["metrics"][-1]
    assert {"train loss", "train samples", "test accuracy", "train total tokens"} <= set(last)
    package = record["meta_info"]["package_info"]
    assert {"peft-version", "transformers-version", "datasets-version", "torch-version", "bitsandbytes-version"} <= set(
        package
    )
