"""python scripts/params.py [model=llama2_7b] [rank=r8] [tying=TABuv]: trainable parameters of a configuration.

Without tying=, it prints every option of conf/tying. It needs only the architecture, so no weights and no network. It
takes the overrides of train.py, such as `rank.r=5`, `tying.A.share=4` and `'tying.layers=[0-9]'`.
"""

import sys

from tiedlora import errors
from tiedlora.config import compose, explain
from tiedlora.tying import lora_params, trainable_params


def main(overrides: list[str]) -> None:
    if not any(override.startswith("model=") for override in overrides):
        overrides = ["model=llama2_7b", *overrides]
    chooses_tying = any(override.startswith("tying=") for override in overrides)
    options = [[]] if chooses_tying else [[f"tying={option}"] for option in explain.options("tying")]
    rows = []
    for option in options:
        config = compose.compose_config([*overrides, *option])
        rank, architecture = config.rank.r, config.model.architecture
        count = trainable_params(config.tying, rank, architecture)
        rows.append((count, config.tying.name, 100 * count / lora_params(rank, architecture)))
    shape = f"L={architecture.layers}, d={architecture.hidden}, rank {rank}"
    print(f"{config.model.name} ({shape}); LoRA, the comparator, has L r (d_in + d_out) on the fused QKV")
    if config.tying.layers is not None:
        print(f"adapted: {len(config.tying.layers)} of {architecture.layers} layers; LoRA has all of them")
    print()
    print(f"{'configuration':<14} {'trainable':>14} {'share of LoRA':>14}")
    for count, name, share in sorted(rows):
        print(f"{name:<14} {count:>14,} {share:>12.2f} %")


if __name__ == "__main__":
    with errors.exit_codes():
        print(__doc__) if {"-h", "--help"} & set(sys.argv[1:]) else main(sys.argv[1:])
