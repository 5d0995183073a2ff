"""Where the parameters went: norms of the vectors and of the updates by layer, and cosines of updates.

They come from the adapters' files alone, without torch or a model. A layer's update is W_l = s B_l A_l with the folded
factors A_l = diag(u_l) A and B_l = diag(v_l) B. Norms and cosines come from products of r x r matrices,

    <B1 A1, B2 A2> = sum of (B1' B2) * (A1 A2'),

so no d_out x d_in matrix is formed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tiedlora import storage, tying
from tiedlora.analysis.compare import BASELINE
from tiedlora.analysis.groups import RunGroup
from tiedlora.config.adapter_folder import DESCRIPTION
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder

Array = NDArray[np.float64]
TENSORS = "adapter.safetensors"
LARGEST_BYTES = 2**29
"""Larger files are not read: a report must not need more memory than the runs that it is about."""


@dataclass(frozen=True)
class Target:
    """The parts of one target. Factors have a first axis of groups of layers, vectors one of layers."""

    A: Array
    B: Array
    u: Array | None
    v: Array | None
    share_of_A: int
    """How many consecutive layers share one A."""
    share_of_B: int

    def pair(self, place: int) -> tuple[Array, Array]:
        """The folded factors (r, d_in) and (d_out, r) of one adapted layer."""
        A, B = self.A[place // self.share_of_A], self.B[place // self.share_of_B]
        if self.u is not None:
            A = self.u[place][:, None] * A
        if self.v is not None:
            B = self.v[place][:, None] * B
        return A, B


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's parts, read from its file."""

    layers: tuple[int, ...]
    """The numbers of the adapted layers."""
    scale: float
    targets: dict[str, Target]

    def norms(self) -> Array:
        """(layers,): the Frobenius norm of each layer's update, over all targets together."""
        return self.scale * np.sqrt(np.maximum(_inner(self, self), 0.0))

    def vector_rms(self, part: str) -> Array | None:
        """(layers,): ||u_l|| / sqrt(r), or ||v_l|| / sqrt(d_out); None without such a vector. 1 is its usual start."""
        squares = [
            (vector**2).mean(1)
            for target in self.targets.values()
            if (vector := {"u": target.u, "v": target.v}[part]) is not None
        ]
        return np.sqrt(np.mean(squares, 0)) if squares else None


def _inner(one: SavedAdapter, other: SavedAdapter) -> Array:
    """(layers,): the inner products of the updates of two adapters of the same layers and targets, without scales."""
    sums = np.zeros(len(one.layers))
    for name, target in one.targets.items():
        for place in range(len(one.layers)):
            (A1, B1), (A2, B2) = target.pair(place), other.targets[name].pair(place)
            sums[place] += float(((B1.T @ B2) * (A1 @ A2.T)).sum())
    return sums


def cosines(one: SavedAdapter, other: SavedAdapter) -> Array | None:
    """(layers,): the cosine of the two updates of each layer; NaN where one is zero.

    Returns:
        None if the adapters change other layers or other projections, so that there is nothing to compare.
    """
    sizes = [{name: (t.A.shape[2], t.B.shape[1]) for name, t in adapter.targets.items()} for adapter in (one, other)]
    if one.layers != other.layers or sizes[0] != sizes[1]:
        return None
    lengths = np.sqrt(np.maximum(_inner(one, one), 0) * np.maximum(_inner(other, other), 0))
    with np.errstate(invalid="ignore"):
        quotients: Array = np.where(lengths > 0, _inner(one, other) / lengths, np.nan)
    return quotients


def read_adapter(run: Path) -> SavedAdapter:
    """The adapter in a run's folder.

    Raises:
        UserError: there is no file, it is not an adapter of this project, or a random part was not stored.
    """
    folder = RunFolder(run).adapter
    tensors = folder / TENSORS
    if not tensors.is_file() or tensors.is_symlink():
        raise UserError(f"{folder}: holds no {TENSORS}")
    if tensors.stat().st_size > LARGEST_BYTES:
        raise UserError(f"{tensors}: is larger than {LARGEST_BYTES:,} bytes, which the report does not read")
    tree = storage.read_json(folder / DESCRIPTION)
    try:
        return _adapter(tree, load_file(tensors))
    except (SafetensorError, OmegaConfBaseException, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{folder}: is not an adapter that the report can read ({error!r:.80})") from None


def _adapter(tree: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> SavedAdapter:
    specification: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(tying.Tying), tree["tying"]))
    architecture: Any = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(tying.Architecture), tree["architecture"])
    )
    layers = tuple(tying.adapted_layers(specification, architecture))
    targets = {}
    for target in specification.targets:
        parts: dict[str, Array | None] = {}
        for part in tying.PARTS:
            shape = tying.part_shape(specification, part, int(tree["rank"]), architecture, target)
            parts[part] = _part(specification, part, tensors.get(f"{target}.{part}"), shape)
        A, B = parts["A"], parts["B"]
        if A is None or B is None:
            raise ValueError(f"{target}: a random part is not in the file")
        share_of_A, share_of_B = (
            tying.layers_per_group(getattr(specification, factor).share, len(layers)) for factor in ("A", "B")
        )
        targets[target] = Target(A, B, parts["u"], parts["v"], share_of_A, share_of_B)
    scale = tying.scale(float(tree["alpha"]), int(tree["rank"]), tree.get("scaling", "standard"))
    return SavedAdapter(layers, scale, targets)


def _part(specification: Any, part: str, tensor: NDArray[Any] | None, shape: tuple[int, ...]) -> Array | None:
    """The part's values; None if it is a vector that changes nothing, or a random factor that was not stored."""
    if tensor is not None:
        if tensor.shape != shape or not np.isfinite(tensor).all():
            raise ValueError(f"{part} is {tensor.shape} and not {shape}, or not finite")
        return tensor.astype(np.float64)
    init = getattr(specification, part).init
    if not tying.is_stored(specification, part) or isinstance(init, str):
        return None
    return np.full(shape, float(init))


@dataclass(frozen=True)
class LayerProfile:
    """One number for each layer, for several seeds or pairs of seeds of one group."""

    group: RunGroup
    name: str
    layers: tuple[int, ...]
    values: Array
    """(seeds, layers)."""
    is_reference: bool = False
    """Whether it shows what to compare the others with."""


@dataclass(frozen=True)
class LayerProfiles:
    """What is known about the layers of one setting's groups."""

    u: list[LayerProfile]
    v: list[LayerProfile]
    updates: list[LayerProfile]
    cosines: list[LayerProfile]
    """With LoRA's update at the same seed. The reference is LoRA with itself at another seed."""
    compared_with: str
    """The name of the group in `cosines`."""
    unread: list[str]
    """Groups without a file that can be read."""


def comparator(groups: Sequence[RunGroup]) -> RunGroup | None:
    """LoRA, whose updates the others are compared with; of several, the one at the rank that most groups have."""
    usual = Counter(group.rank for group in groups).most_common(1)
    loras = [group for group in groups if group.label == BASELINE]
    return min(loras, key=lambda group: group.rank != usual[0][0], default=None)


def layer_profiles(groups: Sequence[RunGroup]) -> LayerProfiles:
    """The profiles of groups of one setting."""
    lora = comparator(groups)
    adapters: dict[int, dict[int, SavedAdapter]] = {}
    found = LayerProfiles([], [], [], [], lora.name if lora is not None else "", [])
    for group in groups:
        adapters[id(group)] = own = _adapters(group)
        if not own:
            found.unread.append(group.name)
            continue
        for profiles, measure in ((found.u, _rms("u")), (found.v, _rms("v")), (found.updates, SavedAdapter.norms)):
            _add(profiles, group, group.name, own.values(), measure)
    if lora is not None and (theirs := adapters.get(id(lora))):
        for group in groups:
            own = adapters[id(group)]
            pairs = [(own[seed], theirs[seed]) for seed in own if seed in theirs and group is not lora]
            _add(found.cosines, group, group.name, pairs, lambda pair: cosines(*pair))
        seeds = sorted(theirs)
        neighbours = [(theirs[one], theirs[other]) for one, other in itertools.pairwise(seeds)]
        name = f"{lora.name}, two seeds"
        _add(found.cosines, lora, name, neighbours, lambda pair: cosines(*pair), is_reference=True)
    return found


def _rms(part: str) -> Callable[[SavedAdapter], Array | None]:
    return lambda adapter: adapter.vector_rms(part)


def _adapters(group: RunGroup) -> dict[int, SavedAdapter]:
    """Seed -> its adapter, for the seeds whose file can be read and that adapt the same layers as the first."""
    found: dict[int, SavedAdapter] = {}
    for run in group.runs:
        try:
            adapter = read_adapter(run.path)
        except UserError:
            continue
        first = next(iter(found.values()), adapter)
        if adapter.layers == first.layers:
            found[run.seed] = adapter
    return found


def _add(
    profiles: list[LayerProfile],
    group: RunGroup,
    name: str,
    items: Any,
    measure: Callable[[Any], Array | None],
    is_reference: bool = False,
) -> None:
    """Add the profile of the items that have the measure, if any has."""
    rows = [(item, row) for item in items if (row := measure(item)) is not None]
    if rows:
        first = rows[0][0][0] if isinstance(rows[0][0], tuple) else rows[0][0]
        profiles.append(LayerProfile(group, name, first.layers, np.array([row for _, row in rows]), is_reference))
