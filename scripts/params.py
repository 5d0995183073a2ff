"""python scripts/params.py [model=llama2_7b] [rank=r8] [tying=TABuv]: trainable parameters of a configuration.

Without tying=, every option of conf/tying. From the architecture alone: no weights, no network. Any
override of train.py works, so `rank.r=5` and `tying.A.share=4` count too.
"""

import sys

from tiedlora import errors
from tiedlora.config import compose
from tiedlora.tying import lora_params, trainable_params


def main(overrides: list[str]) -> None:
    if not any(override.startswith("model=") for override in overrides):
        overrides = ["model=llama2_7b", *overrides]
    named = [override for override in overrides if override.startswith("tying=")]
    options = [None] if named else compose.options("tying")
    rows = []
    for option in options:
        chosen = compose.compose_config([*overrides, *([f"tying={option}"] if option else [])])
        rank, architecture = chosen.rank.r, chosen.model.architecture
        count = trainable_params(chosen.tying, rank, architecture)
        rows.append((count, chosen.tying.name, 100 * count / lora_params(rank, architecture)))
    shape = f"L={architecture.layers}, d={architecture.hidden}, rank {rank}"
    print(f"{chosen.model.name} ({shape}); share of LoRA is of L r (d_in + d_out) on the fused QKV\n")
    print(f"{'configuration':<14} {'trainable':>14} {'share of LoRA':>14}")
    for count, name, share in sorted(rows):
        print(f"{name:<14} {count:>14,} {share:>12.2f} %")


if __name__ == "__main__":
    with errors.exit_codes():
        main(sys.argv[1:])
