"""python benchmarks/tying.py [--batches 24] [--json FILE]: what a step of TABuv, of Tuv and of PEFT's adapters costs.

In one process, on the same GSM8K batches of SmolLM2-135M in bfloat16 (rank 8, batch 8, blocks not compiled): each batch
is trained on by every adapter in turn, in another order each time, and the ratio of their seconds to our LoRA's is
taken batch by batch. The interval is a bootstrap of the mean ratio over batches. PEFT's LoRA and VeRA (its nearest to
Tuv) stand on q, k and v within the same loss and attention as ours, so what differs is the adapter alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from tiedlora.adapter import TiedAdapter, attach_adapter
from tiedlora.data.batching import BatchSampler, microbatches
from tiedlora.data.encoding import Encoder, fit
from tiedlora.runs import reuse
from tiedlora.training import loop
from tiedlora.training.loss import target_loss

OURS = ("LoRA", "TABuv", "Tuv")
NAMES = (*OURS, "PEFT LoRA", "PEFT VeRA")


def peft(name: str, model: Any) -> Any:
    from peft import VeraConfig, get_peft_model

    if name == "PEFT LoRA":
        return common.peft_lora(model)
    settings = VeraConfig(r=common.RANK, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    arguments = parser.parse_args()
    configs = {name: common.config(f"tying={name}") for name in OURS}
    config = configs["LoRA"]
    base = reuse.base(config, torch.device("cpu"))
    encoded = fit(Encoder(base.tokenizer, config.task, config.model.context), reuse.rows(config)[0]["train"]).encoded
    sampler = BatchSampler([len(row) for row in encoded], config.train, config.seed)
    adapters, optimizers = {}, {}
    for name, c in configs.items():
        adapters[name] = TiedAdapter(c.tying, c.rank.r, c.rank.alpha, c.model.architecture, c.seed)
        optimizers[name] = loop.build_optimizer(adapters[name].trained_parts(), c.train)
    base.model.train()
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(arguments.batches + 1):
        rows = [encoded[row] for row in sampler.rows_of_step(number + 1)]
        batches = microbatches(rows, base.tokenizer.eos_token_id, tokens=common.PASS_TOKENS)
        for turn in range(len(NAMES)):
            name = NAMES[(turn + number) % len(NAMES)]
            if name in OURS:
                attached, optimizer = attach_adapter(base.model, adapters[name]), optimizers[name]
            else:
                wrapped = peft(name, base.model).train()
                optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=config.train.lr)
            started = time.perf_counter()
            for batch in batches:
                (target_loss(base.model, batch) / sum(len(b.targets) for b in batches)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds[name].append(time.perf_counter() - started)
            if name in OURS:
                attached.detach()
            else:
                wrapped.unload()
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
