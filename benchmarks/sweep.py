"""python benchmarks/sweep.py [--alternations 1] [--dtype bfloat16]: eight configurations, ours and theirs.

Ours is one sweep, `python train.py --multirun tying=LoRA,TA,...,TABuv`, in one process. Theirs are eight processes of
PEFT LoRA + Trainer that do the same work from start to end: load SmolLM2-135M, tokenise GSM8K's training rows, train 6
steps of 8 rows, and answer 16 validation rows (transformers' generate, batch 16) in at most 64 tokens. PEFT lacks the
seven other configurations, so LoRA replaces them. Both train on the same 48 rows, each row once. Our batches are
grouped by length. Theirs are the same batches in bfloat16, and in float32 Trainer's default, random order.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

EIGHT = ("LoRA", "TA", "TB", "TAB", "Tuv", "TAuv", "TBuv", "TABuv")
STEPS, ROWS, NEW_TOKENS, BATCH = 6, 16, 64, 16


def settings(dtype: str) -> list[str]:
    return [
        f"train.dtype={dtype}",
        f"train.steps={STEPS}",
        "train.validation_rows=1",
        "train.validate_every=0",
        "train.log_every=100",
        f"train.microbatch_tokens={common.PASS_TOKENS}",
        f"task.rows.train={STEPS * common.BATCH}",
        f"task.rows.validation={ROWS}",
        f"task.max_new_tokens={NEW_TOKENS}",
        f"score.batch_size={BATCH}",
        "score.base=false",
    ]


def ours(dtype: str) -> float:
    """Seconds of the whole command."""
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, str(common.PROJECT / "train.py"), "--multirun", f"tying={','.join(EIGHT)}"]
        command += [f"{key}={value}" for key, value in common.defaults().items()] + settings(dtype)
        started = time.perf_counter()
        command.append(f"outputs={outputs}")
        sweep = subprocess.run(command, env=common.environment(), capture_output=True, text=True, cwd=common.PROJECT)
        seconds = time.perf_counter() - started
        results = len(list(Path(outputs).glob("*/result.json")))
        if sweep.returncode != 0 or results != len(EIGHT):
            sys.exit(
                f"the sweep ended with {sweep.returncode}, {results} results\n{sweep.stdout}\n{sweep.stderr[-2000:]}"
            )
    return seconds


def theirs(dtype: str) -> None:
    """One of the eight processes."""
    # Imported here: the parent process does not need torch.
    import baseline
    import harness

    config = common.config(*settings(dtype))
    order = "grouped" if dtype == "bfloat16" else "plain"
    trained = baseline.train(dtype, order, STEPS, 1, *settings(dtype))
    encoder = harness.encoder_of(config, trained.base)
    prompts = [encoder.prompt(example.prompt) for example in harness.validation_examples(config)[:ROWS]]
    baseline.answers(trained.model, trained.base.tokenizer, prompts, config.task, BATCH)
    print("{}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alternations", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    arguments = parser.parse_args()
    rows, figures = [], []
    for alternation in range(1, arguments.alternations + 1):
        our_seconds = ours(arguments.dtype)
        print(f"{alternation} ours: {our_seconds:.0f} s", file=sys.stderr)
        their_seconds: list[float] = []
        for name in EIGHT:
            their_seconds.append(common.measure(__file__, arguments.dtype)["whole_seconds"])
            print(f"{alternation} theirs, {name}: {their_seconds[-1]:.0f} s", file=sys.stderr)
        figures.append({"ours": our_seconds, "theirs": their_seconds})
        total = sum(their_seconds)
        speedup = f"{total / our_seconds:.2f}"
        rows.append([str(alternation), f"{our_seconds:.0f}", f"{total:.0f}", common.spread(their_seconds), speedup])
    header = [arguments.dtype, "our sweep, s", "their eight, s", "one of theirs, s", "ours is x times as fast"]
    print(common.table(header, rows))
    common.write(arguments.json, {"dtype": arguments.dtype, "alternations": figures})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        theirs(sys.argv[2])
    else:
        main()
