"""PEFT's method_comparison/MetaMathQA results, in and out.

Its files (one JSON object a run: run_info, train_info, meta_info) hold one seed each and no interval, trained on
MetaMathQA and tested on GSM8K. They are shown as a series of their own, never in a table with ours: base model, data
and training differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.report.runs import LeftOut, Run
from tiedlora.statistics.intervals import Interval, wilson

GSM8K_TEST_ROWS = 1319
"""What PEFT tests on; its files do not say."""


@dataclass(frozen=True)
class Peer:
    """One published run."""

    experiment: str
    method: str
    model: str
    params: int
    accuracy: float
    file_bytes: int
    memory_bytes: int
    seconds: float

    def interval(self) -> Interval:
        """Wilson's, over which of GSM8K's test rows were drawn; seeds are not covered, there is one."""
        return wilson(round(self.accuracy * GSM8K_TEST_ROWS), GSM8K_TEST_ROWS)


def read(folder: Path) -> tuple[list[Peer], list[LeftOut]]:
    """Every results file of a folder, and the ones that are none, with the reason.

    Raises:
        UserError: the folder is missing or holds no JSON.
    """
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise UserError(f"--peft-results {folder}: holds no *.json; give PEFT's method_comparison/MetaMathQA/results")
    peers, left_out = [], []
    for file in files:
        try:
            peers.append(_peer(storage.read_json(file)))
        except UserError as error:
            left_out.append(LeftOut(file, str(error).removeprefix(f"{file}: "), {}))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            left_out.append(LeftOut(file, f"not a results file of PEFT's comparison ({error!r:.80})", {}))
    return sorted(peers, key=lambda peer: peer.params), left_out


def _peer(record: dict[str, Any]) -> Peer:
    about, training = record["run_info"], record["train_info"]
    if training["status"] != "success":
        raise UserError(f"its status is {training['status']!r:.40}")
    peft = about["peft_config"]
    accuracy = float(training["metrics"][-1]["test accuracy"])
    if not 0 <= accuracy <= 1:
        raise UserError(f"its test accuracy is {accuracy}")
    return Peer(
        experiment=str(about["experiment_name"]),
        method=str(peft["peft_type"]) if peft else "full fine-tuning",
        model=str(about["train_config"]["model_id"]),
        params=int(training["num_trainable_params"]),
        accuracy=accuracy,
        file_bytes=int(training["file_size"]),
        memory_bytes=int(training["accelerator_memory_max"]),
        seconds=float(training["train_time"]),
    )


def export(runs: list[Run], folder: Path) -> int:
    """Write runs that were scored on GSM8K's test split as files of that schema.

    A file's name is the run's id. What we do not measure (average and 99th-percentile memory, forgetting) is null.

    Returns:
        How many were written; runs on other tasks have no place in that comparison.
    """
    count = 0
    for run in runs:
        if run.record["identity"]["task"].get("kind") == "gsm8k" and "test" in run.splits:
            storage.write_json(folder / f"{run.run_id}.json", _exported(run))
            count += 1
    return count


def _exported(run: Run) -> dict[str, Any]:
    record, training, identity = run.record, run.record["training"], run.record["identity"]
    test = run.splits["test"]
    train, rank, tying = identity["train"], identity["rank"], identity["tying"]
    peft_config = {
        # Every configuration is exactly a LoRA once its vectors are folded in, but was not trained as one.
        "peft_type": "LORA" if run.configuration.startswith("LoRA") else f"TIED_LORA_{run.configuration.upper()}",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": record["base"]["name"],
        "r": run.rank,
        "lora_alpha": rank.get("alpha"),
        "lora_dropout": tying.get("dropout", 0.0),
        "target_modules": tying.get("targets"),
        "tying": tying,
    }
    last = {
        "step": training.get("steps"),
        "test accuracy": next(iter(test["metrics"].values()))["value"],
        "train loss": _last_loss(run),
        "train samples": training.get("steps", 0) * train.get("batch_size", 0),
        "train total tokens": training.get("tokens"),
        "forgetting": None,
    }
    curve = [{"step": step, "valid loss": value} for step, value in zip(*run.curve("validation/loss"), strict=True)]
    versions = record["versions"]
    return {
        "run_info": {
            "created_at": None,
            "total_time": training["seconds"] + test.get("seconds", 0.0),
            "experiment_name": f"tiedlora/{run.run_id}",
            "peft_branch": None,
            "train_config": {
                "model_id": record["base"]["name"],
                "dtype": train.get("dtype"),
                "max_seq_length": identity["model"].get("context"),
                "batch_size": train.get("batch_size"),
                "batch_size_eval": identity["score"].get("batch_size"),
                "max_steps": train.get("steps"),
                "eval_steps": train.get("validate_every"),
                "query_template": identity["task"].get("prompt"),
                "seed": run.seed,
                "grad_norm_clip": train.get("clip"),
                "optimizer_type": "AdamW",
                "optimizer_kwargs": {"lr": run.lr, "weight_decay": train.get("weight_decay")},
                "lr_scheduler": train.get("schedule"),
                "generation_kwargs": {"max_new_tokens": identity["task"].get("max_new_tokens")},
            },
            "peft_config": peft_config,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": training["peak_memory_bytes"],
            "accelerator_memory_reserved_99th": None,
            "train_time": training["seconds"],
            "file_size": record["adapter_bytes"],
            "num_trainable_params": run.params,
            "num_total_params": None,
            "status": "success",
            "metrics": [*curve, last],
        },
        "meta_info": {
            "model_info": {"sha": record["base"].get("digest"), "created_at": None},
            "dataset_info": {run.task: {"sha": test["digest"], "created_at": None}},
            "package_info": {
                **{f"{name}-version": version for name, version in versions.items()},
                # The app of that comparison reads these whether or not they were used.
                "peft-version": versions.get("peft"),
                "datasets-version": versions.get("datasets"),
                "bitsandbytes-version": versions.get("bitsandbytes"),
                "tiedlora-commit-hash": record["code"].get("commit"),
            },
            "system_info": {"accelerator": record.get("device")},
            "pytorch_info": versions.get("torch"),
        },
    }


def _last_loss(run: Run) -> float | None:
    _, losses = run.curve("train/loss")
    return losses[-1] if losses and math.isfinite(losses[-1]) else None
