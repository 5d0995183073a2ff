"""Carry out one run: load, train, save, score, record. Of several processes, only the first writes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tiedlora.config.check import check_new_run
from tiedlora.config.identity import run_id
from tiedlora.config.schema import FORGETTING, Config
from tiedlora.errors import StoppedEarly, UserError
from tiedlora.models import products
from tiedlora.models.device import only_deterministic_algorithms, resolve_device
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import RunRecord, SplitScores
from tiedlora.records.summary import flat_summary
from tiedlora.runs.recording import build_record
from tiedlora.runs.session import RunSession
from tiedlora.runs.trainer import Trainer
from tiedlora.scoring.engines import check_usable
from tiedlora.scoring.memory import score_forgetting, score_within_memory
from tiedlora.scoring.passes import wanted_passes
from tiedlora.scoring.split import Scorer
from tiedlora.tasks import load_task
from tiedlora.training.distributed import World, join_world
from tiedlora.training.signals import StopSignal


def execute(config: Config) -> RunRecord | None:
    """Carry out the run, or continue it from its newest checkpoint.

    Returns:
        The record; None in every process except the first. A finished run is not repeated.

    Raises:
        UserError: a mistake that the user can correct, or too little memory.
        Busy: another process is working on this run.
        Paused: train.pause_after is reached.
        StoppedEarly: a signal asked the run to stop; the same command continues from its checkpoint.
    """
    algorithms = only_deterministic_algorithms() if config.train.deterministic else nullcontext()
    device = resolve_device(config.train.device)
    on_any_cpu = products.on_any_cpu(device, config.train.dtype)
    with algorithms, on_any_cpu, join_world(device.type == "cuda") as world:
        check_usable(config.score.engine, world.size)
        if world.is_first:
            return _run_first_process(config, world)
        _run_worker_process(config, world)
        return None


def _run_first_process(config: Config, world: World) -> RunRecord | None:
    folder = RunFolder(Path(config.outputs) / run_id(config))
    finished = None if config.force else folder.record()
    if world.any(finished is not None):
        if finished is None:
            raise UserError(
                f"{folder.path}: other processes find a result.json there, this one does not; share the folder"
            )
        return finished
    check_new_run(config)
    # From here on, a signal ends the run as one that can go on, also while it loads.
    with StopSignal() as stop:
        session = RunSession(config, load_task(config.task), world)
        try:
            with folder.locked(), _error_file(folder):
                if config.force and folder.record() is not None:
                    folder.clear()
                folder.tidy()
                folder.error_file.unlink(missing_ok=True)
                folder.pruned_file.unlink(missing_ok=True)
                # Another process with the same command may have finished the run while this one was loading.
                if world.any(folder.record() is not None):
                    return folder.record()
                return _train_and_score(session, folder, stop)
        finally:
            session.release()


def _train_and_score(session: RunSession, folder: RunFolder, stop: StopSignal) -> RunRecord:
    """Train from the newest checkpoint or from the start, save the adapter, score, and write result.json last."""
    trained = Trainer(session, folder, stop).train()
    with trained.trackers.closed_on_error():
        adapter_bytes = session.attached.save(folder.adapter, session.base.record)
        scores = _score(session, folder)
        # The other processes have nothing left to do. They leave now.
        session.world.leave()
        record = build_record(session, trained, folder, adapter_bytes, scores)
    trained.trackers.finish(flat_summary(record))
    folder.write_record(record)
    folder.tidy()
    return record


def _score(session: RunSession, folder: RunFolder) -> dict[str, SplitScores]:
    """Score the splits. Every process scores its share, and writes the predictions of all into its own folder."""
    scorer = Scorer(session.attached, session.encoder, session.task, session.config, session.base.record, session.world)
    passes = wanted_passes(session.config.score.metrics, session.task)
    splits = session.config.score.splits
    scores = {split: score_within_memory(scorer, split, session.examples(split), folder, passes) for split in splits}
    if session.config.score.forgetting is not None:
        scores[FORGETTING] = score_forgetting(scorer, session.config.score.forgetting, folder)
    return scores


def _run_worker_process(config: Config, world: World) -> None:
    """The work of every process except the first: the gradients and scores of its rows. It leaves no files."""
    logging.getLogger("tiedlora").setLevel(logging.WARNING)
    folder = RunFolder(Path(config.outputs) / run_id(config))
    if world.any(folder.record() is not None and not config.force):
        return
    config.tracking.backend = "none"
    session = RunSession(config, load_task(config.task), world)
    try:
        with tempfile.TemporaryDirectory() as scratch, StopSignal() as stop:
            # Here the first process tells the others whether another command has finished the run in the meantime.
            if not world.any(False):
                Trainer(session, RunFolder(Path(scratch)), stop, resume_from=folder.checkpoints).train()
                _score(session, RunFolder(Path(scratch)))
                world.leave()
    finally:
        session.release()


@contextmanager
def _error_file(folder: RunFolder) -> Iterator[None]:
    """If the block fails, write the traceback to the run's folder. A stop on request is not a failure."""
    try:
        yield
    except StoppedEarly:
        raise
    except Exception:
        folder.write_error()
        raise
