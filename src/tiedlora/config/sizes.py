"""How many numbers a configuration trains, and the rank or argument that comes nearest to a budget of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from tiedlora import other_methods
from tiedlora import tying as spec
from tiedlora.config.schema import Config
from tiedlora.errors import UserError, made_once
from tiedlora.families import layout_of
from tiedlora.other_methods import TyingConfig
from tiedlora.tying import Architecture

TOLERANCE = 0.05
"""An arm counts as equal in size if its parameters differ from the budget by at most this share."""
LARGEST_KNOB = 2**22
TRIES = 12
"""Most values of an argument that are counted in a search, besides the neighbours of the best one."""
_COUNTS: dict[str, int | UserError | None] = {}
"""A method and a model as text -> what was counted, or why it cannot be: a sweep asks again for each cell."""


def trainable_params(config: Config) -> int | None:
    """How many numbers the optimizer changes. None for a method that only its own code can count.

    Raises:
        UserError: PEFT refuses the method's arguments for this model.
    """
    architecture = config.model.architecture
    if config.tying.method is None:
        return spec.trainable_params(config.tying, config.rank.r, architecture)
    if config.tying.method == other_methods.FULL or config.tying.method in other_methods.REGISTERED:
        return None
    return _peft_params(config.tying, architecture)


def is_near(count: int, budget: int) -> bool:
    """Whether `count` parameters are equal in size to the budget."""
    return abs(count / budget - 1) <= TOLERANCE


def at_budget(config: Config) -> Config:
    """The configuration with the rank, or the argument tying.knob, that comes nearest to `budget` parameters.

    Below rank 1, LoRA gets fewer layers. A method without a knob stays as it is.
    """
    if config.budget is None:
        return config
    budget, tying, architecture = config.budget, config.tying, config.model.architecture
    if (layers := lora_layers(tying, budget, architecture)) is not None:
        return replace(config, rank=replace(config.rank, r=1), tying=replace(tying, layers=[f"evenly {layers}"]))
    if tying.method is not None and (tying.knob is None or tying.method in other_methods.REGISTERED):
        return config
    knob, arguments = tying.knob or "", tying.resolved or {}

    def sized(value: int) -> Config:
        if tying.method is None:
            return replace(config, rank=replace(config.rank, r=value))
        return replace(config, tying=replace(tying, resolved={**arguments, knob: value}))

    def count(value: int) -> int | None:
        try:
            return trainable_params(sized(value))
        except UserError:
            # PEFT refuses the value, or nothing is left for a term.
            return None

    if tying.method is None:
        highest, landmarks = spec.largest_rank(tying, architecture), []
    else:
        # Some counts fall and rise: they are lowest where the rank is a side of the matrix.
        sides = {side for target in ("q", "k") for side in spec.target_shape(architecture, target)}
        highest, landmarks = LARGEST_KNOB, sorted(sides)
    return sized(nearest_size(count, budget, highest, landmarks))


def lora_layers(tying: TyingConfig, budget: int, architecture: Architecture) -> int | None:
    """On how many evenly spaced layers LoRA of rank 1 comes nearest to a budget below rank 1 of all layers.

    Returns:
        None if the specification is not LoRA, or if all layers are nearest.
    """
    if tying.method is not None or spec.name_of(tying) != "LoRA":
        return None
    layers, all_layers = architecture.layers, spec.lora_params(1, architecture)
    if is_near(all_layers, budget):
        return None
    count = max(1, round(budget * layers / all_layers))
    return count if count < layers else None


def nearest_size(count: Callable[[int], int | None], budget: int, highest: int, landmarks: Sequence[int] = ()) -> int:
    """The whole number whose count of parameters comes nearest to a budget; of two, the lower one.

    Most methods' counts are straight lines over the value, so that two points give the rest. Others are bent, or have
    steps: the line is then drawn again through the nearest points on both sides.

    Args:
        count: the parameters for a value; None if the value is impossible.
        highest: the largest value that may be tried.
        landmarks: values to try as well, if the search finds none near enough.

    Raises:
        UserError: no value is possible.
    """
    search = _SizeSearch(count, budget, highest)
    search.count_new(1)
    search.count_new(2)
    for _ in range(TRIES):
        value = search.guess()
        # Some values are impossible, for example because they must divide a side of the matrix.
        if value in search.counts or not any(map(search.count_new, (value, value - 1, value + 1))):
            break
    if not any(is_near(number, budget) for number in search.counts.values()):
        for value in landmarks:
            search.count_new(value)
    if not search.counts:
        raise UserError(f"budget={budget}: no value of the method's size is possible for this model")
    best = search.nearest()[0]
    search.count_new(best - 1)
    search.count_new(best + 1)
    return search.nearest()[0]


class _SizeSearch:
    """The values that a search for a budget has counted so far."""

    def __init__(self, count: Callable[[int], int | None], budget: int, highest: int) -> None:
        self.count, self.budget, self.highest = count, budget, highest
        self.counts: dict[int, int] = {}
        """Value -> its number of parameters."""

    def count_new(self, value: int) -> bool:
        """Count a value that is possible and not counted yet. Returns whether it was one."""
        if not 1 <= value <= self.highest or value in self.counts or (number := self.count(value)) is None:
            return False
        self.counts[value] = number
        return True

    def nearest(self) -> list[int]:
        """The counted values, the one nearest to the budget first; of two, the lower one."""
        return sorted(self.counts, key=lambda value: (abs(self.counts[value] - self.budget), value))

    def guess(self) -> int:
        """The value where a line reaches the budget: through the nearest point on each side, or the nearest two."""
        counts, budget = self.counts, self.budget
        if len(counts) < 2:
            return 2 * next(iter(counts), 2)
        first, *others = self.nearest()
        is_above = counts[first] > budget
        second = next((value for value in others if (counts[value] > budget) != is_above), others[0])
        slope = (counts[second] - counts[first]) / (second - first)
        reached = first + (budget - counts[first]) / slope if slope > 0 else 2 * max(counts)
        return max(1, min(self.highest, round(reached)))


def _peft_params(tying: TyingConfig, architecture: Architecture) -> int | None:
    """The trained numbers of a method of PEFT on a model of this architecture, without its weights.

    The method is put on linear layers of the model's sizes on the meta device, which hold no numbers.

    Raises:
        UserError: PEFT refuses the method's arguments for this model.
    """
    values = [tying.method, tying.resolved, tying.targets, tying.layers, asdict(architecture)]
    key = json.dumps(values, sort_keys=True)
    return made_once(_COUNTS, key, lambda: _count(tying, architecture))


def _count(tying: TyingConfig, architecture: Architecture) -> int | None:
    # The skeleton's layers have no biases, and with biases they all have them. The real ones are known with the model.
    counts = {_count_on(_skeleton(architecture, bias), tying, architecture) for bias in (False, True)}
    return counts.pop() if len(counts) == 1 else None


def _count_on(skeleton: Any, tying: TyingConfig, architecture: Architecture) -> int | None:
    # PEFT is an extra, and both libraries are slow to load: only a method of PEFT needs them here.
    import torch  # noqa: PLC0415
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # noqa: PLC0415

    config = other_methods.peft_config(tying, architecture, seed=0)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](skeleton, config, "default")
        except NotImplementedError:
            return None
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            # It reads the values of the weights, or adapts modules that are no projections, such as norms.
            if "meta" in str(error) or "arget modules" in str(error):
                return None
            raise UserError(f"tying.method={tying.method}: PEFT refuses it: {str(error)[:300]}") from None
    return sum(int(parameter.numel()) for parameter in tuner.parameters() if parameter.requires_grad)


def _skeleton(architecture: Architecture, bias: bool) -> Any:
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    root, modules = nn.Module(), _modules(architecture)
    for layer in range(architecture.layers):
        for path, (d_in, d_out) in modules.items():
            linear = nn.Linear(d_in, d_out, bias=bias, device=torch.device("meta"))
            parent: Any = root
            *parents, name = f"{layout_of(architecture).layers}.{layer}.{path}".split(".")
            for each in parents:
                parent = parent._modules.setdefault(each, nn.Module())
            parent.add_module(name, linear.requires_grad_(False))
    return root


def _modules(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """The path of each module inside a layer that a target names whole -> its sizes, in and out."""
    found: dict[str, tuple[int, int]] = {}
    for target, paths in layout_of(architecture).sites.items():
        # `qkv` may be three modules, which are targets of their own too.
        targets = ["q", "k", "v"] if target == "qkv" and len(paths) == 3 else [target]
        for each, path in zip(targets, paths, strict=False):
            if ":" not in path:
                found[path] = spec.target_shape(architecture, each)
    return found


def missed_budget(config: Config, count: int) -> str | None:
    """Why an arm is not of the budget's size, in words; None if it is, or if there is no budget."""
    if config.budget is None or is_near(count, config.budget):
        return None
    return f"{count:,} parameters are {count / config.budget - 1:+.0%} off the budget of {config.budget:,}"
