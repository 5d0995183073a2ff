"""An adapter's own folder: adapter.json beside adapter.safetensors.

The tensors are those that cannot be rebuilt, each once: the trained parts, and the frozen random ones
(or, when asked, only the latter's seed and checksum). Frozen constants are in the specification.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from tiedlora import storage
from tiedlora import tying as spec
from tiedlora.adapter.parts import TiedAdapter
from tiedlora.config.adapter_folder import DESCRIPTION
from tiedlora.errors import UserError
from tiedlora.records.reading import is_number, typed
from tiedlora.records.run_record import BaseModelRecord, plain
from tiedlora.tying import Architecture, Tying

FORMAT = 1
TENSORS = "adapter.safetensors"
LARGEST_REBUILT = 2**28
"""Numbers of the frozen random parts that a file may leave out: a gigabyte."""


def checksum(tensor: Tensor) -> str:
    """sha256 of a tensor's float32 values."""
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def save(adapter: TiedAdapter, folder: Path, base: BaseModelRecord, rebuild_frozen: bool = False) -> int:
    """Write the adapter; the folder appears whole or not at all.

    Args:
        base: which base model the adapter belongs to, for the check at loading.
        rebuild_frozen: leave out frozen random parts and keep their seed and checksum instead.

    Returns:
        Bytes of the folder.
    """
    stored, rebuilt = {}, {}
    for name, parameter in adapter.parts().items():
        part = getattr(adapter.tying, spec.part_of(name))
        if part.trained or (isinstance(part.init, str) and not rebuild_frozen):
            stored[name] = parameter.detach().float().cpu().contiguous()
        else:
            rebuilt[name] = checksum(parameter)
    data = to_bytes(stored)
    description = {
        "format": FORMAT,
        "base": plain(base),
        "tying": asdict(adapter.tying),
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "seed": adapter.seed,
        "architecture": asdict(adapter.architecture),
        "rebuilt": rebuilt,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    with storage.new_folder(folder) as beside:
        (beside / TENSORS).write_bytes(data)
        storage.write_json(beside / DESCRIPTION, description)
    return sum(file.stat().st_size for file in folder.iterdir())


def load(folder: Path) -> tuple[TiedAdapter, BaseModelRecord]:
    """Read an adapter back, tied parts as one parameter again.

    Returns:
        The adapter (on the CPU) and the base model that it was trained on.

    Raises:
        UserError: naming the file and the part that is damaged, missing, of another shape or not finite.
    """
    description = storage.read_json(folder / DESCRIPTION)
    tying, rank, alpha, seed, architecture = _described(description, folder / DESCRIPTION)
    path = folder / TENSORS
    if storage.sha256(path) != description.get("sha256"):
        raise UserError(f"{path}: is damaged or was changed (its sha256 is not the one in {DESCRIPTION})")
    expected = {
        f"{target}.{part}": spec.part_shape(tying, part, rank, architecture, target)
        for target in tying.targets
        for part in spec.PARTS
        if spec.is_stored(tying, part)
    }
    rebuilt = description.get("rebuilt", {})
    tensors = _read_tensors(path, {name: shape for name, shape in expected.items() if name not in rebuilt})
    adapter = TiedAdapter(tying, rank, alpha, architecture, seed)
    with torch.no_grad():
        for name, parameter in adapter.parts().items():
            if name in tensors:
                parameter.copy_(tensors[name])
            elif checksum(parameter) != rebuilt[name]:
                raise UserError(
                    f"{folder}: {name} rebuilt from seed {seed} is not the one that was trained with "
                    "(another torch version draws other numbers); save with rebuild_frozen=False"
                )
    return adapter, typed(BaseModelRecord, {"revision": None, **description["base"]})


def _described(description: dict[str, Any], path: Path) -> tuple[Tying, int, float, int, Architecture]:
    if description.get("format") != FORMAT:
        raise UserError(f"{path}: format {description.get('format')!r} is not {FORMAT}, which this version reads")
    if "${" in json.dumps([description.get("tying"), description.get("architecture")]):
        raise UserError(f"{path}: holds an interpolation (${{...}}); a description has plain values alone")
    try:
        tying, architecture = (
            OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), description[key]))
            for kind, key in ((Tying, "tying"), (Architecture, "architecture"))
        )
        rank, alpha, seed = description["rank"], description["alpha"], description["seed"]
    except KeyError as error:
        raise UserError(f"{path}: has no {error}") from None
    except (OmegaConfBaseException, TypeError, ValueError, OverflowError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from None
    assert isinstance(tying, Tying)
    assert isinstance(architecture, Architecture)
    try:
        spec.check(tying, architecture)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    sizes = [getattr(architecture, name) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")]
    if type(rank) is not int or not 1 <= rank <= 65536 or not all(1 <= size <= 10**6 for size in sizes):
        raise UserError(f"{path}: rank={rank!r:.40}, layers={sizes[0]}, hidden={sizes[1]}: not the sizes of an adapter")
    if type(seed) is not int or not is_number(alpha) or not 1e-12 <= alpha <= 1e12:
        raise UserError(f"{path}: seed={seed!r:.40}, alpha={alpha!r:.40}: must be a whole and a positive number")
    base, rebuilt = description.get("base"), description.get("rebuilt", {})
    if not isinstance(base, dict) or not {"name", "digest"} <= base.keys() or not isinstance(rebuilt, dict):
        raise UserError(f"{path}: base (with name and digest) and rebuilt must be objects")
    # The file's own parts are as large as the file; rebuilt ones are as large as a few bytes say.
    drawn = sum(
        math.prod(spec.part_shape(tying, part, rank, architecture, target))
        for target in tying.targets
        for part in spec.PARTS
        if f"{target}.{part}" in rebuilt
    )
    if drawn > LARGEST_REBUILT:
        raise UserError(f"{path}: {drawn:,} numbers to rebuild from the seed, at most {LARGEST_REBUILT:,} are")
    return tying, rank, float(alpha), seed, architecture


def _read_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
                raise UserError(f"{path}: lacks {missing or 'nothing'} and has {extra or 'nothing'} beyond its parts")
            for name, shape in expected.items():
                found = file.get_slice(name)
                if tuple(found.get_shape()) != shape or found.get_dtype() != "F32":
                    raise UserError(
                        f"{path}: {name} is {found.get_dtype()} {tuple(found.get_shape())}, expected F32 {shape}"
                    )
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a readable safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds values that are not finite")
    return tensors


def start_from(adapter: TiedAdapter, folder: Path, base: BaseModelRecord) -> None:
    """Give `adapter` the values of a saved one, so that training goes on from there.

    Parts of the saved adapter must have their place here. u and v that it lacks are ones there, and must start at one
    here: then the first step begins at exactly the saved update (TAB -> TABuv, for instance).

    Args:
        base: what the base model is now.

    Raises:
        UserError: another base model, scale, rank or shape, or a part without a place.
    """
    saved, trained_on = load(folder)
    if (trained_on.name, trained_on.digest) != (base.name, base.digest):
        raise UserError(f"train.init_from={folder}: was trained on {trained_on}, the base model here is {base}")
    if (saved.rank, saved.scale) != (adapter.rank, adapter.scale):
        raise UserError(
            f"train.init_from={folder}: has rank {saved.rank} and alpha {saved.alpha:g}, this run has {adapter.rank} "
            f"and {adapter.alpha:g}; set rank.r and rank.alpha to the adapter's"
        )
    ours, theirs = adapter.parts(), saved.parts()
    for name in sorted(set(ours) | set(theirs)):
        part = getattr(adapter.tying, spec.part_of(name))
        if name not in ours or (name not in theirs and part.init != spec.PARTS[spec.part_of(name)].neutral):
            raise UserError(
                f"train.init_from={folder}: {name} is in {'the adapter' if name in theirs else 'this run'} alone; "
                "choose the tying and targets that the adapter was trained with"
            )
        if name in theirs:
            if ours[name].shape != theirs[name].shape:
                raise UserError(
                    f"train.init_from={folder}: {name} is {tuple(theirs[name].shape)} there and "
                    f"{tuple(ours[name].shape)} here; choose the model, targets and shares of the adapter"
                )
            ours[name].data.copy_(theirs[name])
