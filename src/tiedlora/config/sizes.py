"""How many numbers a configuration trains, and the rank or argument that comes nearest to a budget of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from tiedlora import tying as spec
from tiedlora.config import methods
from tiedlora.config.families import architecture_of, layout_of
from tiedlora.config.schema import Config, TyingConfig
from tiedlora.errors import UserError
from tiedlora.tying import Architecture

TOLERANCE = 0.05
"""An arm counts as equal in size if its parameters differ from the budget by at most this share."""
LARGEST_KNOB = 2**22
TRIES = 12
"""Most values of an argument that are counted in a search, besides the neighbours of the best one."""


def trainable_params(config: Config) -> int | None:
    """How many numbers the optimizer changes. None for a method that only its own code can count.

    Raises:
        UserError: PEFT refuses the method's arguments for this model.
    """
    architecture = config.model.architecture
    if config.tying.method is None:
        return spec.trainable_params(config.tying, config.rank.r, architecture)
    if config.tying.method in methods.REGISTERED:
        return None
    return _peft_params(_as_key(config.tying), json.dumps(asdict(architecture), sort_keys=True))


def is_near(count: int, budget: int) -> bool:
    """Whether `count` parameters are equal in size to the budget."""
    return abs(count / budget - 1) <= TOLERANCE


def at_budget(config: Config) -> Config:
    """The configuration with the rank, or the argument tying.knob, that comes nearest to `budget` parameters.

    A method without a knob stays as it is.

    Raises:
        UserError: the knob is no whole number among the method's arguments.
    """
    if config.budget is None:
        return config
    budget, tying = config.budget, config.tying
    if tying.method is None:
        architecture = config.model.architecture
        highest = min(spec.target_shape(architecture, tying.targets[0]))
        size = Search(lambda rank: spec.trainable_params(tying, rank, architecture), budget, highest).nearest()
        return replace(config, rank=replace(config.rank, r=size))
    if tying.knob is None or tying.method in methods.REGISTERED:
        return config
    assert tying.resolved is not None
    if type(tying.resolved.get(tying.knob)) is not int:
        numbers = [name for name, value in tying.resolved.items() if type(value) is int]
        raise UserError(
            f"tying.knob={tying.knob}: is no whole number among the arguments of {tying.method}; "
            f"choose from {', '.join(numbers)}"
        )
    return replace(config, tying=_with_knob(tying, _nearest_value(config)))


def _nearest_value(config: Config) -> int:
    tying, architecture, budget = config.tying, config.model.architecture, config.budget
    assert tying.knob is not None
    assert budget is not None
    return _search_peft(
        _as_key(_with_knob(tying, 1)), tying.knob, json.dumps(asdict(architecture), sort_keys=True), budget
    )


@lru_cache(maxsize=1024)
def _search_peft(tying: str, knob: str, architecture: str, budget: int) -> int:
    def count(value: int) -> int | None:
        tree = json.loads(tying)
        tree["resolved"][knob] = value
        try:
            return _peft_params(json.dumps(tree, sort_keys=True), architecture)
        except UserError:
            return None

    sizes = architecture_of(json.loads(architecture))
    # Some counts fall and rise: they are lowest where the rank is a side of the matrix.
    landmarks = {side for target in ("q", "k") for side in spec.target_shape(sizes, target)}
    return Search(count, budget, LARGEST_KNOB, tuple(sorted(landmarks))).nearest()


def _with_knob(tying: TyingConfig, value: int) -> TyingConfig:
    assert tying.knob is not None
    assert tying.resolved is not None
    return replace(tying, resolved={**tying.resolved, tying.knob: value})


@dataclass(frozen=True)
class Search:
    """The whole number whose count of parameters comes nearest to a budget."""

    count: Callable[[int], int | None]
    """The parameters for a value; None if the value is impossible."""
    budget: int
    highest: int
    """The largest value that may be tried."""
    landmarks: tuple[int, ...] = ()
    """Values to try as well, if the search finds none near enough."""

    def nearest(self) -> int:
        """The nearest value; of two that are equally near, the lower one.

        Most methods' counts are straight lines over the value, so that two points give the rest. Others are bent, or
        have steps: the line is then drawn again through the nearest points on both sides.

        Raises:
            UserError: no value is possible.
        """
        counts: dict[int, int] = {}
        self._try(counts, 1)
        self._try(counts, 2)
        for _ in range(TRIES):
            guess = self._guess(counts)
            # Some values are impossible, for example because they must divide a side of the matrix.
            near = [value for value in (guess, guess - 1, guess + 1) if 1 <= value <= self.highest]
            if guess in counts or not any(self._try(counts, value) for value in near if value not in counts):
                break
        if not any(is_near(count, self.budget) for count in counts.values()):
            for value in self.landmarks:
                self._try(counts, value)
        if not counts:
            raise UserError(f"budget={self.budget}: no value of the method's size is possible for this model")
        best = min(counts, key=lambda value: (self._distance(counts[value]), value))
        for neighbour in (best - 1, best + 1):
            if 1 <= neighbour <= self.highest and neighbour not in counts:
                self._try(counts, neighbour)
        return min(counts, key=lambda value: (self._distance(counts[value]), value))

    def _try(self, counts: dict[int, int], value: int) -> bool:
        number = self.count(value)
        if number is not None:
            counts[value] = number
        return number is not None

    def _guess(self, counts: dict[int, int]) -> int:
        """The value where a line reaches the budget: through the nearest point on each side, or the nearest two."""
        if not counts:
            return 4
        if len(counts) == 1:
            return 2 * next(iter(counts))
        nearest = sorted(counts, key=lambda value: (self._distance(counts[value]), value))
        first = nearest[0]
        is_above = counts[first] > self.budget
        across = [value for value in nearest if (counts[value] > self.budget) != is_above]
        second = across[0] if across else nearest[1]
        slope = (counts[second] - counts[first]) / (second - first)
        if slope <= 0:
            return min(self.highest, 2 * max(counts))
        guess = round(first + (self.budget - counts[first]) / slope)
        return max(1, min(self.highest, guess))

    def _distance(self, count: int) -> int:
        return abs(count - self.budget)


def _as_key(tying: TyingConfig) -> str:
    """What a method's count depends on besides the architecture, as text."""
    values = {name: getattr(tying, name) for name in ("method", "resolved", "targets", "layers")}
    return json.dumps(values, sort_keys=True)


@lru_cache(maxsize=4096)
def _peft_params(tying: str, architecture: str) -> int | None:
    """The trained numbers of a method of PEFT on a model of this architecture, without its weights.

    The method is put on linear layers of the model's sizes on the meta device, which hold no numbers.
    """
    values = json.loads(tying)
    sizes = architecture_of(json.loads(architecture))
    if values["method"] == "ShiraConfig":
        # Its masks are drawn with the values of the weights, so it cannot be built without them.
        return _shira_params(TyingConfig(**values), sizes)
    return _count(methods.peft_config(TyingConfig(**values), sizes, seed=0), sizes)


def _count(config: Any, architecture: Architecture) -> int | None:
    # PEFT is an extra, and both libraries are slow to load: only a method of PEFT needs them here.
    import torch
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    skeleton = _skeleton(architecture)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](skeleton, config, "default")
        except NotImplementedError:
            # It reads the values of the weights.
            return None
        except (ValueError, TypeError, RuntimeError) as error:
            if "meta" in str(error):
                return None
            if "Target modules" in str(error) or "target modules" in str(error):
                # Modules that are no projections, such as norms.
                return None
            raise UserError(f"tying.method={type(config).__name__}: PEFT refuses it: {str(error)[:300]}") from None
    return sum(int(parameter.numel()) for parameter in tuner.parameters() if parameter.requires_grad)


def _skeleton(architecture: Architecture) -> Any:
    import torch
    from torch import nn

    layout, root = layout_of(architecture), nn.Module()
    for layer in range(architecture.layers):
        for target, paths in layout.sites.items():
            if any(":" in path for path in paths) or (target == "qkv" and len(paths) > 1):
                # A part of a fused module, or three modules that are targets of their own.
                continue
            d_in, d_out = spec.target_shape(architecture, target)
            linear = nn.Linear(d_in, d_out, bias=False, device=torch.device("meta"))
            _put(root, f"{layout.layers}.{layer}.{paths[0]}", linear.requires_grad_(False))
    return root


def _put(root: Any, path: str, module: Any) -> None:
    from torch import nn

    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(name, module)


def _shira_params(tying: TyingConfig, architecture: Architecture) -> int | None:
    """r (d_in + d_out) entries of each weight; None if the arguments name the modules themselves."""
    assert tying.resolved is not None
    if "target_modules" in tying.resolved:
        return None
    layers = len(spec.adapted_layers(tying, architecture))
    targets = [part for target in tying.targets for part in _single(target, architecture)]
    rank = int(tying.resolved["r"])
    return layers * sum(rank * sum(spec.target_shape(architecture, target)) for target in targets)


def _single(target: str, architecture: Architecture) -> tuple[str, ...]:
    is_three = target == "qkv" and len(layout_of(architecture).sites["qkv"]) == 3
    return ("q", "k", "v") if is_three else (target,)


def missed_budget(config: Config, count: int) -> str | None:
    """Why an arm is not of the budget's size, in words; None if it is, or if there is no budget."""
    if config.budget is None or is_near(count, config.budget):
        return None
    return f"{count:,} parameters are {count / config.budget - 1:+.0%} off the budget of {config.budget:,}"
