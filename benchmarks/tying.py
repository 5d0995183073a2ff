"""python benchmarks/tying.py [--batches 24] [--json FILE]: what a step of TABuv, of Tuv and of PEFT's adapters costs.

It runs in one process, with SmolLM2-135M in bfloat16 on GSM8K batches (rank 8, batch 8, blocks not compiled). On each
batch every adapter trains one step, in another order each time. Its seconds are divided by those of our LoRA on the
same batch. The interval is a bootstrap of the mean ratio over batches. PEFT's LoRA and VeRA (its method nearest to Tuv)
adapt q, k and v, with the same loss and attention as ours, so only the adapter differs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import baseline
import common
import harness
import numpy as np
import torch
from peft import VeraConfig, get_peft_model

from tiedlora.adapter import TiedAdapter, attach_adapter
from tiedlora.data.batching import Batch, BatchSampler, microbatches
from tiedlora.training.loss import target_loss
from tiedlora.training.optimizer import build_optimizer

OURS = ("LoRA", "TABuv", "Tuv")
NAMES = (*OURS, "PEFT LoRA", "PEFT VeRA")


def with_peft(name: str, model: Any) -> Any:
    """The model with a new adapter of PEFT."""
    if name == "PEFT LoRA":
        return baseline.peft_lora(model)
    settings = VeraConfig(r=common.RANK, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


class StepTimer:
    """Trains one model with several adapters, one after the other, and times each step."""

    def __init__(self) -> None:
        configs = {name: common.config(f"tying={name}") for name in OURS}
        self.config = configs["LoRA"]
        self.base = harness.base_model(self.config)
        self.base.model.train()
        self.adapters, self.optimizers = {}, {}
        for name, config in configs.items():
            rank, architecture = config.rank, config.model.architecture
            adapter = TiedAdapter(config.tying, rank.r, rank.alpha or rank.r, architecture, seed=config.seed)
            self.adapters[name] = adapter
            self.optimizers[name] = build_optimizer(adapter.parameter_groups(config.train.lr_factor), config.train)

    def seconds(self, name: str, batches: list[Batch]) -> float:
        """Seconds of one step: forward, backward and update."""
        if name in OURS:
            attached = attach_adapter(self.base.model, self.adapters[name])
            seconds = self._step(batches, self.optimizers[name])
            attached.detach()
            return seconds
        wrapped = with_peft(name, self.base.model).train()
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        seconds = self._step(batches, torch.optim.AdamW(trained, lr=self.config.train.lr or 0.0))
        wrapped.unload()
        return seconds

    def _step(self, batches: list[Batch], optimizer: torch.optim.Optimizer) -> float:
        target_tokens = sum(len(batch.targets) for batch in batches)
        started = time.perf_counter()
        for batch in batches:
            (target_loss(self.base.model, batch) / target_tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    arguments = parser.parse_args()
    timer = StepTimer()
    encoded = harness.training_rows(timer.config, timer.base)
    sampler = BatchSampler([len(row) for row in encoded], timer.config.train, timer.config.seed)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(arguments.batches + 1):
        rows = [encoded[row] for row in sampler.rows_of_step(number + 1)]
        batches = microbatches(rows, timer.base.tokenizer.eos_token_id, tokens=common.PASS_TOKENS)
        for turn in range(len(NAMES)):
            name = NAMES[(turn + number) % len(NAMES)]
            seconds[name].append(timer.seconds(name, batches))
    # The first batch warms up.
    measured = {name: np.array(times[1:]) for name, times in seconds.items()}
    draws = np.random.default_rng(0).integers(0, arguments.batches, (10_000, arguments.batches))
    lines = []
    for name, times in measured.items():
        ratio = times / measured["LoRA"]
        low, high = np.percentile(ratio[draws].mean(axis=1), [2.5, 97.5])
        lines.append([name, f"{statistics.median(times):.2f}", f"{ratio.mean():.3f} [{low:.3f}, {high:.3f}]"])
    print(common.table(["adapter", "seconds a step (median)", "x LoRA's, mean [95 %]"], lines))
    common.write(arguments.json, {name: times.tolist() for name, times in measured.items()})


if __name__ == "__main__":
    main()
