"""A run's folder as a study keeps it: everything that a reader needs to check the run, without what must not be shared.

Prompts, references and texts of choices belong to the data sets, so they are left out: scripts/verify.py takes them
from the rows again, by id. Paths of the machine are left out too. The record's `left_out` says what is missing.
Predictions are compressed, and the record has the sha256 of their content. The base model's are equal for many runs, so
a study holds each file once, in base/, named by its sha256.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.config.compose import read_config
from tiedlora.config.identity import config_tree
from tiedlora.config.schema import Config
from tiedlora.records.rows import PredictionRow, read_predictions, write_predictions
from tiedlora.records.run_folder import RunFolder, last_line
from tiedlora.records.run_record import ADAPTER, TEXTS, ConfigRecord, SplitScores, from_tree


def export_record(run: RunFolder, out: Path, *, keep_adapter: bool) -> RunFolder:
    """Write a finished run to out/<run id>.

    Args:
        out: the folder of the study's runs.
        keep_adapter: whether the adapter's files are kept, if the run has them. Otherwise the record has their sha256.

    Raises:
        UserError: the run is not finished, or a file is damaged.
        OSError: the folder cannot be written.
    """
    record = run.finished_record()
    exported = RunFolder(out / record.run_id)
    scores = {split: _split(run, exported, split, recorded) for split, recorded in record.scores.items()}
    keep_adapter = keep_adapter and record.keeps(ADAPTER)
    if keep_adapter:
        for name in record.files:
            storage.write_bytes(exported.path / name, storage.read_bytes(run.path / name))
    config = _copy_files(run, exported)
    left_out = [TEXTS] if keep_adapter else [TEXTS, ADAPTER]
    exported.result_file.unlink(missing_ok=True)
    exported.write_record(
        replace(record, config=from_tree(ConfigRecord, config_tree(config)), scores=scores, left_out=left_out)
    )
    return exported


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
    """Copy the files without texts, and config.yaml without paths. Returns the configuration."""
    # Of an earlier export, before the run started again.
    exported.error_file.unlink(missing_ok=True)
    for name in ("metrics.jsonl", "validation_losses.jsonl", "pruned.txt"):
        if (run.path / name).exists():
            storage.write_bytes(exported.path / name, storage.read_bytes(run.path / name))
        else:
            (exported.path / name).unlink(missing_ok=True)
    config = read_config(run.config_file)
    score = replace(config.score, forgetting=config.score.forgetting and Path(config.score.forgetting).name)
    # RUN/adapter, or the name of another adapter's folder.
    start = Path(config.train.init_from or "")
    name = f"{start.parent.name}/adapter" if start.name == "adapter" else start.name
    train = replace(config.train, init_from=name or None)
    model = replace(config.model, path=None)
    config = replace(config, outputs="outputs", cache=".cache", data_root=None, model=model, score=score, train=train)
    storage.write_bytes(exported.config_file, OmegaConf.to_yaml(config_tree(config)).encode())
    return config


def _split(run: RunFolder, exported: RunFolder, split: str, recorded: SplitScores) -> SplitScores:
    """Write a split's predictions without texts, and return its scores with the new files' sha256."""
    rows = read_predictions(run.predictions_file(split))
    write_predictions(exported.predictions_file(split), map(_without_texts, rows))
    files = exported.prediction_checksums(split)
    if recorded.base is not None:
        name = f"predictions/{split}.base.jsonl"
        base_rows = read_predictions(run.base_predictions_file(split, recorded.files))
        written = exported.predictions_file(f"{split}.base")
        write_predictions(written, map(_without_texts, base_rows))
        files[name] = storage.sha256(written)
        shared = exported.shared_base_file(files[name])
        shared.parent.mkdir(parents=True, exist_ok=True)
        written.replace(shared)
    storage.compress(exported.predictions_file(split))
    return replace(recorded, files=files, source=recorded.source and Path(recorded.source).name)


def _without_texts(row: PredictionRow) -> PredictionRow:
    """The row without what belongs to the data set. An output that was chosen among its texts belongs to it too."""
    if row.choices is None:
        return replace(row, prompt="", references=[])
    return replace(row, prompt="", references=[], output="", choices=[""] * len(row.choices))
