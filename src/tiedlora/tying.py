"""What a tied adapter trains, what its layers share, its initial values, its number of parameters, and what is refused.

No torch: this is arithmetic, and the named arms of conf/tying/. The formula (Tied-LoRA, arXiv 2311.09578) for layer l
of L, with the frozen weight W_l (d_out x d_in), is

    z = W_l x + s * diag(v_l) B diag(u_l) A x        A: r x d_in   B: d_out x r   u_l: r   v_l: d_out

A tying with several terms adds up such updates, for example one that layers share and one of each layer's own.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, PlainValidator

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.keys import CHECKED, EXECUTION, Name, Number, Text, Whole, from_person, is_count, neutral
from tiedlora.places import CONF

Scaling = Literal["standard", "rslora"]
SCALINGS = get_args(Scaling)
"""How s follows from alpha and the rank; see `scale`."""
ALL_LAYERS = "all"
RANDOM_INITS = ("uniform", "normal")
NAMES = ("LoRA", "TA", "TB", "TAB", "Tuv", "TAuv", "TBuv", "TABuv")
"""The paper's eight configurations."""
OTHER_NAMES = ("TABuv_b0", "TBuv_b0", "LoRA_qkv", "ShareLoRA", "ShareLoRA_B", "RaSA", "TAuv_LoRA1")
"""The other named arms. Each name here and in NAMES is a file of conf/tying/, and may begin a run's id. A file of your
own is an option, and no name of an id: a later edit of it must not rename runs."""
RENAMED = {"TABuv_v0": "TABuv_v0 is TABuv now, and the start with B = 0 and v = 1 is TABuv_b0"}
"""An earlier name -> what a person who writes it must know."""
LORA_ON_LAYERS = re.compile(r"LoRA_l([1-9]\d{0,2})", re.ASCII)
"""The name of LoRA on so many evenly spaced layers. At rank 1 it is LoRA's curve below rank 1 (docs/statistics.md)."""
MOST_LAYERS = 10_000
"""Upper bound of a model's layers."""
Rate = Annotated[Number, Field(ge=0, le=1_000_000)]
"""A factor on the learning rate."""


def _start(value: Any) -> Any:
    if isinstance(value, str):
        if value not in RANDOM_INITS:
            raise ValueError(f"choose {', '.join(RANDOM_INITS)} or a number")
    elif not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= 1e6:
        raise ValueError(f"choose {', '.join(RANDOM_INITS)} or a finite number, from -1e6 to 1e6")
    return value


def _share(value: Any) -> Any:
    if value != ALL_LAYERS and not is_count(value):
        raise ValueError("choose all (tied) or how many layers share it (1 = untied)")
    return value


@dataclass
class Part:
    """One of A, B, u, v."""

    trained: bool = True
    """Whether the optimizer changes it."""
    init: Annotated[float | str, PlainValidator(_start)] = 1.0
    """`uniform` = U(-1/sqrt(n), 1/sqrt(n)), n the last dimension; `normal` = N(0, 1); or a constant."""

    def __post_init__(self) -> None:
        # 0 and 0.0 are the same start, and so the same run.
        if isinstance(self.init, int) and not isinstance(self.init, bool):
            self.init = float(self.init)


@dataclass
class Factor(Part):
    """A or B, which layers can share. u and v always belong to one layer."""

    share: Annotated[int | str, PlainValidator(_share)] = ALL_LAYERS
    """How many consecutive layers share one factor: `all` (tied), 1 (untied), or any number in between."""


def _term_rank(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,4}|r(/[1-9]\d{0,2})?(\*layers)?|r-r/[1-9]\d{0,2}", value, re.ASCII):
        raise ValueError("write a number, r, r/8, r-r/8 or r/8*layers")
    return value


TermRank = Annotated[Text, AfterValidator(_term_rank)]
"""The rank of a term; see `term_rank`."""
TermName = Annotated[Text, Field(pattern="^[A-Za-z][A-Za-z0-9_]{0,30}$")]


@dataclass
class Parts:
    """The parts of a tying, or of one of its terms: which are trained, their initial values, and what layers share.

    The defaults are those of TABuv.
    """

    __pydantic_config__ = CHECKED

    A: Factor = field(default_factory=lambda: Factor(init="uniform"))
    """The factor A, r x d_in."""
    B: Factor = field(default_factory=lambda: Factor(init="uniform"))
    """The factor B, d_out x r."""
    u: Part = field(default_factory=Part)
    """The vector u of each layer, of r numbers, which scales the rows of A."""
    v: Part = field(default_factory=lambda: Part(init=0.0))
    """The vector v of each layer, of d_out numbers, which scales the rows of B."""


@dataclass
class Term(Parts):
    """One of several updates that a layer adds up."""

    rank: TermRank = "r"
    """The rank of the term: a whole number, or r (rank.r), r/8 (an eighth of it, rounded down, at least 1), r-r/8 (the
    rest), or r/8*layers (an eighth of it from each adapted layer of the term)."""
    layers: list[Any] | None = field(default=None, metadata=neutral(None))
    """As tying.layers."""
    own_scale: bool = False
    """Whether the scale s follows from the term's own rank instead of rank.r."""

    def __post_init__(self) -> None:
        self.layers = _numbered(self.layers, "tying.terms.NAME.layers")


@dataclass
class Tying(Parts):
    """A complete specification: one of the paper's eight configurations, or any other."""

    name: Name = field(default="custom", metadata=EXECUTION)
    """The name in tables. It is not part of the run's identity."""
    targets: Annotated[list[Text], Field(min_length=1)] = field(default_factory=lambda: ["qkv"])
    """The adapted projections: qkv (fused, as the paper does), q, k, v, o, gate, up, down."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the adapter's input while training."""
    suggested_lr: Annotated[Number, Field(gt=0)] = field(default=1e-2, metadata=EXECUTION)
    """The learning rate that train.lr takes when it is null: no single rate suits all eight configurations."""
    layers: list[Any] | None = field(default=None, metadata=neutral(None))
    """The adapted layers, counted from 0, as numbers and ranges: [0,5,20-29]; [evenly 15] for 15 evenly spaced ones;
    null adapts every layer. Only adapted layers share a factor."""
    terms: Annotated[dict[TermName, Term], Field(min_length=1)] | None = field(default=None, metadata=neutral(None))
    """Several updates that each layer adds up, by name, such as a shared and a private one (tying=RaSA). Each has its
    own A, B, u, v, layers and rank, and those of the tying have no meaning. null is one update: that of the tying."""

    def __post_init__(self) -> None:
        self.layers = _numbered(self.layers, "tying.layers")


@dataclass
class LrFactors:
    """`train.lr_factor`: what multiplies the learning rate of each part."""

    A: Rate = 1.0
    """Multiplies the learning rate of A."""
    B: Rate = 1.0
    """Multiplies the learning rate of B."""
    u: Rate = 1.0
    """Multiplies the learning rate of u."""
    v: Rate = 1.0
    """Multiplies the learning rate of v."""


def _numbered(layers: list[Any] | None, key: str) -> list[Any] | None:
    return layers if layers is None or evenly(layers) is not None else layer_numbers(layers, key)


def layer_numbers(items: Iterable[object], key: str = "tying.layers") -> list[int]:
    """The numbers that a list of layers names, in order and each once. An item is 5, or a range 20-29 with both ends.

    Raises:
        UserError: an item is neither.
    """
    numbers: set[int] = set()
    for item in items:
        ends = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(item), re.ASCII)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not first <= last < MOST_LAYERS:
            raise UserError(
                f"{key}: {item!r:.40} is neither a layer's number nor a range; write for example [0,5,20-29], "
                "or [evenly 15]"
            )
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def evenly(items: Iterable[object]) -> int | None:
    """How many evenly spaced layers tying.layers asks for; None if it names layers."""
    words = [re.fullmatch(r"evenly ([1-9]\d{0,4})", str(item), re.ASCII) for item in items]
    return int(words[0][1]) if len(words) == 1 and words[0] else None


def evenly_spaced(count: int, layers: int) -> list[int]:
    """The layers in the middles of `count` parts of equal length: 1, 3, ..., 29 for 15 of 30.

    Raises:
        UserError: the model has fewer layers.
    """
    if count > layers:
        raise UserError(f"tying.layers=[evenly {count}]: the model has only {layers} layers")
    return [(2 * number + 1) * layers // (2 * count) for number in range(count)]


@dataclass
class Layout:
    """Where a causal language model keeps its projections, by module path."""

    __pydantic_config__ = CHECKED

    layers: Text = ""
    """Path of the list of layers inside the model; empty means the layout of the model's family."""
    sites: dict[Text, list[Text]] = field(default_factory=dict)
    """Target -> module paths inside a layer: one path, or three if qkv is three modules. `path:q` is the q part of a
    fused module that computes [Q; K; V]."""
    interleaved: bool = False
    """Whether a fused module's outputs are ordered head by head: [q_1; k_1; v_1; q_2; ...]."""
    transposed: bool = False
    """Whether weights are d_in x d_out (transformers' Conv1D) instead of d_out x d_in."""


@dataclass
class Architecture:
    """The sizes of a base model, on which every shape in this module depends."""

    __pydantic_config__ = CHECKED

    family: Name = "llama"
    """The model's family in families.py: transformers' `model_type`."""
    layers: Annotated[Whole, Field(ge=1, le=MOST_LAYERS)] = 0
    """Transformer layers."""
    hidden: Annotated[Whole, Field(ge=1, le=10**6)] = 0
    """The width between layers."""
    heads: Annotated[Whole, Field(ge=1, le=10**6)] = 0
    """Query heads of a layer."""
    kv_heads: Annotated[Whole, Field(ge=1, le=10**6)] = 0
    """Key-value heads of a layer; it divides `heads`."""
    head_dim: Annotated[Whole, Field(ge=1, le=10**6)] = 0
    """The width of a head."""
    intermediate: Annotated[Whole, Field(ge=0, le=10**7)] = 0
    """The width inside the feed-forward block."""
    vocabulary: Annotated[Whole, Field(ge=0, le=10**8)] = 0
    """Tokens of the vocabulary."""
    layout: Layout = field(default_factory=Layout, metadata=neutral(Layout()))
    """Where the projections are, for a family that families.py does not know."""


def largest_rank(tying: Tying, architecture: Architecture) -> int:
    """The largest rank that an adapted projection can have. A larger one would add parameters alone."""
    return max(min(target_shape(architecture, target)) for target in tying.targets)


def target_shape(architecture: Architecture, target: str) -> tuple[int, int]:
    """(d_in, d_out) of one projection of one layer.

    Raises:
        UserError: `target` is not a known projection.
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


def adapted_layers(tying: Tying | Term, architecture: Architecture) -> list[int]:
    """The numbers of the layers that get an update of a tying, or of one of its terms, in order."""
    if isinstance(tying, Tying) and tying.terms is not None:
        return sorted({layer for term in tying.terms.values() for layer in adapted_layers(term, architecture)})
    if tying.layers is None:
        return list(range(architecture.layers))
    count = evenly(tying.layers)
    return layer_numbers(tying.layers) if count is None else evenly_spaced(count, architecture.layers)


def terms(tying: Tying) -> dict[str, Term]:
    """Name -> term. A tying without `terms` is one term without a name."""
    if tying.terms is None:
        return {"": Term(**{name: getattr(tying, name) for name in (*PARTS, "layers")})}
    return tying.terms


def target_terms(tying: Tying) -> dict[str, tuple[str, Term]]:
    """`target`, or `target:term` if there are several terms -> its target and its term."""
    found = {}
    for target in tying.targets:
        for name, term in terms(tying).items():
            found[f"{target}:{name}" if name else target] = (target, term)
    return found


def trained_parts(tying: Tying) -> list[str]:
    """The parts that are trained in any term, in the order of PARTS."""
    return [part for part in PARTS if any(getattr(term, part).trained for term in terms(tying).values())]


def term_rank(term: Term, rank: int, architecture: Architecture) -> int:
    """The rank of a term for the rank `rank.r`.

    Raises:
        UserError: nothing is left for the term.
    """
    if term.rank.isdecimal():
        own = int(term.rank)
    else:
        rest, divisor, pooled = re.findall(r"^(r-)?r(?:/(\d+))?(\*layers)?$", term.rank)[0]
        own = max(1, rank // int(divisor or 1))
        own = rank - own if rest else own
        own *= len(adapted_layers(term, architecture)) if pooled else 1
    if own < 1:
        raise UserError(f"tying.terms: a term's rank of {term.rank} is {own} at rank.r={rank}; raise rank.r")
    return own


def term_scale(term: Term, alpha: float, rank: int, scaling: str, architecture: Architecture) -> float:
    """The scale s of a term's update: by the term's own rank with `own_scale`, otherwise by the adapter's."""
    return scale(alpha, term_rank(term, rank, architecture) if term.own_scale else rank, scaling)


def scale(alpha: float, rank: int, scaling: str = "standard") -> float:
    """The factor s of the update: alpha / r (standard), or alpha / sqrt(r) (rslora, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if scaling == "rslora" else alpha / rank


def layers_per_group(share: int | str, layers: int) -> int:
    """How many consecutive layers share one factor (the last group may have fewer)."""
    return layers if share == ALL_LAYERS else min(int(share), layers)


@dataclass(frozen=True)
class PartTraits:
    """The properties of one part. Everything that depends on the part's letter is declared here."""

    sizes: tuple[str, ...]
    """The shape of one layer's values, or of one group's, in `rank`, `d_in` and `d_out`."""
    is_shared: bool
    """Whether layers can share the part (then it is a `Factor`). Otherwise every layer has its own."""
    decays: bool
    """Whether weight decay applies. It would pull u and v towards 0, and u starts at 1."""
    neutral: float | None = None
    """If the part is frozen at this value, it changes nothing, so it is neither created nor stored."""


PARTS: dict[str, PartTraits] = {
    "A": PartTraits(("rank", "d_in"), is_shared=True, decays=True),
    "B": PartTraits(("d_out", "rank"), is_shared=True, decays=True),
    "u": PartTraits(("rank",), is_shared=False, decays=False, neutral=1.0),
    "v": PartTraits(("d_out",), is_shared=False, decays=False, neutral=1.0),
}
"""The parts of an adapter by name. `Tying` has an attribute of the same name, which says how the part is trained."""
FACTORS = tuple(name for name, traits in PARTS.items() if traits.is_shared)
"""The parts that layers can share."""
DECIDING_KEYS = (*PARTS, "targets", "dropout", "layers", "terms")
"""The keys of `Tying` that decide which adapter is trained. Its name does not."""


def part_of(parameter_name: str) -> str:
    """The part's name, from the name of an adapter's parameter: `qkv.A` -> `A`."""
    return parameter_name.rpartition(".")[2]


def part_shape(term: Term, part: str, rank: int, architecture: Architecture, target: str) -> tuple[int, ...]:
    """The shape of one part of a term for one target, all adapted layers together.

    A: (groups, r, d_in)   B: (groups, d_out, r)   u: (L, r)   v: (L, d_out), with L the number of adapted layers

    Args:
        rank: rank.r, from which the term's own rank follows.

    Raises:
        UserError: `target` is not a known projection.
    """
    d_in, d_out = target_shape(architecture, target)
    sizes = {"rank": term_rank(term, rank, architecture), "d_in": d_in, "d_out": d_out}
    layers, specification = len(adapted_layers(term, architecture)), getattr(term, part)
    sharing = layers_per_group(specification.share, layers) if isinstance(specification, Factor) else 1
    return math.ceil(layers / sharing), *(sizes[name] for name in PARTS[part].sizes)


def parts(tying: Tying, rank: int, architecture: Architecture) -> Iterator[tuple[str, Part, tuple[int, ...]]]:
    """(`target.part` or `target:term.part`, its specification, its shape) of every part, also of one without effect."""
    for name, (target, term) in target_terms(tying).items():
        for part in PARTS:
            yield f"{name}.{part}", getattr(term, part), part_shape(term, part, rank, architecture, target)


def trainable_params(tying: Tying, rank: int, architecture: Architecture) -> int:
    """How many numbers the optimizer changes (docs/method.md has the formulas of the eight configurations)."""
    return sum(math.prod(shape) for _, part, shape in parts(tying, rank, architecture) if part.trained)


def lora_params(rank: int, architecture: Architecture) -> int:
    """Trainable parameters of the paper's LoRA at this rank: L r (d_in + d_out), on the fused QKV of every layer.

    Every "share of LoRA" in this project is relative to this number, also that of a specification that adapts only some
    layers: to leave out layers is one way to need fewer parameters, and the share must show it.
    """
    d_in, d_out = target_shape(architecture, "qkv")
    return architecture.layers * rank * (d_in + d_out)


def nearest_lora_rank(trainable: int, architecture: Architecture) -> int:
    """The rank (at least 1) at which LoRA has the number of parameters nearest to `trainable`; of two, the lower."""
    below = max(1, trainable // lora_params(1, architecture))
    return min(below, below + 1, key=lambda rank: abs(lora_params(rank, architecture) - trainable))


def named(name: str) -> Tying:
    """One of the named arms: an option of conf/tying/, or LoRA on so many layers, such as LoRA_l15.

    Raises:
        UserError: there is no such name; the message lists them.
    """
    return deepcopy(_named(name))


@functools.cache
def _named(name: str) -> Tying:
    if (count := lora_layers(name)) is not None:
        return replace(_named("LoRA"), name=name, layers=[f"evenly {count}"])
    if name not in (known := (*NAMES, *OTHER_NAMES)):
        if name in RENAMED:
            raise UserError(f"tying={name}: {RENAMED[name]}")
        raise UserError(f"tying={name}: is not one of {', '.join(known)}; for another, build a tiedlora.Tying")
    return from_person(Tying, storage.read_yaml(CONF / "tying" / f"{name}.yaml"))


def lora_layers(name: str) -> int | None:
    """The number of layers in a name such as LoRA_l15; None for another name."""
    match = LORA_ON_LAYERS.fullmatch(name)
    return int(match[1]) if match else None


def is_named(name: str) -> bool:
    """Whether `named` knows the name, so that a specification with other values is not meant by it."""
    return name in NAMES or name in OTHER_NAMES or lora_layers(name) is not None


def name_of(tying: Tying) -> str | None:
    """The name of an option of conf/tying/ with the same values; None without one. Its own `name` does not count."""
    meaning = _meaning(tying)
    return next((name for name, known in _meanings() if known == meaning), None)


@functools.cache
def _meanings() -> list[tuple[str, list[Any]]]:
    return [(name, _meaning(_named(name))) for name in (*NAMES, *OTHER_NAMES)]


def _meaning(tying: Tying) -> list[Any]:
    """The values of a specification that decide what is trained."""
    return [getattr(tying, name) for name in DECIDING_KEYS]


def check_tying(tying: Tying, rank: int, architecture: Architecture) -> None:
    """Refuse a specification that cannot train from the base model.

    In each term, exactly one part must start at zero, and it must be trained. If no part starts at zero, the run does
    not start at the base model. If the zero part is frozen, the update stays zero. If two parts start at zero, no part
    ever gets a gradient.

    Raises:
        UserError: a value is not allowed; the message names the key under `tying.`.
    """
    unused = (*PARTS, "layers") if tying.terms is not None else ()
    if changed := [name for name in unused if getattr(tying, name) != getattr(Tying(), name)]:
        raise UserError(
            f"tying.{changed[0]}: has no meaning beside tying.terms; set tying.terms.TERM.{changed[0]}, TERM being one "
            f"of {', '.join(tying.terms or ())}"
        )
    for target in tying.targets:
        target_shape(architecture, target)
    doubled = "qkv" in tying.targets and {"q", "k", "v"} & set(tying.targets)
    if doubled or len(set(tying.targets)) != len(tying.targets):
        raise UserError(f"tying.targets={tying.targets}: a projection is adapted twice; qkv holds q, k and v already")
    for name, term in terms(tying).items():
        key = f"tying.terms.{name}" if name else "tying"
        zeros = [part for part in PARTS if getattr(term, part).init == 0.0]
        if not zeros:
            raise UserError(
                f"{key}: no part starts at zero, so the run would not start at the base model; "
                "give exactly one trained part of A, B, u, v init=0 (usually v if it is trained, otherwise B)"
            )
        if len(zeros) > 1:
            raise UserError(
                f"{key}: {' and '.join(zeros)} both start at zero, so no part would ever get a gradient; "
                "give exactly one trained part init=0"
            )
        if not getattr(term, zeros[0]).trained:
            raise UserError(
                f"{key}.{zeros[0]}: starts at zero and is frozen, so the update would always stay zero; "
                f"set {key}.{zeros[0]}.trained=true or give it another init"
            )
        check_layers(f"{key}.layers", adapted_layers(term, architecture), architecture)
        term_rank(term, rank, architecture)


def check_layers(key: str, layers: list[int], architecture: Architecture) -> None:
    """Refuse layers that the model does not have.

    Args:
        key: the key that names them.

    Raises:
        UserError: there is no layer, or one is out of range.
    """
    if not layers:
        raise UserError(f"{key}: is empty; name at least one layer, or set null to adapt all")
    if layers[-1] >= architecture.layers:
        raise UserError(
            f"{key}: holds {layers[-1]}, but the model has {architecture.layers} layers: "
            f"0 to {architecture.layers - 1} are allowed"
        )
