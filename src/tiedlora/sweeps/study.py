"""A study: sweeps that are planned in one file before they run, and the records that it keeps of their runs.

    studies/NAME/study.yaml    the plan: the question and the words of every sweep; committed before the first run
    studies/NAME/claims.yaml   the claims, with their planned looks
    studies/NAME/runs/         the records (export/study_records.py), which the report reads as it reads outputs/;
                               of a finished study, records.tar.xz (records/study_files.py)

A sweep of a study is an ordinary `train.py --multirun` command, so it stops and continues like any other.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from tiedlora import storage
from tiedlora.config.compose import in_hydras_grammar
from tiedlora.config.identity import identity_digest
from tiedlora.errors import UserError
from tiedlora.export.study_records import export_adapter, export_record, export_scores, export_stopped
from tiedlora.keys import from_person
from tiedlora.places import PROJECT
from tiedlora.reading import StoredText
from tiedlora.records.provenance import code_version, git
from tiedlora.records.run_folder import BASE, RunFolder, State
from tiedlora.records.run_record import RunRecord
from tiedlora.records.scores import read_run_scores
from tiedlora.records.selection import SELECTION_FILE, read_selection
from tiedlora.records.study_files import ARCHIVE, PLAN, RUNS, is_finished, runs_folder
from tiedlora.sweeps.cells import Sweep
from tiedlora.sweeps.expand import SECTIONS, Composers, DecidingOptions, compose_sweep
from tiedlora.text import is_name, nearest

log = logging.getLogger(__name__)

_WORD = re.compile(r"\+{0,2}([A-Za-z_][\w./]*)=(.*)", re.ASCII | re.DOTALL)
_SECTIONS = ("grid", *(name for name in SECTIONS if name not in ("outputs", "cache", "data_root", "force")))
"""What a word may set. The other keys of a run say where and how it is carried out, which is for the command."""
_OF_HYDRA = (
    "hydra/sweeper",
    "hydra/launcher",
    "hydra.launcher.n_jobs",
    "hydra.launcher.devices",
    *(f"hydra.sweeper.{item.name}" for item in fields(DecidingOptions) if item.name not in ("params", "arms")),
)
"""The other keys of Hydra could start programs, or write elsewhere."""
LARGEST_ADAPTER = 4 * 2**20
"""Bytes. A study keeps only the sha256 of a larger adapter (some methods store their frozen projections)."""


def _allowed(word: str) -> str:
    """Check a word. Studies are files that people pass on, so it may set a key of a run or an axis, and no other."""
    match = _WORD.fullmatch(word)
    if match is None:
        raise ValueError("must be KEY=VALUE, with a key of a run or of its sweep")
    key, value = match.groups()
    section = re.split("[./]", key)[0]
    if section == "hydra":
        if key not in _OF_HYDRA:
            raise ValueError(f"a study sets only these keys of Hydra: {', '.join(_OF_HYDRA)}{nearest(key, _OF_HYDRA)}")
    elif section not in _SECTIONS:
        raise ValueError(f"a study cannot set {section}; it sets {', '.join(_SECTIONS)}{nearest(section, _SECTIONS)}")
    if "." not in key and ".." in value:
        raise ValueError("an option of conf/ is a name, without '..'")
    return word


def _plain(name: str) -> str:
    if not is_name(name) or "/" in name:
        raise ValueError("becomes a folder's name: use letters, digits, '.', '_' and '-' (no '..')")
    return name


Word = Annotated[StoredText, AfterValidator(_allowed)]
PlainName = Annotated[StoredText, AfterValidator(_plain)]


@dataclass(frozen=True)
class StudyPart:
    """Sweeps that share a task and its settings."""

    name: PlainName
    words: list[Word]
    """The words that all sweeps of the part add to those of the study."""
    sweeps: Annotated[list[list[Word]], Field(min_length=1)]
    """The words of each sweep, such as [tying=LoRA,TABuv, rank=r8, seed=0,1,2]."""


@dataclass(frozen=True)
class Study:
    """The plan of a study. Its file may have more keys, for people."""

    name: PlainName
    words: list[Word]
    """The words of every sweep."""
    parts: Annotated[list[StudyPart], Field(min_length=1)]
    records: StoredText | None = None
    """The sha256 of the archive of its records, once the study is finished."""

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two parts have the name {twice}; give each its own")

    def composed(
        self, outputs: Path, only: str | None = None, more: Sequence[str] = ()
    ) -> list[tuple[str, list[str], Sweep]]:
        """The name of the part, the words after `train.py --multirun` and the checked sweep, in the planned order.

        Args:
            only: the name of one part; None takes all.
            more: words to add to every sweep.

        Raises:
            UserError: no part has this name; or naming the part, and what is wrong in its words.
        """
        names = [part.name for part in self.parts]
        if only is not None and only not in names:
            raise UserError(f"{only}: is no part of {self.name}; its parts are {', '.join(names)}")
        planned = []
        composers: Composers = {}
        place = outputs_word(outputs)
        for part in self.parts:
            for own in part.sweeps if only in (None, part.name) else []:
                words = [*self.words, *part.words, *own]
                try:
                    sweep = compose_sweep([*words, *more, place], composers)
                except UserError as error:
                    beside = f" with {' '.join(more)}" if more else ""
                    raise UserError(f"{PLAN}: part {part.name}{beside}: {error}") from None
                planned.append((part.name, words, sweep))
        return planned


def outputs_word(outputs: Path) -> str:
    """The word that names the folder of the runs, whatever letters it has."""
    return f"outputs={in_hydras_grammar(str(outputs))}"


def read_study(folder: Path) -> Study:
    """The study of a folder.

    Raises:
        UserError: study.yaml is missing, or a key is missing or wrong, or the name is not the folder's.
    """
    path = folder / PLAN
    if not path.is_file():
        raise UserError(f"{path}: no such file; a study is a folder with a {PLAN}, such as studies/tied-lora-smollm2")
    tree = storage.read_yaml(path)
    try:
        study = from_person(Study, tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    names = (folder.absolute().name, folder.resolve().name)
    if study.name not in names:
        # The copy of another study would export that study's runs.
        raise UserError(f"{path}: name={study.name}: must be the name of the study's folder, {names[1]}")
    return study


def check_can_run(folder: Path) -> None:
    """Check that the study is not finished, and that its plan is in the commit that the runs will record.

    Raises:
        UserError: it is finished, there are uncommitted changes, or the plan is not in the commit.
    """
    _check_unfinished(folder)
    if PROJECT is None:
        raise UserError(
            "study run: its runs record the commit of the code and of the plan, and an installed package has none; use "
            "a checkout of the project"
        )
    plan = (folder / PLAN).resolve()
    if git("ls-files", "--error-unmatch", str(plan)) is None:
        raise UserError(f"{folder / PLAN}: is not committed; commit the plan before the first run")
    if code_version().dirty is not False:
        raise UserError(
            f"{PROJECT}: has uncommitted changes, so the runs could not be repeated from their commit; commit them"
        )


def _check_unfinished(folder: Path) -> None:
    if is_finished(folder):
        raise UserError(
            f"{folder}: is finished, and its records are in {ARCHIVE}; to go on, unpack it there, and remove "
            f"it and the line `records` of {PLAN}"
        )


def export_study(folder: Path, outputs: Path) -> int:
    """Write the records of all ended runs to the study's folder, with one small adapter of each arm at its chosen rate.

    Returns:
        The number of runs.

    Raises:
        UserError: a run or a selection.json is damaged, or there are no runs.
    """
    _check_unfinished(folder)
    runs = folder / RUNS
    if not outputs.is_dir():
        raise UserError(f"{outputs}: no such folder, so there are no runs to export; start the study with `run`")
    _export_choices(outputs, runs)
    with_adapter = _with_adapter(outputs, runs)
    # A hidden folder is a copy that a kill has left incomplete.
    paths = sorted(path for path in outputs.iterdir() if not path.name.startswith("."))
    return sum(_export_run(RunFolder(path), runs, with_adapter) for path in paths)


def _export_choices(outputs: Path, runs: Path) -> None:
    """Copy the selection.json of each sweep. One that is being scored again lacks choices until it ends."""
    for path in sorted((outputs / "sweeps").glob(f"*/{SELECTION_FILE}")):
        kept_file = runs / "sweeps" / path.parent.name / SELECTION_FILE
        kept_choices = read_selection(kept_file).choices if kept_file.exists() else []
        if len(read_selection(path).choices) >= len(kept_choices):
            storage.write_bytes(kept_file, storage.read_bytes(path))


def _with_adapter(outputs: Path, runs: Path) -> set[str]:
    """The ids of the runs whose adapters the study keeps: one of each arm at its chosen rate."""
    choices = [read_selection(path).choices for path in (runs / "sweeps").glob(f"*/{SELECTION_FILE}")]
    of_arm: dict[str, list[RunRecord]] = defaultdict(list)
    for run_id in {name for items in choices for item in items for name in item.run_ids}:
        record = RunFolder(outputs / run_id).record() or RunFolder(runs / run_id).record()
        if record is not None and any(read_run_scores(RunFolder(root / run_id)).splits for root in (outputs, runs)):
            of_arm[identity_digest(record.identity.tree | {"seed": None})].append(record)
    with_adapter: set[str] = set()
    for records in of_arm.values():
        # An adapter that was kept before stays the only one.
        kept = {record.run_id for record in records if RunFolder(runs / record.run_id).adapter.exists()}
        # Of a run that `restore` has brought, it may not be here.
        here = [record for record in records if RunFolder(outputs / record.run_id).has_adapter]
        with_adapter |= kept or {record.run_id for record in sorted(here, key=attrgetter("seed"))[:1]}
    return with_adapter


def _export_run(run: RunFolder, runs: Path, with_adapter: Container[str]) -> bool:
    """Export one run. Returns whether it has ended and belongs to the study."""
    exported = RunFolder(runs / run.path.name)
    if run.result_file.is_file():
        return _export_finished(run, exported, with_adapter)
    if not run.validation_losses_file.is_file() or not run.config_file.is_file() or run.state() == State.RUNNING:
        return False
    if not run.pruned_file.exists() and not run.diverged():
        # It has only paused, and may go on.
        return False
    # A finished record stays while its run is trained again, because its adapter was not kept. Files of a stopped run
    # stay as they were written if it has gone no further.
    if not exported.result_file.is_file() and _progress(run) != _progress(exported):
        export_stopped(run, runs)
    return True


def _export_finished(run: RunFolder, exported: RunFolder, with_adapter: Container[str]) -> bool:
    """Export a finished run, unless the folder's run or the study's record is another one. Returns whether it did."""
    record, kept_record = run.finished_record(), exported.record()
    if record.run_id != run.path.name:
        log.warning("%s: holds the run %s, so it is left out", run.path, record.run_id)
        return False
    if kept_record is None:
        export_record(run, exported.path.parent)
    elif kept_record.files != record.files:
        log.warning("%s: is another training of the run that the study keeps, so it is left out", run.path)
        return False
    # A record never changes. What was scored or chosen since is a new file.
    export_scores(run, exported)
    # A record that another study has kept with its adapter stays whole.
    is_wanted = record.run_id in with_adapter or not record.keeps_texts
    is_wanted = is_wanted and record.adapter_bytes <= LARGEST_ADAPTER
    if is_wanted and run.has_adapter and not exported.has_adapter:
        export_adapter(run, exported)
    return True


def _progress(run: RunFolder) -> list[object]:
    """What changes when a stopped run goes on."""
    files = (run.validation_losses_file, run.pruned_file)
    return [run.diverged(), *(file.exists() and storage.read_bytes(file) for file in files)]


def restore_study(folder: Path, outputs: Path) -> int:
    """Copy the study's records to where its runs are, so that `run` continues from them on another machine.

    A run that is already in `outputs` stays as it is.

    Returns:
        The number of runs that were copied.

    Raises:
        UserError: the study has no records.
        OSError: the folder cannot be written.
    """
    runs = runs_folder(folder)
    kept = [path for path in sorted(runs.iterdir()) if (path / "config.yaml").is_file()]
    # Copying takes long: another process may have begun a run by then.
    copied = [not (outputs / path.name).exists() and storage.copy_folder(path, outputs / path.name) for path in kept]
    for file in (runs / BASE).glob("*.jsonl*"):
        storage.write_bytes(outputs / BASE / file.name, storage.read_bytes(file))
    return sum(copied)
