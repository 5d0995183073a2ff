"""The digest of the base model of a configuration. The model is not loaded, so torch is not needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from tiedlora import storage
from tiedlora.config.embedded import embedded_model
from tiedlora.config.own_model import is_gguf
from tiedlora.config.schema import ModelConfig
from tiedlora.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""It names the file of each weight. transformers reads it if there is no model.safetensors."""
TOKEN_FILES = ("added_tokens.json", "special_tokens_map.json", "*vocab*", "merges.txt", "*.model", "tekken.json")
"""The files of a folder that may decide tokens, besides those of the digest of the base model."""
CHAT_TEMPLATES = ("chat_template.jinja", "chat_templates/*.jinja")


def known_digest(config: ModelConfig, cache: Path | None = None) -> str | None:
    """The digest of the base model that goes into a record; of a folder, by the content of its files.

    These are the weights that are loaded, wherever the index names them, the configuration and tokenizer.json.
    To hash the weights takes minutes for a large model. So the hash of each file is remembered in `cache`, under a name
    that has the file's path, size, times and inode. A file for which one of them has changed is hashed again.

    Args:
        cache: the configuration's cache folder; None hashes every file.

    Returns:
        None for a model from the hub whose commit was not asked for yet.

    Raises:
        UserError: model.path is not a folder with safetensors, a file is missing, or its index names a file elsewhere;
            or no embedded model has this name.
    """
    if not config.path:
        if config.source == "embedded":
            return f"gguf-sha256:{embedded_model(config.name).sha256}"
        if config.source == "random":
            return "random:seed-0"
        return f"commit:{config.commit}" if config.commit else None
    if is_gguf(config.path):
        return f"gguf-sha256:{storage.remembered_sha256(Path(config.path), cache)}"
    folder = Path(config.path)
    weights = {file.name for file in folder.glob("*.safetensors")}
    loaded = weights if (folder / WEIGHTS).is_file() else _files_of_index(folder / INDEX) or weights
    if not loaded:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        not_read = (
            f"; {pickles[0]} is not read, because such a file can run code: save the model again" if pickles else ""
        )
        raise UserError(
            f"model.path={folder}: has no *.safetensors, and must be a folder with config.json, tokenizer.json and "
            f"*.safetensors, as save_pretrained writes it{not_read}"
        )
    # tokenizer_config.json is there twice, as it is in the digests of earlier runs.
    others = [file.name for pattern in ("*config.json", "tokenizer*") for file in folder.glob(pattern)]
    # An index that names all files here and no others decides nothing. Without it, earlier digests stay as they are.
    index = [INDEX] if loaded != weights else []
    return f"sha256:{_sha256_of(folder, [*(weights | loaded), *others, *index], cache)}"


def tokens_digest(config: ModelConfig, chat_template: bool, cache: Path | None = None) -> str | None:
    """The digest of what decides tokens in a model's folder and is not in `known_digest`; None for another model.

    A GGUF file holds all of it.

    Args:
        chat_template: whether the task uses one, so that its files count.
        cache: as known_digest.
    """
    if not config.path or is_gguf(config.path):
        return None
    folder = Path(config.path)
    patterns = [*TOKEN_FILES, *(CHAT_TEMPLATES if chat_template else ())]
    names = {
        file.relative_to(folder).as_posix() for pattern in patterns for file in folder.glob(pattern) if file.is_file()
    }
    return _sha256_of(folder, names, cache)[:16]


def _files_of_index(index: Path) -> set[str]:
    """The files of weights that an index names, from its folder; none without an index.

    Raises:
        UserError: the index is damaged, or names a file that is no safetensors or is outside of the folder.
    """
    if not index.exists():
        return set()
    named = storage.read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index}: weight_map must be the file of each weight")
    files = {PurePosixPath(name) for name in named.values()}
    for file in sorted(files):
        if file.is_absolute() or ".." in file.parts or file.suffix != ".safetensors":
            raise UserError(f"{index}: names {file}; each file must be a *.safetensors in this folder or below it")
    return {file.as_posix() for file in files}


def _sha256_of(folder: Path, names: Iterable[str], cache: Path | None) -> str:
    hashes = "\n".join(f"{name} {storage.remembered_sha256(folder / name, cache)}" for name in sorted(names))
    return hashlib.sha256(hashes.encode()).hexdigest()
