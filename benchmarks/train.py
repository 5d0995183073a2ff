"""python benchmarks/train.py [--alternations 5] [--json FILE]: our training loop against PEFT LoRA + Trainer.

With --profile it says instead on which operators our steps spend their time.

First both train 20 float32 steps from the same initial values on the same batches, and their losses must agree.
Then each measurement runs in a process of its own, ours and theirs in turn: GSM8K rows, SmolLM2-135M, rank 8,
batch 8, tokens without padding, seconds of the steps after the first two. Trainer has its default order, or, as
"grouped", the very batches that our length buckets make (more alike than its own group_by_length makes them).

The model's arithmetic, for the share of the machine's matrix-product rate: a token passes each weight of the blocks
twice (forward, and backward for the activations; frozen weights need no third product), a target token also the
output head twice; and each pair of a token and one it attends to (itself and those before it) takes part in two
products of attention forward and four backward. So
4 x (block weights x tokens + head weights x target tokens) + 12 x layers x heads x head size x pairs FLOP. The
adapter's own products, padding, and pairs that the mask hides are left out. The rate is measured after every step of a
run of its own, since it changes from one second to the next, and its time is taken off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

SKIPPED, CHECKED, PROFILED = 2, 20, 20
THEIRS = ("peft:float32:plain", "peft:bfloat16:plain", "peft:bfloat16:grouped")
OURS, SHARE = "ours:bfloat16:TABuv", "share:bfloat16:TABuv"
SETTINGS = (f"train.microbatch_tokens={common.PASS_TOKENS}", "train.compile=always")
"""Of ours when it is timed."""
WANTED = dict(zip(THEIRS, (2.6, 1.7, 1.25), strict=True))


def ours(dtype: str, tying: str, steps: int, *overrides: str) -> dict[str, Any]:
    """Our loop as train.py runs it, into a folder that is thrown away."""
    from tiedlora.data.batching import BatchSampler
    from tiedlora.records.run_folder import RunFolder
    from tiedlora.runs.session import RunSession
    from tiedlora.tasks import load_task
    from tiedlora.training.distributed import World
    from tiedlora.training.signals import StopSignal

    config = common.config(
        f"tying={tying}",
        f"train.dtype={dtype}",
        f"train.steps={steps}",
        "train.log_every=1",
        "train.validation_rows=1",
        "train.validate_every=0",
        *overrides,
    )
    prepared = RunSession(config, load_task(config.task), World())
    with tempfile.TemporaryDirectory() as scratch, StopSignal() as stop:
        folder = RunFolder(Path(scratch))
        progress, _ = prepared.train(folder, stop)
        lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    rows = [line for line in lines if "train/loss" in line]
    encoded = prepared.encoded["train"]
    sampler = BatchSampler([len(row) for row in encoded], config.train, config.seed)
    lengths = [len(encoded[number]) for step in range(SKIPPED + 1, steps + 1) for number in sampler.rows_of_step(step)]
    found = {
        "losses": [row["train/loss"] for row in rows],
        **_steady(rows),
        "target_share": progress.target_tokens / progress.tokens,
        "pairs": sum(length * (length + 1) // 2 for length in lengths),
        "peak": common.peak_memory(),
    }
    assert found["tokens"] == sum(lengths)
    return found


def _steady(rows: list[dict[str, Any]]) -> dict[str, float]:
    first, last = rows[SKIPPED - 1], rows[-1]
    return {
        "tokens": last["train/tokens"] - first["train/tokens"],
        "seconds": last["train/seconds"] - first["train/seconds"],
    }


def theirs(dtype: str, order: str, steps: int, *overrides: str) -> dict[str, Any]:
    """transformers' Trainer over PEFT's LoRA, on the same tokens."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from tiedlora.adapter import TiedAdapter
    from tiedlora.data.encoding import Encoder, BatchSampler, fit
    from tiedlora.runs import reuse

    config = common.config(f"train.dtype={dtype}", "tying=LoRA_qkv", *overrides)
    base = reuse.base(config, torch.device("cpu"))
    base.model.set_attn_implementation("sdpa")
    encoder = Encoder(base.tokenizer, config.task, config.model.context)
    examples = reuse.rows(config)[0]
    encoded = fit(encoder, examples["train"]).encoded
    size = config.train.batch_size
    if order == "plain":
        chosen = encoded
    else:
        ours = BatchSampler([len(row) for row in encoded], config.train, config.seed)
        chosen = [encoded[number] for step in range(1, steps + 1) for number in ours.rows_of_step(step)]
    adapter = TiedAdapter(config.tying, config.rank.r, config.rank.alpha, config.model.architecture, config.seed)
    model = common.peft_lora(base.model, adapter)
    pad, losses, marks = base.tokenizer.eos_token_id, [], []
    tokens = 0

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        nonlocal tokens
        tokens += sum(len(row["input_ids"]) for row in rows)
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

        return {
            "input_ids": padded("input_ids", pad),
            "labels": padded("labels", -100),
            "attention_mask": torch.tensor(
                [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
            ),
        }

    class Clock(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            # Batches are collated in this process, just before their step.
            marks.append((time.perf_counter(), tokens))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
            loss = super().compute_loss(*arguments, **keywords)
            losses.append(float(loss.detach()))
            return loss

    rows = [
        {"input_ids": [*row.prompt, *row.target], "labels": [-100] * len(row.prompt) + list(row.target)}
        for row in chosen
    ]
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=size,
            learning_rate=config.train.lr,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=config.seed,
            remove_unused_columns=False,
        )
        kind = InOrder if order != "plain" else Trainer
        trainer = kind(model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[Clock()])
        trainer.train()
    # The loader collates one batch ahead of the step: what a step used is known one batch later at the latest.
    lengths = [len(row["input_ids"]) for row in rows]
    used = sum(lengths[SKIPPED * size : steps * size]) if order != "plain" else marks[-1][1] - marks[SKIPPED - 1][1]
    return {
        "losses": losses,
        "tokens": used,
        "seconds": marks[-1][0] - marks[SKIPPED - 1][0],
        "peak": common.peak_memory(),
        "base": base,
        "model": model,
        "validation": examples["validation"],
    }


def arithmetic(run: dict[str, Any]) -> float:
    """FLOP of a run's timed steps (see the head of this file)."""
    from tiedlora.tying import target_shape

    a = common.config().model.architecture
    shapes = [target_shape(a, name) for name in ("q", "k", "v", "o", "gate", "up", "down")]
    blocks = a.layers * sum(d_in * d_out for d_in, d_out in shapes)
    weights = 4 * run["tokens"] * (blocks + a.vocabulary * a.hidden * run["target_share"])
    return float(weights + 12 * a.layers * a.heads * a.head_dim * run["pairs"])


def share(dtype: str, tying: str, steps: int, *overrides: str) -> dict[str, Any]:
    """Which part of the matrix-product rate our timed steps compute at, and the rate's median, FLOP/s."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ended, began, rates = [], [], []

    def measure_rate(*_: Any) -> None:
        ended.append(time.perf_counter())
        rates.append(common.matmul_rate(dtype, (2048, 576, 1536), 0.1))
        began.append(time.perf_counter())

    register_optimizer_step_post_hook(measure_rate)
    run = ours(dtype, tying, steps, *overrides)
    possible = sum(
        (ended[step] - began[step - 1]) * (rates[step - 1] + rates[step]) / 2 for step in range(SKIPPED, steps)
    )
    return {"share": arithmetic(run) / possible, "rate": statistics.median(rates[SKIPPED:])}


def child(what: str, steps: str, *overrides: str) -> None:
    who, dtype, how = what.split(":")
    found = {"ours": ours, "share": share, "peft": theirs}[who](dtype, how, int(steps), *overrides)
    print(json.dumps({key: found[key] for key in found if key not in ("base", "model", "validation")}))


def check() -> list[float]:
    """The two losses' largest relative difference over 20 float32 steps on identical batches of two."""
    small = ("train.batch_size=2",)
    a = common.measure(__file__, "ours:float32:LoRA_qkv", str(CHECKED), *small)["losses"]
    b = common.measure(__file__, "peft:float32:grouped", str(CHECKED), *small)["losses"]
    assert len(a) == len(b) == CHECKED
    worst = max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
    print(f"{CHECKED} float32 steps on identical batches: losses {a[0]:.4f} .. {a[-1]:.4f}, differ by {worst:.1e}")
    assert worst < 1e-4, "ours and theirs do not train the same: a comparison of their speed would mean nothing"
    return [worst]


def profile(steps: int) -> None:
    """Which operators our steps spend their time on, those left out that are not timed either."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    common.measure(__file__, OURS, str(steps), *SETTINGS)  # compiles, into torch's cache
    activities = [torch.profiler.ProfilerActivity.CPU]
    schedule = torch.profiler.schedule(wait=SKIPPED, warmup=0, active=steps - SKIPPED, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule) as recorded:
        register_optimizer_step_post_hook(lambda *_: recorded.step())
        ours("bfloat16", "TABuv", steps, *SETTINGS)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        [event.key[:60], f"{event.self_cpu_time_total / total:.1%}", f"{event.count // (steps - SKIPPED):,}"]
        for event in events[:PROFILED]
    ]
    print(common.table(["operator", "share of the time", "calls a step"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    parser.add_argument("--profile", action="store_true", help="where our steps spend their time, and nothing else")
    arguments = parser.parse_args()
    if arguments.profile:
        return profile(arguments.steps)
    worst = check()
    names = [OURS, *THEIRS]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    shares: list[dict[str, Any]] = []
    # The first compiles, into torch's cache: what the timed steps of the others find there.
    for alternation in range(arguments.alternations + 1):
        shares.append(common.measure(__file__, SHARE, str(arguments.steps), *SETTINGS))
        print(f"{alternation} {SHARE}: {shares[-1]['share']:.3f}", file=sys.stderr)
        for name in names if alternation else ():
            settings = SETTINGS if name == OURS else ()
            found[name].append(common.measure(__file__, name, str(arguments.steps), *settings))
            latest = found[name][-1]
            print(f"{alternation} {name}: {latest['tokens'] / latest['seconds']:.0f} tokens/s", file=sys.stderr)
    rows = []
    for name in names:
        speeds = [one["tokens"] / one["seconds"] for one in found[name]]
        ratios = [
            mine["tokens"] / mine["seconds"] / (one["tokens"] / one["seconds"])
            for mine, one in zip(found[OURS], found[name], strict=True)
        ]
        peak = statistics.median(one["peak"] for one in found[name])
        mine = statistics.median(one["peak"] for one in found[OURS])
        rows.append(
            [
                name,
                f"{statistics.median(speeds):.0f}",
                f"{peak / 1e9:.2f} GB",
                common.spread(ratios),
                f"{mine / peak:.2f}",
            ]
        )
    print(
        common.table(["what", "tokens/s", "peak memory", "ours is x times as fast", "ours uses x of its memory"], rows)
    )
    rate = statistics.median(one["rate"] for one in shares[1:])
    print(
        f"matrix products, bfloat16, (2048, 576) @ (576, 1536): {rate / 1e9:.0f} GFLOP/s; "
        f"ours computes at {common.spread([one['share'] for one in shares[1:]])} of it"
    )
    for name, wanted in WANTED.items():
        print(f"wanted against {name}: {wanted}x")
    common.write(arguments.json, {"worst": worst, "runs": found, "shares": shares[1:]})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
