"""python benchmarks/score.py [--rows 200] [--alternations 5] [--dtype bfloat16] [--ways ours,generate,...]: scoring.

All ways write answers to the same GSM8K validation rows, with SmolLM2-135M and the same adapter (LoRA on q, k and v,
trained for 20 steps by this project and exported to PEFT's format). Decoding is greedy, and ends at the end-of-text
token, at "Question:" or at 256 tokens. Loading is not timed, but tokenising is. The ways:

- ours: the scoring code of train.py, at score.batch_size=200;
- generate: transformers' generate on the unmerged PEFT model at batch 16, with prompts sorted by length;
- generate_batch: its continuous batching, at most 64 rows at once. It knows no stop strings, so it writes beyond them.

A CPU second is a second of one core. It also counts if other programs use the machine. In float32 the outputs of ours
and of generate must be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from tiedlora.config.schema import Config
    from tiedlora.data.encoding import Encoder
    from tiedlora.models.base_model import BaseModel
    from tiedlora.tasks import Example

THEIR_BATCH, THEIR_CONTINUOUS_BATCH, OUR_BATCH = 16, 64, 200

# Imports inside functions: a measurement's memory contains only what it imports itself.


def config(dtype: str, *overrides: str) -> Config:
    return common.config("tying=LoRA_qkv", f"train.dtype={dtype}", f"score.batch_size={OUR_BATCH}", *overrides)


def train(folder: Path, *overrides: str) -> None:
    """A short real training, so that the adapter changes the answers and the answers have ends."""
    import harness

    from tiedlora.adapter import Attached
    from tiedlora.export.folder import to_peft

    short = ("train.steps=20", "train.validation_rows=1", "train.validate_every=0")
    arm = harness.train(config("bfloat16", *short, *overrides), folder / "run").loaded.arm
    assert isinstance(arm, Attached)
    arm.save_pretrained(folder / "ours")
    to_peft(arm.adapter, folder / "theirs", "base")


def ours(
    folder: Path, run_config: Config, base: BaseModel, encoder: Encoder, examples: list[Example]
) -> tuple[list[str], int]:
    from tiedlora.adapter import attach_adapter, load
    from tiedlora.scoring.split import Scorer
    from tiedlora.tasks import load_task

    attached = attach_adapter(base.model, load(folder / "ours")[0])
    scorer = Scorer(attached, encoder, load_task(run_config.task), run_config, base.record)
    rows = scorer.rows(examples, "ours", "answers")
    return [row.output for row in rows], sum(row.output_tokens for row in rows)


def theirs(
    folder: Path, run_config: Config, base: BaseModel, encoder: Encoder, examples: list[Example], *, continuous: bool
) -> tuple[list[str], int]:
    import baseline
    from peft import PeftModel

    base.model.set_attn_implementation("sdpa")
    model = PeftModel.from_pretrained(base.model, folder / "theirs").eval()
    prompts = [encoder.prompt(example.prompt) for example in examples]
    if continuous:
        inner = model.get_base_model()
        return baseline.batch_answers(inner, base.tokenizer, prompts, run_config.task, THEIR_CONTINUOUS_BATCH)
    return baseline.answers(model, base.tokenizer, prompts, run_config.task, THEIR_BATCH)


WAYS: dict[str, Callable[..., tuple[list[str], int]]] = {
    "ours": ours,
    "generate": partial(theirs, continuous=False),
    "generate_batch": partial(theirs, continuous=True),
}


def measure(way: str, folder: Path, dtype: str, rows: int, *overrides: str) -> dict[str, Any]:
    """The time of one way, its outputs, their tokens, and the peak of memory."""
    import harness

    from tiedlora.models.device import peak_memory_bytes

    run_config = config(dtype, *overrides)
    base = harness.base_model(run_config)
    device = base.model.device
    encoder = harness.encoder_of(run_config, base)
    examples = harness.validation_examples(run_config)[:rows]
    started, started_cpu = time.perf_counter(), time.process_time()
    outputs, tokens = WAYS[way](folder, run_config, base, encoder, examples)
    harness.wait_for(device)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - started_cpu,
        "tokens": tokens,
        "outputs": outputs,
        "peak": peak_memory_bytes(device),
    }


def child(who: str, folder: str, *settings: str) -> None:
    if who == "train":
        train(Path(folder), *settings)
        print("{}")
    else:
        dtype, rows, *overrides = settings
        print(json.dumps(measure(who, Path(folder), dtype, int(rows), *overrides)))


def print_comparison(runs: dict[str, list[dict[str, Any]]], title: str) -> dict[str, int]:
    """Print one row for each way. Returns how many outputs of each way are those of the first."""
    first = next(iter(runs.values()))
    same, rows = {}, []
    for way, measured in runs.items():
        same[way] = sum(a == b for a, b in zip(first[0]["outputs"], measured[0]["outputs"], strict=True))
        ratios = [run["seconds"] / own["seconds"] for run, own in zip(measured, first, strict=True)]
        rows.append(
            [
                way,
                common.spread([run["seconds"] for run in measured]),
                common.spread([run["tokens"] / run["seconds"] for run in measured]),
                common.spread([run["tokens"] / run["cpu_seconds"] for run in measured]),
                f"{statistics.median(run['peak'] for run in measured) / 1e9:.2f} GB",
                common.spread(ratios),
                f"{same[way]} of {len(first[0]['outputs'])}",
            ]
        )
    header = [title, "seconds", "tokens/s", "tokens a CPU second", "peak memory"]
    print(common.table([*header, f"x the time of {next(iter(runs))}", "the same outputs"], rows))
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--ways", default="ours,generate", help=f"some of {','.join(WAYS)}; the first is compared to")
    parser.add_argument("--threads", type=int, help="threads of torch; by default torch decides")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as task.max_new_tokens=128")
    arguments = parser.parse_args()
    if unknown := set(arguments.ways.split(",")) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))}; choose from {', '.join(WAYS)}")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in arguments.ways.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        common.measure(__file__, "train", folder, *arguments.overrides, threads=arguments.threads)
        words = [folder, arguments.dtype, str(arguments.rows), *arguments.overrides]
        for alternation in range(1, arguments.alternations + 1):
            for way, measured in runs.items():
                measured.append(common.measure(__file__, way, *words, threads=arguments.threads))
                print(f"{alternation} {way}: {measured[-1]['seconds']:.1f} s", file=sys.stderr)
    same = print_comparison(runs, f"{arguments.dtype}, {arguments.rows} rows")
    common.write(arguments.json, {"same": same, "runs": runs})
    if arguments.dtype == "float32" and {"ours", "generate"} <= set(runs) and len({same["ours"], same["generate"]}) > 1:
        sys.exit("in float32 the outputs should be the same")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
