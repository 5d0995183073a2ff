"""From a sweep's command line to its cells: every one composed, checked and resolved before any is run.

Beside train.py, config.py and the plugins, this file alone knows Hydra.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, flag_override

from tiedlora import tying
from tiedlora.config import compose
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.sweeps.sweep import Cell, Sweep

_WORD = re.compile(r"[\w.-]+")


def compose_sweep(overrides: list[str]) -> Sweep:
    """What `train.py --multirun OVERRIDES` would run; for scripts and tests.

    Raises:
        UserError: naming the cell and the key.
    """
    compose.register()
    with compose.readable_errors():
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(compose.CONF), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            master = loader.load_configuration("config", overrides, run_mode=RunMode.MULTIRUN)
            return expand(master, loader, overrides)


def expand(master: DictConfig, loader: Any, overrides: list[str]) -> Sweep:
    """The cells of a sweep, each once, those of one model and task beside each other.

    Args:
        master: the composed configuration; its hydra.sweeper.params are the axes of the grids.
        loader: Hydra's config loader.
        overrides: the command line's, which win over the grids' axes of the same key.

    Raises:
        UserError: naming the cell and the key.
    """
    rows = product(master, loader, overrides)

    def composed(row: list[str]) -> Config:
        try:
            with compose.readable_errors():
                whole = loader.load_sweep_config(master, row)
                # Hydra's own part is the launcher's business, and has values that are missing by design.
                with flag_override(whole, ["struct", "readonly"], False):
                    del whole["hydra"]
                return compose.load(whole)
        except UserError as error:
            raise UserError(f"cell {' '.join(row)}: {error}") from None

    cells: dict[str, Cell] = {}
    for row in rows:
        chosen = composed(row)
        found = [Cell(tuple(row), chosen)]
        if master.hydra.sweeper.match_lora:
            found.append(_matching_lora(row, chosen, composed))
        for cell in found:
            if cell.config.force:
                raise UserError(
                    "force=true: a sweep that repeats what is finished cannot be resumed; delete those folders"
                )
            cells.setdefault(cell.run_id, cell)
    grids = [word for override in overrides if override.startswith("+grid=") for word in _WORD.findall(override[6:])]
    return Sweep("+".join(grids) or "sweep", _grouped(list(cells.values())))


def product(master: DictConfig, loader: Any, overrides: list[str]) -> list[list[str]]:
    """Every combination of the axes, as overrides, nothing composed yet. The arguments are those of `expand`."""
    params = [f"{key}={value}" for key, value in master.hydra.sweeper.params.items()]
    with compose.readable_errors():
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*params, *overrides])
        (rows,) = BasicSweeper.split_arguments(parsed, None)
    return rows


def _matching_lora(row: list[str], chosen: Config, composed: Callable[[list[str]], Config]) -> Cell:
    """The LoRA cell of nearest trainable count on the same base model, else as `row`."""
    count = tying.trainable_params(chosen.tying, chosen.rank.r, chosen.model.architecture)
    rank = tying.nearest_lora_rank(count, chosen.model.architecture)
    shared = [override for override in row if override.split("=")[0].split(".")[0] not in ("tying", "rank")]
    matching = [*shared, "tying=LoRA", f"rank.r={rank}"]
    return Cell(tuple(matching), composed(matching))


def _grouped(cells: list[Cell]) -> list[Cell]:
    """Cells of one base model, then of one task, beside each other: what they share is loaded once."""
    models: list[Any] = []
    tasks: list[Any] = []

    def place(cell: Cell) -> tuple[int, int]:
        found = []
        for seen, key in ((models, (cell.config.model, cell.config.train.dtype)), (tasks, cell.config.task)):
            if key not in seen:
                seen.append(key)
            found.append(seen.index(key))
        return found[0], found[1]

    return sorted(cells, key=place)
