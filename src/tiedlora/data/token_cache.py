"""Tokenised rows, kept on disk under what they were made from: a large task's rows take longer than its first steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError, numpy, safe_open

from tiedlora import storage
from tiedlora.config.identity import identity
from tiedlora.data.encoding import Encoded, Encoder, Fitted, fit
from tiedlora.models.base_model import BaseModel
from tiedlora.records.run_record import plain
from tiedlora.tasks import Example

VERSION = 1
"""Raise it when data.fit makes other tokens of the same rows."""
WORTH_KEEPING = 1000
"""Rows; fewer are tokenised faster than a file is worth."""


def fitted(encoder: Encoder, examples: Sequence[Example], digest: str, base: BaseModel, cache: Path) -> Fitted:
    """As data.fit, from the cache's file if there is one, else made and kept there.

    Args:
        digest: of the examples.
        base: the base model, whose digest covers the tokenizer.
        cache: the folder `config.cache`.

    Raises:
        UserError: as data.fit.
    """
    if len(examples) < WORTH_KEEPING or not base.digest_is_known:
        return fit(encoder, examples)
    made_from = [VERSION, tokenizers.__version__, identity(encoder.config), encoder.context, digest, plain(base.record)]
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]
    path = cache / "tokens" / f"{name}.safetensors"
    try:
        return _read(path)
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        # Missing, or damaged: it holds nothing that cannot be made again.
        made = fit(encoder, examples)
        storage.write_bytes(path, _bytes(made))
        return made


def _bytes(made: Fitted) -> bytes:
    rows = made.encoded
    ids = [token for row in rows for token in (*row.prompt, *row.target)]
    columns = {
        "kept": made.kept,
        "prompts": [len(row.prompt) for row in rows],
        "targets": [len(row.target) for row in rows],
        "ids": ids,
    }
    arrays = {name: np.array(column, dtype=np.int32) for name, column in columns.items()}
    return numpy.save(arrays, {"counts": json.dumps(made.counts), "sha256": _checksum(arrays)})


def _read(path: Path) -> Fitted:
    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in ("kept", "prompts", "targets", "ids")}
        metadata = file.metadata()
    if _checksum(arrays) != metadata["sha256"]:
        raise ValueError("checksum")
    kept, prompts, targets, ids = (array.tolist() for array in arrays.values())
    encoded, start = [], 0
    for prompt, target in zip(prompts, targets, strict=True):
        middle, end = start + prompt, start + prompt + target
        encoded.append(Encoded(tuple(ids[start:middle]), tuple(ids[middle:end])))
        start = end
    return Fitted(kept, encoded, json.loads(metadata["counts"]))


def _checksum(arrays: dict[str, Any]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
