"""An adapter's own folder: adapter.json beside adapter.safetensors.

The file holds each tensor that the specification does not give, once: the trained parts and the frozen random parts.
(On request, the seed and a checksum replace the frozen random parts.) Frozen constants are in the specification.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tiedlora import storage
from tiedlora import tying as spec
from tiedlora.adapter.parts import TiedAdapter, check_numbers
from tiedlora.config.adapter_folder import DESCRIPTION
from tiedlora.errors import UserError
from tiedlora.records.reading import typed
from tiedlora.records.run_record import BaseModelRecord, plain
from tiedlora.tying import Architecture, Part, Tying

log = logging.getLogger(__name__)

T = TypeVar("T")
FORMAT = 1
SCALED_FORMAT = 2
"""The format of an adapter with another scaling than the standard one. Earlier versions, which know only the standard
scaling, refuse this number: they would apply another update without a word."""
TENSORS = "adapter.safetensors"
LARGEST_REBUILT = 2**28
"""Most numbers of frozen random parts that a file may leave out: a gigabyte of float32."""
LARGEST_SIZE = 10**6
"""Upper bounds of the sizes in a description. They are far above any model, and keep a damaged file from asking for
huge tensors."""


def checksum(tensor: Tensor) -> str:
    """sha256 of a tensor's float32 values."""
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def save(adapter: TiedAdapter, folder: Path, base: BaseModelRecord, rebuild_frozen: bool = False) -> int:
    """Write the adapter's folder, completely or not at all. Other files of a folder that is there stay.

    Args:
        base: which base model the adapter belongs to. `load` returns it, so that the caller can compare it.
        rebuild_frozen: store the seed and a checksum of the frozen random parts instead of their values.

    Returns:
        The size of the adapter's files in bytes.
    """
    parts, kept = adapter.parts(), stored_parts(adapter, rebuild_frozen)
    rebuilt = {name: checksum(parameter) for name, parameter in parts.items() if name not in kept}
    data = to_bytes({name: parameter.detach().float().cpu().contiguous() for name, parameter in kept.items()})
    description = {
        "format": _format(adapter.scaling),
        "base": plain(base),
        # Without the key `layers` if all layers are adapted, so that earlier versions can read the file.
        "tying": plain(adapter.tying),
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        **({} if adapter.scaling == "standard" else {"scaling": adapter.scaling}),
        "seed": adapter.seed,
        "architecture": asdict(adapter.architecture),
        "rebuilt": rebuilt,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    storage.write_folder(folder, {TENSORS: data, DESCRIPTION: storage.json_bytes(description)})
    return sum((folder / name).stat().st_size for name in (TENSORS, DESCRIPTION))


def stored_parts(adapter: TiedAdapter, rebuild_frozen: bool = False) -> dict[str, nn.Parameter]:
    """`target.part` -> its parameter, for the parts whose values a file holds.

    Args:
        rebuild_frozen: as in `save`.
    """

    def is_stored(part: Part) -> bool:
        return part.trained or (isinstance(part.init, str) and not rebuild_frozen)

    tying = adapter.tying
    return {name: part for name, part in adapter.parts().items() if is_stored(getattr(tying, spec.part_of(name)))}


def _format(scaling: str) -> int:
    return FORMAT if scaling == "standard" else SCALED_FORMAT


@dataclass(frozen=True)
class _Description:
    """The checked content of adapter.json."""

    tying: Tying
    architecture: Architecture
    rank: int
    alpha: float
    scaling: str
    seed: int
    base: BaseModelRecord
    """The base model that the adapter was trained on."""
    rebuilt: dict[str, str]
    """`target.part` -> the checksum of a part that `load` draws from the seed."""
    sha256: str | None
    """The sha256 of the tensors' file."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`target.part` -> its shape, for every part that has a parameter."""
        return {
            f"{target}.{part}": spec.part_shape(self.tying, part, self.rank, self.architecture, target)
            for target in self.tying.targets
            for part in spec.PARTS
            if spec.is_stored(self.tying, part)
        }


def load(folder: Path) -> tuple[TiedAdapter, BaseModelRecord]:
    """Read an adapter. Each tied part is one parameter.

    Returns:
        The adapter (on the CPU) and the base model that it was trained on.

    Raises:
        UserError: a file or a part is damaged, missing, of another shape, or not finite; the message names it.
    """
    description = _read_description(folder / DESCRIPTION)
    path = folder / TENSORS
    if storage.sha256(path) != description.sha256:
        raise UserError(f"{path}: is damaged or was changed (its sha256 is not the one in {DESCRIPTION})")
    in_file = {name: shape for name, shape in description.shapes().items() if name not in description.rebuilt}
    tensors = _read_tensors(path, in_file)
    adapter = TiedAdapter(
        description.tying,
        description.rank,
        description.alpha,
        description.architecture,
        description.seed,
        description.scaling,
    )
    with torch.no_grad():
        for name, parameter in adapter.parts().items():
            if name in tensors:
                parameter.copy_(tensors[name])
            elif checksum(parameter) != description.rebuilt[name]:
                raise UserError(
                    f"{folder}: {name} drawn again from seed {description.seed} is not the part that was trained with "
                    "(another torch version draws other numbers); save with rebuild_frozen=False"
                )
    return adapter, description.base


def _read_description(path: Path) -> _Description:
    tree = storage.read_json(path)
    scaling = tree.get("scaling", "standard")
    if scaling not in spec.SCALINGS:
        raise UserError(f"{path}: scaling={scaling!r:.40}: must be one of {', '.join(spec.SCALINGS)}")
    if tree.get("format") != _format(scaling):
        raise UserError(
            f"{path}: format {tree.get('format')!r} is not {_format(scaling)}, which this version reads "
            f"for {scaling} scaling"
        )
    for key in ("tying", "architecture", "rank", "alpha", "seed"):
        if key not in tree:
            raise UserError(f"{path}: has no '{key}'")
    tying, architecture = _typed(Tying, tree["tying"], path), _typed(Architecture, tree["architecture"], path)
    base, rebuilt = tree.get("base"), tree.get("rebuilt", {})
    if not isinstance(base, dict) or not {"name", "digest"} <= base.keys() or not isinstance(rebuilt, dict):
        raise UserError(f"{path}: base (with name and digest) and rebuilt must be objects")
    rank, alpha, seed = tree["rank"], tree["alpha"], tree["seed"]
    _check_sizes(rank, alpha, seed, architecture, path)
    try:
        spec.check_tying(tying, architecture)
        base_record = typed(BaseModelRecord, {"revision": None, **base})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    description = _Description(
        tying, architecture, rank, float(alpha), scaling, seed, base_record, rebuilt, tree.get("sha256")
    )
    # The size of the file limits the parts in it, but a few bytes of a description could ask for huge rebuilt parts.
    drawn = sum(math.prod(shape) for name, shape in description.shapes().items() if name in rebuilt)
    if drawn > LARGEST_REBUILT:
        raise UserError(f"{path}: {drawn:,} numbers to draw again from the seed, at most {LARGEST_REBUILT:,} are")
    return description


def _typed(kind: type[T], value: object, path: Path) -> T:
    """A part of the description as the dataclass `kind`. Unknown keys, wrong types and interpolations are refused."""
    if "${" in json.dumps(value):
        raise UserError(f"{path}: holds an interpolation (${{...}}); a description may hold only plain values")
    try:
        instance = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), value))
    except (OmegaConfBaseException, TypeError, ValueError, OverflowError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from None
    assert isinstance(instance, kind)
    return instance


def _check_sizes(rank: object, alpha: object, seed: object, architecture: Architecture, path: Path) -> None:
    sizes = [getattr(architecture, name) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")]
    if not all(1 <= size <= LARGEST_SIZE for size in sizes):
        raise UserError(f"{path}: layers={sizes[0]}, hidden={sizes[1]}: not the sizes of a model")
    try:
        check_numbers(rank, alpha, seed)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
                raise UserError(f"{path}: lacks {missing or 'nothing'} and has {extra or 'nothing'} beyond its parts")
            for name, shape in expected.items():
                tensor = file.get_slice(name)
                stored_shape, stored_dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if (stored_shape, stored_dtype) != (shape, "F32"):
                    raise UserError(f"{path}: {name} is {stored_dtype} {stored_shape}, expected F32 {shape}")
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a readable safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds values that are not finite")
    return tensors


def start_from(adapter: TiedAdapter, folder: Path, base: BaseModelRecord) -> None:
    """Copy the values of a saved adapter into `adapter`, so that training starts from them.

    `adapter` must have every part of the saved adapter. It may also have a u or v that the saved adapter lacks, if that
    part starts at one. Then the first step begins at exactly the saved update (for example TAB -> TABuv).

    Args:
        base: the base model of `adapter`.

    Raises:
        UserError: the base model, scale, rank, adapted layers or a shape differs, or only one of the two has a part.
    """
    saved, trained_on = load(folder)
    if (trained_on.name, trained_on.digest) != (base.name, base.digest):
        raise UserError(f"train.init_from={folder}: was trained on {trained_on}, the base model here is {base}")
    if trained_on.quantization != base.quantization:
        log.warning(
            "train.init_from=%s: was trained on a base in %s, the base here is in %s",
            *(folder, *(each.quantization or "full precision" for each in (trained_on, base))),
        )
    if (saved.rank, saved.scale) != (adapter.rank, adapter.scale):
        raise UserError(
            f"train.init_from={folder}: has rank {saved.rank} and alpha {saved.alpha:g}, this run has {adapter.rank} "
            f"and {adapter.alpha:g}; set rank.r, rank.alpha and rank.scaling to the adapter's"
        )
    saved_layers, own_layers = (spec.adapted_layers(each.tying, each.architecture) for each in (saved, adapter))
    if saved_layers != own_layers:
        raise UserError(f"train.init_from={folder}: adapts the layers {saved_layers}; set tying.layers to them")
    for part in ("A", "B"):
        theirs, ours = (
            spec.layers_per_group(getattr(each.tying, part).share, len(own_layers)) for each in (saved, adapter)
        )
        if theirs != ours:
            raise UserError(
                f"train.init_from={folder}: {theirs} layers have one {part} there, and {ours} here; set "
                f"tying.{part}.share to the adapter's"
            )
    own_parts, saved_parts = adapter.parts(), saved.parts()
    for name in sorted(set(own_parts) | set(saved_parts)):
        own, other, part = own_parts.get(name), saved_parts.get(name), spec.part_of(name)
        starts_as_saved = other is not None or getattr(adapter.tying, part).init == spec.PARTS[part].neutral
        if own is None or not starts_as_saved:
            raise UserError(
                f"train.init_from={folder}: {name} is in {'the adapter' if own is None else 'this run'} only; "
                "choose the tying and targets that the adapter was trained with"
            )
        if other is None:
            continue
        if own.shape != other.shape:
            raise UserError(
                f"train.init_from={folder}: {name} is {tuple(other.shape)} there and {tuple(own.shape)} here; "
                "choose the model, targets and shares of the adapter"
            )
        own.data.copy_(other)
