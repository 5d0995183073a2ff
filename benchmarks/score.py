"""python benchmarks/score.py [--rows 200] [--alternations 5] [--dtype bfloat16]: scoring against generate.

Both write answers to the same GSM8K validation rows with the same adapter (LoRA on q, k and v, trained 20 steps by this
project and exported to PEFT's format) on SmolLM2-135M, greedily, to the end-of-text token, "Question:" or 256 tokens.
Theirs is transformers' generate on the unmerged PEFT model at batch 16, prompts sorted by length. Ours is what train.py
scores with, at score.batch_size=200. Loading is not timed, tokenising is. In float32 the outputs must be the same.
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

BATCH, OURS = 16, 200


def config(dtype: str, *overrides: str) -> Any:
    return common.config("tying=LoRA_qkv", f"train.dtype={dtype}", f"score.batch_size={OURS}", *overrides)


def train(folder: Path) -> None:
    """A short real training, so that answers have ends and the adapter does something."""
    from tiedlora.records.run_folder import RunFolder
    from tiedlora.runs.session import RunSession
    from tiedlora.tasks import load_task
    from tiedlora.training.distributed import World
    from tiedlora.training.signals import StopSignal

    chosen = config("bfloat16", "train.steps=20", "train.validation_rows=1", "train.validate_every=0")
    prepared = RunSession(chosen, load_task(chosen.task), World())
    with StopSignal() as stop:
        prepared.train(RunFolder(folder / "run"), stop)
    from tiedlora.adapter import to_peft

    prepared.attached.save_pretrained(folder / "ours")
    to_peft(prepared.attached.adapter, folder / "theirs", "smollm2")
    print("{}")


def ours(folder: Path, dtype: str, rows: int) -> dict[str, Any]:
    import torch

    from tiedlora.adapter import attach_adapter, load
    from tiedlora.data.encoding import Encoder
    from tiedlora.runs import reuse
    from tiedlora.scoring import scoring
    from tiedlora.tasks import load_task

    chosen = config(dtype)
    base = reuse.base(chosen, torch.device("cpu"))
    attached = attach_adapter(base.model, load(folder / "ours")[0])
    examples = reuse.rows(chosen)[0]["validation"][:rows]
    encoder = Encoder(base.tokenizer, chosen.task, chosen.model.context)
    started = time.perf_counter()
    with scoring.adapted(attached, chosen) as model:
        found = scoring.predict(model, encoder, load_task(chosen.task), examples, chosen, "ours")
    return {
        "seconds": time.perf_counter() - started,
        "tokens": sum(row["output_tokens"] for row in found),
        "outputs": [row["output"] for row in found],
        "peak": common.peak_memory(),
    }


def theirs(folder: Path, dtype: str, rows: int) -> dict[str, Any]:
    import torch
    from peft import PeftModel

    from tiedlora.data.encoding import Encoder
    from tiedlora.runs import reuse

    chosen = config(dtype)
    base = reuse.base(chosen, torch.device("cpu"))
    base.model.set_attn_implementation("sdpa")
    model = PeftModel.from_pretrained(base.model, folder / "theirs").eval()
    encoder = Encoder(base.tokenizer, chosen.task, chosen.model.context)
    examples = reuse.rows(chosen)[0]["validation"][:rows]
    started = time.perf_counter()
    prompts = [encoder.prompt(example.prompt) for example in examples]
    outputs, tokens = common.answers(model, base.tokenizer, prompts, chosen.task, BATCH)
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
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        common.measure(__file__, "train", folder)
        for alternation in range(1, arguments.alternations + 1):
            for who, runs in found.items():
                runs.append(common.measure(__file__, who, folder, arguments.dtype, str(arguments.rows)))
                print(f"{alternation} {who}: {runs[-1]['seconds']:.1f} s", file=sys.stderr)
    same = sum(a == b for a, b in zip(found["ours"][0]["outputs"], found["theirs"][0]["outputs"], strict=True))
    rows = [
        [
            who,
            common.spread([run["seconds"] for run in runs]),
            f"{statistics.median(run['tokens'] / run['seconds'] for run in runs):.0f}",
            f"{statistics.median(run['peak'] for run in runs) / 1e9:.2f} GB",
        ]
        for who, runs in found.items()
    ]
    print(common.table([f"{arguments.dtype}, {arguments.rows} rows", "seconds", "tokens/s", "peak memory"], rows))
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(found["ours"], found["theirs"], strict=True)]
    print(f"ours is {common.spread(ratios)} times as fast; {same} of {arguments.rows} outputs are the same")
    common.write(arguments.json, {"same": same, "runs": found})
    if arguments.dtype == "float32" and same < arguments.rows:
        sys.exit("in float32 the outputs should be the same")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
