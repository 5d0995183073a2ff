"""The files of a study: its plan, and the records of its runs.

    study.yaml        the plan
    runs/             the records, while the study is under way
    records.tar.xz    the records of a finished study; study.yaml has its sha256 under `records`

Whoever reads records asks `records_folder`, which unpacks an archive once into the cache.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
from lzma import LZMAError
from pathlib import Path

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.places import cache_folder

PLAN = "study.yaml"
ARCHIVE = "records.tar.xz"
RUNS = "runs"
CLUSTERS = "clusters.json"
"""Task -> row's id -> the row's cluster, for runs whose rows do not name it."""
PACKED = (RUNS, "rates", CLUSTERS)
"""What an archive may hold, as far as the study has it."""
LARGEST_BYTES = 4 * 2**30
"""Of an archive's files together. A study is a file that people pass on, and an archive can pretend to be small."""
LARGEST_COUNT = 50_000
"""Of an archive's entries. Empty files take no bytes, but time."""
_SHA256 = re.compile(r"^records: *(\S+)$", re.MULTILINE)
_COMMENT = f"# The sha256 of {ARCHIVE}."
_RECORDS = re.compile(rf"^(?:{re.escape(_COMMENT)}\n)?records:.*\n?", re.MULTILINE)


def is_study(folder: Path) -> bool:
    """Whether the folder is a study's."""
    return (folder / PLAN).is_file()


def is_finished(folder: Path) -> bool:
    """Whether a study's records are in its archive."""
    return (folder / ARCHIVE).is_file()


def records_folder(folder: Path) -> Path:
    """The folder that holds a study's runs/: its own, or the unpacked archive.

    Raises:
        UserError: the archive is not the one of study.yaml, or is damaged; or the study has both forms.
        OSError: the cache cannot be written.
    """
    archive = folder / ARCHIVE
    if not archive.is_file():
        return folder
    if (folder / RUNS).exists():
        raise UserError(f"{folder}: has {RUNS}/ and {ARCHIVE}; keep the one that is right, and remove the other")
    sha256 = storage.sha256(archive)
    recorded: list[str] = _SHA256.findall(storage.read_bytes(folder / PLAN).decode("utf-8", "replace"))
    if recorded != [sha256]:
        raise UserError(f"{archive}: has the sha256 {sha256}, and {PLAN} says {', '.join(recorded) or 'none'}")
    cache = cache_folder() / "studies"
    cache.mkdir(parents=True, exist_ok=True)
    unpacked = cache / sha256[:24]
    with storage.locked(cache / f"{sha256[:24]}.lock"):
        if not unpacked.is_dir():
            with storage.new_folder(unpacked) as beside:
                _unpack(archive, beside)
    return unpacked


def runs_folder(folder: Path) -> Path:
    """The folder of a study's runs, as `records_folder`.

    Raises:
        UserError: the study has no runs yet, or its archive holds none; or as `records_folder`.
    """
    runs = records_folder(folder) / RUNS
    if not runs.is_dir() and is_finished(folder):
        raise UserError(
            f"{folder / ARCHIVE}: holds no folder {RUNS}, which every study has; restore the file, or remove what is "
            f"left of its unpacked form, {runs.parent}"
        )
    if not runs.is_dir():
        raise UserError(f"{runs}: the study has no runs yet; scripts/study.py run {folder} makes them")
    return runs


def finish(folder: Path) -> str:
    """Pack a study's records into one archive, write its sha256 into study.yaml, and remove the files.

    Equal records give equal bytes: entries are sorted, without times and owners.

    Returns:
        The sha256 of the archive.

    Raises:
        UserError: the study has no runs, is finished already, or is larger than what an archive may hold.
        OSError: the folder cannot be written.
    """
    # In the cache, because a study's folder is committed.
    locks = cache_folder() / "studies"
    locks.mkdir(parents=True, exist_ok=True)
    with storage.locked(locks / f"finish-{storage.json_sha256(str(folder.resolve()))[:24]}.lock"):
        if is_finished(folder):
            raise UserError(f"{folder}: is finished; its records are in {ARCHIVE}")
        runs_folder(folder)
        return _finish(folder)


def _finish(folder: Path) -> str:
    """As `finish`, while no other process finishes the study."""
    archive, plan = folder / ARCHIVE, folder / PLAN
    packed = [folder / name for name in PACKED if (folder / name).exists()]
    beside = archive.with_name(f".{ARCHIVE}.tmp")
    try:
        with tarfile.open(beside, "w:xz", preset=9) as tar:
            for path in packed:
                tar.add(path, path.name, filter=_plain)
        # The files are removed below, so that they can be read again is tried here.
        with tempfile.TemporaryDirectory(prefix=f".{ARCHIVE}-", dir=folder) as unpacked:
            _unpack(beside, Path(unpacked))
        sha256 = storage.sha256(beside)
        # On the disk before the files are removed: a power failure could otherwise leave neither.
        storage.flush_to_disk(beside)
        # Before the archive is there, the line means nothing. One may be left from a process that was killed here.
        text = _RECORDS.sub("", plan.read_text(encoding="utf-8")).rstrip("\n")
        storage.write_bytes(plan, f"{text}\n{_COMMENT}\nrecords: {sha256}\n".encode())
        beside.replace(archive)
        storage.flush_to_disk(folder)
    finally:
        beside.unlink(missing_ok=True)
    for path in packed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sha256


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The entry as it is on every machine; None for a lock, which is no record."""
    if entry.name.endswith(".lock"):
        return None
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry


def _unpack(archive: Path, out: Path) -> None:
    try:
        with tarfile.open(archive, "r:xz") as tar:
            size = 0
            for count, entry in enumerate(tar, start=1):
                if entry.name.partition("/")[0] not in PACKED:
                    raise UserError(f"{archive}: holds {entry.name!r:.60}; it may hold {', '.join(PACKED)}")
                size += entry.size
                if size > LARGEST_BYTES:
                    raise UserError(f"{archive}: holds more than {LARGEST_BYTES >> 30} GiB, which no study has")
                if count > LARGEST_COUNT:
                    raise UserError(f"{archive}: holds more than {LARGEST_COUNT:,} files, which no study has")
                tar.extract(entry, out, filter="data")
    except (tarfile.TarError, LZMAError, EOFError) as error:
        raise UserError(f"{archive}: is not a readable archive ({error})") from None
