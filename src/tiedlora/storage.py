"""Writes that are whole or not there, hashes of what was written, and readers that trust no file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from tiedlora.errors import UserError

LARGEST_JSON, LARGEST_YAML = 64 * 2**20, 2**20
"""Bytes of a record and of a configuration at most: ours have kilobytes, and they are read whole."""
DEEPEST_YAML = 50
"""Levels: pyyaml's time grows with their square."""


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an error say which file it is about: a write to an open file does not know the name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside `path`, flush to the disk, rename over it.

    Raises:
        OSError: disk full, no permission; `path` is then what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, strict: a NaN is an error, not a file that other programs cannot read."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_bytes(path, text.encode())


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """What a regular file holds: a pipe would be waited for, and a device never ends.

    Raises:
        UserError: the file is missing, is no regular file, cannot be read, or has more than `most` bytes.
    """
    with _regular(path) as file:
        if most is not None and (size := os.fstat(file.fileno()).st_size) > most:
            raise UserError(f"{path}: has {size:,} bytes, at most {most:,} are read")
        return file.read()


def sha256(path: Path) -> str:
    """Of a regular file's bytes.

    Raises:
        UserError: the file is missing, is no regular file, or cannot be read.
    """
    with _regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _regular(path: Path) -> Iterator[BufferedReader]:
    try:
        # Looked at first: the opening of a pipe may wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: the file cannot be read, is not UTF-8, not JSON, or not an object.
    """
    data = read_bytes(path, LARGEST_JSON)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def read_yaml(path: Path) -> Any:
    """A YAML mapping as an OmegaConf node, its interpolations unresolved. Tags of Python objects are an error.

    Raises:
        UserError: the file cannot be read, is not UTF-8, not YAML, no mapping, or what no file of ours is.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    data = read_bytes(path, LARGEST_YAML)
    try:
        text = data.decode("utf-8")
        if reason := _unreadable(yaml.parse(text, yaml.SafeLoader)):
            raise UserError(f"{path}: {reason}")
        return OmegaConf.create(text)
    except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: is not readable YAML ({reason})") from None


def _unreadable(events: Iterator[Any]) -> str:
    """Why YAML should not be built into values: nine lines of aliases unfold to gigabytes."""
    import yaml

    depth, root = 0, True
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            return "has YAML aliases (*name), which are not read; write the values out"
        if isinstance(event, yaml.NodeEvent):
            if root and not isinstance(event, yaml.MappingStartEvent):
                return "must hold a YAML mapping of keys to values"
            root = False
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_YAML:
            return f"is nested more than {DEEPEST_YAML} levels deep"
    return ""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` whole, when the block ends, replacing what was there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        with naming(path):
            yield beside
            for file in beside.iterdir():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
            sync_folder(beside)
            if path.exists():
                shutil.rmtree(path)
            os.replace(beside, path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
