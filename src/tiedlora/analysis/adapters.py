"""Where the parameters went: norms of the vectors and of the updates by layer, and cosines of updates.

They come from the adapters' files alone, without a model. The method's own loader reads them and folds their parts, so
a part that is added to the method is in every number here. A layer's update is W_l = s B_l A_l with the folded factors.
Norms and cosines come from products of r x r matrices,

    <B1 A1, B2 A2> = sum of (B1' B2) * (A1 A2'),

so no d_out x d_in matrix is formed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiedlora import tying
from tiedlora.analysis.compare import BASELINE
from tiedlora.analysis.groups import RunGroup
from tiedlora.analysis.intervals import Array
from tiedlora.config.adapter_folder import DESCRIPTION
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder

LAYER_VECTORS = tuple(part for part in tying.PARTS if part not in tying.FACTORS)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's folded factors and the sizes of its vectors, read from its file."""

    layers: tuple[int, ...]
    """The numbers of the adapted layers."""
    scale: float
    pairs: dict[str, tuple[Array, Array]]
    """Target -> the folded factors of all layers: (layers, r, d_in) and (layers, d_out, r)."""
    vectors: dict[str, Array]
    """u or v -> (layers,): ||u_l|| / sqrt(r), or ||v_l|| / sqrt(d_out), over all targets. 1 is the usual start."""

    def norms(self) -> Array:
        """(layers,): the Frobenius norm of each layer's update, over all targets together."""
        return self.scale * np.sqrt(np.maximum(_inner(self, self), 0.0))


def _inner(one: SavedAdapter, other: SavedAdapter) -> Array:
    """(layers,): the inner products of the updates of two adapters of the same layers and targets, without scales."""
    sums = np.zeros(len(one.layers))
    for target, (A1, B1) in one.pairs.items():
        A2, B2 = other.pairs[target]
        for place in range(len(one.layers)):
            sums[place] += float(((B1[place].T @ B2[place]) * (A1[place] @ A2[place].T)).sum())
    return sums


def cosines(one: SavedAdapter, other: SavedAdapter) -> Array | None:
    """(layers,): the cosine of the two updates of each layer; NaN where one is zero.

    Returns:
        None if the adapters change other layers or other projections, so that there is nothing to compare.
    """
    sizes = [{name: (A.shape[2], B.shape[1]) for name, (A, B) in adapter.pairs.items()} for adapter in (one, other)]
    if one.layers != other.layers or sizes[0] != sizes[1]:
        return None
    lengths = np.sqrt(np.maximum(_inner(one, one), 0) * np.maximum(_inner(other, other), 0))
    with np.errstate(invalid="ignore"):
        quotients: Array = np.where(lengths > 0, _inner(one, other) / lengths, np.nan)
    return quotients


def read_adapter(run: Path) -> SavedAdapter:
    """The adapter in a run's folder.

    Raises:
        UserError: it is missing, damaged, or not an adapter of this project's method.
    """
    folder = RunFolder(run).adapter
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder}: holds no {DESCRIPTION}")
    # Imported here, because torch takes seconds and a report without adapters needs none.
    from tiedlora.adapter import files

    adapter, _ = files.load(folder)
    adapter.double()
    pairs: dict[str, tuple[Array, Array]] = {}
    squares: dict[str, list[Array]] = {}
    for target in adapter.tying.targets:
        A, B = adapter.folded(target)
        pairs[target] = A.detach().numpy(), B.detach().numpy()
    for parts in adapter.targets.values():
        for name in LAYER_VECTORS:
            # The vectors of a term that leaves out layers have no value there.
            if (vector := getattr(parts, name)) is not None and parts.layers == adapter.layers:
                squares.setdefault(name, []).append((vector.detach().numpy() ** 2).mean(1))
    layers = tuple(adapter.layers)
    sizes = {name: np.sqrt(np.mean(own, 0)) for name, own in squares.items()}
    return SavedAdapter(layers, adapter.scale, pairs, sizes)


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


def layer_profiles(groups: Sequence[RunGroup]) -> LayerProfiles:
    """The profiles of groups of one setting. The comparator is LoRA, at the rank that most groups have if there."""
    usual = Counter(group.rank for group in groups).most_common(1)
    loras = [group for group in groups if group.label == BASELINE]
    lora = min(loras, key=lambda group: group.rank != usual[0][0], default=None)
    found = LayerProfiles([], [], [], [], lora.name if lora is not None else "")
    adapters = {id(group): _adapters(group) for group in groups}
    for group in groups:
        each = adapters[id(group)].values()
        layers = next((one.layers for one in each), ())
        _add(found.u, group, group.name, layers, [one.vectors.get("u") for one in each])
        _add(found.v, group, group.name, layers, [one.vectors.get("v") for one in each])
        _add(found.updates, group, group.name, layers, [one.norms() for one in each])
    if lora is not None and (theirs := adapters[id(lora)]):
        layers = next(iter(theirs.values())).layers
        for group in groups:
            own = adapters[id(group)] if group is not lora else {}
            rows = [cosines(own[seed], theirs[seed]) for seed in own if seed in theirs]
            _add(found.cosines, group, group.name, layers, rows)
        neighbours = itertools.pairwise(theirs[seed] for seed in sorted(theirs))
        rows = [cosines(one, other) for one, other in neighbours]
        _add(found.cosines, lora, f"{lora.name}, two seeds", layers, rows, is_reference=True)
    return found


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
    layers: tuple[int, ...],
    rows: Sequence[Array | None],
    is_reference: bool = False,
) -> None:
    """Add the profile of the rows that have a measure, if any has."""
    if measured := [row for row in rows if row is not None]:
        profiles.append(LayerProfile(group, name, layers, np.array(measured), is_reference))
