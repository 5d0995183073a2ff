"""One run that is not finished: load, train, save, score, record. Of several processes, only the first writes."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tiedlora import storage, tying
from tiedlora.analysis.intervals import mean_loss
from tiedlora.analysis.metrics import summarise
from tiedlora.config import compose, own_model
from tiedlora.config.check import check_new_run
from tiedlora.config.identity import config_tree, identity
from tiedlora.config.schema import FORGETTING, Config, ModelConfig, ScoreConfig
from tiedlora.data.batching import Batch, BatchSampler, collate, empty_batch, even_passes, microbatches
from tiedlora.data.encoding import Encoded
from tiedlora.description import DESCRIPTION
from tiedlora.errors import StoppedEarly, UserError, is_out_of_memory
from tiedlora.families import layout_of
from tiedlora.models import device as devices
from tiedlora.models import products
from tiedlora.models.arithmetic import block_weights
from tiedlora.records import run_record
from tiedlora.records.rows import AppendedFile, MetricsRow, ValidationLosses, read_validation_losses
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import ConfigRecord, Halving, Identity, RunRecord
from tiedlora.records.scores import read_run_scores, read_scores
from tiedlora.records.summary import flat_summary
from tiedlora.runs.loading import Loaded, computing_as, load
from tiedlora.runs.reward import Reward
from tiedlora.scoring.split import in_shares
from tiedlora.scoring.wanted import forgetting_to_score, missing_scores
from tiedlora.tasks import Example, digest
from tiedlora.tracking.progress import ProgressBar
from tiedlora.tracking.run_trackers import NONE, RunTrackers, TrackedRun, check_tracker
from tiedlora.training import checkpoint, compiling
from tiedlora.training.distributed import World, join_world
from tiedlora.training.loop import Loop, TrainState
from tiedlora.training.loss import row_losses, target_loss
from tiedlora.training.optimizer import build_optimizer
from tiedlora.training.signals import StopSignal

log = logging.getLogger(__name__)

NAMED_ROWS = 16
"""How many rows of a step an error names."""


def carry_out(config: Config, folder: RunFolder) -> RunRecord | None:
    """Carry out the run, or continue it from its newest checkpoint. A finished run is not repeated.

    Args:
        folder: the run's own.

    Returns:
        The record; None in every process except the first.

    Raises:
        UserError, Busy, StoppedEarly: as run.main.
        Paused: train.pause_after is reached.
    """
    device = devices.resolve_device(config.train.device)
    with computing_as(config.train, device), join_world(device.type) as world:
        _check_alike(world, "runs", folder.path.name)
        # 1. Do all processes agree that the run is not finished?
        finished = None if config.force else folder.record()
        if world.any(finished is not None):
            if finished is None:
                raise UserError(
                    f"{folder.path}: other processes find a result.json there, this one does not; share the folder"
                )
            return finished if world.is_first else None
        check_new_run(config)
        config = _with_commit(config, folder, world)
        if world.is_first:
            check_tracker(config)
        else:
            # Only the first process prints.
            logging.getLogger("tiedlora").setLevel(logging.WARNING)
        # 2. Load. From here on, after a signal the same command continues the run, also if it came while loading.
        with StopSignal() as stop, ExitStack() as undone:
            loaded = load(config, world)
            undone.callback(loaded.release)
            scored = {split: digest(rows) for split, rows in loaded.examples.items() if world.size > 1}
            _check_alike(world, "rows or base models", (loaded.inputs.data, scored, loaded.inputs.base))
            own = undone.enter_context(_written_folder(folder, config.force, world))
            # Another process with the same command may have finished the run while this one was loading.
            if world.any(own.record() is not None):
                return own.record()
            # 3. Train from the newest checkpoint or from the start, and save the adapter.
            training = begin(config, loaded, own, folder.checkpoints)
            training.train(stop)
            with training.trackers.closed_on_error():
                adapter_bytes = _save_adapter(loaded, own)
                record = record_of(config, loaded, training.state, own, adapter_bytes)
                # 4. Score. Every process scores its share, and writes the rows of all into its own folder. What a stop
                # has left is kept if it is of this adapter.
                _remove_other_scores(own, record, loaded.examples)
                score(config.score, loaded, own)
                # The other processes have nothing left to do. They leave now.
                world.leave()
                if not world.is_first:
                    return None
            # 5. Write result.json last.
            training.trackers.finish(flat_summary(record, read_run_scores(own)))
            own.write_record(record)
            own.tidy()
            return record


def _check_alike(world: World, what: str, mine: object) -> None:
    """Raises UserError, in every process, if the processes have not all the same."""
    found = world.gather(mine)
    if any(other != mine for other in found):
        each = "; ".join(sorted({*map(str, found)}))
        raise UserError(
            f"torchrun: its processes have different {what} ({each}); give all of them the same command and files"
        )


def _save_adapter(loaded: Loaded, folder: RunFolder) -> int:
    """Save the adapter in the first process. The others get its description, whose digest their scores name.

    Returns:
        The size of its files in bytes; 0 in the other processes.
    """
    world, described = loaded.world, folder.adapter / DESCRIPTION
    size = loaded.arm.save(folder.adapter, loaded.base.record) if world.is_first else 0
    description = world.gather(storage.read_bytes(described) if world.is_first else b"")[0]
    if not world.is_first:
        storage.write_bytes(described, description)
    return size


def _with_commit(config: Config, folder: RunFolder, world: World) -> Config:
    """The configuration with the commit of a model of the hub: that with which the run began, if it continues.

    Raises:
        UserError: as own_model.with_commit.
    """
    model = config.model
    if model.source != "hub" or model.path is not None:
        return config
    if model.commit is None and not config.force and folder.config_file.exists():
        model = replace(model, commit=compose.read_config(folder.config_file).model.commit)
    # All processes have the first one's, because the hub may have moved in between.
    commit = world.gather(own_model.with_commit(model).commit)[0]
    log.info("%s at %s is commit %s", model.name, model.revision, commit)
    return replace(config, model=replace(model, commit=commit))


@contextmanager
def _written_folder(folder: RunFolder, force: bool, world: World) -> Iterator[RunFolder]:
    """The folder that this process writes: the run's own, locked; in every process but the first, a temporary one.

    If the block fails, the traceback is written to the run's folder. A stop on request is not a failure.
    """
    if not world.is_first:
        with tempfile.TemporaryDirectory() as scratch:
            yield RunFolder(Path(scratch))
        return
    with folder.locked():
        try:
            if force and folder.result_file.exists():
                folder.clear()
            folder.tidy()
            folder.error_file.unlink(missing_ok=True)
            folder.pruned_file.unlink(missing_ok=True)
            yield folder
        except StoppedEarly:
            raise
        except Exception:
            folder.write_error()
            raise


def can_be_compiled(model: ModelConfig, device: torch.device) -> bool:
    """Whether each block of the base becomes one graph."""
    # accelerate's hooks move weights while a block runs. In int8, bitsandbytes asks a GPU in each linear layer for the
    # columns with outliers, and a block breaks into 22 graphs.
    return not (model.device_map or (model.quantization == "int8" and device.type != "cpu"))


def begin(config: Config, loaded: Loaded, folder: RunFolder, checkpoints: Path) -> Training:
    """The training of a run from its newest checkpoint, or from its start. Its files are open, and its tracker.

    Args:
        folder: config.yaml, metrics.jsonl, validation_losses.jsonl and the checkpoints are written there.
        checkpoints: the folder of the checkpoints to continue from, which the first process has written.

    Raises:
        UserError: a tracker that is not installed; a checkpoint of other data or another base model; or processes that
            continue from different steps (in all of them).
    """
    arm, world = loaded.arm, loaded.world
    # 1. The optimizer, and the newest checkpoint if there is one.
    optimizer = build_optimizer(arm.parameter_groups(config.train.lr_factor), config.train)
    restored = checkpoint.restore(checkpoints, loaded.parts, optimizer, loaded.inputs, arm.buffers())
    state = restored or TrainState()
    # 2. Do all processes continue from the same step?
    first, last = world.smallest(state.step), -world.smallest(-state.step)
    if first != last:
        raise UserError(
            f"{checkpoints}: of the {world.size} processes, one continues from step {first} and another from "
            f"step {last}; make all of them see the same outputs={config.outputs}"
        )
    if restored is not None:
        log.info("continuing from step %d", state.step)
    # 3. Write config.yaml, and open the files that grow and the tracker, which only the first process has.
    storage.write_yaml(folder.config_file, config_tree(config))
    tracking = config.tracking if world.is_first else replace(config.tracking, backend=NONE)
    run = TrackedRun(folder.path.name, folder.path, replace(config, tracking=tracking), loaded.trainable_params)
    resumed_step = None if restored is None else restored.step
    return Training(
        config=config,
        loaded=loaded,
        folder=folder,
        optimizer=optimizer,
        state=state,
        sampler=BatchSampler([len(row) for row in loaded.rows["train"].encoded], config.train, config.seed),
        held_out=loaded.rows["validation"].encoded[: config.train.validation_rows],
        trackers=RunTrackers(run, resumed_step),
        losses_file=AppendedFile(folder.validation_losses_file, read_validation_losses, resumed_step),
        bar=ProgressBar("training", config.train.steps, "steps", state.step),
    )


@dataclass(frozen=True)
class Training:
    """The training of a run: where it is, and what its loop calls. `begin` makes it."""

    config: Config
    loaded: Loaded
    folder: RunFolder
    """Where this process writes."""
    optimizer: torch.optim.Optimizer
    state: TrainState
    """Where the loop is. Every step advances it in place."""
    sampler: BatchSampler
    """Which training rows are in a step."""
    held_out: list[Encoded]
    """The rows of the validation loss."""
    trackers: RunTrackers
    losses_file: AppendedFile[ValidationLosses]
    """validation_losses.jsonl."""
    bar: ProgressBar

    @property
    def _pad_id(self) -> int:
        return int(self.loaded.encoder.tokenizer.eos_token_id)

    def train(self, stop: StopSignal) -> None:
        """Train to the last step. Afterwards the model has the adapter of the step that will be scored.

        Args:
            stop: if a signal came, training writes a checkpoint after the current step and ends.

        Raises:
            UserError: a loss that is not finite, or too little memory.
            StoppedEarly: the stop signal came, or train.pause_after is reached (Paused); a checkpoint is written.
        """
        config, world = self.config, self.loaded.world
        model: Any = self.loaded.arm.model
        # 1. What a step learns: the targets of its rows, or from answers to them (objective=reward).
        reward = self._reward() if config.objective.name == "reward" else None
        # 2. The loop.
        loop = Loop(
            state=self.state,
            optimizer=self.optimizer,
            config=config.train,
            seed=config.seed,
            world=world,
            batches=reward.batches if reward else self._batches,
            loss_sum=reward.loss_sum if reward else functools.partial(target_loss, model),
            validate=self._validate,
            save_checkpoint=self._save_checkpoint,
            count_step=functools.partial(self.bar.advance, 1),
            log_metrics=functools.partial(self._log_metrics, reward.metrics if reward else {}),
            describe_rows=self._describe_rows,
            stop_requested=lambda: world.any(stop.requested()),
        )
        # 3. Train. After a signal, the current step is finished first.
        devices.restart_peak_memory(self.loaded.device)
        model.train()
        stop.finish_step_first = True
        try:
            with self.trackers.closed_on_error(), self._training_blocks():
                loop.train()
        finally:
            stop.finish_step_first = False
            self.bar.close()
        model.eval()
        # 4. Load the adapter of the step that is scored.
        if config.score.checkpoint == "best":
            self._load_best()

    @contextmanager
    def _training_blocks(self) -> Iterator[None]:
        """Inside the context, the blocks are compiled and recompute activations, as the configuration says."""
        train, arm, device = self.config.train, self.loaded.arm, self.loaded.device
        model: Any = arm.model
        architecture = self.config.model.architecture
        blocks: Any = model.get_submodule(layout_of(architecture).layers)
        tokens = train.steps * train.batch_size * sum(self.sampler.lengths) / len(self.sampler.lengths)
        if train.recompute_activations:
            model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            wish = train.compile if arm.compiles and can_be_compiled(self.config.model, device) else "never"
            slow = products.without_instructions(device, train.dtype)
            if slow:
                log.info("this CPU has no instructions for bfloat16: products are computed in float32 and rounded")
            if devices.emulates_bfloat16(device, train.dtype):
                log.info(
                    "this GPU has no arithmetic for bfloat16, and emulates it: train.dtype=float32 (another run) may "
                    "be faster, and train.compile=never helps if compiling fails"
                )
            worth_it = compiling.decide(wish, device.type, block_weights(architecture), tokens, slow)
            compiled = compiling.compiled(blocks, model.get_input_embeddings()) if worth_it else nullcontext()
            self.bar.now_doing("first step, compiling" if worth_it else "first step")
            with compiled:
                yield
        finally:
            if train.recompute_activations:
                model.activation_checkpointing_disable()
                # The other call has made the embeddings ask for gradients, and this one does not end it.
                model.disable_input_require_grads()

    def _reward(self) -> Reward:
        return Reward(
            self.loaded.scorer,
            self.loaded.rows["train"].encoded,
            self.loaded.train_examples,
            rows_of_step=self.sampler.rows_of_step,
            in_passes=self._in_passes,
            evaluating=self._evaluating,
            halvings=self.state.halvings,
        )

    def _batches(self, step: int) -> list[Batch]:
        """The microbatches of an optimizer step for this process."""
        all_rows = self.loaded.rows["train"].encoded
        rows = sorted((all_rows[number] for number in self.sampler.rows_of_step(step)), key=len)
        return self._in_passes(self.loaded.world.local_rows(rows))

    def _in_passes(self, rows: Sequence[Encoded]) -> list[Batch]:
        """The microbatches of this process's rows of a step."""
        train, loaded, pad_id = self.config.train, self.loaded, self._pad_id
        tokens = self._pass_tokens("training")
        batches = microbatches(rows, pad_id, train.microbatch_size, tokens, loaded.encoder.context)
        if train.shard:
            # All processes must make the same number of passes. One without targets adds zeros to the gradients.
            most = -loaded.world.smallest(-len(batches))
            batches += [empty_batch(pad_id)] * (most - len(batches))
        return [batch.to(loaded.device) for batch in batches]

    def _pass_tokens(self, during: str) -> int | None:
        """The most tokens of a forward pass: what the configuration says, or less after memory ran out."""
        limits = [halving.tokens for halving in self.state.halvings if halving.during == during]
        return min(filter(None, [self.config.train.microbatch_tokens, *limits]), default=None)

    def _describe_rows(self, step: int) -> str:
        examples = self.loaded.train_examples
        ids = [examples[number].id for number in self.sampler.rows_of_step(step)]
        more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
        return f"training rows {ids[:NAMED_ROWS]}{more}"

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside the context, the model evaluates, and its blocks run uncompiled."""
        model = self.loaded.arm.model
        model.eval()
        # Otherwise another mode or shape would be compiled again.
        with torch.compiler.set_stance("force_eager"):
            yield
        model.train()

    def _validate(self) -> dict[str, float]:
        """The validation loss, and the scores of the rows that train.validation_answers asks for.

        The loss of each row is appended to validation_losses.jsonl. If the best adapter is scored, it is stored when
        its loss is the lowest so far.
        """
        state, loaded, count = self.state, self.loaded, self.config.train.validation_answers
        with self.bar.doing("validation"), self._evaluating():
            losses = self._row_losses()
        metrics = {"validation/loss": (loss := mean_loss(losses))}
        # The loop refuses a loss that is not finite, which JSON cannot represent.
        if math.isfinite(loss):
            self.losses_file.append([losses])
        is_best = all(loss < earlier for _, earlier in state.validation)
        if self.config.score.checkpoint == "best" and loaded.world.is_first and is_best:
            loaded.arm.save(self._best_folder(state.step), loaded.base.record)
        if count and math.isfinite(loss):
            examples, title = loaded.examples["validation"][:count], f"step {state.step}"
            with self._evaluating():
                rows, _ = loaded.scorer.within_memory(lambda smaller: smaller.rows(examples, title, "answers"))
            scores = summarise(rows, loaded.scorer.task, "answers")
            metrics |= {f"validation/{name}": score.value for name, score in scores.items()}
        return metrics

    def _row_losses(self) -> ValidationLosses:
        """The loss of each validation row, each process computing its share; smaller batches if memory runs out.

        Raises:
            Exception: memory ran out (errors.is_out_of_memory), and every batch has a single row.
            UserError: memory ran out, and the model is sharded.
        """
        model, held_out = self.loaded.arm.model, self.held_out
        batches = even_passes(held_out, self.config.score.batch_size, self._pass_tokens("validation"))

        def of_batch(batch: list[int]) -> list[tuple[float, int]]:
            rows = collate([held_out[number] for number in batch], self._pad_id)
            return row_losses(model, rows.to(self.loaded.device))

        try:
            found = in_shares(self.loaded.world, model, batches, of_batch)
            return ValidationLosses(self.state.step, [loss / n for loss, n in found], [n for _, n in found])
        except Exception as error:
            if not is_out_of_memory(error) or max(map(len, batches)) == 1:
                raise
        # A batch of one row cannot become smaller.
        tokens = max(sum(len(held_out[number]) for number in batch) for batch in batches if len(batch) > 1) // 2
        log.warning("validation: out of memory; batches have at most %d tokens from now on", tokens)
        self.state.halvings.append(Halving(self.state.step, "validation", tokens))
        devices.free_memory()
        return self._row_losses()

    def _best_folder(self, step: int) -> Path:
        # Each step has its own folder: to replace a folder would leave a moment without any.
        return self.folder.checkpoints / f"best-{step:08d}"

    def _load_best(self) -> None:
        """Load the adapter of the lowest validation loss. Only the first process has its file."""
        world, arm, parts = self.loaded.world, self.loaded.arm, self.loaded.parts
        if world.is_first:
            arm.load_values(self._best_folder(self.state.best_step()))
        # Loading changes buffers too. Only the first process knows which ones.
        changed = world.gather(list(arm.changed_buffers()))[0]
        buffers = arm.buffers()
        world.broadcast([*parts.values(), *(buffers[name] for name in changed)])

    def _save_checkpoint(self, state: TrainState) -> None:
        loaded = self.loaded
        # The last step has a checkpoint too. A process that only scores what another one trained needs less memory.
        state.peak_memory_bytes = max(state.peak_memory_bytes, devices.peak_memory_bytes(loaded.device))
        if loaded.world.is_first:
            buffers = loaded.arm.changed_buffers()
            checkpoint.save(
                self.folder.checkpoints, state, loaded.parts, self.optimizer, loaded.inputs, buffers=buffers
            )
            if self.config.score.checkpoint == "best":
                self._remove_passed_best(state)

    def _remove_passed_best(self, state: TrainState) -> None:
        """Remove the adapters of earlier best validations, but for those that a kept checkpoint may come back to."""
        kept = {self._best_folder(state.best_step(until)) for until in checkpoint.kept_steps(self.folder.checkpoints)}
        for folder in set(self.folder.checkpoints.glob("best-*[0-9]")) - kept:
            shutil.rmtree(folder, ignore_errors=True)

    def _log_metrics(self, of_reward: dict[int, dict[str, float]], rows: list[MetricsRow]) -> None:
        """Log rows, each with what the reward has measured in its step, which is then dropped."""
        for row in rows:
            row.values.update(of_reward.pop(row.step, {}))
        self.trackers.log(rows)
        if rows and "train/tokens" in (last := rows[-1].values):
            rate = last["train/tokens"] / max(last["train/seconds"], 1e-9)
            self.bar.note = f"loss {last.get('train/loss', math.nan):.3f}, {rate:.0f} tokens/s"


def _remove_other_scores(folder: RunFolder, record: RunRecord, examples: Mapping[str, list[Example]]) -> None:
    """Remove the scores that a stopped process has left, unless they are whole, and of this adapter and these rows.

    Args:
        examples: split -> the rows that will be scored. Those of another split cannot be compared.
    """
    digests = {split: digest(rows) for split, rows in examples.items()}
    for path in folder.scores.glob("*"):
        with suppress(UserError):
            found = read_scores(path).record
            is_in_place = path == folder.scores_file(found.split, found.kind)
            # Whether a neutral text has changed is asked when it is scored.
            has_same_rows = found.split == FORGETTING or found.digest == digests.get(found.split)
            if is_in_place and has_same_rows and found.is_of(record):
                continue
        log.info("%s: is not of this adapter and these rows, so it is removed", path)
        path.unlink()


def score(config: ScoreConfig, loaded: Loaded, folder: RunFolder) -> None:
    """Score what the folder lacks of the splits and the neutral text of `score`, and write their files into it."""
    scorer = replace(loaded.scorer, run_id=folder.path.name)
    # Only the first process has the run's folder.
    lacking, forgetting = loaded.world.gather((missing_scores(config, folder), forgetting_to_score(config, folder)))[0]
    for split, wanted in lacking.items():
        scorer.score_split(split, loaded.examples[split], folder, wanted)
    if forgetting is not None:
        scorer.score_forgetting(forgetting, folder)


def record_of(
    config: Config,
    loaded: Loaded,
    state: TrainState,
    folder: RunFolder,
    adapter_bytes: int,
) -> RunRecord:
    """The content of result.json, of a run that is trained."""
    inputs, trainable_params, stored_params = loaded.inputs, loaded.trainable_params, loaded.arm.stored_params()
    assert inputs.code is not None
    return RunRecord(
        run_id=folder.path.name,
        identity=run_record.from_tree(Identity, identity(config)),
        config=run_record.from_tree(ConfigRecord, config_tree(config)),
        seed=config.seed,
        code=inputs.code,
        versions=inputs.versions,
        execution=inputs.execution,
        base=loaded.base.record,
        trainable_params=trainable_params,
        share_of_lora=trainable_params / tying.lora_params(config.rank.r, config.model.architecture),
        data={
            split: run_record.DataRecord(digest=inputs.data[split], **rows.counts)
            for split, rows in loaded.rows.items()
        },
        training=run_record.TrainingRecord(
            steps=state.step,
            tokens=state.tokens,
            target_tokens=state.target_tokens,
            seconds=state.seconds,
            tokens_per_s=state.tokens / state.seconds,
            clipped_share=state.clipped_steps / state.step,
            skipped_steps=state.skipped_steps,
            validation_loss_first=state.validation[0][1],
            validation_loss_last=state.validation[-1][1],
            best_step=state.best_step(),
            scored_step=state.best_step() if config.score.checkpoint == "best" else state.step,
            # 0: the last checkpoint is of a version that did not keep it.
            peak_memory_bytes=state.peak_memory_bytes or devices.peak_memory_bytes(loaded.device),
            halvings=state.halvings or None,
            continued_from=state.continued_from or None,
        ),
        adapter_bytes=adapter_bytes,
        status="done",
        files=folder.checksums("adapter/*"),
        stored_params=stored_params if stored_params != trainable_params else None,
        more_ends=list(loaded.encoder.more_ends) or None,
        admission=loaded.admission,
    )
