"""The place of a saved adapter, and its digest. No tensor is read, so torch is not needed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tiedlora import storage
from tiedlora.errors import UserError

DESCRIPTION = "adapter.json"


def adapter_folder(source: Path | str) -> Path:
    """The adapter's folder in the run `source`, or `source` itself if it is an adapter's folder.

    Raises:
        UserError: it is neither.
    """
    # os.path's functions accept any text. For an unknown ~user, a null byte or a name too long they answer "no file".
    source = Path(os.path.expanduser(source))
    for folder in (source, source / "adapter"):
        if os.path.isfile(folder / DESCRIPTION):
            return folder
    raise UserError(
        f"{source}: is neither a finished run nor an adapter's folder (no {DESCRIPTION} in it or in adapter/)"
    )


def adapter_digest(folder: Path) -> str:
    """sha256 of an adapter's description: specification, sizes, base model and the sha256 of its tensors.

    It does not depend on the place of the folder.

    Raises:
        UserError: the folder holds no adapter.
    """
    description = storage.read_json(folder / DESCRIPTION)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
