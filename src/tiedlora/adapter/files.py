"""An adapter's own folder: adapter.json beside adapter.safetensors.

The file holds each tensor that the specification does not give, once: the trained parts and the frozen random parts.
Frozen constants are in the specification.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from tiedlora import storage
from tiedlora import tying as spec
from tiedlora.adapter.parts import TiedAdapter, check_specification
from tiedlora.description import DESCRIPTION, BaseModelRecord
from tiedlora.errors import UserError
from tiedlora.reading import StoredNumber, StoredText, StoredWhole, plain, typed
from tiedlora.tying import Architecture, Part, Tying

log = logging.getLogger(__name__)

FORMATS = {"standard": 1, "rslora": 2}
"""Scaling -> the format of an adapter. Earlier versions, which know only the standard scaling, refuse the other number:
they would apply another update without a word."""
TENSORS = "adapter.safetensors"
UNKNOWN_BASE = "%s: was saved by a program that did not say which weights its base had (%s), so they are not compared"


def save(adapter: TiedAdapter, folder: Path, base: BaseModelRecord) -> int:
    """Write the adapter's folder, completely or not at all. Other files of a folder that is there stay.

    Args:
        base: which base model the adapter belongs to. `load` returns it, so that the caller can compare it.

    Returns:
        The size of the adapter's files in bytes.
    """
    kept = stored_parts(adapter)
    data = to_bytes({name: parameter.detach().float().cpu().contiguous() for name, parameter in kept.items()})
    description = {
        "format": FORMATS[adapter.scaling],
        "base": plain(base),
        # Without the key `layers` if all layers are adapted, so that earlier versions can read the file.
        "tying": {"name": adapter.tying.name, **plain(adapter.tying)},
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        **({} if adapter.scaling == "standard" else {"scaling": adapter.scaling}),
        "seed": adapter.seed,
        "architecture": asdict(adapter.architecture),
        # Earlier versions ask for the sha256 of each part that the file leaves out, and train.init_digest has it.
        "rebuilt": {
            name: hashlib.sha256(part.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
            for name, part in adapter.parts().items()
            if name not in kept
        },
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    contents = {TENSORS: data, DESCRIPTION: storage.json_bytes(description)}
    storage.write_folder(folder, contents)
    return sum(map(len, contents.values()))


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file from the tensors' own memory. The library's `save` would copy all of them twice."""
    # The library lets nobody else read the file, whatever the umask says.
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def stored_parts(adapter: TiedAdapter) -> dict[str, nn.Parameter]:
    """`target.part` -> its parameter, for the parts whose values a file holds."""
    return {name: part for name, part in adapter.parts().items() if is_in_file(adapter.specification(name))}


def is_in_file(part: Part) -> bool:
    """A frozen constant is in the specification."""
    return part.trained or isinstance(part.init, str)


@dataclass(frozen=True)
class _Description:
    """What is read of adapter.json."""

    format: StoredWhole
    base: BaseModelRecord
    """The base model that the adapter was trained on."""
    tying: Tying
    rank: StoredWhole
    alpha: StoredNumber
    seed: StoredWhole
    architecture: Architecture
    sha256: StoredText
    """The sha256 of the tensors' file."""
    scaling: StoredText = "standard"


def load(folder: Path) -> tuple[TiedAdapter, BaseModelRecord]:
    """Read an adapter. Each tied part is one parameter.

    Returns:
        The adapter (on the CPU) and the base model that it was trained on.

    Raises:
        UserError: a file or a part is damaged, missing, of another shape, or not finite; the message names it.
    """
    path, tree = folder / TENSORS, storage.read_json(folder / DESCRIPTION)
    try:
        if "method" in tree:
            raise UserError("describes an arm of another method, which has no parts A, B, u and v")
        saved = typed(_Description, tree, "an adapter's description")
        check_specification(
            saved.tying, saved.rank, saved.alpha, saved.architecture, seed=saved.seed, scaling=saved.scaling
        )
        if saved.format != (known := FORMATS[saved.scaling]):
            raise UserError(
                f"format {saved.format} is not {known}, which this version reads for {saved.scaling} scaling"
            )
    except UserError as error:
        raise UserError(f"{folder / DESCRIPTION}: {error}") from None
    # Before the parts are made: a few bytes of a description can ask for more memory than there is.
    parts, tensors = spec.parts(saved.tying, saved.rank, saved.architecture), read_tensors(path, saved.sha256)
    expected = {name: f"{torch.float32} {shape}" for name, part, shape in parts if is_in_file(part)}
    stored = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}
    for name in sorted({*expected, *stored}):
        if (found := stored.get(name, "missing")) != (asked := expected.get(name, "no part")):
            raise UserError(f"{path}: {name} is {found}, expected {asked}")
    adapter = TiedAdapter(
        saved.tying, saved.rank, saved.alpha, saved.architecture, seed=saved.seed, scaling=saved.scaling
    )
    with torch.no_grad():
        for name, part in stored_parts(adapter).items():
            part.copy_(tensors[name])
    return adapter, saved.base


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: the file is missing, has another sha256, is damaged, or holds values that are not finite.
    """
    data = storage.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path}: is damaged or was changed (its sha256 is not the one in {DESCRIPTION})")
    try:
        tensors = from_bytes(data)
    except SafetensorError as error:
        raise UserError(f"{path}: is not a readable safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds values that are not finite")
    return tensors


def start_from(adapter: TiedAdapter, folder: Path, base: BaseModelRecord) -> None:
    """Copy the values of a saved adapter into `adapter`, so that training starts from them.

    `adapter` must have every part of the saved adapter. It may also have a u or v that the saved adapter lacks, if that
    part starts at one. Then the first step begins at exactly the saved update (for example TAB -> TABuv_b0).

    Args:
        base: the base model of `adapter`.

    Raises:
        UserError: the base model, scale, rank, adapted layers or a shape differs, or only one of the two has a part.
    """
    saved, trained_on = load(folder)
    _check_base(folder, trained_on, base, (saved.architecture, adapter.architecture))
    # If the terms have other names, the lists differ in length, and the names come first.
    for (key, theirs), (_, ours) in zip(_comparable(saved), _comparable(adapter), strict=False):
        if theirs != ours:
            raise UserError(f"train.init_from={folder}: {key} is {theirs} there, and {ours} here; set it as there")
    own_parts, saved_parts = adapter.parts(), saved.parts()
    for name in sorted(set(own_parts) | set(saved_parts)):
        own, other = own_parts.get(name), saved_parts.get(name)
        if other is None and adapter.specification(name).init == spec.PARTS[spec.part_of(name)].neutral:
            continue
        if own is None or other is None or own.shape != other.shape:
            theirs, ours = ("missing" if part is None else tuple(part.shape) for part in (other, own))
            raise UserError(
                f"train.init_from={folder}: {name} is {theirs} there, and {ours} here; choose the model, tying and "
                "targets that the adapter was trained with"
            )
        if not is_in_file(adapter.specification(name)) and not torch.equal(own, other):
            # The saved adapter would have the constant.
            part = spec.part_of(name)
            raise UserError(
                f"train.init_from={folder}: {name} has other values there, and is a frozen constant here; set "
                f"tying.{part}.trained=true, or take the constant of the saved adapter"
            )
        own.data.copy_(other)


def _check_base(
    folder: Path, trained_on: BaseModelRecord, base: BaseModelRecord, architectures: tuple[Architecture, Architecture]
) -> None:
    """Refuse a start from an adapter of another base model.

    Args:
        architectures: those of the saved adapter and of the one here.
    """
    if trained_on.digest is None and trained_on != base:
        # A program made the model, and did not say which weights it has.
        log.warning(UNKNOWN_BASE, f"train.init_from={folder}", trained_on.name)
        if other := other_architecture(*architectures):
            raise UserError(f"train.init_from={folder}: {other}")
    elif (trained_on.name, trained_on.digest) != (base.name, base.digest):
        raise UserError(f"train.init_from={folder}: was trained on {trained_on}, the base model here is {base}")
    elif trained_on.quantization != base.quantization:
        log.warning(
            "train.init_from=%s: was trained on a base in %s, the base here is in %s",
            folder,
            *(each.quantization or "full precision" for each in (trained_on, base)),
        )


def other_architecture(expected: Architecture, actual: Architecture) -> str | None:
    """In what a model differs from the one that an adapter was made for, in words; None if the adapter fits."""
    for name in ("family", "layers", "hidden", "heads", "kv_heads", "head_dim"):
        if (theirs := getattr(expected, name)) != (here := getattr(actual, name)):
            return f"the adapter is for a model with {name}={theirs}, this model has {name}={here}"
    return None


def _comparable(adapter: TiedAdapter) -> list[tuple[str, object]]:
    """(key, value): what two adapters of one base must have in common, so that each part has the same effect."""
    terms = spec.terms(adapter.tying)
    values: list[tuple[str, object]] = [
        ("tying.terms", list(terms)),
        ("rank.r", adapter.rank),
        ("the scale (rank.alpha, rank.scaling)", adapter.scale),
    ]
    for name, term in terms.items():
        key, layers = f"tying.terms.{name}" if name else "tying", spec.adapted_layers(term, adapter.architecture)
        own_scale = spec.term_scale(term, adapter.alpha, adapter.rank, adapter.scaling, adapter.architecture)
        values += [(f"{key}.layers", layers), (f"the scale of {key} (own_scale)", own_scale)]
        for part in spec.FACTORS:
            sharing = spec.layers_per_group(getattr(term, part).share, len(layers))
            values.append((f"{key}.{part}.share (the layers that share one)", sharing))
    return values
