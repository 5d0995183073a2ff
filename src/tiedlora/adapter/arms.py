"""What adapts a base model: the protocol `Arm`, and how an arm is made and read.

This project's own method (attach.Attached) and every method of PEFT (peft_arm.PeftArm) are arms. The training, the
scoring and the record of a run know only the protocol. A program can register a third kind (docs/arena.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tiedlora.config.methods import REGISTERED
from tiedlora.config.schema import LrFactors, TyingConfig
from tiedlora.errors import UserError
from tiedlora.records.run_record import BaseModelRecord
from tiedlora.tying import PARTS, Architecture, part_of


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and whether weight decay applies."""

    parameters: list[nn.Parameter]
    lr_factor: float = 1.0
    """A factor on the run's learning rate."""
    decays: bool = True


class Arm(Protocol):
    """What adapts a base model. While it is attached, the model computes with it."""

    @property
    def model(self) -> nn.Module:
        """The base model with the arm on it."""

    @property
    def compiles(self) -> bool:
        """Whether torch.compile may compile the blocks with the arm on them."""

    def trained_parts(self) -> dict[str, nn.Parameter]:
        """Name -> each parameter that the optimizer changes, once."""

    def parameter_groups(self, lr_factors: LrFactors) -> list[ParameterGroup]:
        """The trained parameters with their rates and decay.

        Args:
            lr_factors: factors for the parts A, B, u and v, if the arm has such parts.
        """

    def changed_buffers(self) -> dict[str, Tensor]:
        """Name -> each tensor besides the trained parts that has changed since the start. A checkpoint holds them."""

    def buffers(self) -> dict[str, Tensor]:
        """Name -> each tensor of the arm that is no trained part and may change."""

    def stored_params(self) -> int:
        """How many numbers the arm's files hold: trained ones, and frozen ones that cannot be left out."""

    def enable(self) -> None:
        """Make the model compute with the arm."""

    def disable(self) -> None:
        """Make the model compute as the base model."""

    def folded_once(self) -> AbstractContextManager[None]:
        """Inside the block the arm does not change, so what it prepares before a pass may be prepared once."""

    def detach(self) -> None:
        """Take the arm off. The base model is then bit for bit as it was."""

    def cannot_merge(self) -> str | None:
        """Why the update cannot be added to the weights and taken off again exactly; None if it can."""

    def merge(self) -> None:
        """Add the update to the weights."""

    def unmerge(self) -> None:
        """Restore the weights. Without an earlier `merge` nothing happens."""

    def save(self, folder: Path, base: BaseModelRecord) -> int:
        """Write the arm's folder, completely or not at all. Returns its size in bytes."""

    def load_values(self, folder: Path) -> None:
        """Take the values of a folder that an arm of the same configuration has written.

        Raises:
            UserError: a file is damaged or of another arm.
        """


@dataclass(frozen=True)
class ArmSpec:
    """What an arm of another method is made from."""

    tying: TyingConfig
    """With `method` and `resolved`."""
    architecture: Architecture
    seed: int


ArmFactory = Callable[[nn.Module, ArmSpec], Arm]


def register(kind: str, factory: ArmFactory) -> None:
    """Make `tying.method=KIND` an arm that `factory` puts on a model.

    Raises:
        UserError: the name is taken, or is no plain word.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", kind):
        raise UserError(f"arms: {kind!r:.60} must be lower-case letters, digits and '_'; PEFT's methods have capitals")
    if REGISTERED.get(kind, factory) is not factory:
        raise UserError(f"arms: '{kind}' is taken")
    REGISTERED[kind] = factory


def groups_by_part(parts: Mapping[str, nn.Parameter], lr_factors: LrFactors) -> list[ParameterGroup]:
    """One parameter group for each of A, B, u and v.

    Args:
        parts: `target.part` -> its parameter.
    """
    groups = []
    for letter, traits in PARTS.items():
        parameters = [parameter for name, parameter in parts.items() if part_of(name) == letter]
        if parameters:
            groups.append(ParameterGroup(parameters, getattr(lr_factors, letter), traits.decays))
    return groups


def groups_by_pattern(
    parts: Mapping[str, nn.Parameter], lr_factors: Mapping[str, float] | None, no_decay: Sequence[str] | None
) -> list[ParameterGroup]:
    """Parameter groups by regular expressions for names of parameters. The first pattern that matches counts.

    Raises:
        UserError: a pattern matches no parameter.
    """
    patterns = [*(lr_factors or {}), *(no_decay or ())]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in parts):
            raise UserError(f"tying: the pattern {pattern!r} matches no trained parameter; they are {_shown(parts)}")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parts.items():
        factors = [factor for pattern, factor in (lr_factors or {}).items() if re.search(pattern, name)]
        decays = not any(re.search(pattern, name) for pattern in no_decay or ())
        groups.setdefault((factors[0] if factors else 1.0, decays), []).append(parameter)
    return [ParameterGroup(parameters, factor, decays) for (factor, decays), parameters in groups.items()]


def _shown(parts: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in parts))
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
