"""From a sweep's command line to its cells. All are composed, checked and resolved before the first one runs.

This module and cell_composer.py are the only ones of the package that import Hydra.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig

from tiedlora import tying
from tiedlora.config import compose
from tiedlora.config.check import check_new_run
from tiedlora.config.explain import readable_errors
from tiedlora.config.project import CONF
from tiedlora.config.sizes import trainable_params
from tiedlora.errors import UserError
from tiedlora.sweeps.cell_composer import CellComposer
from tiedlora.sweeps.cells import Sweep, SweepCell

MOST_CELLS = 100_000
"""A larger grid is a typing mistake: to compose its cells alone would take an hour."""
Composers = dict[tuple[str, ...], CellComposer]
"""Overrides of Hydra's own keys -> the composer of the sweeps that have them."""
_GRID_OVERRIDE = "+grid="
_GRID_NAME = re.compile(r"[\w.-]+")


def compose_sweep(overrides: list[str], composers: Composers | None = None) -> Sweep:
    """The sweep that `train.py --multirun OVERRIDES` would run; for scripts and tests.

    Args:
        composers: those of the sweeps before, so that what the sweeps share is composed once; it gets this sweep's.

    Raises:
        UserError: naming the cell and the key.
    """
    compose.register()
    with readable_errors():
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(CONF), **compose.VERSION_BASE):
            loader = GlobalHydra.instance().config_loader()
            master = loader.load_configuration("config", overrides, run_mode=RunMode.MULTIRUN)
            return expand(master, loader, overrides, composers)


def expand(master: DictConfig, loader: ConfigLoader, overrides: list[str], composers: Composers | None = None) -> Sweep:
    """The cells of a sweep, each once. Cells of the same model and task follow each other.

    Args:
        master: the composed configuration. Its hydra.sweeper.params are the axes of the grids.
        loader: Hydra's config loader.
        overrides: the overrides of the command line. They replace axes of the grids with the same key.
        composers: as for compose_sweep.

    Raises:
        UserError: naming the cell and the key.
    """
    composers = {} if composers is None else composers
    composer = composers.setdefault(tuple(master.hydra.overrides.hydra), CellComposer(master, loader))
    # Hydra does not know the types of a sweeper's keys.
    for key, kind, words in (
        ("params", DictConfig, "a mapping of axes"),
        ("match_lora", bool, "true or false"),
        ("arms", ListConfig, "a list of arms, each a list of words"),
        ("fail_fast", bool, "true or false"),
    ):
        if not isinstance(value := master.hydra.sweeper[key], kind):
            raise UserError(f"hydra.sweeper.{key}={value}: must be {words}")
    match_lora: bool = master.hydra.sweeper.match_lora
    if wrong := [arm for arm in master.hydra.sweeper.arms if not isinstance(arm, ListConfig)]:
        raise UserError(f"hydra.sweeper.arms={wrong[0]!s:.40}: each arm must be a list of words such as [tying=TA]")
    arms = [list(map(str, arm)) for arm in master.hydra.sweeper.arms]
    cells: dict[str, SweepCell] = {}
    for cell_overrides in combinations(master, loader, overrides):
        for cell in _cells(composer, cell_overrides, match_lora, arms):
            cells.setdefault(cell.run_id, cell)
    return Sweep("+".join(_grid_names(overrides)) or "sweep", _grouped(list(cells.values())))


def combinations(master: DictConfig, loader: ConfigLoader, overrides: list[str]) -> list[list[str]]:
    """Every combination of the axes, as overrides. Nothing is composed yet. The arguments are those of `expand`."""
    params = [f"{key}={value}" for key, value in master.hydra.sweeper.params.items()]
    with readable_errors():
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*params, *overrides])
        axes: dict[str, list[str]] = {}
        for override in parsed:
            # A later override replaces an earlier one of the same key, and keeps its place.
            key = override.get_key_element()
            axes[key] = [f"{key}={value}" for value in _values(override)]
    if (count := math.prod(map(len, axes.values()))) > MOST_CELLS:
        raise UserError(f"the grid has {count:,} cells, at most {MOST_CELLS:,} are allowed; shorten an axis")
    return [list(words) for words in itertools.product(*axes.values())]


def _values(override: Override) -> list[str]:
    """The values of an override, as the command line writes them.

    Raises:
        UserError: it is an interval, which only an optimiser can draw from; or it has no value, or too many.
    """
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: give the values one by one, as in train.lr=1e-3,1e-2")
    # A range may be too long to be listed.
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MOST_CELLS + 1))
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}; give the values, as in seed=0,1,2") from None
    if not 0 < len(values) <= MOST_CELLS:
        size = f"more than {MOST_CELLS:,} values" if values else "no value"
        raise UserError(f"{override.input_line}: has {size}, so there is no sweep; give some, as in seed=0,1,2")
    return values


def _cells(
    composer: CellComposer, overrides: list[str], match_lora: bool, arms: list[list[str]]
) -> Iterator[SweepCell]:
    """The cell of one combination, and the cells beside it: its matching LoRA (+grid=matched), and the sweep's arms.

    Raises:
        UserError: naming the cell and the key.
    """
    cell = _cell(composer, overrides)
    yield cell
    if match_lora:
        yield _cell(composer, [*_other_axes(overrides), *_matching_lora(cell)])
    for arm in arms:
        keys = [word.partition("=")[0] for word in arm]
        others = [word for word in _other_axes(overrides) if word.partition("=")[0] not in keys]
        yield _cell(composer, [*others, *arm])


def _other_axes(overrides: list[str]) -> list[str]:
    """The overrides that say nothing about an arm: its tying, its size, and the rates of its parts."""
    return [word for word in overrides if not re.match(r"\+*(tying|rank|budget|train\.lr_factor)\b", word)]


def _cell(composer: CellComposer, overrides: list[str]) -> SweepCell:
    try:
        config = composer.compose(overrides)
        cell = SweepCell(tuple(overrides), config)
        if not cell.folder.result_file.exists():
            check_new_run(config)
    except UserError as error:
        raise UserError(f"cell {' '.join(overrides)}: {error}") from None
    if config.force:
        raise UserError(
            "force=true: a sweep that repeats its finished cells could not be resumed; delete the folders of the "
            "runs to repeat"
        )
    return cell


def _matching_lora(cell: SweepCell) -> list[str]:
    """The words of the LoRA with the nearest trainable count to that of `cell`."""
    count = trainable_params(cell.config) or 0
    return ["tying=LoRA", f"rank.r={tying.nearest_lora_rank(count, cell.config.model.architecture)}"]


def _grid_names(overrides: list[str]) -> list[str]:
    """The names in +grid=NAME and '+grid=[NAME,NAME]'."""
    values = [override.removeprefix(_GRID_OVERRIDE) for override in overrides if override.startswith(_GRID_OVERRIDE)]
    return [name for value in values for name in _GRID_NAME.findall(value)]


def _grouped(cells: list[SweepCell]) -> list[SweepCell]:
    """Sort the cells by base model and task, so that consecutive cells load what they share only once."""
    places: dict[str, int] = {}

    def place(*shared: object) -> int:
        """The number of what cells share, in the order in which it is first seen."""
        return places.setdefault(repr(shared), len(places))

    def both(cell: SweepCell) -> tuple[int, int]:
        return place(cell.config.model, cell.config.train.dtype), place(cell.config.task)

    return sorted(cells, key=both)
