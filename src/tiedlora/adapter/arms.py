"""What adapts a base model: the class `Arm`, and how an arm of another method is saved and described.

This project's own method (attach.Attached) and every method of PEFT (peft_arm.PeftArm) are arms. The training, the
scoring and the record of a run know only the base class. Full fine-tuning (full_arm.FullArm) is a third kind, and a
program can register more (docs/arena.md).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiedlora import storage
from tiedlora.adapter import files
from tiedlora.adapter.parts import ParameterGroup, TiedAdapter
from tiedlora.description import DESCRIPTION, BaseModelRecord
from tiedlora.errors import UserError
from tiedlora.other_methods import FULL, REGISTERED, TyingConfig
from tiedlora.reading import StoredName, StoredText, StoredWhole, plain, read_typed
from tiedlora.tying import Architecture, LrFactors

FORMAT = 3
"""The format of adapter.json for arms of other methods. Earlier versions refuse the number."""


@dataclass(frozen=True)
class ArmSpec:
    """What an arm of another method is made from."""

    tying: TyingConfig
    """With `method` and `resolved`."""
    architecture: Architecture
    seed: int


def register(kind: str, factory: Callable[[nn.Module, ArmSpec], Arm]) -> None:
    """Make `tying.method=KIND` an arm that `factory` puts on a model.

    Raises:
        UserError: the name is taken, or is no plain word.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", kind):
        raise UserError(f"arms: {kind!r:.60} must be lower-case letters, digits and '_'; PEFT's methods have capitals")
    if kind == FULL or REGISTERED.get(kind, factory) is not factory:
        raise UserError(f"arms: '{kind}' is taken")
    REGISTERED[kind] = factory


@dataclass(frozen=True)
class ArmDescription:
    """The content of adapter.json of an arm of another method."""

    format: StoredWhole
    base: BaseModelRecord
    method: StoredText
    resolved: dict[str, Any]
    targets: list[StoredText]
    seed: StoredWhole
    architecture: Architecture
    tensors_file: StoredName
    sha256: StoredText
    """The sha256 of the tensors' file."""
    layers: list[StoredWhole] | None = None


class Arm(ABC):
    """What adapts a base model. While it is attached, the model computes with it.

    A subclass attaches itself in `__init__`, and defines what is abstract, and what is otherwise than here.
    """

    model: nn.Module
    """The base model with the arm on it."""
    spec: ArmSpec
    """What an arm of another method is made from."""
    compiles = False
    """Whether torch.compile may compile the blocks with the arm on them."""
    tensors_file = "adapter.safetensors"

    def __init__(self, model: nn.Module, spec: ArmSpec) -> None:
        self.model, self.spec = model, spec

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> every parameter of the arm, trained or frozen, once."""

    @abstractmethod
    def enable(self) -> None:
        """Make the model compute with the arm."""

    @abstractmethod
    def disable(self) -> None:
        """Make the model compute as the base model."""

    @abstractmethod
    def detach(self) -> None:
        """Take the arm off. The base model is then bit for bit as it was."""

    def buffers(self) -> dict[str, Tensor]:
        """Name -> each tensor of the arm that is no parameter and may change."""
        return {}

    def changed_buffers(self) -> dict[str, Tensor]:
        """Name -> each buffer that may have changed since the start. A checkpoint holds them."""
        return self.buffers()

    def trained_parts(self) -> dict[str, nn.Parameter]:
        """Name -> each parameter that the optimizer changes, once."""
        return {name: parameter for name, parameter in self.named_parameters().items() if parameter.requires_grad}

    def parameter_groups(self, _lr_factors: LrFactors) -> list[ParameterGroup]:
        """The trained parameters with their rates and decay.

        Args:
            _lr_factors: factors for the parts A, B, u and v, which only the project's own method has.
        """
        return groups_by_pattern(self.trained_parts(), self.spec.tying.lr_factors, self.spec.tying.no_decay)

    def folded_once(self) -> AbstractContextManager[None]:
        """Inside the block the arm does not change, so what it prepares before a pass may be prepared once."""
        return nullcontext()

    def cannot_merge(self) -> str | None:
        """Why the update cannot be added to the weights and taken off again exactly; None if it can."""
        return f"the update of {self.spec.tying.method} cannot be taken off the weights exactly"

    def merge(self) -> None:
        """Add the update to the weights.

        Raises:
            UserError: it cannot be added.
        """
        raise UserError(f"merge: {self.cannot_merge()}")

    def unmerge(self) -> None:
        """Restore the weights. Without an earlier `merge` nothing happens."""
        return None

    def fuse(self) -> None:
        """Merge for good: the arm leaves the model, whose weights keep the update. Raises UserError as `merge`."""
        self.merge()

    def tensors(self) -> dict[str, Tensor]:
        """What the tensors' file holds: trained parts, and frozen ones that cannot be left out."""
        return {**self.named_parameters(), **self.buffers()}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of a tensors' file with the right names and shapes."""
        with torch.no_grad():
            for name, own in self.tensors().items():
                own.copy_(tensors[name])

    def stored_params(self) -> int:
        """How many numbers the tensors' file holds."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def files_beside(self, _base: BaseModelRecord) -> dict[str, object]:
        """Name -> content of further JSON files beside adapter.json and the tensors."""
        return {}

    def save(self, folder: Path, base: BaseModelRecord) -> int:
        """Write the arm's folder, completely or not at all. Other files of a folder that is there stay.

        Returns:
            The size of the arm's files in bytes.
        """
        tying = self.spec.tying
        assert tying.method is not None
        with storage.new_folder(folder, last=DESCRIPTION) as beside:
            files.write_tensors(_each_once(self.tensors()), beside / self.tensors_file)
            description = ArmDescription(
                format=FORMAT,
                base=base,
                method=tying.method,
                resolved=tying.resolved or {},
                targets=tying.targets,
                seed=self.spec.seed,
                architecture=self.spec.architecture,
                tensors_file=self.tensors_file,
                sha256=storage.sha256(beside / self.tensors_file),
                layers=tying.layers,
            )
            for name, content in {**self.files_beside(base), DESCRIPTION: plain(description)}.items():
                storage.write_json(beside / name, content)
            return sum(file.stat().st_size for file in beside.iterdir())

    def load_values(self, folder: Path) -> None:
        """Take the values of a folder that an arm of the same configuration has written.

        Raises:
            UserError: a file is damaged or of another arm.
        """
        saved = read_description(folder)
        tensors = files.read_tensors(folder / saved.tensors_file, saved.sha256)
        own = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        if own != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
            raise UserError(f"{folder}: has other tensors or shapes than {self.spec.tying.method} has here")
        self.take(tensors)


def _each_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file holds them. Some methods have one under several names, and a file has no shared ones."""
    found: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        place = here.untyped_storage().data_ptr()
        found[name] = here.clone() if place in written else here
        written.add(place)
    return found


def groups_by_pattern(
    parts: Mapping[str, nn.Parameter], lr_factors: Mapping[str, float] | None, no_decay: Sequence[str] | None
) -> list[ParameterGroup]:
    """Parameter groups by regular expressions for names of parameters.

    Raises:
        UserError: a pattern matches no parameter, or two give one parameter different factors: an id has no order.
    """
    patterns = [*(lr_factors or {}), *(no_decay or ())]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in parts):
            names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in parts))
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(f"tying.lr_factors or no_decay: {pattern!r} matches no trained parameter; they are {shown}")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parts.items():
        found = {pattern: factor for pattern, factor in (lr_factors or {}).items() if re.search(pattern, name)}
        if len(factors := set(found.values())) > 1:
            raise UserError(f"tying.lr_factors: {' and '.join(map(repr, found))} give {name} different factors")
        decays = not any(re.search(pattern, name) for pattern in no_decay or ())
        groups.setdefault((factors.pop() if factors else 1.0, decays), []).append(parameter)
    return [ParameterGroup(parameters, factor, decays) for (factor, decays), parameters in groups.items()]


def read_description(folder: Path) -> ArmDescription:
    """adapter.json of an arm of another method.

    Raises:
        UserError: it is missing or wrong; the message names the file and the key.
    """
    path = folder / DESCRIPTION
    description = read_typed(path, ArmDescription, "an adapter's description")
    if description.format != FORMAT:
        raise UserError(f"{path}: format {description.format} is not {FORMAT}, which this version reads")
    return description


def read(folder: Path) -> tuple[TiedAdapter | ArmSpec, BaseModelRecord]:
    """A saved adapter, or what a saved arm of another method is made from, and the base model that it was trained on.

    Raises:
        UserError: a file is missing or damaged, or holds values that are not finite; the message names it.
    """
    if not is_other_method(folder):
        return files.load(folder)
    saved = read_description(folder)
    files.read_tensors(folder / saved.tensors_file, saved.sha256)
    tying = TyingConfig(method=saved.method, resolved=saved.resolved, targets=saved.targets, layers=saved.layers)
    return ArmSpec(tying, saved.architecture, saved.seed), saved.base


def stored_params(folder: Path) -> int:
    """How many numbers the tensors' file of a saved arm of another method holds.

    Raises:
        UserError: as `read`.
    """
    saved = read_description(folder)
    return sum(tensor.numel() for tensor in files.read_tensors(folder / saved.tensors_file, saved.sha256).values())


def is_other_method(folder: Path) -> bool:
    """Whether an adapter's folder is of another method than this project's own.

    Raises:
        UserError: it has no readable adapter.json.
    """
    if not (folder / DESCRIPTION).exists():
        raise UserError(f"{folder}: holds no adapter; a study keeps one of each arm; a run's command gives it again")
    return storage.read_json(folder / DESCRIPTION).get("format") == FORMAT
