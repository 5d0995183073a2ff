"""Compose a configuration from conf/, turn it into typed values, and check it. Errors are one line with the key.

And back: the command that composes a run's configuration again.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import hydra
import omegaconf
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, StringNode
from omegaconf.resolvers import oc

from tiedlora import storage
from tiedlora.config import own_model
from tiedlora.config.check import check
from tiedlora.config.explain import files_beside_one, options, peft_options, readable_errors, schema_keys
from tiedlora.config.identity import (
    adapter_digest,
    adapter_folder,
    arm_of,
    config_tree,
    identity,
    leaves,
    run_id,
    without_gone_keys,
)
from tiedlora.config.rates import suggested_lr
from tiedlora.config.schema import SPLITS, Config, HubSource, RankConfig, TaskConfig, TrainConfig
from tiedlora.config.sizes import at_budget
from tiedlora.config.task_rows import OWN_ROWS, UNNAMED, complete_task
from tiedlora.errors import UserError, as_called
from tiedlora.keys import from_person
from tiedlora.other_methods import REGISTERED, TyingConfig, resolve
from tiedlora.places import CONF, DATA, default_folder, folder_of, own_options
from tiedlora.text import nearest
from tiedlora.tying import Architecture, Term, adapted_layers, is_named

# OmegaConf 2.4 has another name for register_new_resolver. 2.3 has an older function of that name.
_IS_NEW = tuple(map(int, omegaconf.__version__.split(".")[:2])) >= (2, 4)
_HYDRA_IS_NEW = tuple(map(int, hydra.__version__.split(".")[:2])) >= (1, 4)
VERSION_BASE: dict[str, Any] = {} if _HYDRA_IS_NEW else {"version_base": "1.3"}
"""Hydra 1.3 asks which version's defaults to take. 1.4 has these defaults, and warns if it is told."""
PATHS = ("outputs", "cache", "data_root", "model.path", *(f"task.files.{split}" for split in SPLITS))
"""Keys that name places of the machine: they are no part of a run, and `verify` may get others."""
MOST_LAYERS_IN_NAME = 48
"""The options LoRA_l1, LoRA_l2, ... end here: gpt2_xl has so many layers. tying.layers takes any number."""
ARGUMENTS = "tying.resolved."
"""Where the identity has the arguments of another method. The user sets them under tying.arguments."""
LR_FACTORS = "tying.lr_factors."
WITH_LINE_FEEDS = ("task.prompt", "task.target", "task.stop")
"""Where `\\n` is a line feed."""
NOT_EXACT = "   # not exact: this version of the code composes another run; the run's config.yaml has all values"
Layered = TypeVar("Layered", TyingConfig, Term)
_register_resolver: Any = OmegaConf.register_resolver if _IS_NEW else OmegaConf.register_new_resolver


@functools.cache
def register() -> None:
    """Register the schema, the options `tying=peft/NAME` and the resolvers of conf/config.yaml, once in a process.

    Raises:
        UserError: conf/peft_methods.yaml is not readable.
    """
    again: dict[str, Any] = {"replace": True} if _HYDRA_IS_NEW else {}
    schema = OmegaConf.create(asdict(Config()))
    # Hydra can set no key of a mapping that is null, and refuses keys that a mapping does not have.
    for name in ("arguments", "lr_factors"):
        schema.tying[name] = {}
        OmegaConf.set_struct(schema.tying[name], False)
    OmegaConf.set_struct(schema.task.hub.splits, False)
    OmegaConf.set_struct(schema.task.template_options, False)
    # The program fills it in: nobody may set it.
    schema.tying.resolved = StringNode(None, flags={"readonly": True})
    store = ConfigStore.instance()
    store.store(name="schema", node=schema, **again)
    for option, node in peft_options().items():
        group, _, name = f"tying/{option}".rpartition("/")
        store.store(group=group, name=name, node=node)
    for name, count in lora_on_layers().items():
        node = {"defaults": ["LoRA", "_self_"], "name": name, "layers": [f"evenly {count}"]}
        store.store(group="tying", name=name, node=node)
    _register_resolver("default_folder", lambda kind: str(default_folder(kind)), replace=True)
    _register_resolver("option_folders", option_folders, replace=True)


def lora_on_layers() -> dict[str, int]:
    """The options `tying=LoRA_lN` -> their numbers of layers."""
    return {f"LoRA_l{count}": count for count in range(1, MOST_LAYERS_IN_NAME + 1)}


def option_folders() -> list[str]:
    """Where Hydra looks for options that are not in conf/: grids, and options of one's own, as its search path.

    Raises:
        UserError: as check_names.
    """
    folders = [DATA / "sweeps"]
    if own := own_options():
        check_names(own)
        folders.append(own)
    return [f"file://{folder}" for folder in folders]


def check_names(own: Path) -> None:
    """Check that a folder of options of one's own has none with the name of another one, which Hydra would take.

    Raises:
        UserError: it has one with other values.
    """
    stored = {f"tying/{option}.yaml" for option in (*peft_options(), *lora_on_layers())}
    for file in sorted(own.glob("*/**/*.yaml")):
        name = file.relative_to(own)
        others = [folder / name for folder in (CONF, DATA / "sweeps") if (folder / name).is_file()]
        if str(name) in stored or any(other.read_bytes() != file.read_bytes() for other in others):
            # As on the command line, where the option peft/vera of the group tying is tying=peft/vera.
            group, *option = name.with_suffix("").parts
            raise UserError(f"{file}: {group}={'/'.join(option)} is an option of tiedlora; give this one another name")


def load(composed: DictConfig | dict[str, Any]) -> Config:
    """Turn a composed configuration, or that of a record, into typed objects, with resolved and checked values.

    Every mistake that is visible in the configuration is reported here, before anything is loaded.

    Raises:
        UserError: one line that names the key.
    """
    return complete(typed(composed), is_recorded=isinstance(composed, dict))


def typed(composed: DictConfig | dict[str, Any]) -> Config:
    """The values of a composed configuration as typed objects. Each key is checked alone.

    Args:
        composed: what Hydra has composed, whose interpolations are resolved, or the plain data of a record. A record
            has none: one from a stranger could ask for more text than there is memory.

    Raises:
        UserError: a key is unknown or missing, or has a wrong value; the message names it.
    """
    with readable_errors(), own_variables_only():
        is_plain = isinstance(composed, dict)
        values: Any = deepcopy(composed) if is_plain else OmegaConf.to_container(composed, resolve=True)
        # A recorded configuration has all values, and one from a stranger reads no files.
        keys = [] if is_plain or not isinstance(values.get("model"), dict) else own_model.open_keys(values["model"])
        config = from_person(Config, without_gone_keys(values), schema_keys())
    return replace(config, model=own_model.read(config.model, keys, Path(config.cache))) if keys else config


def complete(config: Config, is_recorded: bool = False) -> Config:
    """Fill in the values that depend on others, and check all.

    Args:
        is_recorded: whether it is that of a record, whose task is complete as it is.

    Returns:
        A new object. It shares the sections that did not change with `config`, whose sections stay as they were.

    Raises:
        UserError: one line that names the key.
    """
    # Not a part of `check`: a worker of a sweep has a frozen configuration, and perhaps no conf/.
    if (backend := config.tracking.backend) not in (known := options("tracking")):
        raise UserError(f"tracking.backend={backend}: choose one of {', '.join(known)}{nearest(backend, known)}")
    train = config.train
    if train.init_from and train.init_digest is None:
        folder = adapter_folder(train.init_from).absolute()
        train = replace(train, init_from=str(folder), init_digest=adapter_digest(folder))
    # A recorded configuration has all arguments of another method. To search those of a budget again would load PEFT.
    has_arguments = config.tying.resolved is not None
    task = config.task if is_recorded else complete_task(config)
    config = complete_method(replace(config, train=train, task=task))
    check(config)
    if config.budget is not None and not has_arguments:
        config = at_budget(config)
        check(config)
    rank = config.rank
    if rank.alpha is None:
        config.rank = replace(rank, alpha=float(rank.r))
    config.tying = _with_numbers(config.tying, config.model.architecture)
    if config.tying.terms is not None:
        terms = {name: _with_numbers(term, config.model.architecture) for name, term in config.tying.terms.items()}
        config.tying = replace(config.tying, terms=terms)
    if config.train.lr is None:
        # The budget may have chosen the rank and the layers.
        config = replace(config, train=replace(config.train, lr=suggested_lr(config.tying, rank.r)))
    return config


def complete_method(config: Config) -> Config:
    """The configuration with the full name of its method and all its arguments.

    A method of this kind has no rank of ours. Its `rank` is the default, so that it is one cell in a grid over ranks,
    and is compared with LoRA of that rank.

    Raises:
        UserError: the method or an argument is unknown, the knob is no whole number, or PEFT is missing.
    """
    tying = config.tying
    if tying.method == "":
        raise UserError("tying=peft: names no method; add tying.method=NAME")
    if tying.method is None:
        for name in ("arguments", "resolved", "knob", "lr_factors", "no_decay"):
            if getattr(tying, name) is not None:
                raise UserError(f"tying.{name}: belongs to another method; set tying.method, or tying.{name}=null")
        return config
    if tying.resolved is None:
        method, resolved = resolve(tying.method, tying.arguments or {})
        tying = replace(tying, method=method, resolved=resolved)
    arguments = tying.resolved or {}
    if tying.knob is not None and tying.method not in REGISTERED and type(arguments.get(tying.knob)) is not int:
        numbers = [name for name, value in arguments.items() if type(value) is int]
        raise UserError(
            f"tying.knob={tying.knob}: is no whole number among the arguments of {tying.method}; choose from "
            f"{', '.join(numbers)}"
        )
    return replace(config, tying=tying, rank=RankConfig())


def _with_numbers(tying: Layered, architecture: Architecture) -> Layered:
    """The tying, or the term, with the numbers of its layers: every layer by number is the same run as null."""
    if tying.layers is None:
        return tying
    layers = adapted_layers(tying, architecture)
    return replace(tying, layers=None if len(layers) == architecture.layers else layers)


ARM = "arm"
"""The word arm=TYING@rRANK, which is short for tying=TYING rank.r=RANK: as an axis, it gives arms of different rank."""
SAID_BY_ARM = ("tying", "rank", "rank.r", "budget")


def words_of_arm(word: str) -> list[str]:
    """The words that arm=TYING@rRANK, or arm=TYING, is short for.

    Raises:
        UserError: it has another form.
    """
    match = re.fullmatch(rf"{ARM}=([\w./-]+)(?:@r?(\d{{1,6}}))?", word, re.ASCII)
    if match is None:
        raise UserError(f"{word:.80}: must be TYING@rRANK, and several are an axis, as in arm=LoRA@r1,TABuv@r8")
    return [f"tying={match[1]}", *([f"rank.r={match[2]}"] if match[2] else [])]


def without_arm(overrides: Sequence[str]) -> list[str]:
    """The overrides with the words that arm=TYING@rRANK is short for. An axis of arms stays: sweeps/expand.py reads it.

    Raises:
        UserError: an arm has another form, or another word says its tying or rank too.
    """
    words: list[str] = []
    for word in overrides:
        if word.startswith(f"{ARM}="):
            check_alone(word, overrides)
        is_axis = "," in word and not word.startswith(f"{ARM}=[")
        words += words_of_arm(word) if word.startswith(f"{ARM}=") and not is_axis else [word]
    return words


def check_alone(arm: str, overrides: Iterable[str]) -> None:
    """Refuse another word of the command line that says an arm's tying, or its rank if the arm has one."""
    keys = SAID_BY_ARM if "@" in arm else SAID_BY_ARM[:1]
    if other := next((word for word in overrides if word.partition("=")[0] in keys), None):
        raise UserError(f"{other:.80}: {arm:.80} says it already; leave one of them out")


def check_words(overrides: Iterable[str]) -> None:
    """Refuse an empty mapping as a value: Hydra merges a mapping into the present one, so an empty one changes nothing.

    Raises:
        UserError: naming the override.
    """
    for word in overrides:
        if re.fullmatch(r"[^=]+=\s*\{\s*\}\s*", word):
            key = word.partition("=")[0].lstrip("+")
            raise UserError(
                f"{word}: an empty mapping is merged into the present one and changes nothing; leave it out, or write "
                f"{key}=null or ~{key}.NAME to take something away"
            )


def check_files(overrides: Sequence[str]) -> None:
    """Refuse task.files=FILE after the file of a split, whose place it would take without a word.

    Raises:
        UserError: naming the key of the split.
    """
    has_one = [bool(re.match(r"task\.files=(?!\{|null$).", word)) for word in overrides]
    for place, word in enumerate(overrides):
        if word.startswith("task.files.") and any(has_one[place:]):
            raise UserError(files_beside_one(word.partition("=")[0]))


def compose_config(overrides: list[str]) -> Config:
    """The configuration that `train.py OVERRIDES` would run; for scripts and tests.

    Raises:
        UserError: one line that names the key.
    """
    overrides = without_arm(overrides)
    check_words(overrides)
    check_files(overrides)
    overrides = own_model.with_option(overrides)
    register()
    with readable_errors():
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(CONF), **VERSION_BASE):
            composed = compose(config_name="config", overrides=overrides)
    return load(composed)


def task_option(name: str) -> TaskConfig:
    """The task of conf/task/NAME.yaml, without a run.

    Raises:
        UserError: there is no such file, or a key of it is wrong.
    """
    with readable_errors():
        values = OmegaConf.create(storage.read_yaml(CONF / "task" / f"{name}.yaml"))
        return from_person(TaskConfig, OmegaConf.to_container(values, resolve=True), schema_keys(), "task.")


def read_config(path: Path) -> Config:
    """The configuration in a config.yaml.

    Raises:
        UserError: the file is missing or not YAML, or a key is wrong; the message names the file or the key.
    """
    register()
    values = storage.read_yaml(path)
    try:
        return load(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_finished_config(path: Path, recorded: dict[str, Any]) -> Config:
    """The configuration in the config.yaml of a finished run.

    Args:
        recorded: the configuration in the run's record.

    Raises:
        UserError: as `read_config`; or a key has another value than in the record.
    """
    config = read_config(path)
    for key, (found, value) in compared_keys(config, recorded).items():
        if found != value:
            raise UserError(f"{path}: {key} is {found!s:.80}, and was {value!s:.80} in the run; undo the change")
    return config


def compared_keys(config: Config, recorded: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every key but those of PATHS -> its value in a finished run's config.yaml and in its record.

    An older record lacks keys that were added later, and has keys that are gone: it is read as a config.yaml is.
    """
    found, values = (leaves(as_recorded(config_tree(each))) for each in (config, typed(recorded)))
    keys = sorted({*found, *values} - set(PATHS))
    return {key: (found.get(key), values.get(key)) for key in keys}


def as_recorded(tree: Any) -> Any:
    """The tree after a JSON round trip, so that it can be compared with one that was read from a record."""
    return json.loads(json.dumps(tree))


def cache_is_in(config: Config, given: Path | str | None) -> str:
    """The folder of converted models for a finished run: the one that is given, TIEDLORA_CACHE, or the run's own."""
    return str(given or folder_of("TIEDLORA_CACHE") or config.cache)


def rows_are_in(config: Config, given: str | None) -> str | None:
    """Where the rows of a finished run are now: in the folder that is given, or the run's own if it is here, or that of
    TIEDLORA_DATA; None means the hub.
    """
    own = config.data_root if config.data_root and Path(config.data_root).is_dir() else None
    return given or own or folder_of("TIEDLORA_DATA") or config.data_root


def _own_variable(name: str, *default: str | None) -> str | None:
    """OmegaConf's `oc.env`, for TIEDLORA_... variables only: a configuration is recorded, and others may be secrets."""
    if not str(name).startswith("TIEDLORA_"):
        raise UserError(
            f"${{oc.env:{name}}}: a configuration is recorded, so it may read TIEDLORA_... variables and no others"
        )
    return oc.env(name, *default)


@contextmanager
def own_variables_only() -> Iterator[None]:
    """Inside the block, interpolations may read only TIEDLORA_... variables of the environment."""
    _register_resolver("oc.env", _own_variable, replace=True)
    try:
        yield
    finally:
        _register_resolver("oc.env", oc.env, replace=True)


def command(config: Config) -> str:
    """`python train.py ...` for exactly this run, with as few overrides as the options of conf/ allow."""
    overrides, is_exact = list[str](), False
    with suppress(UserError):
        overrides = _overrides(config)
        is_exact = run_id(compose_config(overrides)) == run_id(config)
    # A card is published, and a reader has other folders.
    overrides = ["train.init_from=RUN" if word.startswith("train.init_from=") else word for word in overrides]
    overrides = [word for word in overrides if not word.startswith("+task.rows_from.")] + _source(config.task)
    if config.model.path and f"model={own_model.OPTION}" in overrides:
        overrides.append("model.path=FOLDER")
    if config.data_root:
        overrides.append("data_root=FOLDER")
    words = " ".join(map(_on_one_line, overrides))
    return f"{as_called('python train.py')} {words}".rstrip() + ("" if is_exact else NOT_EXACT)


def _on_one_line(word: str) -> str:
    """The word for a shell, without a line feed: indented, as in a card, the next line would be another text."""
    if "\n" not in word:
        return shlex.quote(word)
    escaped = word.replace("\\", r"\\").replace("'", r"\'").replace("\n", r"\n")
    return f"$'{escaped}'"


def _source(task: TaskConfig) -> list[str]:
    """The overrides that `task.rows_from` was filled in from, without the folders of the files."""
    if not task.rows_from:
        return []
    found: dict[str, str | None] = {}
    for split in SPLITS:
        if file := getattr(task.files, split):
            found[f"task.files.{split}"] = Path(file).name
    if "hub" in task.rows_from:
        hub, default = task.hub, HubSource()
        found |= {f"task.hub.{key}": getattr(hub, key) for key in ("id", "subset", "revision")}
        found = {key: value for key, value in found.items() if value != getattr(default, key.rpartition(".")[2])}
        found |= {f"task.hub.splits.{split}": name for split, name in hub.splits.items()}
    found |= {"task.cluster": task.cluster} if "cluster" in task.rows_from else {}
    return [f"{key}={in_hydras_grammar(value)}" for key, value in found.items()]


def _nearest_train(config: Config) -> str:
    """The option of conf/train that has the most values of a run."""
    values, defaults = identity(config)["train"], asdict(TrainConfig())

    def different(option: str) -> int:
        given = defaults | storage.read_yaml(CONF / "train" / f"{option}.yaml")
        return sum(given[key] != value for key, value in values.items())

    return min(options("train"), key=different)


def _overrides(config: Config) -> list[str]:
    """Options by name, and an override for each value of the identity that the options do not give."""
    models = {storage.read_yaml(CONF / "model" / f"{name}.yaml")["name"]: name for name in options("model")}
    # The user's own rows have any name.
    task = UNNAMED if config.task.kind == OWN_ROWS else config.task.name
    model = models.get(config.model.name, own_model.OPTION if config.model.source == "hub" else "")
    chosen = {"model": model, "task": task, "tying": arm_of(config).option}
    chosen |= {"objective": config.objective.name, "rank": f"r{config.rank.r}", "train": _nearest_train(config)}
    defaults = [entry for entry in OmegaConf.load(CONF / "config.yaml").defaults if not isinstance(entry, str)]
    words = []
    for group, name in chosen.items():
        is_option = name in options(group) or (group == "tying" and is_named(name))
        if is_option and {group: name} not in defaults:
            words.append(f"{group}={name}")
    if "tying=peft" in words:
        words.append(f"tying.method={config.tying.method}")
    identity_values = _identity_values(config)
    # The sizes of a model of one's own are written, because its files need not be here.
    sizes = own_model.KEYS if model == own_model.OPTION else ()
    words += [f"model.{key}={identity_values[f'model.{key}']}" for key in sizes]
    from_options = _identity_values(compose_config(words))
    values = {key: value for key, value in identity_values.items() if from_options.get(key) != value}
    # They follow from other keys: from init_from, and from the rank.
    values.pop("train.init_digest", None)
    if values.get("rank.alpha") == in_hydras_grammar(float(config.rank.r)):
        del values["rank.alpha"]
    differences = []
    for key, value in values.items():
        if key.startswith((ARGUMENTS, LR_FACTORS)):
            continue
        # A key at its neutral value is not among the values. Hydra's + adds a key that the schema does not have.
        is_known = key in from_options or key in schema_keys()
        differences.append(f"{key}={value}" if is_known else f"+{key}={value}")
    for prefix, name in ((ARGUMENTS, "tying.arguments"), (LR_FACTORS, LR_FACTORS[:-1])):
        own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        if pairs := [f"{_as_key(key)}: {value}" for key, value in own.items()]:
            # Hydra's ++ changes a key of the option, and adds others.
            differences.append(f"++{name}={{{', '.join(pairs)}}}")
    if config.train.init_from:
        differences.append(f"train.init_from={in_hydras_grammar(config.train.init_from)}")
    return [*words, *differences]


def _identity_values(config: Config) -> dict[str, str]:
    """Dotted key -> value in Hydra's grammar, for every key of the identity."""
    values = {key: in_hydras_grammar(value) for key, value in leaves(identity(config)).items()}
    for key in WITH_LINE_FEEDS:
        values[key] = values[key].replace("\n", r"\n")
    return values


def in_hydras_grammar(value: object) -> str:
    """A value in Hydra's grammar. In a quoted string, the quote is escaped, and the backslashes before one."""
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(in_hydras_grammar, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_as_key(key)}: {in_hydras_grammar(item)}' for key, item in value.items())}}}"
    escaped = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), str(value))
    return f'"{escaped}"'


def _as_key(text: str) -> str:
    """The key of a mapping in Hydra's grammar, where a regular expression may hold characters with a meaning."""
    return re.sub(r"([][(){}:=, \\])", r"\\\1", text)
