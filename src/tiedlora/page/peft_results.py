"""Results of PEFT's method_comparison/MetaMathQA, read and written.

Each of its files is one run (run_info, train_info, meta_info) with one seed and no interval. It was trained on
MetaMathQA and tested on GSM8K. These runs are a separate series, never in one table with our runs, because base model,
data and training differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tiedlora import storage
from tiedlora.analysis.intervals import wilson
from tiedlora.analysis.runs import LeftOut, Run
from tiedlora.config.schema import FORGETTING
from tiedlora.errors import UserError
from tiedlora.records.interval import Interval
from tiedlora.records.loss_metrics import TARGET_LOSS, is_loss
from tiedlora.records.reading import Number, Text, typed
from tiedlora.records.run_record import RunRecord

GSM8K_TEST_ROWS = 1319
"""The number of rows that PEFT tests on. Its files do not have it."""
PEFT_TYPES = {"LNTuningConfig": "LN_TUNING"}
"""Classes whose name does not give PEFT's name of the method."""
RESULTS_FILE = "a results file of PEFT's comparison"


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
        """The test accuracy with Wilson's interval, over which test rows were drawn. It does not cover seeds."""
        return wilson(round(self.accuracy * GSM8K_TEST_ROWS), GSM8K_TEST_ROWS)


@dataclass(frozen=True)
class _PeftConfig:
    peft_type: Text


@dataclass(frozen=True)
class _TrainConfig:
    model_id: Text


@dataclass(frozen=True)
class _RunInfo:
    experiment_name: Text
    train_config: _TrainConfig
    peft_config: _PeftConfig | None
    """None for full fine-tuning."""


@dataclass(frozen=True)
class _Metrics:
    test_accuracy: Annotated[Number | None, Field(alias="test accuracy")] = None


@dataclass(frozen=True)
class _TrainInfo:
    num_trainable_params: Annotated[Number, Field(ge=0)]
    file_size: Annotated[Number, Field(ge=0)]
    accelerator_memory_max: Annotated[Number, Field(ge=0)]
    train_time: Number
    metrics: Annotated[list[_Metrics], Field(min_length=1)]
    """By step; the last one has the test accuracy."""


@dataclass(frozen=True)
class _Status:
    status: Text


@dataclass(frozen=True)
class _Outcome:
    train_info: _Status


@dataclass(frozen=True)
class _Published:
    run_info: _RunInfo
    train_info: _TrainInfo


def read(folder: Path) -> tuple[list[Peer], list[LeftOut]]:
    """Every results file of a folder, and the other files with the reason why they are not.

    Raises:
        UserError: the folder is missing or has no JSON files.
    """
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise UserError(f"--peft-results {folder}: holds no *.json; give PEFT's method_comparison/MetaMathQA/results")
    peers, left_out = [], []
    for file in files:
        try:
            peers.append(_peer(file))
        except UserError as error:
            left_out.append(LeftOut(file, str(error).removeprefix(f"{file}: ")))
    return sorted(peers, key=lambda peer: peer.params), left_out


def _peer(file: Path) -> Peer:
    """The published run of one file.

    Raises:
        UserError: the run did not succeed, or the file is not of this comparison.
    """
    tree = storage.read_json(file)
    status = typed(_Outcome, tree, RESULTS_FILE).train_info.status
    if status != "success":
        raise UserError(f"its status is {status!r:.40}, not 'success'")
    published = typed(_Published, tree, RESULTS_FILE)
    run, training = published.run_info, published.train_info
    accuracy = training.metrics[-1].test_accuracy
    if accuracy is None:
        raise UserError(f"has no 'test accuracy' in its last metrics, so it is not {RESULTS_FILE}")
    if not 0 <= accuracy <= 1:
        raise UserError(f"its test accuracy is {accuracy}, which is not in [0, 1]")
    return Peer(
        experiment=run.experiment_name,
        method=run.peft_config.peft_type if run.peft_config else "full fine-tuning",
        model=run.train_config.model_id,
        params=int(training.num_trainable_params),
        accuracy=accuracy,
        file_bytes=int(training.file_size),
        memory_bytes=int(training.accelerator_memory_max),
        seconds=training.train_time,
    )


def export(runs: Sequence[Run], folder: Path) -> int:
    """Write runs whose answers were scored on GSM8K's test split as files of PEFT's schema.

    A file's name is the run's id. What we do not measure (average and 99th-percentile memory) is null.

    Returns:
        How many were written. (Runs on other tasks, or with only a loss, do not belong in that comparison.)
    """
    exported = [run for run in runs if run.record.identity.task.kind == "gsm8k" and _has_accuracy(run)]
    for run in exported:
        tree = {"run_info": _run_info(run), "train_info": _train_info(run), "meta_info": _meta_info(run)}
        storage.write_json(folder / f"{run.run_id}.json", tree)
    return len(exported)


def _has_accuracy(run: Run) -> bool:
    return "test" in run.splits and not is_loss(run.splits["test"].first_metric)


def _run_info(run: Run) -> dict[str, Any]:
    record, identity = run.record, run.record.identity.tree
    train, tying = identity["train"], identity["tying"]
    return {
        "created_at": None,
        "total_time": record.training.seconds + run.splits["test"].seconds,
        "experiment_name": f"tiedlora/{run.run_id}",
        "peft_branch": None,
        "peft_worktree_is_dirty": record.code.dirty,
        "train_config": {
            "model_id": record.base.name,
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
        "peft_config": _other_method(record, tying)
        if record.is_other_method
        else {
            # After folding, every configuration is exactly a LoRA, but it was not trained as one.
            "peft_type": "LORA" if run.configuration.startswith("LoRA") else f"TIED_LORA_{run.configuration.upper()}",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": record.base.name,
            "r": run.rank,
            "lora_alpha": record.identity.rank.alpha,
            "use_rslora": record.identity.rank.scaling == "rslora",
            "lora_dropout": tying.get("dropout", 0.0),
            "target_modules": tying.get("targets"),
            "tying": tying,
        },
        "error_msg": "",
    }


def _other_method(record: RunRecord, tying: dict[str, Any]) -> dict[str, Any]:
    """PEFT's configuration of an arm: its type, and all its arguments."""
    method = str(tying["method"])
    return {
        "peft_type": PEFT_TYPES.get(method, method.removesuffix("Config").upper()),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": record.base.name,
        "targets": tying.get("targets"),
        "layers_to_transform": tying.get("layers"),
        **(tying.get("resolved") or {}),
    }


def _train_info(run: Run) -> dict[str, Any]:
    record, training, test = run.record, run.record.training, run.splits["test"]
    batch_size = record.identity.tree["train"].get("batch_size", 0)
    curve = [{"step": step, "valid loss": value} for step, value in zip(*run.curve("validation/loss"), strict=True)]
    last = {
        "step": training.steps,
        "test accuracy": test.metrics[test.first_metric].value,
        "train loss": _last_loss(run),
        "train samples": training.steps * batch_size,
        "train total tokens": training.tokens,
        "forgetting": _forgetting(record),
    }
    return {
        "accelerator_memory_reserved_avg": None,
        "accelerator_memory_max": training.peak_memory_bytes,
        "accelerator_memory_reserved_99th": None,
        "train_time": training.seconds,
        "file_size": record.adapter_bytes,
        "num_trainable_params": run.params,
        "num_total_params": None,
        "status": "success",
        "metrics": [*curve, last],
    }


def _forgetting(record: RunRecord) -> float | None:
    """How much the loss of neutral text grows, in nats per token.

    PEFT's own figure compares logits with the token at the same position, so the two are not the same quantity.
    """
    scores = record.scores.get(FORGETTING)
    return scores.gain[TARGET_LOSS].value if scores is not None and scores.gain is not None else None


def _last_loss(run: Run) -> float | None:
    _, losses = run.curve("train/loss")
    return losses[-1] if losses and math.isfinite(losses[-1]) else None


def _meta_info(run: Run) -> dict[str, Any]:
    record, versions = run.record, run.record.versions
    return {
        "model_info": {"sha": record.base.digest, "created_at": None},
        "dataset_info": {run.task: {"sha": run.splits["test"].digest, "created_at": None}},
        "package_info": {
            **{f"{name}-version": version for name, version in versions.items()},
            # The app of PEFT's comparison always reads these keys.
            "peft-version": versions.get("peft"),
            "datasets-version": versions.get("datasets"),
            "bitsandbytes-version": versions.get("bitsandbytes"),
            "tiedlora-commit-hash": record.code.commit,
        },
        "system_info": {"accelerator": str(record.execution)},
        "pytorch_info": versions.get("torch"),
    }
