"""python benchmarks/score.py [--rows 200] [--alternations 5] [--dtype bfloat16]: scoring against generate.

Both write answers to the same GSM8K validation rows, with SmolLM2-135M and the same adapter (LoRA on q, k and v,
trained for 20 steps by this project and exported to PEFT's format). Decoding is greedy, and ends at the end-of-text
token, at "Question:" or at 256 tokens. Theirs is transformers' generate on the unmerged PEFT model at batch 16, with
prompts sorted by length. Ours is the scoring code of train.py, at score.batch_size=200. Loading is not timed, but
tokenising is. In float32 the outputs must be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from tiedlora.config.schema import Config

THEIR_BATCH, OUR_BATCH = 16, 200

# Imports inside functions: a measurement's memory contains only what it imports itself.


def config(dtype: str, *overrides: str) -> Config:
    return common.config("tying=LoRA_qkv", f"train.dtype={dtype}", f"score.batch_size={OUR_BATCH}", *overrides)


def train(folder: Path) -> None:
    """A short real training, so that the adapter changes the answers and the answers have ends."""
    import harness

    from tiedlora.export.peft import to_peft

    short = config("bfloat16", "train.steps=20", "train.validation_rows=1", "train.validate_every=0")
    session, _ = harness.train(short, folder / "run")
    session.attached.save_pretrained(folder / "ours")
    to_peft(session.attached.adapter, folder / "theirs", "smollm2")
    print("{}")


def ours(folder: Path, dtype: str, rows: int) -> dict[str, Any]:
    import harness

    from tiedlora.adapter import attach_adapter, load
    from tiedlora.scoring.split import Scorer
    from tiedlora.tasks import load_task

    run_config = config(dtype)
    base = harness.base_model(run_config)
    attached = attach_adapter(base.model, load(folder / "ours")[0])
    encoder = harness.encoder_of(run_config, base)
    examples = harness.validation_examples(run_config)[:rows]
    scorer = Scorer(attached, encoder, load_task(run_config.task), run_config, base.record)
    started = time.perf_counter()
    predictions = scorer.adapted_rows(examples, "ours")
    return {
        "seconds": time.perf_counter() - started,
        "tokens": sum(row.output_tokens for row in predictions),
        "outputs": [row.output for row in predictions],
        "peak": common.peak_memory(),
    }


def theirs(folder: Path, dtype: str, rows: int) -> dict[str, Any]:
    import baseline
    import harness
    from peft import PeftModel

    run_config = config(dtype)
    base = harness.base_model(run_config)
    base.model.set_attn_implementation("sdpa")
    model = PeftModel.from_pretrained(base.model, folder / "theirs").eval()
    encoder = harness.encoder_of(run_config, base)
    examples = harness.validation_examples(run_config)[:rows]
    started = time.perf_counter()
    prompts = [encoder.prompt(example.prompt) for example in examples]
    outputs, tokens = baseline.answers(model, base.tokenizer, prompts, run_config.task, THEIR_BATCH)
    return {
        "seconds": time.perf_counter() - started,
        "tokens": tokens,
        "outputs": outputs,
        "peak": common.peak_memory(),
    }


def child(who: str, folder: str, *settings: str) -> None:
    if who == "train":
        train(Path(folder))
    else:
        dtype, rows = settings
        print(json.dumps((ours if who == "ours" else theirs)(Path(folder), dtype, int(rows))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        common.measure(__file__, "train", folder)
        for alternation in range(1, arguments.alternations + 1):
            for who, measured in runs.items():
                measured.append(common.measure(__file__, who, folder, arguments.dtype, str(arguments.rows)))
                print(f"{alternation} {who}: {measured[-1]['seconds']:.1f} s", file=sys.stderr)
    same = sum(a == b for a, b in zip(runs["ours"][0]["outputs"], runs["theirs"][0]["outputs"], strict=True))
    rows = [
        [
            who,
            common.spread([run["seconds"] for run in measured]),
            f"{statistics.median(run['tokens'] / run['seconds'] for run in measured):.0f}",
            f"{statistics.median(run['peak'] for run in measured) / 1e9:.2f} GB",
        ]
        for who, measured in runs.items()
    ]
    print(common.table([f"{arguments.dtype}, {arguments.rows} rows", "seconds", "tokens/s", "peak memory"], rows))
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs["ours"], runs["theirs"], strict=True)]
    print(f"ours is {common.spread(ratios)} times as fast; {same} of {arguments.rows} outputs are the same")
    common.write(arguments.json, {"same": same, "runs": runs})
    if arguments.dtype == "float32" and same < arguments.rows:
        sys.exit("in float32 the outputs should be the same")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
