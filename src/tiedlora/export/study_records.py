"""A run's folder as a study keeps it: everything that a reader needs to check the run, without what must not be shared.

Prompts, references and texts of choices belong to the data sets, so they are left out: scripts/verify.py takes them
from the rows again, by id. Paths of the machine are left out too.
Files of scores are compressed. Those of the base model are in base/ beside the runs, once for all of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiedlora import storage
from tiedlora.config.compose import read_config
from tiedlora.config.identity import config_tree, without_paths
from tiedlora.config.schema import Config
from tiedlora.records.rows import PredictionRow
from tiedlora.records.run_folder import RunFolder, last_line
from tiedlora.records.run_record import ConfigRecord, from_tree
from tiedlora.records.scores import read_run_scores, read_scores, write_scores


def export_record(run: RunFolder, out: Path) -> RunFolder:
    """Write a finished run's training to out/<run id>, without its adapter and its scores.

    Args:
        out: the folder of the study's runs.

    Raises:
        UserError: the run is not finished, or a file is damaged.
        OSError: the folder cannot be written.
    """
    record = run.finished_record()
    exported = RunFolder(out / record.run_id)
    config = _copy_files(run, exported)
    exported.write_record(replace(record, config=from_tree(ConfigRecord, config_tree(config)), keeps_texts=False))
    return exported


def export_adapter(run: RunFolder, exported: RunFolder) -> None:
    """Copy the files of the adapter that the record names, completely or not at all.

    Raises:
        UserError: a file is missing.
        OSError: the folder cannot be written.
    """
    with storage.new_folder(exported.adapter) as beside:
        for name in run.finished_record().files:
            storage.write_bytes(beside / Path(name).name, storage.read_bytes(run.path / name))


def export_stopped(run: RunFolder, out: Path) -> None:
    """Write what shows why a run has no result: its configuration, its losses, and why a search stopped it, or that its
    loss was not finite. Only the last line of that error is kept, because the lines before it name paths.

    Raises:
        UserError: config.yaml is damaged.
        OSError: the folder cannot be written.
    """
    exported = RunFolder(out / run.path.name)
    _copy_files(run, exported)
    if run.diverged():
        storage.write_bytes(exported.error_file, f"{last_line(run.error_file)}\n".encode())


def _copy_files(run: RunFolder, exported: RunFolder) -> Config:
    """Write config.yaml without paths, and copy the files without texts. Returns the configuration."""
    config = without_paths(read_config(run.config_file))
    # First: the files below say how far a stopped run has come, so without them it is exported again after a kill.
    storage.write_yaml(exported.config_file, config_tree(config))
    # Of an earlier export, before the run started again.
    exported.error_file.unlink(missing_ok=True)
    for name in ("metrics.jsonl", "validation_losses.jsonl", "pruned.txt"):
        if (run.path / name).exists():
            storage.write_bytes(exported.path / name, storage.read_bytes(run.path / name))
        else:
            (exported.path / name).unlink(missing_ok=True)
    return config


def export_scores(run: RunFolder, exported: RunFolder) -> None:
    """Write the files of scores that the study does not have yet, without texts. Those that it has never change.

    Raises:
        UserError: a file is damaged.
        OSError: a folder cannot be written.
    """
    for (split, kind), record in read_run_scores(run).adapted.items():
        _export_file(run.scores_file(split, kind), exported.scores_file(split, kind))
        base_file = run.base_scores_file(record.base)
        if record.base and storage.is_here(base_file):
            _export_file(base_file, exported.base_scores_file(record.base))


def _export_file(source: Path, out: Path) -> None:
    if storage.is_here(out):
        return
    scored = read_scores(source)
    record = replace(scored.record, source=scored.record.source and Path(scored.record.source).name)
    write_scores(out, record, list(map(_without_texts, scored.rows)), compressed=True)


def _without_texts(row: PredictionRow) -> PredictionRow:
    """The row without what belongs to the data set. An output that was chosen among its texts belongs to it too."""
    if row.choices is None:
        return replace(row, prompt="", references=[])
    return replace(row, prompt="", references=[], output="", choices=[""] * len(row.choices))
