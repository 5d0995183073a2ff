"""python benchmarks/first_step.py [--seeds 3]: how much Adam's first step lowers the loss at each rank.

At alpha = r the scale s is 1. With a fixed alpha it is alpha / r, or alpha / sqrt(r) with rank.scaling=rslora.
SmolLM2-135M in float32 takes one AdamW step on 16 rows of chain_sum, without warm-up and clipping. The loss of the same
rows before the step, less that after it, is the drop.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import common
import harness
import torch

from tiedlora.adapter import Attached, TiedAdapter, attach_adapter
from tiedlora.data.batching import Batch, microbatches
from tiedlora.training.loss import target_loss
from tiedlora.training.optimizer import build_optimizer

ROWS, RANKS, ALPHA = 16, (1, 8, 128), 8
SCALES = {
    "alpha = r": [],
    f"alpha = {ALPHA}, standard": [f"rank.alpha={ALPHA}"],
    f"alpha = {ALPHA}, rslora": [f"rank.alpha={ALPHA}", "rank.scaling=rslora"],
}
SMALL_LR = 1e-5
"""At this rate the drop is nearly linear in the step. 3e-3 is what conf/tying suggests for LoRA."""


def loss(attached: Attached, batches: list[Batch]) -> float:
    """The mean loss of a target token; its gradients are added to those of the trained parts."""
    target_tokens = sum(len(batch.targets) for batch in batches)
    total = 0.0
    for batch in batches:
        part = target_loss(attached.model, batch) / target_tokens
        if torch.is_grad_enabled():
            part.backward()
        total += float(part.detach())
    return total


def drop(configuration: str, overrides: list[str], lr: float, seed: int) -> float:
    """The loss before the first step, less that after it."""
    config = common.config(
        "task=chain_sum",
        f"tying={configuration}",
        "train.dtype=float32",
        f"train.lr={lr}",
        f"seed={seed}",
        *overrides,
    )
    base, rank = harness.base_model(config), config.rank
    encoded = harness.training_rows(config, base)[:ROWS]
    batches = microbatches(encoded, base.tokenizer.eos_token_id, tokens=common.PASS_TOKENS)
    adapter = TiedAdapter(
        config.tying,
        rank.r,
        rank.alpha or rank.r,
        config.model.architecture,
        seed=config.seed,
        scaling=rank.scaling,
    )
    attached = attach_adapter(base.model, adapter)
    optimizer = build_optimizer(adapter.parameter_groups(config.train.lr_factor), config.train)
    before = loss(attached, batches)
    optimizer.step()
    with torch.no_grad():
        after = loss(attached, batches)
    attached.detach()
    return before - after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--configurations", nargs="+", default=["LoRA"])
    parser.add_argument("--rates", nargs="+", type=float, default=[SMALL_LR])
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    arguments = parser.parse_args()
    lines, figures = [], {}
    for configuration in arguments.configurations:
        for lr in arguments.rates:
            for name, scale in SCALES.items():
                cells = [configuration, f"{lr:g}", name]
                for rank in RANKS:
                    drops = [drop(configuration, [f"rank.r={rank}", *scale], lr, s) for s in range(arguments.seeds)]
                    figures[f"{configuration}, lr {lr:g}, {name}, r = {rank}"] = drops
                    cells.append(f"{statistics.mean(drops):.3g} [{min(drops):.3g}, {max(drops):.3g}]")
                lines.append(cells)
    ranks = [f"r = {rank}, mean [range]" for rank in RANKS]
    print(common.table(["configuration", "lr", "scale", *ranks], lines))
    common.write(arguments.json, figures)


if __name__ == "__main__":
    main()
