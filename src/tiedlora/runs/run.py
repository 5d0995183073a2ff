"""One run's life: found finished, begun, gone on with where it stopped; and splits scored afterwards."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tiedlora import storage
from tiedlora import text as present
from tiedlora.config import compose as configuration
from tiedlora.config.schema import Config
from tiedlora.errors import UserError, out_of_memory
from tiedlora.records.run_folder import RunFolder, run_id
from tiedlora.runs import reuse
from tiedlora.runs.session import Prepared, device_of
from tiedlora.tasks import load_examples, load_task
from tiedlora.training import distributed
from tiedlora.training.distributed import Processes
from tiedlora.training.signals import Stop

log = logging.getLogger(__name__)


def main(config: Config) -> dict[str, Any]:
    """Carry out a run, or find that it is done, and print its result.

    Raises:
        UserError: a mistake the user can mend, or too little memory.
        Busy: another process is working on this very run.
        Interrupted: a signal asked the run to stop; the same command goes on from its checkpoint.
    """
    with distributed.joined(_wants_cuda(config.train.device)) as us:
        try:
            return _main(config, us) if us.first else _help(config, us)
        except (MemoryError, RuntimeError, OSError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                f"out of memory; while scoring or validating, lower score.batch_size={config.score.batch_size} (other "
                "rounding, so another run); while loading, take a smaller model or train.dtype=bfloat16"
            ) from error


def _main(config: Config, us: Processes) -> dict[str, Any]:
    folder = RunFolder(Path(config.outputs) / run_id(config))
    task = load_task(config.task)
    result = folder.result()
    if us.any(result is not None and not config.force) and result is None:
        raise UserError(f"{folder.path}: other processes find a result.json there, this one does not; share the folder")
    if result is not None and not config.force:
        same_data(config, result, folder)
        # A read-only archive cannot be tidied, and needs not be.
        with suppress(OSError), folder.locked():
            folder.tidy()
        if missing := [split for split in config.score.splits if split not in result["scores"]]:
            result = score_more(folder, missing, config.data_root, config)
        else:
            print(f"finished before: {folder.path} (force=true repeats it)")
        print(present.result(result, folder.path))
        return result
    prepared = Prepared(config, task, us)
    try:
        with folder.locked(), _failure_in(folder), Stop() as stop:
            if config.force and folder.result() is not None:
                folder.clear()
            folder.tidy()
            folder.error_file.unlink(missing_ok=True)
            # Another run of the same command may have finished it while the parts were loaded.
            result = folder.result()
            if not us.any(result is not None):
                result = prepared.train_and_score(folder, stop)
    finally:
        prepared.release()
    assert result is not None
    print(present.result(result, folder.path))
    return result


def _help(config: Config, us: Processes) -> dict[str, Any]:
    """The part of every process but the first: its rows' gradients. What it would write is thrown away."""
    logging.getLogger("tiedlora").setLevel(logging.WARNING)
    folder = RunFolder(Path(config.outputs) / run_id(config))
    if us.any(folder.result() is not None and not config.force):
        return {}
    config.tracking.backend = "none"
    prepared = Prepared(config, load_task(config.task), us)
    try:
        with tempfile.TemporaryDirectory() as scratch, Stop() as stop:
            if not us.any(False):
                prepared.train(RunFolder(Path(scratch)), stop, resume_from=folder.checkpoints)
    finally:
        prepared.release()
    return {}


def score_more(
    folder: RunFolder, splits: list[str], data_root: str | None, execution: Config | None = None
) -> dict[str, Any]:
    """Add splits to a finished run: its identity, training record and other scores stay.

    Args:
        data_root: where the split's rows are now; None means the hub.
        execution: where to take the other paths and the device from; None takes the run's own record.

    Raises:
        UserError: the run is not finished, or its base model or adapter has changed.
    """
    from tiedlora.adapter import attach_adapter, load
    from tiedlora.data.encoding import Encoder
    from tiedlora.scoring import scoring

    result = folder.result()
    if result is None:
        raise UserError(f"{folder.path}: has no result.json, so the run is not finished; run its command again")
    config = configuration.saved(folder.config_file)
    # A run that was moved, or is somebody else's, writes beside itself and not where it was made.
    config.data_root, config.outputs = data_root, str(folder.path.parent)
    if execution is not None:
        config.outputs, config.cache = execution.outputs, execution.cache
        config.model.path, config.train.device = execution.model.path, execution.train.device
    import torch

    task = load_task(config.task)
    base = reuse.base(config, torch.device(device_of(config.train.device)))
    adapter, trained_on = load(folder.adapter)
    if trained_on != base.record:
        raise UserError(f"{folder.adapter}: was trained on {trained_on}, the base model here is {base.record}")
    attached = attach_adapter(base.model, adapter)
    encoder = Encoder(base.tokenizer, config.task, config.model.context)
    try:
        with folder.locked():
            for split in splits:
                examples = load_examples(task, split, config.data_root)
                result["scores"][split] = scoring.score_split(
                    attached, encoder, task, examples, config, base.record, split, folder
                )
                result["scores"][split]["files"] = folder.prediction_checksums(split)
                storage.write_json(folder.result_file, result)
    finally:
        attached.detach()
    return result


def same_data(config: Config, result: dict[str, Any], folder: RunFolder) -> None:
    """A finished run of the same configuration but other data or another base is an error, not a match.

    Raises:
        UserError: naming what has changed.
    """
    from tiedlora.models.base_model import describe

    if result["run_id"] != folder.path.name:
        raise UserError(
            f"{folder.result_file}: is the result of another run, {result['run_id']}; restore this run's own, or "
            "repeat the run with force=true"
        )
    _, now = reuse.rows(config)
    recorded = {split: result["data"][split]["digest"] for split in now}
    for split, found in now.items():
        if found != recorded[split]:
            raise UserError(
                f"{folder.path}: finished on other {split} data (sha256 {recorded[split][:12]}, now {found[:12]}); "
                "restore the data, or repeat the run with force=true"
            )
    base = describe(config.model)["digest"]
    if base is not None and base != result["base"]["digest"]:
        raise UserError(
            f"{folder.path}: finished on another base model ({result['base']['digest']}, now {base}); "
            "restore the model, or repeat the run with force=true"
        )


def _wants_cuda(name: str) -> bool:
    # Only processes that torchrun started need to know before torch is loaded.
    return "WORLD_SIZE" in os.environ and device_of(name) != "cpu"


@contextmanager
def _failure_in(folder: RunFolder) -> Iterator[None]:
    """Leave a failing run's traceback in its folder; a stop on request is not a failure."""
    from tiedlora.training.loop import Interrupted

    try:
        yield
    except Interrupted:
        raise
    except Exception:
        folder.write_error()
        raise
