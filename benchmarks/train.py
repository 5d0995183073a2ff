"""python benchmarks/train.py [--alternations 5] [--model NAME] [--json FILE]: our loop against PEFT LoRA + Trainer.

With --profile, it only shows which operators take the time of our steps. --model takes any option of conf/model; the
targets are those of SmolLM2-135M.

First both train 20 float32 steps from the same initial values on the same batches, and their losses must agree. Then
each measurement runs in its own process, ours and theirs alternately, with GSM8K rows, SmolLM2-135M, rank 8 and batch
8. Tokens are counted without padding, and the first two steps are not timed. Trainer has its default order or, as
"grouped", exactly the batches of our length buckets (whose rows are more similar than those of its group_by_length).

The share of the machine's matrix-product rate needs the model's arithmetic: tiedlora.models.arithmetic.training_flop.
It leaves out the products of the adapter, padding, and pairs that the mask hides. The rate is measured after every step
of a separate run, because it changes from one second to the next. The time of these measurements is subtracted.
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
"""Steps that are not timed, steps whose losses are compared, operators that --profile prints."""
THEIRS = ("peft:float32:plain", "peft:bfloat16:plain", "peft:bfloat16:grouped", "tied:bfloat16:grouped")
OURS, SHARE = "ours:bfloat16:TABuv", "share:bfloat16:TABuv"
SETTINGS = (f"train.microbatch_tokens={common.PASS_TOKENS}", "train.compile=always")
"""The overrides of our timed runs."""


def ours(dtype: str, tying: str, steps: int, *overrides: str) -> dict[str, Any]:
    """Our loop as train.py runs it, in a temporary folder."""
    # Imported here, as in `theirs`: a measurement's memory contains only what it imports itself.
    import harness

    from tiedlora.data.batching import BatchSampler
    from tiedlora.models.arithmetic import training_flop
    from tiedlora.models.device import peak_memory_bytes
    from tiedlora.records.rows import read_metrics

    config = common.config(
        f"tying={tying}",
        f"train.dtype={dtype}",
        f"train.steps={steps}",
        "train.log_every=1",
        "train.validation_rows=1",
        "train.validate_every=0",
        *overrides,
    )
    with tempfile.TemporaryDirectory() as folder:
        trained = harness.train(config, Path(folder))
        metrics = [row.values for row in read_metrics(Path(folder) / "metrics.jsonl")]
    rows = [values for values in metrics if "train/loss" in values]
    first_timed, last = rows[SKIPPED - 1], rows[-1]
    encoded = trained.loaded.rows["train"].encoded
    sampler = BatchSampler([len(row) for row in encoded], config.train, config.seed)
    timed = [encoded[number] for step in range(SKIPPED + 1, steps + 1) for number in sampler.rows_of_step(step)]
    tokens = last["train/tokens"] - first_timed["train/tokens"]
    assert tokens == sum(map(len, timed))
    a = config.model.architecture
    return {
        "losses": [values["train/loss"] for values in rows],
        "tokens": tokens,
        "seconds": last["train/seconds"] - first_timed["train/seconds"],
        "flop": sum(training_flop(a, len(row), len(row.target)) for row in timed),
        "peak": peak_memory_bytes(trained.loaded.device),
    }


def theirs(dtype: str, order: str, steps: int, *overrides: str) -> dict[str, Any]:
    """transformers' Trainer over PEFT's LoRA, on the same tokens."""
    import baseline

    return baseline.train(dtype, order, steps, SKIPPED, *overrides).figures()


def tied(dtype: str, order: str, steps: int, *overrides: str) -> dict[str, Any]:
    """The same Trainer over TABuv as a method of PEFT: what our users of TiedLoraConfig have."""
    import baseline

    return baseline.train(dtype, order, steps, SKIPPED, *overrides, method="tied").figures()


class RateMeter:
    """After every optimizer step, measures the rate of matrix products, and stores the times of the measurement.

    Args:
        shape: of the product, as common.matmul_rate.
    """

    def __init__(self, dtype: str, shape: tuple[int, int, int]) -> None:
        self.dtype, self.shape = dtype, shape
        self.began: list[float] = []
        self.ended: list[float] = []
        self.rates: list[float] = []

    def __call__(self, *_: Any) -> None:
        self.began.append(time.perf_counter())
        self.rates.append(common.matmul_rate(self.dtype, self.shape, 0.1))
        self.ended.append(time.perf_counter())

    def possible_flop(self, steps: range) -> float:
        """FLOP that the machine could have computed during those steps."""
        return sum(
            (self.began[step] - self.ended[step - 1]) * (self.rates[step - 1] + self.rates[step]) / 2 for step in steps
        )


def share(dtype: str, tying: str, steps: int, *overrides: str) -> dict[str, Any]:
    """The share of the matrix-product rate that our timed steps reach, and the median of the rate in FLOP/s."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    a = common.config(*overrides).model.architecture
    meter = RateMeter(dtype, shape := (common.PASS_TOKENS, a.hidden, a.intermediate))
    register_optimizer_step_post_hook(meter)
    run = ours(dtype, tying, steps, *overrides)
    possible = meter.possible_flop(range(SKIPPED, steps))
    rate = statistics.median(meter.rates[SKIPPED:])
    return {"share": run["flop"] / possible, "rate": rate, "shape": shape}


def child(what: str, steps: str, *overrides: str) -> None:
    who, dtype, variant = what.split(":")
    measure = {"ours": ours, "share": share, "peft": theirs, "tied": tied}[who]
    print(json.dumps(measure(dtype, variant, int(steps), *overrides)))


def check(model: str) -> float:
    """The two losses' largest relative difference over 20 float32 steps on identical batches of two."""
    small = ("train.batch_size=2", model)
    a = common.measure(__file__, "ours:float32:LoRA_qkv", str(CHECKED), *small)["losses"]
    b = common.measure(__file__, "peft:float32:grouped", str(CHECKED), *small)["losses"]
    assert len(a) == len(b) == CHECKED
    worst = max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
    print(f"{CHECKED} float32 steps on identical batches: losses {a[0]:.4f} .. {a[-1]:.4f}, differ by {worst:.1e}")
    assert worst < 1e-4, "ours and theirs do not train the same: a comparison of their speed would mean nothing"
    return worst


def profile(steps: int, model: str) -> None:
    """Print which operators take the time of our timed steps."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    common.measure(__file__, OURS, str(steps), *SETTINGS, model)  # compiles, into torch's cache
    activities = [torch.profiler.ProfilerActivity.CPU]
    schedule = torch.profiler.schedule(wait=SKIPPED, warmup=0, active=steps - SKIPPED, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule) as recorded:
        register_optimizer_step_post_hook(lambda *_: recorded.step())
        ours("bfloat16", "TABuv", steps, *SETTINGS, model)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        [event.key[:60], f"{event.self_cpu_time_total / total:.1%}", f"{event.count // (steps - SKIPPED):,}"]
        for event in events[:PROFILED]
    ]
    print(common.table(["operator", "share of the time", "calls a step"], rows))


def compare(steps: int, alternations: int, model: str) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """(name -> its measurements, measurements of the share). Ours and theirs alternate."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, *THEIRS)}
    shares: list[dict[str, Any]] = []
    # The first measurement fills torch's compile cache for the others.
    for alternation in range(alternations + 1):
        shares.append(common.measure(__file__, SHARE, str(steps), *SETTINGS, model))
        print(f"{alternation} {SHARE}: {shares[-1]['share']:.3f}", file=sys.stderr)
        for name in runs if alternation else ():
            settings = SETTINGS if name == OURS else ()
            latest = common.measure(__file__, name, str(steps), *settings, model)
            runs[name].append(latest)
            print(f"{alternation} {name}: {_speed(latest):.0f} tokens/s", file=sys.stderr)
    return runs, shares[1:]


def _speed(run: dict[str, Any]) -> float:
    """Tokens per second."""
    return float(run["tokens"] / run["seconds"])


def print_comparison(runs: dict[str, list[dict[str, Any]]], shares: list[dict[str, Any]]) -> None:
    rows = []
    our_peak = statistics.median(run["peak"] for run in runs[OURS])
    for name, measured in runs.items():
        speedups = [_speed(our_run) / _speed(run) for our_run, run in zip(runs[OURS], measured, strict=True)]
        peak = statistics.median(run["peak"] for run in measured)
        speed = statistics.median(map(_speed, measured))
        rows.append([name, f"{speed:.0f}", f"{peak / 1e9:.2f} GB", common.spread(speedups), f"{our_peak / peak:.2f}"])
    header = ["what", "tokens/s", "peak memory", "ours is x times as fast", "ours uses x of its memory"]
    print(common.table(header, rows))
    rate = statistics.median(measured["rate"] for measured in shares)
    tokens, hidden, width = shares[0]["shape"]
    print(
        f"matrix products, bfloat16, ({tokens}, {hidden}) @ ({hidden}, {width}): {rate / 1e9:.0f} GFLOP/s; "
        f"ours computes at {common.spread([measured['share'] for measured in shares])} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--steps", type=int, default=14, help=f"of each measurement; {SKIPPED} are not timed")
    parser.add_argument("--model", default=common.MODEL, help="an option of conf/model; default: %(default)s")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    parser.add_argument("--profile", action="store_true", help="show which operators take our time, and nothing else")
    arguments = parser.parse_args()
    if arguments.steps <= SKIPPED or arguments.alternations < 1:
        parser.error(f"--steps must be more than {SKIPPED}, and --alternations at least 1")
    model = f"model={arguments.model}"
    if arguments.profile:
        return profile(arguments.steps, model)
    worst = check(model)
    runs, shares = compare(arguments.steps, arguments.alternations, model)
    print_comparison(runs, shares)
    common.write(arguments.json, {"worst": [worst], "runs": runs, "shares": shares})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
