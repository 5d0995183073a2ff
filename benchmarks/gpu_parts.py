"""The measurements of benchmarks/gpu.py. Each one runs in a process of its own, and gives figures for JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    import torch

    from tiedlora.config.schema import Config

# Imports inside functions: a measurement's memory contains only what it imports itself.

LARGE = (
    # The blocks of Llama-3.2-1B, 14 of 16. Random models have at most 1e9 parameters, and one token for each byte.
    "model=tiny_llama",
    "model.name=random/llama-0.99B",
    "model.context=2048",
    "model.architecture.hidden=2048",
    "model.architecture.layers=14",
    "model.architecture.heads=32",
    "model.architecture.kv_heads=8",
    "model.architecture.head_dim=64",
    "model.architecture.intermediate=8192",
    "model.architecture.vocabulary=32000",
)
VARIANTS = {
    "compiled": ("train.compile=always",),
    "not compiled": ("train.compile=never",),
    "not compiled, deterministic": ("train.compile=never", "train.deterministic=true"),
    "not compiled, activations recomputed": ("train.compile=never", "train.recompute_activations=true"),
    "not compiled, nf4": ("train.compile=never", "model.quantization=nf4"),
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    models: dict[str, tuple[str, ...]]
    """Name in the report -> its overrides. The first one is also trained with PEFT, and scored."""
    common: tuple[str, ...]
    """Overrides of every measurement."""
    skipped: int
    """Steps that are not timed."""
    timed: int
    rows: int
    """Rows that are scored."""
    losses: tuple[tuple[int, int, int], ...]
    """(positions, hidden size, vocabulary) of the compared losses."""
    cell_model: str
    cell_steps: int
    cells_at_once: tuple[int, ...]
    product: int
    """The size of the square matrices of the machine's rate."""
    rehearsed: bool = False

    def with_models(self, names: Sequence[str]) -> Plan:
        """The plan, with more options of conf/model to train."""
        return replace(self, models={**self.models, **{name: (f"model={name}",) for name in names}})


FULL = Plan(
    models={"SmolLM2-135M": ("model=smollm2_135m",), "random Llama of 0.99e9 parameters": LARGE},
    common=("task=gsm_symbolic", "train.batch_size=32", "train.microbatch_tokens=4096"),
    skipped=10,
    timed=30,
    rows=200,
    losses=((2048, 576, 49_152), (2048, 4096, 32_000), (2048, 4096, 128_256)),
    cell_model="smollm2_135m",
    cell_steps=80,
    cells_at_once=(1, 2, 4),
    product=8192,
)
REHEARSAL = Plan(
    models={"tiny Llama": ("model=tiny_llama",)},
    common=(
        "task=chain_sum",
        "task.options.rows={train: 40, validation: 12, test: 12}",
        "task.rows.validation=null",
        "task.max_new_tokens=6",
        "train.batch_size=4",
        "train.microbatch_tokens=512",
    ),
    skipped=2,
    timed=3,
    rows=8,
    losses=((64, 32, 260),),
    cell_model="tiny_llama",
    cell_steps=8,
    cells_at_once=(1, 2),
    product=256,
    rehearsed=True,
)


def machine(plan: Plan) -> dict[str, Any]:
    """The device, the versions, and the rate of large matrix products."""
    import harness
    import torch

    from tiedlora.models.device import resolve_device

    device = resolve_device("auto")
    figures: dict[str, Any] = {"processor": common.machine()["processor"], "cores": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        figures["gpu"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        figures["GPU memory"] = f"{properties.total_memory / 1e9:.1f} GB"
        figures["GPUs"] = torch.cuda.device_count()
        figures["cuda"] = torch.version.cuda
        figures["driver"] = _driver()
    for dtype in ("bfloat16", "float32"):
        x, weight = (torch.randn(plan.product, plan.product).to(device, getattr(torch, dtype)) for _ in range(2))
        seconds = timed(lambda x=x, weight=weight: x @ weight, device, harness.wait_for)
        figures[f"{dtype} products of size {plan.product}"] = f"{2e-12 * plan.product**3 / seconds:.1f} TFLOP/s"
    for package in ("torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes", "liger-kernel"):
        try:
            figures[package] = version(package)
        except PackageNotFoundError:
            figures[package] = "not installed"
    return figures


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except OSError:
        return "unknown (no nvidia-smi)"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def timed(
    work: Callable[[], Any], device: torch.device, wait: Callable[[Any], None], least_seconds: float = 1.0
) -> float:
    """The seconds of one call, over as many calls as fill `least_seconds`. The first two calls are not timed."""
    for _ in range(2):
        work()
    wait(device)
    calls, started = 0, time.perf_counter()
    while True:
        for _ in range(5):
            work()
        calls += 5
        wait(device)
        if (passed := time.perf_counter() - started) >= least_seconds:
            return passed / calls


def config_of(plan: Plan, model: str, *overrides: str) -> Config:
    """A configuration that trains steps to skip and steps to time, and reads numbers only after each of the two."""
    steps = plan.skipped + plan.timed
    words = ("train.validate_every=0", "train.validation_rows=8", "train.checkpoint_every=1000000", "score.splits=[]")
    return common.config(
        *plan.models[model],
        *plan.common,
        f"train.steps={steps}",
        f"train.log_every={plan.skipped}",
        *words,
        *overrides,
    )


def training(plan: Plan, model: str, variant: str) -> dict[str, Any]:
    """The speed of our loop, its share of the arithmetic's bound, and its memory beside the forecast."""
    import harness

    from tiedlora.data.batching import BatchSampler
    from tiedlora.models.arithmetic import training_bytes, training_flop

    config = config_of(plan, model, "tying=TABuv", *VARIANTS[variant])
    with tempfile.TemporaryDirectory() as folder:
        trained = harness.train(config, Path(folder))
        figures = speed_in(Path(folder), plan)
    rows = trained.loaded.rows["train"].encoded
    sampler = BatchSampler([len(row) for row in rows], config.train, config.seed)
    numbers = [n for step in range(plan.skipped + 1, config.train.steps + 1) for n in sampler.rows_of_step(step)]
    a = config.model.architecture
    flop = sum(training_flop(a, len(rows[n]), len(rows[n].target)) for n in numbers)
    rate = products_rate(config, 0.5)
    return {
        **figures,
        "flop_per_s": flop / figures["seconds"],
        "share": flop / figures["seconds"] / rate,
        "rate": rate,
        "peak": trained.state.peak_memory_bytes,
        "forecast": training_bytes(config, max(map(len, rows))),
        "loss": trained.state.validation[-1][1],
        "halvings": len(trained.state.halvings),
    }


def products_rate(config: Config, seconds: float) -> float:
    """The rate of the product of 2,048 tokens with a feed-forward weight, in the run's number type: FLOP a second."""
    import torch
    from torch.nn import functional as F

    from tiedlora.models.device import set_up_device

    device, dtype = set_up_device(config.train.device, config.train.threads), getattr(torch, config.train.dtype)
    a = config.model.architecture
    x = torch.randn(2048, a.hidden).to(device, dtype)
    weight = torch.full((a.intermediate or 4 * a.hidden, a.hidden), 0.01, device=device, dtype=dtype)
    # On a GPU one product takes a few microseconds, less than to start it and to wait for its end.
    at_once = 100 if device.type == "cuda" else 1
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        for _ in range(at_once):
            F.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    # The first one is not counted.
    return 2 * at_once * x.shape[0] * weight.numel() / statistics.median(times[1:])


def speed_in(folder: Path, plan: Plan) -> dict[str, Any]:
    """The timed tokens and seconds of a run's folder, and the seconds of the steps before (with compilation)."""
    from tiedlora.records.rows import read_metrics

    rows = {row.step: row.values for row in read_metrics(folder / "metrics.jsonl") if "train/tokens" in row.values}
    first, last = rows[plan.skipped], rows[max(rows)]
    tokens = last["train/tokens"] - first["train/tokens"]
    seconds = last["train/seconds"] - first["train/seconds"]
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "start": first["train/seconds"]}


def peft(plan: Plan, model: str, order: str) -> dict[str, Any]:
    """PEFT's LoRA with Trainer on the same rows, in bfloat16."""
    import baseline

    config = config_of(plan, model)
    words = (*plan.models[model], *plan.common, "train.lr=1e-3")
    figures = baseline.train("bfloat16", order, config.train.steps, plan.skipped, *words).figures()
    return {**figures, "losses": [], "tokens_per_s": figures["tokens"] / figures["seconds"]}


def losses(_plan: Plan, positions: int, hidden_size: int, vocabulary: int) -> dict[str, Any]:
    """Our loss, torch's on whole logits, and liger's fused one: forward and backward in bfloat16, the head frozen."""
    import harness
    import torch
    from torch.nn import functional as F

    from tiedlora.models.device import resolve_device
    from tiedlora.training.loss import _Head, _TokenLosses

    device = resolve_device("auto")
    torch.manual_seed(0)
    hidden = torch.randn(positions, hidden_size).to(device, torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size) / hidden_size**0.5).to(device, torch.bfloat16)
    labels = torch.randint(vocabulary, (positions,)).to(device)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: _TokenLosses.apply(hidden, _Head(weight, None, None), labels).sum(),
        "torch, whole logits": lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum"),
    }
    figures: dict[str, Any] = {}
    if importlib.util.find_spec("liger_kernel") is None:
        figures["liger, fused"] = {"missing": "not installed (pip install liger-kernel)"}
    elif device.type != "cuda":
        figures["liger, fused"] = {"missing": "needs a GPU"}
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["liger, fused"] = lambda: fused(weight, hidden, labels)
    for name, way in ways.items():
        figures[name] = _loss_figures(way, hidden, device, harness.wait_for)
    return figures


def _loss_figures(way: Callable[[], torch.Tensor], hidden: torch.Tensor, device: torch.device, wait: Any) -> Any:
    import torch

    def once() -> torch.Tensor:
        hidden.grad = None
        loss = way()
        loss.backward()
        return loss

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        once()
        memory = torch.cuda.max_memory_allocated(device) - before
    else:
        memory = None
    mean = float(once().detach()) / len(hidden)
    assert hidden.grad is not None
    norm = float(hidden.grad.float().norm())
    return {"seconds": timed(once, device, wait, 0.5), "memory": memory, "loss": mean, "gradient": norm}


def scoring(plan: Plan, way: str, folder: str) -> dict[str, Any]:
    """The answers of one way of benchmarks/score.py; `train` first trains the adapter."""
    import score

    model = next(iter(plan.models))
    words = (*plan.models[model], *plan.common)
    if way == "train":
        score.train(Path(folder), *words)
        return {}
    return score.measure(way, Path(folder), "bfloat16", plan.rows, *words)


def cells(plan: Plan, at_once: int) -> dict[str, Any]:
    """Four cells of a sweep on one GPU, so many at once: the time of the whole command."""
    import cells_at_once

    way = ["train.threads=1", "hydra/launcher=joblib_slots", f"hydra.launcher.n_jobs={at_once}"]
    return {"seconds": cells_at_once.seconds(way, plan.cell_model, plan.cell_steps)}


def processes(plan: Plan, size: int, shard: str) -> dict[str, Any]:
    """Training by so many processes, each with its own GPU, started as a user would start them."""
    model = list(plan.models)[-1]
    config = config_of(plan, model)
    with tempfile.TemporaryDirectory() as outputs:
        words = [*plan.models[model], *plan.common, "train.compile=never", f"train.shard={shard}", f"outputs={outputs}"]
        words += [f"train.steps={config.train.steps}", f"train.log_every={plan.skipped}", "score.splits=[]"]
        words += ["train.validate_every=0", "train.validation_rows=8", "train.warmup_steps=0"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command = [sys.executable, *(torchrun if size > 1 else []), str(common.PROJECT / "train.py"), *words]
        common.run_command(command)
        (result,) = Path(outputs).glob("*/result.json")
        peak = json.loads(result.read_text())["training"]["peak_memory_bytes"]
        return {**speed_in(result.parent, plan), "peak": peak}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": machine,
    "training": training,
    "peft": peft,
    "losses": losses,
    "scoring": scoring,
    "cells": cells,
    "processes": processes,
}


def measure(plan: Plan, part: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """The figures of one measurement."""
    return PARTS[part](plan, *arguments)


if __name__ == "__main__":
    rehearsed, models, wanted_part, its_arguments = json.loads(sys.argv[1])
    chosen = (REHEARSAL if rehearsed else FULL).with_models(models)
    print(json.dumps(measure(chosen, wanted_part, its_arguments)))
