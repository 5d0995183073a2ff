"""From a sweep's command line to its cells. All are composed, checked and resolved before the first one runs.

Hydra needs a tenth of a second for a configuration. But the cells of a grid share their parts. `train.lr=1e-3` changes
the section `train` and nothing else, so the section is the same in every cell with this rate. A CellComposer composes
one configuration for the overrides of each section, always with Hydra, and puts the sections together. Where sections
may depend on each other, Hydra composes the cell as a whole.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from tiedlora import tying
from tiedlora.config import compose, own_model
from tiedlora.config.check import check_new_run
from tiedlora.config.compose import ARM, SAID_BY_ARM, in_hydras_grammar
from tiedlora.config.explain import readable_errors
from tiedlora.config.identity import config_tree, leaves
from tiedlora.config.schema import Config
from tiedlora.config.sizes import trainable_params
from tiedlora.errors import UserError
from tiedlora.keys import CHECKED, Count, Distinct, Number, Text, Whole, from_person
from tiedlora.places import CONF
from tiedlora.sweeps.cells import Sweep, SweepCell

SECTIONS = tuple(item.name for item in fields(Config))
MOST_CELLS = 100_000
"""A larger grid is a typing mistake: to compose its cells alone would take an hour."""
_REFERENCE = re.compile(r"\$\{(?!oc\.env:|default_folder:)")
"""An interpolation that may read another section. The two resolvers read the environment and name a folder."""
_OF_AN_ARM = re.compile(r"\+*(tying|rank|budget|train\.lr_factor)\b")
"""The words that say something about an arm: its tying, its size, and the rates of its parts."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The keys hydra.sweeper.* of every sweep."""

    __pydantic_config__ = CHECKED
    params: dict[str, Any] = field(default_factory=dict)
    """The axes of the grids on the command line. The command line's own axes replace them."""
    match_lora: bool = False
    """Whether to add to each tied cell the LoRA cell with the nearest trainable count."""
    arms: list[list[Text]] = field(default_factory=list)
    """The words of arms to add to the grid, at every value of its other axes."""
    fail_fast: bool = False
    """Whether the first cell that fails stops the sweep. Otherwise the others continue."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(SweepOptions):
    """Those of a search of learning rates."""

    rungs: list[Annotated[Number, Field(gt=0, lt=1)]]
    """Shares of the steps, after which rates that are clearly behind stop, in rising order."""
    finalists: Annotated[Count, Field(ge=2)]
    """The most rates that run at the second seed."""
    search_seeds: Annotated[list[Annotated[Whole, Field(ge=0, le=2**63 - 1)]], Distinct] = field(default_factory=list)
    """The seeds at which rates are compared, in the order of use: with more than two, the finalists race. Empty takes
    the first two of the sweep's seeds."""
    race_level: Annotated[Number, Field(gt=0, lt=1)]
    """A rate leaves the race if it is worse than the best one at this two-sided level."""
    race_within: Annotated[Number, Field(ge=0)]
    """The race ends if no rate that is left can be better than the best one so far by as much as this, in nats."""
    lowest_rate: Annotated[Number, Field(gt=0)]
    """The bounds of rates outside the grid."""
    highest_rate: Number

    def __post_init__(self) -> None:
        if len(self.search_seeds) == 1:
            raise ValueError(f"search_seeds={self.search_seeds} must have two seeds or more, such as [0,1,2,3]")
        if any(later <= rung for rung, later in itertools.pairwise(self.rungs)):
            raise ValueError(f"rungs={self.rungs} must rise, each once, such as {sorted(set(self.rungs))}")
        if self.highest_rate < self.lowest_rate:
            raise ValueError(f"highest_rate={self.highest_rate} is below lowest_rate={self.lowest_rate}")


@dataclass(frozen=True, kw_only=True)
class DecidingOptions(SearchOptions):
    """Those of a deciding sweep."""

    claims: Annotated[Text, Field(min_length=1)]
    """The file with the claims and their planned looks, relative to the working folder or to the project."""
    budget: Count | None
    """No look starts that would take the sweep beyond so many runs, those of the search included; the search itself is
    never cut. None sets no limit."""


KINDS = {
    "hydra_plugins.sweepers.ResumingSweeper": SweepOptions,
    "hydra_plugins.sweepers.StagedSweeper": SearchOptions,
    "hydra_plugins.sweepers.DecidingSweeper": DecidingOptions,
}
"""`_target_` of an option of conf/hydra/sweeper/ -> its options."""


def read_options(config: DictConfig) -> SweepOptions:
    """The options of the composed configuration of a sweep: those of its sweeper.

    Raises:
        UserError: naming the key. Hydra does not know their types.
    """
    # The values of the grids' axes go into the records of runs.
    with compose.own_variables_only():
        values: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    kind = KINDS.get(values["_target_"])
    if kind is None:
        raise UserError(f"hydra/sweeper: {values['_target_']} is none of ours; choose resuming, staged or deciding")
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    return from_person(kind, given, [item.name for item in fields(kind)], "hydra.sweeper.")


class CellComposer:
    """Composes the cells of one sweep. The cells share their sections, so nobody may change a section in place.

    Args:
        master: the composed configuration of the sweep.
        loader: Hydra's config loader.
    """

    def __init__(self, master: DictConfig, loader: ConfigLoader) -> None:
        self.master, self.loader = master, loader
        self._section_of = cache(self._find_section)
        self._composition = cache(self._compose)
        self._section_config = cache(self._compose_section)
        self._files_of = cache(self._find_files)

    def compose(self, overrides: list[str], as_a_whole: bool = False) -> Config:
        """The configuration that Hydra composes from these overrides, completed and checked.

        Args:
            as_a_whole: whether no section is kept for other cells.

        Raises:
            UserError: one line that names the key.
        """
        if as_a_whole:
            return compose.load(self._load(overrides))
        named = [(self._section_of(override), override) for override in overrides]
        values = {}
        for section in SECTIONS:
            own = tuple(override for name, override in named if name in (section, None))
            config = self._section_config(section, own)
            if config is None:
                return compose.load(self._load(overrides))
            values[section] = getattr(config, section)
        return compose.complete(Config(**values))

    def _find_section(self, override: str) -> str | None:
        """The only section that an override can change; None for +grid=... and others that may change any section."""
        with suppress(UserError), readable_errors():
            (parsed,) = OverridesParser.create().parse_overrides([override])
            name = re.split(r"[./]", parsed.key_or_group)[0]
            return name if name in SECTIONS and parsed.package is None else None
        return None

    def _compose_section(self, section: str, own: tuple[str, ...]) -> Config | None:
        """A configuration that has the right values in one section; None if the section may depend on others.

        Args:
            own: the overrides that can change the section.
        """
        without = tuple(override for override in own if self._section_of(override) is None)
        composed, shared = self._composition(own), self._composition(without)
        if composed is None or shared is None:
            return None
        config, raw, _ = composed
        # A section that a word such as ~seed has taken away has its default only in the whole configuration.
        if section not in raw or _REFERENCE.search(str(raw[section])):
            return None
        # An option may have a defaults list or a @package line, and so change other sections.
        outside, others = ([file for file in files if file[1][0] != section] for *_, files in (composed, shared))
        return config if outside == others else None

    def _compose(self, overrides: tuple[str, ...]) -> tuple[Config, dict[Any, Any], list[tuple[str, list[str]]]] | None:
        """The typed configuration of these overrides, which is not completed; its values with their interpolations; and
        the files that Hydra merges.

        None if they are not a configuration without the others.
        """
        try:
            composed = self._load(list(overrides))
            raw: Any = OmegaConf.to_container(composed, resolve=False)
            files = self._files_of(tuple(override for override in overrides if self._chooses_an_option(override)))
            return compose.typed(composed), raw, files
        except UserError:
            # The composition of the whole cell succeeds, or it reports the error with its right words.
            return None

    @staticmethod
    def _chooses_an_option(override: str) -> bool:
        """Whether the override may be of a group: options have names. A number changes no list of files."""
        (parsed,) = OverridesParser.create().parse_overrides([override])
        return parsed.is_delete() or isinstance(parsed.value(), str | list)

    def _find_files(self, options: tuple[str, ...]) -> list[tuple[str, list[str]]]:
        """The files that Hydra merges, in their order, each with its package, whose first word is a section."""
        with readable_errors():
            words = [*self.master.hydra.overrides.hydra, *options]
            merged = self.loader.compute_defaults_list(self.master.hydra.job.config_name, words, RunMode.RUN)
        return [(str(file.config_path), str(file.package).split(".")) for file in merged.defaults]

    def _load(self, overrides: list[str]) -> DictConfig:
        """What Hydra composes, without its own section, in which some values are missing on purpose."""
        with readable_errors():
            composed = self.loader.load_sweep_config(self.master, overrides)
            OmegaConf.set_struct(composed, False)
            OmegaConf.set_readonly(composed, False)
            del composed["hydra"]
        return composed


Composers = dict[tuple[str, ...], CellComposer]
"""Overrides of Hydra's own keys -> the composer of the sweeps that have them."""


def compose_sweep(overrides: list[str], composers: Composers | None = None) -> Sweep:
    """The sweep that `train.py --multirun OVERRIDES` would run; for scripts and tests.

    Args:
        composers: those of the sweeps before, so that what the sweeps share is composed once; it gets this sweep's.

    Raises:
        UserError: naming the cell and the key.
    """
    overrides = compose.without_arm(overrides)
    compose.register()
    GlobalHydra.instance().clear()
    with readable_errors(), initialize_config_dir(config_dir=str(CONF), **compose.VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        words = own_model.with_option(overrides)
        master = loader.load_configuration("config", words, run_mode=RunMode.MULTIRUN)
        # Without the words for Hydra itself: `master` has them. Each cell resolves the interpolations of its words.
        task: Any = OmegaConf.to_container(master.hydra.overrides.task, resolve=False)
        return expand(master, loader, task, composers)


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
    is_alone = composers is None
    composers = {} if composers is None else composers
    composer = composers.setdefault(tuple(master.hydra.overrides.hydra), CellComposer(master, loader))
    options = read_options(master)
    with readable_errors():
        of_grids = _axes(_words_of(options.params), loader)
        own = _axes(overrides, loader)
    for replacing, replaced in ((ARM, SAID_BY_ARM), *((key, (ARM,)) for key in SAID_BY_ARM)):
        for key in replaced if replacing in own else ():
            of_grids.pop(key, None)
    # An axis of the command line replaces the grids' axis of the same key, and keeps its place.
    axes = of_grids | own
    if (count := math.prod(map(len, axes.values()))) > MOST_CELLS:
        raise UserError(f"the grid has {count:,} cells, at most {MOST_CELLS:,} are allowed; shorten an axis")
    # Hydra composes each section once for each of its words, which takes longer than a few whole cells.
    is_small = is_alone and count <= len({word for values in axes.values() for words in values for word in words})
    cells: dict[str, SweepCell] = {}
    for choice in itertools.product(*axes.values()):
        words = [word for chosen in choice for word in chosen]
        cell = _cell(composer, words, is_small)
        first = cells.setdefault(cell.run_id, cell)
        if first.config != cell.config:
            values, same = (leaves(config_tree(_unlabelled(each.config))) for each in (first, cell))
            if differing := sorted(key for key in {*values, *same} if values.get(key) != same.get(key)):
                raise UserError(
                    f"{', '.join(differing)}: does not change what a run is, so all its values are the one run "
                    f"{cell.run_id}; give one"
                )
        # Beside it stand its matching LoRA (+grid=matched) and the sweep's arms, at the same values of the other axes.
        arms = list(options.arms)
        if options.match_lora:
            arms.insert(0, _matching_lora(cell))
        others = [word for word in words if not _OF_AN_ARM.match(word)]
        for arm in arms:
            keys = [word.partition("=")[0] for word in arm]
            own_words = [word for word in others if word.partition("=")[0] not in keys]
            beside = _cell(composer, [*own_words, *arm], is_small)
            cells.setdefault(beside.run_id, beside)
    grids = [word.removeprefix("+grid=") for word in overrides if word.startswith("+grid=")]
    names = re.findall(r"[\w.-]+", " ".join(grids))
    places: dict[str, int] = {}

    def place(cell: SweepCell) -> list[int]:
        """A sort key: the numbers of model and task, as first seen. So cells that share a model follow each other."""
        shared = (cell.config.model, cell.config.train.dtype), cell.config.task
        return [places.setdefault(repr(each), len(places)) for each in shared]

    return Sweep("+".join(names) or "sweep", sorted(cells.values(), key=place))


def _words_of(params: Mapping[str, Any]) -> list[str]:
    """The axes of grids as words of a command line. A text is in Hydra's grammar already, as `8,16`."""
    values = {key: value if isinstance(value, str) else in_hydras_grammar(value) for key, value in params.items()}
    return [f"{key}={value}" for key, value in values.items()]


def _matching_lora(cell: SweepCell) -> list[str]:
    """The words of the LoRA with the nearest trainable count.

    Raises:
        UserError: only the loaded model could tell how many numbers the cell trains.
    """
    count = trainable_params(cell.config)
    if count is None:
        raise UserError(
            f"cell {' '.join(cell.overrides)}: hydra.sweeper.match_lora: tying.method={cell.config.tying.method} can "
            "be counted only on the loaded model, so no LoRA matches it; leave one of them out"
        )
    return ["tying=LoRA", f"rank.r={tying.nearest_lora_rank(count, cell.config.model.architecture)}"]


def _unlabelled(config: Config) -> Config:
    """The configuration without the names of its arm: two budgets or two options may mean one arm."""
    return replace(config, budget=None, tying=replace(config.tying, name="", suggested_lr=1.0))


def _axes(words: Sequence[str], loader: ConfigLoader) -> dict[str, list[list[str]]]:
    """Key -> for each of its values, the words of a cell with it. A later word of a key replaces an earlier one.

    Raises:
        UserError: a word has no values, or is none that a sweep can have.
    """
    compose.check_files(words)
    axes = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(words)):
        key = override.get_key_element()
        if key == "+grid" and override.is_sweep_override():
            raise UserError(f"{override.input_line}: grids are joined as '+grid=[NAME,NAME]', not with a comma")
        found = [f"{key}={value}" for value in _values(override)]
        compose.check_words(found)
        axes[key] = [compose.words_of_arm(word) if key == ARM else [word] for word in found]
    return axes


def _values(override: Override) -> list[str]:
    """The values of an override, as the command line writes them.

    Raises:
        UserError: it is an interval, which only an optimiser can draw from; or it has no value, or too many.
    """
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: is an interval; give the values one by one, as in train.lr=1e-3,1e-2")
    # A range may be too long to be listed.
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MOST_CELLS + 1))
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}; give the values, as in seed=0,1,2") from None
    if not 0 < len(values) <= MOST_CELLS:
        size = f"more than {MOST_CELLS:,} values" if values else "no value"
        raise UserError(f"{override.input_line}: has {size}; give 1 to {MOST_CELLS:,} of them, as in seed=0,1,2")
    return values


def _cell(composer: CellComposer, overrides: list[str], as_a_whole: bool) -> SweepCell:
    try:
        config = composer.compose(overrides, as_a_whole)
        cell = SweepCell(tuple(overrides), config)
        if not cell.folder.result_file.exists():
            check_new_run(config)
    except UserError as error:
        raise UserError(f"cell {' '.join(overrides)}: {error}") from None
    if config.force:
        raise UserError("force=true: a sweep that repeats finished cells could not be resumed; delete their folders")
    return cell
