"""python benchmarks/scale.py [--json FILE]: time and memory of a training step against rank, depth, length, vocabulary.

It uses random Llama models of SmolLM2-135M's width (the values of the weights change neither time nor memory), TABuv,
bfloat16, and 8 rows of 128 tokens, half of them targets. Each line varies one of these. Each line is its own process.
Seconds are the median of 3 steps after a first one. Memory is what a step adds, at its peak, to the memory of the
loaded model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import common

USUAL = {"rank": 8, "layers": 30, "rows": 8, "length": 128, "vocabulary": 49_152}
VARIED = {
    "rank": (2, 8, 32, 128, 256),
    "layers": (8, 15, 30, 60),
    "length": (64, 128, 256, 512, 1024),
    "rows": (4, 8, 16, 32),
    "vocabulary": (49_152, 128_256, 256_000),
}


def child(sizes_json: str) -> None:
    # Imported here: the parent process does not need torch.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tiedlora.adapter import attach
    from tiedlora.data.batching import collate
    from tiedlora.data.encoding import Encoded
    from tiedlora.models import attention
    from tiedlora.models import device as devices
    from tiedlora.training.loss import target_loss

    sizes = json.loads(sizes_json)
    torch.manual_seed(0)
    settings = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=sizes["layers"],
        vocab_size=sizes["vocabulary"],
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # The rotary frequencies are not parameters: they are computed.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    attention.use(model)
    attached = attach(model.train(), "TABuv", sizes["rank"])
    half = sizes["length"] // 2
    draw = torch.randint(0, sizes["vocabulary"], (sizes["rows"], sizes["length"])).tolist()
    batch = collate([Encoded(tuple(row[:half]), tuple(row[half:])) for row in draw], 0)

    def step() -> float:
        started = time.perf_counter()
        target_loss(model, batch).backward()
        attached.adapter.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    # A first step of a tiny batch loads the kernels. Then the peak of memory is reset.
    target_loss(model, collate([Encoded((1, 2), (3, 4))], 0)).backward()
    devices.restart_peak_memory(devices.CPU)
    before = devices.peak_memory_bytes(devices.CPU)
    times = [step() for _ in range(4)]
    added = devices.peak_memory_bytes(devices.CPU) - before
    print(json.dumps({"seconds": statistics.median(times[1:]), "memory": added}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    arguments = parser.parse_args()
    figures: list[dict[str, Any]] = []
    rows = []
    for varied, values in VARIED.items():
        lines = []
        for value in values:
            sizes = {**USUAL, varied: value}
            lines.append({**sizes, **common.measure(__file__, json.dumps(sizes))})
            print(f"{varied} {value}: {lines[-1]['seconds']:.2f} s", file=sys.stderr)
        first = lines[0]
        rows += [
            [
                f"{varied} {line[varied]:,}",
                f"{line['seconds']:.2f}",
                f"{line['seconds'] / first['seconds']:.2f}",
                f"{line['memory'] / 1e6:.0f} MB",
                f"{line['memory'] / first['memory']:.2f}",
            ]
            for line in lines
        ]
        figures += [{"varied": varied, **line} for line in lines]
    print(common.table(["", "seconds a step", "x the first", "memory of a step", "x the first"], rows))
    common.write(arguments.json, {"lines": figures})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
