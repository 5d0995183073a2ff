"""Compose many cells at the price of a few: each section of the configuration is composed once for each of its values.

Hydra needs a tenth of a second for a configuration. But the cells of a grid share their parts. `train.lr=1e-3` changes
the section `train` and nothing else, so the section is the same in every cell with this rate. This module composes one
configuration for the overrides of each section, always with Hydra, and puts the sections together. Where sections may
depend on each other, Hydra composes the cell as a whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tiedlora.config import compose
from tiedlora.config.explain import readable_errors
from tiedlora.config.schema import Config
from tiedlora.errors import UserError

SECTIONS = tuple(field.name for field in fields(Config))
_REFERENCE = re.compile(r"\$\{(?!oc\.env:|project:)")
"""An interpolation that may read another section. The two resolvers read the environment and the project's folder."""


@dataclass(frozen=True)
class _Composed:
    """One composition of Hydra."""

    config: Config
    """Typed, and not completed yet."""
    raw: dict[Any, Any]
    """The same values with their interpolations."""
    choices: dict[Any, Any]
    """Group -> option."""


class CellComposer:
    """Composes the cells of one sweep. The cells share their sections, so nobody may change a section in place.

    Args:
        master: the composed configuration of the sweep.
        loader: Hydra's config loader.
    """

    def __init__(self, master: DictConfig, loader: ConfigLoader) -> None:
        self.master, self.loader = master, loader
        self._hydra_overrides = list(master.hydra.overrides.hydra)
        self._section_of = cache(self._find_section)
        self._files_of = cache(self._list_files)
        self._composition = cache(self._compose)
        self._section_config = cache(self._compose_section)

    def compose(self, overrides: list[str]) -> Config:
        """The configuration that Hydra composes from these overrides, completed and checked.

        Raises:
            UserError: one line that names the key.
        """
        try:
            named = [(self._section_of(override), override) for override in overrides]
        except UserError:
            return self.compose_whole(overrides)
        values = {}
        for section in SECTIONS:
            own = tuple(override for name, override in named if name in (section, None))
            config = self._section_config(section, own)
            if config is None:
                return self.compose_whole(overrides)
            values[section] = getattr(config, section)
        return compose.complete(Config(**values))

    def compose_whole(self, overrides: list[str]) -> Config:
        """As `compose`, but Hydra composes the cell in one piece.

        Raises:
            UserError: one line that names the key.
        """
        composed = self._load(overrides)
        del composed["hydra"]
        return compose.complete(compose.typed(composed))

    def _find_section(self, override: str) -> str | None:
        """The only section that an override can change; None for +grid=... and others that may change any section."""
        with readable_errors():
            (parsed,) = OverridesParser.create().parse_overrides([override])
        name = re.split(r"[./]", parsed.key_or_group)[0]
        return name if name in SECTIONS and parsed.package is None else None

    def _compose_section(self, section: str, own: tuple[str, ...]) -> Config | None:
        """A configuration that has the right values in one section; None if the section may depend on others.

        Args:
            own: the overrides that can change the section.
        """
        without = tuple(override for override in own if self._section_of(override) is None)
        composed, shared = self._composition(own), self._composition(without)
        # A section that a word such as ~seed has taken away has its default only in the whole configuration.
        if shared is None or composed is None or section not in composed.raw:
            return None
        if _REFERENCE.search(str(composed.raw[section])):
            return None
        # An option may have a defaults list or a @package line, and so change other sections.
        if composed.choices != shared.choices:
            outside = [
                [(path, package) for path, package in self._files_of(overrides) if package.split(".")[0] != section]
                for overrides in (own, without)
            ]
            if outside[0] != outside[1]:
                return None
        return composed.config

    def _list_files(self, overrides: tuple[str, ...]) -> list[tuple[str, str]]:
        """Path and package of the files that Hydra merges, in their order."""
        with readable_errors():
            listed = self.loader.compute_defaults_list(
                self.master.hydra.job.config_name, [*self._hydra_overrides, *overrides], RunMode.RUN
            )
        return [(str(entry.config_path), str(entry.package)) for entry in listed.defaults]

    def _compose(self, overrides: tuple[str, ...]) -> _Composed | None:
        """What Hydra composes from these overrides; None if they are not a configuration without the others."""
        try:
            composed = self._load(list(overrides))
            choices = OmegaConf.to_container(composed.pop("hydra").runtime.choices)
            raw = OmegaConf.to_container(composed, resolve=False)
            config = compose.typed(composed)
        except UserError:
            # The composition of the whole cell succeeds, or it reports the error with its right words.
            return None
        assert isinstance(raw, dict)
        assert isinstance(choices, dict)
        return _Composed(config, raw, choices)

    def _load(self, overrides: list[str]) -> DictConfig:
        with readable_errors():
            composed = self.loader.load_sweep_config(self.master, overrides)
            # Hydra's own section can then be taken out. Some of its values are missing on purpose.
            OmegaConf.set_struct(composed, False)
            OmegaConf.set_readonly(composed, False)
        return composed
