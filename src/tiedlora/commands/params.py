"""python scripts/params.py [model=llama2_7b] [rank=r8] [tying=TABuv] [budget=46080]: trainable parameters.

Without model=, it takes llama2_7b, the paper's. model.path=FOLDER and model.name=ORG/NAME are a model of your own: its
sizes are read from its config.json. Without tying=, it prints every option of conf/tying, with its learning rate and
the one that a search has found for the model, the task and the rank. It needs only the sizes: no weights, and no
network for an option of conf/model. It takes the overrides of train.py, such as `rank.r=5`, `tying.A.share=4` and
`'tying.layers=[0-9]'`. Methods of PEFT are listed with budget=N, which makes each configuration as large as its rank or
knob allows (about a minute).
"""

from dataclasses import dataclass
from pathlib import Path

from tiedlora.config import compose, explain, own_model
from tiedlora.config.identity import arm_of
from tiedlora.config.rates import NOT_SEARCHED, searched_lr
from tiedlora.config.schema import Config
from tiedlora.config.sizes import is_near, trainable_params
from tiedlora.errors import UserError, as_called
from tiedlora.other_methods import FULL
from tiedlora.tying import adapted_layers, lora_params


@dataclass(frozen=True)
class Size:
    """One line of the table."""

    name: str
    count: int
    share: float
    knob: str
    lr: float
    searched: float | None
    """The rate that a search has found for this model, task and rank; None without one."""


def main(overrides: list[str]) -> None:
    if {"-h", "--help"} & set(overrides):
        print(as_called(str(__doc__)))
        return
    if flag := next((word for word in overrides if word.startswith("-")), None):
        raise UserError(f"{flag:.80}: params has no flags but --help; give KEY=VALUE, such as rank=r8")
    overrides = own_model.with_option(overrides)
    if not any(override.startswith("model=") for override in overrides):
        overrides = ["model=llama2_7b", *overrides]
    has_budget = any(override.startswith("budget=") for override in overrides)
    chooses_tying = any(override.startswith(("tying=", "arm=")) for override in overrides)
    names = [
        name for name in explain.options("tying") if name not in ("peft", FULL) and (has_budget or "/" not in name)
    ]
    options = [[]] if chooses_tying else [[f"tying={name}"] for name in names]
    sizes, refused = [], []
    for option in options:
        try:
            config = compose.compose_config([*overrides, *option])
            sizes.append(size_of(config))
        except UserError as error:
            # A mistake in a word refuses every option. Then the error of the last one is shown.
            if not sizes and option == options[-1]:
                raise
            refused.append(f"{option[0].removeprefix('tying=')}: {error}")
    # The numbers of an option may be those of another model than the one that is named beside it.
    is_named = any(override.startswith(("model.path=", "model.name=")) for override in overrides)
    if is_named and config.model.source not in ("random", "architecture"):
        files = own_model.files_of(config.model, Path(config.cache))
        own_model.check(config.model, own_model.unloaded_model(config.model, files))
    architecture = config.model.architecture
    shape = f"L={architecture.layers}, d={architecture.hidden}"
    shape += f", budget {config.budget:,}" if config.budget else f", rank {config.rank.r}"
    print(f"{config.model.name} ({shape}); LoRA, the comparator, has L r (d_in + d_out) on the fused QKV")
    adapted = len(adapted_layers(config.tying, architecture))
    if adapted < architecture.layers and (chooses_tying or any("layers=" in override for override in overrides)):
        print(f"adapted: {adapted} of {architecture.layers} layers; LoRA has all of them")
    print()
    print(table(sizes, config.budget))
    for line in refused:
        print(f"not possible here: {line}")


def size_of(config: Config) -> Size:
    count = trainable_params(config)
    if count is None:
        raise UserError(f"tying.method={config.tying.method}: can be counted only on the loaded model")
    rank, knob = config.rank.r, config.tying.knob
    size = f"r={rank}" if config.tying.method is None else "none"
    if config.tying.method is not None and knob is not None and config.tying.resolved is not None:
        size = f"{knob}={config.tying.resolved[knob]}"
    assert config.train.lr is not None
    searched = searched_lr(config.model.name, config.task.name, arm_of(config).label, rank)
    share = 100 * count / lora_params(rank, config.model.architecture)
    return Size(config.tying.name, count, share, size, config.train.lr, searched)


def table(sizes: list[Size], budget: int | None) -> str:
    if budget is None:
        lines = [f"{'configuration':<14} {'trainable':>14} {'share of LoRA':>14}   {'train.lr':<8}  a search found"]
        lines += [
            f"{size.name:<14} {size.count:>14,} {size.share:>12.2f} %   {size.lr:<8g}  {rate_in_words(size)}"
            for size in sorted(sizes, key=by_count)
        ]
        return "\n".join(lines)
    lines = [f"{'configuration':<18} {'trainable':>14} {'off':>8}  size"]
    for size in sorted(sizes, key=lambda size: (abs(size.count - budget), size.name)):
        mark = "" if is_near(size.count, budget) else "   more than 5 % off"
        lines.append(f"{size.name:<18} {size.count:>14,} {100 * (size.count / budget - 1):>+7.1f}%  {size.knob}{mark}")
    return "\n".join(lines)


def rate_in_words(size: Size) -> str:
    return NOT_SEARCHED if size.searched is None else f"{size.searched:g}"


def by_count(size: Size) -> tuple[int, str]:
    return size.count, size.name
