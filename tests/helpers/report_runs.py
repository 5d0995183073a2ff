"""Synthetic run folders with the record's schema and a known truth, for tests of the report."""

import copy
import json
from pathlib import Path

import numpy as np

from tiedlora.statistics.intervals import paired_proportions, wilson

SHARES = {"LoRA": 1.0, "TA": 0.013, "TAB": 0.033, "TABuv": 0.112, "Tuv": 0.079}
PARTS = {"trained": True, "init": "uniform", "share": "all"}


def make_record(name="TABuv", rank=8, seed=0, lr=1e-2, task="chain_sum", model="org/tiny", **more) -> dict:
    """A record without scores. `more` replaces values by dotted path, such as {"identity.train.steps": 5}."""
    tying = {part: dict(PARTS) for part in "ABuv"} | {"targets": ["qkv"], "label": name}
    identity = {
        "model": {"name": model, "revision": "main", "context": 512},
        "task": {"name": task, "kind": "gsm8k", "version": 1, "prompt": "{q}"},
        "tying": tying,
        "rank": {"r": rank, "alpha": float(rank)},
        "train": {"steps": 100, "batch_size": 16, "lr": lr, "lr_factor": {"A": 1.0}},
        "score": {"checkpoint": "last", "batch_size": 64},
        "seed": seed,
    }
    params = round(46080 * rank * SHARES.get(name, 0.1))
    record = {
        "identity": identity,
        "config": {**copy.deepcopy(identity), "tying": {**copy.deepcopy(tying), "name": name}, "data_root": None},
        "seed": seed,
        "code": {"commit": "a" * 40, "dirty": False},
        "versions": {"python": "3.11", "torch": "2.13", "transformers": "5.24"},
        "device": "cpu, 1 threads",
        "base": {"name": model, "revision": "main", "digest": "sha256:1"},
        "trainable_params": params,
        "share_of_lora": SHARES.get(name, 0.1),
        "data": {"train": {"rows": 100, "digest": "train"}, "validation": {"rows": 50, "digest": "validation"}},
        "training": {
            "steps": 100,
            "tokens": 1000,
            "seconds": 10.0,
            "tokens_per_s": 100.0,
            "validation_loss_first": 2.0,
            "validation_loss_last": 1.0,
            "peak_memory_bytes": 2**30,
        },
        "adapter_bytes": 4 * params,
        "scores": {},
        "status": "done",
    }
    for path, value in more.items():
        *parents, last = path.split(".")
        node = record
        for key in parents:
            node = node[key]
        node[last] = value
    words = [name, f"r{rank}", task, model.split("/")[-1], f"s{seed}"]
    meaning = json.dumps(record["identity"], sort_keys=True)
    record["run_id"] = "-".join([*words, f"{abs(hash_of(meaning)):010x}"[:10]])
    return record


def hash_of(text: str) -> int:
    import hashlib

    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def add_scores(record: dict, split: str, ours, base=None, metric="exact_match_strict") -> dict:
    """Put a split's scores into a record from per-example scores."""
    ours = np.asarray(ours, dtype=float)
    binary = np.isin(ours, (0, 1)).all()

    def value(scores):
        if binary:
            found = wilson(int(scores.sum()), len(scores))
            return {"value": found.value, "low": found.low, "high": found.high}
        return {"value": float(scores.mean()), "low": float(scores.min()), "high": float(scores.max())}

    found = {"rows": len(ours), "digest": f"{record['identity']['task']['name']}-{split}", "seconds": 1.0}
    found["metrics"] = {metric: value(ours)}
    if base is not None:
        base = np.asarray(base, dtype=float)
        found["base"] = {metric: value(base)}
        if binary:
            gap = paired_proportions(ours.tolist(), base.tolist())
            found["gain"] = {metric: {"value": gap.value, "low": gap.low, "high": gap.high}}
    record["scores"][split] = found
    return record


def write_run(root: Path, record: dict, rows: dict[str, list[dict]]) -> Path:
    """A run's folder: result.json, metrics.jsonl and predictions/."""
    folder = Path(root) / record["run_id"]
    (folder / "predictions").mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(record))
    losses = [{"step": step, "validation/loss": 2.0 - step / 100} for step in (0, 50, 100)]
    losses += [{"step": step, "train/loss": 2.0 - step / 100} for step in range(1, 101, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses))
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "predictions" / f"{name}.jsonl").write_text(text)
    return folder


def prediction_rows(scores, metric="exact_match_strict", output="#### 3"):
    return [
        {
            "id": str(number),
            "prompt": f"Question {number}",
            "references": ["3"],
            "output": output,
            "output_tokens": 3,
            "ended": "end",
            "scores": {metric: score if isinstance(score, list) else float(score)},
        }
        for number, score in enumerate(scores)
    ]


def scored_run(
    root, ours, base=None, split="validation", metric="exact_match_strict", output="#### 3", **about
) -> Path:
    """A finished run with one split's scores and predictions."""
    record = add_scores(make_record(**about), split, ours, base, metric)
    rows = {split: prediction_rows(ours, metric, output)}
    if base is not None:
        rows[f"{split}.base"] = prediction_rows(base, metric)
    return write_run(root, record, rows)


def world(root, truth, *, seeds=5, rows=200, base=0.1, seed_sd=0.01, rank=8, generator=None, **about):
    """Runs of known truth: `truth` maps configurations to success rates; examples differ in difficulty."""
    generator = generator or np.random.default_rng(0)
    difficulty = generator.normal(0, 0.1, rows)
    below = generator.random(rows) < np.clip(base + difficulty, 0, 1)
    for name, p in truth.items():
        own_rank = rank
        if isinstance(name, tuple):
            name, own_rank = name
        for seed in range(seeds):
            chance = np.clip(p + difficulty + generator.normal(0, seed_sd), 0, 1)
            ours = (generator.random(rows) < chance).astype(float)
            scored_run(root, ours, below.astype(float), name=name, rank=own_rank, seed=seed, **about)
