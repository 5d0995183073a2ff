"""What a tied adapter trains, what it shares, where it starts, and how many numbers that is.

Pure arithmetic: no torch, no files. The formula (Tied-LoRA, arXiv 2311.09578), for layer l of L with
frozen weight W_l (d_out x d_in), is

    z = W_l x + s * diag(v_l) B diag(u_l) A x        A: r x d_in   B: d_out x r   u_l: r   v_l: d_out
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Union

from tiedlora.errors import UserError

RANDOM_INITS = ("uniform", "normal")
ALL_LAYERS = "all"


@dataclass
class Part:
    """One of A, B, u, v."""

    trained: bool = True
    """Whether the optimizer moves it."""
    init: Union[float, str] = 1.0
    """`uniform` = U(-1/sqrt(n), 1/sqrt(n)), n the last dimension; `normal` = N(0, 1); or a constant."""


@dataclass
class Factor(Part):
    """A or B, which layers can share. u and v always belong to one layer."""

    share: Union[int, str] = ALL_LAYERS
    """How many consecutive layers share one factor: `all` (tied), 1 (untied), or any n between."""


@dataclass
class Tying:
    """A whole specification: the eight of the paper and everything around them."""

    name: str = field(default="custom", metadata={"execution": True})
    """What tables call it. It does not change the run's identity."""
    A: Factor = field(default_factory=lambda: Factor(init="uniform"))
    B: Factor = field(default_factory=lambda: Factor(init=0.0))
    u: Part = field(default_factory=Part)
    v: Part = field(default_factory=Part)
    targets: list[str] = field(default_factory=lambda: ["qkv"])
    """The adapted projections: qkv (fused, as the paper does), q, k, v, o, gate, up, down."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input while training."""
    suggested_lr: float = field(default=1e-2, metadata={"execution": True})
    """The learning rate that train.lr takes when it is null: one rate cannot serve eight configurations."""


@dataclass
class Layout:
    """Where a causal language model keeps its projections, by module path."""

    layers: str = ""
    """Path of the list of layers inside the model; empty means the family's own layout."""
    sites: dict[str, list[str]] = field(default_factory=dict)
    """Target -> module path inside a layer, three of them where qkv is three modules; `path:q` is the q part of a
    fused module that computes [Q; K; V]."""
    interleaved: bool = False
    """A fused module's outputs go head by head, [q_1; k_1; v_1; q_2; ...]."""
    transposed: bool = False
    """Weights are d_in x d_out (transformers' Conv1D) instead of d_out x d_in."""


@dataclass
class Architecture:
    """The numbers of a base model that decide every shape here."""

    family: str = "llama"
    """The key of adapter/architectures.py, which is transformers' `model_type`."""
    layers: int = 0
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    intermediate: int = 0
    vocabulary: int = 0
    layout: Layout = field(default_factory=Layout, metadata={"neutral": Layout()})
    """By hand, for a family that adapter/architectures.py does not know."""


def target_shape(architecture: Architecture, target: str) -> tuple[int, int]:
    """(d_in, d_out) of one adapted projection of one layer.

    Raises:
        UserError: `target` is not a projection this project knows.
    """
    a = architecture
    d_q, d_kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes = {
        "qkv": (a.hidden, d_q + 2 * d_kv),
        "q": (a.hidden, d_q),
        "k": (a.hidden, d_kv),
        "v": (a.hidden, d_kv),
        "o": (d_q, a.hidden),
        "gate": (a.hidden, a.intermediate),
        "up": (a.hidden, a.intermediate),
        "down": (a.intermediate, a.hidden),
    }
    if target not in shapes:
        raise UserError(f"tying.targets: '{target}' is not a projection; choose from {', '.join(shapes)}")
    return shapes[target]


def layers_per_group(share: int | str, layers: int) -> int:
    """How many consecutive layers hold one factor (the last group may hold fewer)."""
    return layers if share == ALL_LAYERS else min(int(share), layers)


def groups(share: int | str, layers: int) -> int:
    """How many separate factors a model of `layers` layers has: ceil(layers / n)."""
    return math.ceil(layers / layers_per_group(share, layers))


@dataclass(frozen=True)
class Sizes:
    """The numbers that decide the shape of one part for one target, all layers together."""

    groups: int
    """Separate factors: ceil(layers / layers that share one)."""
    layers: int
    rank: int
    d_in: int
    d_out: int


@dataclass(frozen=True)
class PartTraits:
    """What sets one part apart from the others. Everything that depends on the part's letter stands here."""

    shape: Callable[[Sizes], tuple[int, ...]]
    is_shared: bool
    """Whether layers can share it (then it is a `Factor`); otherwise every layer has its own."""
    decays: bool
    """Whether weight decay may apply: it would pull towards 0 what starts at 1."""
    default_init: float | str
    """Its initial value where another part starts at zero."""
    zero_start_order: int | None
    """By default the trained part with the lowest number starts at zero; None never does."""
    neutral: float | None = None
    """A frozen part that equals this changes nothing: it is neither created nor stored."""


PARTS: dict[str, PartTraits] = {
    "A": PartTraits(lambda s: (s.groups, s.rank, s.d_in), True, True, "uniform", zero_start_order=3),
    "B": PartTraits(lambda s: (s.groups, s.d_out, s.rank), True, True, "uniform", zero_start_order=1),
    "u": PartTraits(lambda s: (s.layers, s.rank), False, False, 1.0, zero_start_order=None, neutral=1.0),
    "v": PartTraits(lambda s: (s.layers, s.d_out), False, False, 1.0, zero_start_order=2, neutral=1.0),
}
"""The parts of an adapter by name. A part's value is the attribute of that name of `Tying`."""


def part_of(parameter_name: str) -> str:
    """The part that a parameter of an adapter is: `qkv.A` -> `A`."""
    return parameter_name.rpartition(".")[2]


def part_shape(tying: Tying, part: str, rank: int, architecture: Architecture, target: str) -> tuple[int, ...]:
    """The shape of one part for one target, all layers together.

    A: (groups, r, d_in)   B: (groups, d_out, r)   u: (L, r)   v: (L, d_out)

    Raises:
        UserError: `target` is not a projection this project knows.
    """
    d_in, d_out = target_shape(architecture, target)
    layers, specification = architecture.layers, getattr(tying, part)
    count = groups(specification.share, layers) if isinstance(specification, Factor) else layers
    return PARTS[part].shape(Sizes(count, layers, rank, d_in, d_out))


def trainable_params(tying: Tying, rank: int, architecture: Architecture) -> int:
    """How many numbers the optimizer moves (docs/method.md has the table of the eight configurations)."""
    return sum(
        math.prod(part_shape(tying, part, rank, architecture, target))
        for target in tying.targets
        for part in PARTS
        if getattr(tying, part).trained
    )


def lora_params(rank: int, architecture: Architecture) -> int:
    """Trainable parameters of the paper's LoRA at this rank, L r (d_in + d_out) on the fused QKV.

    Every "share of LoRA" in this project is a share of this number.
    """
    d_in, d_out = target_shape(architecture, "qkv")
    return architecture.layers * rank * (d_in + d_out)


def nearest_lora_rank(trainable: int, architecture: Architecture) -> int:
    """The rank (at least 1) whose LoRA trains the number of parameters nearest to `trainable`; of two, the lower."""
    below = max(1, trainable // lora_params(1, architecture))
    return min(below, below + 1, key=lambda rank: abs(lora_params(rank, architecture) - trainable))


def is_stored(tying: Tying, part: str) -> bool:
    """Whether a part exists as numbers: a frozen one that changes nothing does not."""
    specification, neutral = getattr(tying, part), PARTS[part].neutral
    return bool(specification.trained or neutral is None or specification.init != neutral)


def label(tying: Tying) -> str:
    """The paper's name of a specification, or `custom`. It depends on what the specification means alone."""
    trained = [part for part in PARTS if getattr(tying, part).trained]
    if (
        ("u" in trained) != ("v" in trained)
        or tying.dropout
        or any(getattr(tying, part).init != init for part, init in default_inits(trained).items())
    ):
        return "custom"
    if (tying.A.share, tying.B.share) == (1, 1) and trained == ["A", "B"]:
        return {("qkv",): "LoRA", ("q", "k", "v"): "LoRA_qkv"}.get(tuple(tying.targets), "custom")
    if (tying.A.share, tying.B.share) == (ALL_LAYERS, ALL_LAYERS) and tying.targets == ["qkv"]:
        return "T" + "".join(trained)
    return "custom"


def default_inits(trained: list[str]) -> dict[str, float | str]:
    """The initial values of the eight configurations (docs/method.md): one trained part starts at zero."""
    inits = {name: traits.default_init for name, traits in PARTS.items()}
    starts = {name: order for name in trained if (order := PARTS[name].zero_start_order) is not None}
    if starts:
        inits[min(starts, key=lambda name: starts[name])] = 0.0
    return inits


NAMES = ("LoRA", "TA", "TB", "TAB", "Tuv", "TAuv", "TBuv", "TABuv")


def named(name: str) -> Tying:
    """One of the paper's eight specifications, as conf/tying/ has it.

    Raises:
        UserError: naming the eight.
    """
    if name not in NAMES:
        raise UserError(f"tying={name}: is not one of {', '.join(NAMES)}; for another, build a tiedlora.Tying")
    trained = ["A", "B"] if name == "LoRA" else [part for part in PARTS if part in name[1:]]
    inits, share = default_inits(trained), 1 if name == "LoRA" else ALL_LAYERS
    return Tying(
        name=name,
        A=Factor("A" in trained, inits["A"], share),
        B=Factor("B" in trained, inits["B"], share),
        u=Part("u" in trained, inits["u"]),
        v=Part("v" in trained, inits["v"]),
    )


def check(tying: Tying, architecture: Architecture | None = None) -> None:
    """Refuse a specification that cannot train from the base model.

    Exactly one of A, B, u, v starts at zero and is trained: none, and the run starts off the base;
    zero but frozen, and nothing ever changes; two, and no part ever gets a gradient.

    Raises:
        UserError: naming the key under `tying.` that breaks the rule.
    """
    for name in PARTS:
        _check_part(name, getattr(tying, name))
    zeros = [name for name in PARTS if getattr(tying, name).init == 0.0]
    if not zeros:
        raise UserError(
            "tying: no part starts at zero, so the run would start off the base model; "
            "give exactly one trained part of A, B, u, v init=0 (usually B)"
        )
    if len(zeros) > 1:
        raise UserError(
            f"tying: {' and '.join(zeros)} both start at zero, so no part would ever get a gradient; "
            "give exactly one trained part init=0"
        )
    if not getattr(tying, zeros[0]).trained:
        raise UserError(
            f"tying.{zeros[0]}: starts at zero and is frozen, so the update would stay zero for ever; "
            f"set tying.{zeros[0]}.trained=true or give it another init"
        )
    if not 0.0 <= tying.dropout < 1.0:
        raise UserError(f"tying.dropout={tying.dropout}: must be in [0, 1)")
    if not 0.0 < tying.suggested_lr < math.inf:
        raise UserError(f"tying.suggested_lr={tying.suggested_lr}: must be a positive number")
    _check_targets(tying.targets, architecture or Architecture(layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1))


def _check_part(name: str, part: Part) -> None:
    if isinstance(part.init, str):
        if part.init not in RANDOM_INITS:
            raise UserError(f"tying.{name}.init={part.init}: choose {', '.join(RANDOM_INITS)} or a number")
    elif not abs(part.init) <= 1e6:
        raise UserError(f"tying.{name}.init={part.init}: must be a finite number, from -1e6 to 1e6")
    if isinstance(part, Factor):
        share: Any = part.share
        if share != ALL_LAYERS and (not isinstance(share, int) or isinstance(share, bool) or share < 1):
            raise UserError(f"tying.{name}.share={share}: choose all (tied) or how many layers share it (1 = untied)")


def _check_targets(targets: list[str], architecture: Architecture) -> None:
    if not targets:
        raise UserError("tying.targets: is empty; name at least one projection, usually [qkv]")
    for target in targets:
        # OmegaConf lets a list through where a text belongs.
        if not isinstance(target, str):
            raise UserError(f"tying.targets={targets}: must be a list of names")
        target_shape(architecture, target)
    overlap = {"q", "k", "v"} & set(targets) if "qkv" in targets else set()
    if len(set(targets)) != len(targets) or overlap:
        raise UserError(f"tying.targets={targets}: a projection is adapted twice; qkv holds q, k and v already")
