"""Where a saved adapter lies and what it is, known without reading its tensors (and so without torch)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tiedlora import storage
from tiedlora.errors import UserError

DESCRIPTION = "adapter.json"


def adapter_folder(source: Path | str) -> Path:
    """The adapter's folder inside a run, or `source` itself if it is one.

    Raises:
        UserError: it is neither.
    """
    # os.path's, which take any text: an unknown ~user, a null byte and a name too long are just no file.
    source = Path(os.path.expanduser(source))
    for folder in (source, source / "adapter"):
        if os.path.isfile(folder / DESCRIPTION):
            return folder
    raise UserError(
        f"{source}: is neither a finished run nor an adapter's folder (no {DESCRIPTION} in it or in adapter/)"
    )


def digest(folder: Path) -> str:
    """sha256 of what an adapter is: specification, sizes, base model and the tensors' own sha256, wherever it lies.

    Raises:
        UserError: no adapter there.
    """
    description = storage.read_json(folder / DESCRIPTION)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
