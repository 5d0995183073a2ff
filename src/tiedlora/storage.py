"""Write and read files. A write is complete or has no effect, and every file is checked when it is read.

What writes raises OSError if the disk is full or there is no permission. JSON is refused with a ValueError if a number
is not finite, because other programs could not read the file. What reads raises a UserError that names the file, if it
is missing, is not a regular file, cannot be read, or is damaged.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from typing_extensions import override

from tiedlora.errors import UserError

log = logging.getLogger(__name__)

SECONDS_IN_SILENCE = 2
"""How long a process waits for a lock before it says so."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
"""What flock answers on a file system without it."""
SETTLED_SECONDS = 2.0
"""A younger file is hashed each time, because a second change might have the same (coarse) time stamp as the first."""
SHA256 = re.compile("[0-9a-f]{64}")


@contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[None]:
    """Hold the lock of a lock file. It ends with its process, also with one that is killed. A thread may take it again.

    Args:
        patience: the most seconds to wait; None waits for ever.

    Raises:
        filelock.Timeout: another process holds the lock.
        UserError: the file system has no such locks.
    """
    # Without flock, filelock would take the file itself for the lock, and a killed process would leave it for ever.
    lock = FileLock(path, fallback_to_soft=False, is_singleton=True)
    try:
        lock.acquire(timeout=SECONDS_IN_SILENCE if patience is None else patience)
    except Timeout:
        if patience is not None:
            raise
        log.info("waiting for another process, which holds %s", path)
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{path}: the file system has no locks (flock), without which two processes could spoil a run; choose "
            "another folder with outputs= and cache=, or mount it with them (Lustre: -o flock)"
        ) from None
    try:
        yield
    finally:
        lock.release()


def flush_to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk, so that a rename inside it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an error of the block, because a failed write to an open file does not name it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        error.filename = getattr(error, "filename", None) or str(path)  # type: ignore[union-attr]
        raise


def _beside(path: Path) -> Path:
    """A temporary name in the same folder. It is random, because processes of two machines may have the same number."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write_bytes(path: Path, data: bytes, flush: bool = True) -> None:
    """Write a file completely or not at all: write a second file beside `path`, flush it to the disk, then rename it.

    Args:
        flush: False for files that the next start writes again. It saves milliseconds for each file, but a power
            failure may leave an empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with naming(path), open(beside, "wb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if flush:
        flush_to_disk(path.parent)


def write_changed(path: Path, data: bytes, flush: bool = True) -> None:
    """As `write_bytes`, unless the file has this content already. Then nothing is written, also on a read-only disk."""
    if not path.is_file() or read_bytes(path) != data:
        write_bytes(path, data, flush)


def json_bytes(value: object) -> bytes:
    """Indented JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: object) -> None:
    """Write indented JSON, completely or not at all."""
    write_bytes(path, json_bytes(value))


def write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    """Write plain data as YAML, completely or not at all. `read_yaml` gives it back, also a text such as `${`."""
    text = yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    write_bytes(path, text.encode())


def json_lines_bytes(rows: Sequence[object]) -> bytes:
    """One JSON value per line."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def write_json_lines(path: Path, rows: Sequence[object]) -> None:
    """Write one JSON value per line, completely or not at all."""
    write_bytes(path, json_lines_bytes(rows))


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. A pipe or a device is refused, because reading it might never end."""
    with _regular(path) as file:
        return file.read()


def json_sha256(value: object) -> str:
    """The sha256 of plain data as JSON, in hexadecimal. The order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The sha256 of a regular file, in hexadecimal."""
    with _regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(file: Path, cache: Path | None) -> str:
    """The sha256 of a file. If it is remembered in `cache`, the file is not read."""
    if cache is None or not file.exists():
        return sha256(file)
    state = file.stat()
    known = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"
    path = cache / "digests" / hashlib.sha256(known.encode()).hexdigest()[:24]
    # Without a cache, or with a damaged one, the file is hashed.
    with suppress(OSError, ValueError):
        if SHA256.fullmatch(remembered := path.read_text()):
            return remembered
    hashed = sha256(file)
    if time.time() - state.st_mtime > SETTLED_SECONDS:
        # The cache may be read-only or full: then the file is hashed again next time.
        with suppress(OSError):
            write_bytes(path, hashed.encode())
    return hashed


def write_compressed(path: Path, data: bytes) -> None:
    """Write path.gz, which `read_content` reads, completely or not at all."""
    write_bytes(_compressed(path), gzip.compress(data, mtime=0))


def read_content(path: Path) -> bytes:
    """The content of a file, or that of path.gz if only this is there."""
    with _opened(path) as content:
        return content.read()


def first_line(path: Path) -> bytes:
    """The first line of a file, or of path.gz if only this is there. The rest is not read."""
    with _opened(path) as content:
        return content.readline()


def is_here(path: Path) -> bool:
    """Whether a file is there, as it is or compressed. So is a link that leads nowhere, which cannot be read."""
    return os.path.lexists(path) or _compressed(path).exists()


def _compressed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    """The content of a file, or that of path.gz if only this is there."""
    beside = _compressed(path)
    if path.exists() or not beside.exists():
        with _regular(path) as file:
            yield file
        return
    # BadGzipFile is an OSError, so it must not reach `_regular`.
    with _regular(beside) as file:
        try:
            with gzip.open(file) as content:
                yield content
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{beside}: is not a readable gzip file ({error})") from None


@contextmanager
def _regular(path: Path) -> Iterator[BufferedReader]:
    try:
        # This check comes before open(), because opening a pipe may never return.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def parse_json(text: str | bytes) -> Any:
    """A JSON value from a text of a record.

    Raises:
        ValueError: it is not valid JSON, or an object has a key twice: programs and people could read different values.
        RecursionError: it is nested too deeply.
    """
    return _DECODER.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r:.60} is there twice")
    return tree


# json.loads would make one for each row of a file.
_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeated_keys)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    data = read_bytes(path)
    try:
        value = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as plain data, with the numbers that Hydra would read. Interpolations stay texts.

    Aliases are refused: a file of a few lines could hold more values than any memory, by aliases of aliases. So are
    keys that stand twice, and tags of Python objects.
    """
    data = read_bytes(path)
    try:
        for event in yaml.parse(data, _Loader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise UserError(f"{path}:{line}: *{event.anchor:.40} is an alias; write out what it stands for")
        tree = yaml.load(data, _Loader)
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: is not readable YAML ({' '.join(str(error).split())})") from None
    except (LookupError, AttributeError):
        # From the loader's own code for a value such as `!!bool maybe`.
        raise UserError(f"{path}: is not readable YAML (a value is none of its tag's; leave out tags, !!...)") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold a YAML mapping of keys to values")
    return tree


# libyaml takes a twentieth of the time of the loader that is written in Python.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads numbers and keys as OmegaConf does: 3e-2 is a number, and a date is a text."""

    yaml_implicit_resolvers: ClassVar = {
        start: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"line {node.start_mark.line + 1}: the key {twice[0]!r:.60} stands twice")
        return cast(dict[Any, Any], super().construct_mapping(node, deep))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes every text that would be read as something else, as OmegaConf's own does."""

    @override
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, text: str) -> yaml.ScalarNode:
        """A text. Other programs take y for true, and nan for a number. U+0085 is escaped, because it ends a line."""
        style = '"' if "\x85" in text else "'" if text in ("y", "Y", "n", "N") else None
        with suppress(ValueError):
            float(text)
            style = "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.text)
# The end matters: a text such as `1e-2 is best` only begins as a number.
for kind in (_Loader, _Dumper):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?\d+(_\d+)*(\.[\d_]*)?[eE][-+]?\d+$", re.ASCII),
        list("-+0123456789"),
    )


def copy_folder(source: Path, path: Path) -> bool:
    """Copy a folder completely or not at all. Files that are in `path`, also those of the last moment, stay.

    Returns:
        Whether it was copied.
    """
    try:
        with new_folder(path, replaces=False) as beside:
            for file in source.rglob("*"):
                if file.is_file():
                    (beside / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, beside / file.relative_to(source))
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


@contextmanager
def new_folder(path: Path, replaces: bool = True, last: str | None = None) -> Iterator[Path]:
    """A temporary folder that replaces `path` when the block ends without an error. After an error it is removed.

    The old content comes back if the replacement fails or is interrupted. Only a kill between two renames leaves it
    under a temporary name.

    Args:
        replaces: False to refuse a folder with files by an OSError.
        last: with it, other files in `path` stay. The folder cannot be replaced as a whole then, so each file is, and
            the one of this name at the end. It must hold what identifies the others, such as their sha256.
    """
    # A link stays, and leads to the new content.
    path = Path(os.path.realpath(path))
    beside, before = _beside(path), _beside(path)
    beside.mkdir(parents=True)
    try:
        with naming(path):
            yield beside
            for entry in [*beside.rglob("*"), beside]:
                flush_to_disk(entry)
            names = {entry.name for entry in beside.iterdir()}
            if last is not None and path.is_dir() and any(entry.name not in names for entry in path.iterdir()):
                for name in sorted(names, key=lambda name: name == last):
                    os.replace(beside / name, path / name)
                flush_to_disk(path)
                return
            try:
                if replaces and path.is_dir():
                    os.replace(path, before)
                os.replace(beside, path)
            except BaseException:
                if before.exists() and not path.exists():
                    os.replace(before, path)
                raise
            flush_to_disk(path.parent)
            shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder's files, completely or not at all. If the folder has other files, they stay (see `new_folder`).

    Args:
        contents: name -> content. The last one must hold what identifies the others.
    """
    with new_folder(path, last=[*contents][-1]) as beside:
        for name, data in contents.items():
            (beside / name).write_bytes(data)
