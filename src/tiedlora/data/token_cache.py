"""A cache of token ids on disk. To encode a large task takes longer than its first training steps.

The name of a file is a hash of everything that its token ids depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from safetensors import SafetensorError, numpy, safe_open

from tiedlora import storage
from tiedlora.config.identity import identity
from tiedlora.data.encoding import Encoded, EncodedRows, Encoder, encode_rows
from tiedlora.models.base_model import BaseModel
from tiedlora.records.run_record import plain
from tiedlora.tasks import Example

IntArray = NDArray[np.int32]
ENCODING_VERSION = 1
"""Raise it when encoding.encode_rows gives other token ids for the same rows."""
MIN_ROWS = 1000
"""Fewer rows are not stored, because encoding them is faster than reading a file."""
_COLUMNS = ("kept", "prompts", "targets", "ids")
"""The indices of the rows that fit, the lengths of their prompts, the lengths of their targets, and all token ids."""


def load_or_encode(
    encoder: Encoder, examples: Sequence[Example], digest: str, base: BaseModel, cache: Path
) -> EncodedRows:
    """As encoding.encode_rows, but many rows are read from a file of the cache, or encoded and written to it.

    Args:
        digest: the digest of the examples.
        base: the base model. Its digest also covers the tokenizer, but not the chat template.
        cache: the folder `config.cache`.

    Raises:
        UserError: as encoding.encode_rows.
    """
    if len(examples) < MIN_ROWS or not base.digest_is_known:
        return encode_rows(encoder, examples)
    key = [ENCODING_VERSION, tokenizers.__version__, identity(encoder.config), encoder.context, digest]
    key += encoder.versions.values()
    name = hashlib.sha256(json.dumps([*key, plain(base.record)], sort_keys=True).encode()).hexdigest()[:24]
    path = cache / "tokens" / f"{name}.safetensors"
    try:
        return _read(path)
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        # The file is missing or damaged. Everything in it can be computed.
        rows = encode_rows(encoder, examples)
        storage.write_bytes(path, _to_bytes(rows))
        return rows


def _to_bytes(rows: EncodedRows) -> bytes:
    ids = [token for row in rows.encoded for token in (*row.prompt, *row.target)]
    prompts, targets = [len(row.prompt) for row in rows.encoded], [len(row.target) for row in rows.encoded]
    values = zip(_COLUMNS, (rows.kept, prompts, targets, ids), strict=True)
    arrays = {name: np.array(column, dtype=np.int32) for name, column in values}
    return numpy.save(arrays, {"counts": json.dumps(rows.counts), "sha256": _checksum(arrays)})


def _read(path: Path) -> EncodedRows:
    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in _COLUMNS}
        metadata = file.metadata()
    if _checksum(arrays) != metadata["sha256"]:
        raise ValueError("checksum")
    kept, prompts, targets, ids = (array.tolist() for array in arrays.values())
    encoded, start = [], 0
    for prompt_length, target_length in zip(prompts, targets, strict=True):
        middle, end = start + prompt_length, start + prompt_length + target_length
        encoded.append(Encoded(tuple(ids[start:middle]), tuple(ids[middle:end])))
        start = end
    return EncodedRows(kept, encoded, json.loads(metadata["counts"]))


def _checksum(arrays: dict[str, IntArray]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
