"""A run's identity: the values that change its result, and the id that is a hash of them. The digest of an adapter.

Facts of execution (device, microbatch, paths, tracking) are recorded but not hashed. So a configuration has the same
folder on every machine and under every launcher.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from tiedlora import storage, tying
from tiedlora.config.schema import SPLITS, Config, RowFiles
from tiedlora.config.trial_arm import TrialArm, trial_arm
from tiedlora.description import DESCRIPTION
from tiedlora.errors import UserError
from tiedlora.keys import MISSING

IDENTITY_VERSION = 1
"""Raise it when the meaning of a configuration changes although no key changes. Every run then gets a new id."""
GONE: dict[str, object] = {"score.engine": "transformers", "tying.config": None}
"""Keys of earlier versions whose other values are gone, with the value that is left. Records of studies hold them."""


def identity(config: Any) -> dict[str, Any]:
    """The values of a configuration (or of a section) that change the result, as nested plain data.

    A key is left out if it is a fact of execution, or at its `neutral` value (see keys.py).
    """
    unused, values = _unused(config), {}
    for item in fields(config):
        value = getattr(config, item.name)
        is_neutral = "neutral" in item.metadata and value == item.metadata["neutral"]
        if not (is_neutral or item.metadata.get("execution") or item.name in unused):
            values[item.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return identity(value) if is_dataclass(value) else value


def neutral_values(section: Any) -> dict[str, Any]:
    """The keys of a configuration (or of a section) that `identity` may leave out, at their `neutral` values, as nested
    plain data."""
    values: dict[str, Any] = {}
    for item in fields(section):
        value = getattr(section, item.name)
        if "neutral" in item.metadata:
            values[item.name] = _plain(item.metadata["neutral"])
        elif is_dataclass(value) and (inner := neutral_values(value)):
            values[item.name] = inner
    return values


def _unused(section: Any) -> tuple[str, ...]:
    """The keys of a section that mean nothing with its other values: another method has no A, B, u and v, and a sum of
    terms has them in its terms."""
    if getattr(section, "method", None) is not None:
        return (*tying.PARTS, "dropout")
    return tuple(tying.PARTS) if getattr(section, "terms", None) is not None else ()


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, for every value of nested data that is no mapping, or an empty one."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, Mapping) and value
        found |= leaves(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return found


def arm_of(config: Config) -> TrialArm:
    """The arm that a configuration trains."""
    return trial_arm(identity(config), config.tying.name)


def run_id(config: Config) -> str:
    """`TABuv-r8-chain_sum-smollm2-...-s0-1a2b3c4d5e`: a readable name. It follows from the identity, but that the
    first word is the arm's name in conf/tying.

    Raises:
        UserError: a value is infinite or no number.
    """
    values, model = identity(config), config.model.name.rsplit("/", 1)[-1].lower()
    word, digest = trial_arm(values, config.tying.name).word, identity_digest(values)
    words = [word, f"r{config.rank.r}", config.task.name, model, f"s{config.seed}", digest]
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", word) for word in words)


def identity_digest(values: Mapping[str, Any]) -> str:
    """The last word of a run's id, from the values of its identity.

    Raises:
        UserError: a value is infinite or no number.
    """
    try:
        canonical = json.dumps([IDENTITY_VERSION, values], sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise UserError("the configuration has a value that is infinite or no number; give a finite one") from None
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def config_tree(config: Config) -> dict[str, Any]:
    """The complete configuration as plain data, including the facts of execution."""
    return asdict(config)


def without_paths(config: Config) -> Config:
    """The configuration without what names folders of this machine, for others to read. It is the same run.

    Files of rows and of neutral text keep their names, and a start keeps that of its run.
    """
    start = Path(config.train.init_from or "")
    name = f"{start.parent.name}/adapter" if start.name == "adapter" else start.name
    files = {split: Path(file).name for split in SPLITS if (file := getattr(config.task.files, split))}
    forgetting = config.score.forgetting and Path(config.score.forgetting).name
    return replace(
        config,
        model=replace(config.model, path=None),
        task=replace(config.task, files=RowFiles(**files)),
        train=replace(config.train, init_from=name or None),
        score=replace(config.score, forgetting=forgetting),
        outputs="outputs",
        cache=".cache",
        data_root=None,
    )


def without_gone_keys(tree: Any) -> Any:
    """The plain data of a configuration without the keys of GONE, if they have the one value that is left."""
    for name, only in GONE.items():
        section, key = name.split(".")
        inner = tree.get(section) if isinstance(tree, dict) else None
        if isinstance(inner, dict) and inner.get(key, MISSING) == only:
            del inner[key]
    return tree


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
    return storage.json_sha256(storage.read_json(folder / DESCRIPTION))
