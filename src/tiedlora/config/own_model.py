"""A model of one's own: its name, family, sizes and context are read from its files, before any weights are loaded.

The words `model.path=FOLDER`, `model.path=FILE.gguf` and `model.name=ORG/NAME` choose conf/model/hub.yaml, which leaves
these values open. The options of conf/model/ with written numbers are compared with the files when the model is loaded.

The imports inside functions are those of torch and transformers, which only a model's files need.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora.config.schema import ModelConfig
from tiedlora.errors import UserError, is_out_of_memory, made_once
from tiedlora.families import layout_of
from tiedlora.keys import MISSING, from_person
from tiedlora.text import is_name
from tiedlora.tying import Architecture

log = logging.getLogger(__name__)

OPTION = "hub"
"""The option of conf/model/ for a model of one's own."""
GGUF = ".gguf"
SIZES = tuple(item.name for item in fields(Architecture) if item.name != "layout")
KEYS = ("name", "context", *(f"architecture.{name}" for name in SIZES))
"""The keys of `model` that the option leaves open."""
WAYS = (
    "Three ways: reach the hub (gated models: accept the licence there, then `hf auth login`); or model.path=FOLDER "
    "with its config.json, tokenizer.json and *.safetensors; or model=smollm2_135m, which needs no hub"
)
RESCALED = "beyond them its rope depends on the longest row of a batch"
_UNLOADED: dict[tuple[object, ...], Any] = {}
"""The models of the files so far, or why there is none: a table asks again for each line, and the hub may be slow."""
_NAMES_ONE = re.compile(r"\+*model\.(path|name)=(?!null$).")


def with_option(words: Sequence[str]) -> list[str]:
    """The words of a command line, with model=hub if they name a model's files or its name, and no option."""
    named = [place for place, word in enumerate(words) if _NAMES_ONE.match(word)]
    if not named or any(re.match(r"\+*model=", word) for word in words):
        return list(words)
    # Beside it, because Hydra's parser wants all overrides in one row.
    return [*words[: named[0]], f"model={OPTION}", *words[named[0] :]]


def is_gguf(path: str | None) -> bool:
    """Whether model.path names a GGUF file."""
    return path is not None and path.lower().endswith(GGUF)


def open_keys(values: dict[str, Any]) -> list[str]:
    """The keys of KEYS that the composed section `model` leaves open. They get a value for the time being, in place.

    So every other key is checked before a file is read.
    """
    if values.get("source") != "hub" or (values.get("name") == MISSING and values.get("path") is None):
        return []
    found = []
    for key in KEYS:
        *section, name = key.split(".")
        inner = values.get(section[0]) if section else values
        if isinstance(inner, dict) and inner.get(name, "") in (None, MISSING):
            inner[name] = "llama" if name in ("name", "family") else 1
            found.append(key)
    return found


def files_of(model: ModelConfig, cache: Path) -> Path | None:
    """model.path, or for a GGUF file the folder that it was converted to; None for a model that has no path.

    Raises:
        UserError: the GGUF file cannot be read.
    """
    if model.path is None:
        return None
    path = Path(model.path)
    if is_gguf(model.path) and path.is_file():
        # To read the sizes from the file itself takes up to half a minute, because it reads all tokens.
        folder = converted_folder(path.name, storage.remembered_sha256(path, cache), cache)
        path = folder if (folder / "config.json").is_file() else path
    return path


def converted_folder(file: str, sha256: str, cache: Path) -> Path:
    """Where the model of a GGUF file is converted to. `file` is the file's name."""
    return cache / "models" / f"{file.partition('.')[0].lower()}-{sha256[:12]}"


def read(model: ModelConfig, keys: Collection[str], cache: Path) -> ModelConfig:
    """The section `model` with the values of these keys from the model's files.

    Args:
        cache: the configuration's cache folder.

    Raises:
        UserError: the files are not here or damaged, or are those of a model that no adapter can be put on.
    """
    from tiedlora.adapter import architectures  # noqa: PLC0415

    unloaded = unloaded_model(model, files_of(model, cache))
    found = architectures.read(unloaded, model.architecture.layout)
    sizes = {name: getattr(found, name) for name in SIZES if f"architecture.{name}" in keys}
    model = replace(model, architecture=replace(model.architecture, **sizes))
    if "name" in keys:
        model = replace(model, name=_name_of(str(model.path)))
    if "context" in keys:
        context = getattr(unloaded.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            raise UserError("model.context: the model's config.json names none; set it, such as model.context=2048")
        model = replace(model, context=min([context, *_position_limits(unloaded, found)]))
    return from_person(ModelConfig, asdict(model), prefix="model.")


def _name_of(path: str) -> str:
    name = re.sub("[^A-Za-z0-9._-]+", "-", re.sub(f"(?i:{re.escape(GGUF)})$", "", os.path.basename(path)))
    if not is_name(name):
        raise UserError(f"model.path={path}: gives the model no name; add model.name=NAME")
    return name


def unloaded_model(model: ModelConfig, path: Path | None) -> Any:
    """The model of transformers without weights, on the meta device: its modules have their sizes, and no numbers.

    Args:
        path: where its files are; None for a model of the hub.

    Raises:
        UserError: its config.json or its GGUF file cannot be read, or is not that of a causal language model.
    """
    file = path if path is None or path.is_file() else path / "config.json"
    state = file.stat() if file and file.exists() else None
    key = (path, model.name, model.revision, model.commit, state and (state.st_mtime_ns, state.st_size))
    return made_once(_UNLOADED, key, lambda: _unloaded(path, model))


def _unloaded(path: Path | None, model: ModelConfig) -> Any:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, DynamicCache  # noqa: PLC0415
    from transformers.cache_utils import LinearAttentionLayer  # noqa: PLC0415

    quieten()
    settings = _hub_settings(with_commit(model)) if path is None else _settings(path)
    try:
        with torch.device("meta"):
            unloaded = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers says by all kinds of errors that a number is none or does not fit
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path or model.name}: is no causal language model of transformers ({reason(error)}); take another one"
        ) from None
    if any(isinstance(layer, LinearAttentionLayer) for layer in DynamicCache(config=unloaded.config).layers):
        # Padding and choices that share a prompt (scoring/decoding.py) need the keys and values of each token.
        raise UserError(
            f"{path or model.name}: {settings.model_type} has layers of linear attention (such as Mamba's), which "
            "cannot be scored here; take a model whose layers all keep keys and values"
        )
    return unloaded


def quieten() -> None:
    """From now on, the libraries of models show no progress bars and no warnings. Errors are still raised."""
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Not before the import, which sets a level.
    for library in ("transformers", "huggingface_hub", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def reason(error: Exception) -> str:
    """The kind of an error and the first line of its text; with the next one, if the first only announces it."""
    first, *others = [line.strip() for line in f"{type(error).__name__}: {str(error).strip()}".splitlines()]
    return (f"{first} {others[0]}" if others and first.endswith(":") else first)[:300]


def _settings(path: Path) -> Any:
    """The configuration of a model in a folder or a GGUF file, as transformers reads it."""
    what = f"model.path={path}"
    if not path.exists():
        raise UserError(f"{what}: no such folder or file; a relative path starts at the present folder")
    if path.is_file():
        if not is_gguf(str(path)):
            raise UserError(f"{what}: is a file; give the folder with config.json and *.safetensors, or FILE.gguf")
        with path.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise UserError(f"{what}: is no GGUF file (it does not begin with the letters GGUF)")
        return _read_settings(path.parent, what, gguf_file=path.name)
    file = path / "config.json"
    if not file.is_file():
        ggufs = sorted(path.glob(f"*{GGUF}"))
        if ggufs:
            raise UserError(f"{what}: has no config.json; name the file: model.path={ggufs[0]}")
        is_adapter = any((path / name).is_file() for name in ("adapter_config.json", "adapter.json"))
        advice = "it holds an adapter: give its base model" if is_adapter else "such as save_pretrained writes it"
        raise UserError(f"{what}: must be a folder with config.json, tokenizer.json and *.safetensors; {advice}")
    if not isinstance(storage.read_json(file).get("model_type"), str):
        raise UserError(f"{file}: names no model_type, so it is not the configuration of a model of transformers")
    return _read_settings(path, str(file))


def with_commit(model: ModelConfig) -> ModelConfig:
    """The section `model` with the commit that its revision means now, if it is a model of the hub and has none.

    Raises:
        UserError: the hub cannot be reached, and its cache does not know the revision; or there is no such model.
    """
    if model.source != "hub" or model.path is not None or model.commit is not None:
        return model
    import huggingface_hub  # takes a second  # noqa: PLC0415

    if Path(model.name).is_dir():
        # transformers would load the folder, and the record could not say which weights these were.
        raise UserError(f"model.name={model.name}: is a folder here; give it as model.path={model.name}")
    try:
        found = huggingface_hub.HfApi().resolve_revision(model.name, revision=model.revision)
    except Exception as error:  # as in _read_settings
        raise UserError(f"model.name={model.name}: cannot be loaded ({reason(error)}). {WAYS}") from None
    return replace(model, commit=found.resolved)


def _hub_settings(model: ModelConfig) -> Any:
    """The configuration of a model of the hub."""
    return _read_settings(model.name, f"model.name={model.name}", revision=model.commit)


def _read_settings(source: Path | str, what: str, **settings: Any) -> Any:
    from transformers import AutoConfig  # noqa: PLC0415

    try:
        return AutoConfig.from_pretrained(source, **settings, trust_remote_code=False)
    except Exception as error:  # transformers and the hub's client raise many kinds, and a damaged file any other
        if is_out_of_memory(error):
            raise
        is_on_hub = not isinstance(source, Path)
        advice = WAYS if is_on_hub else "Take a model that the installed transformers knows, or restore its files"
        raise UserError(f"{what}: cannot be loaded ({reason(error)}). {advice}") from None


def check(config: ModelConfig, model: Any) -> None:
    """Compare the sizes and the context of a configuration with a model, loaded or not.

    Raises:
        UserError: they differ; the message has all differences, and the values to write.
    """
    from tiedlora.adapter import architectures  # noqa: PLC0415

    found = architectures.read(model, config.architecture.layout)
    expected, sizes = asdict(config.architecture), {name: getattr(found, name) for name in SIZES}
    wrong = [f"{name}={expected[name]} (it has {size})" for name, size in sizes.items() if expected[name] != size]
    write = [f"architecture: {{{', '.join(f'{name}: {size}' for name, size in sizes.items())}}}"] if wrong else []
    most = min([config.context, *_position_limits(model, found)])
    unscaled = _unscaled_positions(model)
    if config.context > most:
        stretched = f", and {RESCALED}" if most == unscaled else ""
        wrong.append(f"context={config.context} (it has {most} positions{stretched})")
        write.append(f"context: {most}")
    if wrong:
        raise UserError(
            f"model: {config.name} is not the model of these numbers: {', '.join(wrong)}; write into its option of "
            f"conf/model: {' and '.join(write)}; or leave out the option and the numbers: model.path= and model.name= "
            "read them from the model's files"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if config.context == unscaled != positions:
        log.info("model.context=%d of %s positions, because %s", config.context, positions, RESCALED)


def _position_limits(model: Any, architecture: Architecture) -> list[int]:
    """The most positions of a learned table, as GPT-2's or OPT's, and of a rope that others of a batch do not change.

    Other rotary positions go on, and may be stretched.
    """
    from torch import nn  # noqa: PLC0415

    owner = model.get_submodule(layout_of(architecture).layers.rpartition(".")[0])
    named = (child for name, child in owner.named_children() if name in ("wpe", "embed_positions"))
    tables = [child for child in named if isinstance(child, nn.Embedding)]
    limits: list[int | None] = [table.num_embeddings - getattr(table, "offset", 0) for table in tables]
    limits += [getattr(model.config, "n_positions", None), _unscaled_positions(model)]
    return [limit for limit in limits if limit]


def _unscaled_positions(model: Any) -> int | None:
    """The positions up to which the rope of a model is the same in each batch; None if it always is.

    transformers chooses the factors of longrope (Phi-3), and those of dynamic scaling, by the longest row of a batch.
    """
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    # One rope, or one for each type of layer.
    ropes = [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]
    limits = [rope["original_max_position_embeddings"] for rope in ropes if rope.get("rope_type") == "longrope"]
    if any(rope.get("rope_type") == "dynamic" for rope in ropes):
        limits.append(config.max_position_embeddings)
    return min(limits, default=None)
