"""One run that is not finished: load, train, save, score, record. Of several processes, only the first writes."""

from __future__ import annotations

import functools
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from tiedlora import storage, tying
from tiedlora.adapter import TiedAdapter, attach_adapter, files
from tiedlora.adapter.admission import measure
from tiedlora.adapter.arms import Arm, ArmSpec
from tiedlora.adapter.attach import new_arm
from tiedlora.analysis.intervals import mean_loss
from tiedlora.config.check import check_new_run
from tiedlora.config.families import layout_of
from tiedlora.config.identity import adapter_digest, config_tree, identity, run_id
from tiedlora.config.schema import FORGETTING, Config
from tiedlora.config.sizes import missed_budget, trainable_params
from tiedlora.data.batching import (
    Batch,
    BatchSampler,
    check_batch_tokens,
    collate,
    empty_batch,
    even_passes,
    microbatches,
)
from tiedlora.data.encoding import Encoded, EncodedRows, Encoder, load_or_encode
from tiedlora.errors import StoppedEarly, UserError, is_out_of_memory
from tiedlora.models import attention, products
from tiedlora.models import device as devices
from tiedlora.models.arithmetic import block_weights
from tiedlora.models.base_model import BaseModel, load_base
from tiedlora.records import run_record
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.provenance import code_version, package_versions
from tiedlora.records.rows import AppendedFile, MetricsRow, ValidationLosses, read_validation_losses
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.run_record import Admission, ConfigRecord, Halving, Identity, RunRecord, SplitScores
from tiedlora.records.summary import flat_summary
from tiedlora.runs.inputs import RunRows, SingleSlotCache, read_rows, warn_of_trained_rows
from tiedlora.runs.reward import Reward
from tiedlora.scoring.passes import wanted_passes
from tiedlora.scoring.split import Scorer, in_shares
from tiedlora.scoring.summary import summarise
from tiedlora.tasks import Example, load_examples, load_task
from tiedlora.tracking.progress import ProgressBar
from tiedlora.tracking.run_trackers import RunTrackers, TrackedRun, check_tracker
from tiedlora.training import checkpoint, compiling
from tiedlora.training.distributed import World, join_world, shard
from tiedlora.training.loop import Loop, TrainState
from tiedlora.training.loss import row_losses, target_loss
from tiedlora.training.optimizer import build_optimizer
from tiedlora.training.signals import StopSignal

log = logging.getLogger(__name__)

TOKENS: SingleSlotCache[dict[str, EncodedRows]] = SingleSlotCache()
_BASE: SingleSlotCache[BaseModel] = SingleSlotCache()


def carry_out(config: Config) -> RunRecord | None:
    """Carry out the run, or continue it from its newest checkpoint. A finished run is not repeated.

    Returns:
        The record; None in every process except the first.

    Raises:
        UserError, Busy, StoppedEarly: as run.main.
        Paused: train.pause_after is reached.
    """
    algorithms = devices.only_deterministic_algorithms() if config.train.deterministic else nullcontext()
    device = devices.resolve_device(config.train.device)
    with algorithms, products.on_any_cpu(device, config.train.dtype), join_world(device.type == "cuda") as world:
        # 1. Do all processes agree that the run is not finished?
        run_folder = RunFolder(Path(config.outputs) / run_id(config))
        finished = None if config.force else run_folder.record()
        if world.any(finished is not None):
            if finished is None:
                raise UserError(
                    f"{run_folder.path}: other processes find a result.json there, this one does not; share the folder"
                )
            return finished if world.is_first else None
        check_new_run(config)
        if world.is_first:
            check_tracker(config)
        # 2. Load. From here on, after a signal the same command continues the run, also if it came while loading.
        with StopSignal() as stop, ExitStack() as undone:
            trainer = Trainer(config, world)
            undone.callback(trainer.release)
            own = undone.enter_context(_written_folder(run_folder, config, world))
            # Another process with the same command may have finished the run while this one was loading.
            if world.any(own.record() is not None):
                return own.record()
            # 3. Train from the newest checkpoint or from the start, and save the adapter.
            trainer.train(own, run_folder.checkpoints, stop)
            with trainer.trackers.closed_on_error():
                adapter_bytes = trainer.arm.save(own.adapter, trainer.base.record)
                # 4. Score. Every process scores its share, and writes the predictions of all into its own folder.
                scores = trainer.score(own)
                # The other processes have nothing left to do. They leave now.
                world.leave()
                if not world.is_first:
                    return None
                record = trainer.record(own, adapter_bytes, scores)
            # 5. Write result.json last.
            trainer.trackers.finish(flat_summary(record))
            own.write_record(record)
            own.tidy()
            return record


@contextmanager
def _written_folder(folder: RunFolder, config: Config, world: World) -> Iterator[RunFolder]:
    """The folder that this process writes: the run's own, locked; in every process but the first, a temporary one.

    If the block fails, the traceback is written to the run's folder. A stop on request is not a failure.
    """
    if not world.is_first:
        with tempfile.TemporaryDirectory() as scratch:
            yield RunFolder(Path(scratch))
        return
    with folder.locked():
        try:
            if config.force and folder.result_file.exists():
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


def cached_base(config: Config, device: torch.device, shared_by: World | None = None) -> BaseModel:
    """The base model of a configuration. The caller must detach its adapter, because the next run gets the same model.

    Args:
        shared_by: the processes that share the model; None if this process has the whole model.

    Raises:
        UserError: as models.base_model.load_base.
    """

    def make() -> BaseModel:
        first_device = device if shared_by is None else torch.device("cpu")
        base = load_base(config.model, config.train.dtype, first_device, Path(config.cache))
        if shared_by is not None:
            shard(base.model, layout_of(config.model.architecture).layers, device, shared_by)
        return base

    return _BASE.get((config.model, config.train.dtype, device, shared_by), make)


class Trainer:
    """The parts of a run in this process, loaded and checked before anything is written; its training and its scoring.

    Raises:
        UserError: the rows or the base model cannot be loaded, no row fits, or the adapter does not fit the model.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.task = config, world, load_task(config.task)
        self.reward: Reward | None = None
        if not world.is_first:
            # Only the first process prints, and has a tracker.
            logging.getLogger("tiedlora").setLevel(logging.WARNING)
            config.tracking.backend = "none"
        _check_processes(config, world)
        local_index = world.local_index if world.size > 1 else None
        self.device = devices.set_up_device(config.train.device, config.train.threads, local_index)
        # 1. The rows and the base model. Consecutive runs share them.
        rows = read_rows(config)
        if config.objective.name == "reward" and rows.examples["train"][0].choices:
            raise UserError(
                f"objective=reward: the answers of task={config.task.name} are compared by their likelihoods, and none "
                "is generated; take another task, or objective=targets"
            )
        self.base = cached_base(config, self.device, world if config.train.shard else None)
        # 2. The rows as token ids, without those that do not fit.
        # Given texts are compared whole, so no token ends them.
        more_ends = () if rows.examples["validation"][0].choices else self.base.more_ends
        self.encoder = Encoder(self.base.tokenizer, config.task, config.model.context, more_ends)
        self.fitted = self._fit(rows)
        check_batch_tokens(self.fitted["train"].encoded, config.train)
        # In the order in which `fitted` has them.
        self.train_examples = [rows.examples["train"][number] for number in self.fitted["train"].kept]
        self.examples = {"validation": rows.examples["validation"]}
        if "test" in config.score.splits:
            # They are read before training, because a mistake in them would cost the time of a training.
            self.examples["test"] = load_examples(self.task, "test", config.data_root)
            warn_of_trained_rows(config.task.name, rows.examples["train"], self.examples["test"])
        for split in config.score.splits:
            # A row that cannot be scored is known now, and not after the training.
            for example in self.examples[split]:
                self.encoder.scored(example)
        # 3. The adapter, or the arm of another method. An arm of another method is admitted first.
        try:
            self.arm, self.admission = self._attach()
            self.trainable_params = sum(parameter.numel() for parameter in self.arm.trained_parts().values())
            expected = trainable_params(config)
            assert expected in (None, self.trainable_params), f"{self.trainable_params} parameters, expected {expected}"
        except BaseException:
            # The next run of this process must not get a model with parts of this arm.
            _BASE.clear()
            raise
        if missed := missed_budget(config, self.trainable_params):
            log.warning("budget: %s", missed)
        # 4. What the record and the checkpoints say of how the run is carried out.
        assert self.base.record.digest is not None
        versions = package_versions() | self.encoder.versions
        execution = devices.execution_on(self.device, world.size)
        self.inputs = checkpoint.RunInputs(execution, rows.digests, self.base.record.digest, versions, code_version())

    def _fit(self, rows: RunRows) -> dict[str, EncodedRows]:
        config, base, cache = self.config, self.base, Path(self.config.cache)

        def fitted(split: str, examples: list[Example]) -> EncodedRows:
            encoded = load_or_encode(self.encoder, examples, rows.digests[split], base, cache)
            if dropped := sorted(set(range(len(examples))) - set(encoded.kept)):
                first = examples[dropped[0]].id
                log.info("%d of %d %s rows do not fit, such as id %s", len(dropped), len(examples), split, first)
            return encoded

        return TOKENS.get(
            (config.task, rows.digests, base.record, config.model.context),
            lambda: {split: fitted(split, examples) for split, examples in rows.examples.items()},
        )

    def _attach(self) -> tuple[Arm, Admission | None]:
        """A new arm on the base model, and the checks of another method. One that does not fit leaves no trace."""
        config, rank, architecture = self.config, self.config.rank, self.config.model.architecture
        if config.tying.method is not None:
            spec = ArmSpec(config.tying, architecture, config.seed)
            admission = self._admission(spec) if self.world.is_first else None
            return new_arm(self.base.model, spec), admission
        assert rank.alpha is not None
        adapter = TiedAdapter(config.tying, rank.r, rank.alpha, architecture, config.seed, rank.scaling)
        if config.train.init_from:
            folder = Path(config.train.init_from)
            if adapter_digest(folder) != config.train.init_digest:
                raise UserError(f"train.init_from={folder}: holds another adapter than when this run was composed")
            files.start_from(adapter, folder, self.base.record)
        return attach_adapter(self.base.model, adapter, config.train.shard), None

    def _admission(self, spec: ArmSpec) -> Admission:
        rows = [list(row.prompt + row.target) for row in self.fitted["train"].encoded]
        admission = measure(self.base.model, spec, self.base.record, rows, self.config.train.lr or 0.0)
        check_scores_mean_something(admission, self.config)
        for mark in admission.marks().values():
            log.warning("%s: %s", self.config.tying.name, mark)
        return admission

    def release(self) -> None:
        """Restore the base model, because the next cell of a sweep may use it."""
        self.arm.detach()
        self.base.model.eval()
        if self.config.train.shard:
            # Its parts belong to these processes' connections, which end with the run.
            _BASE.clear()

    def train(self, folder: RunFolder, checkpoints: Path, stop: StopSignal) -> None:
        """Train to the last step. Afterwards the model has the adapter of the step that will be scored.

        Args:
            folder: config.yaml, metrics.jsonl, validation_losses.jsonl and the checkpoints are written there.
            checkpoints: the folder of the checkpoints to continue from, which the first process has written.
            stop: if a signal came, training writes a checkpoint after the current step and ends.

        Raises:
            UserError: a loss that is not finite, too little memory, a tracker that is not installed, or processes that
                continue from different steps (in all of them).
            StoppedEarly: the stop signal came, or train.pause_after is reached (Paused); a checkpoint is written.
        """
        config, self.folder = self.config, folder
        model: Any = self.arm.model
        # 1. The optimizer, and the newest checkpoint if there is one.
        self.parts = self.arm.trained_parts()
        self.optimizer = build_optimizer(self.arm.parameter_groups(config.train.lr_factor), config.train)
        state = checkpoint.restore(checkpoints, self.parts, self.optimizer, self.inputs, self.arm.buffers())
        resumed_step = None if state is None else state.step
        self.state = state or TrainState()
        first, last = self.world.smallest(self.state.step), -self.world.smallest(-self.state.step)
        if first != last:
            raise UserError(
                f"{checkpoints}: of the {self.world.size} processes, one continues from step {first} and another from "
                f"step {last}; make all of them see the same outputs={config.outputs}"
            )
        if state is not None:
            log.info("continuing from step %d", state.step)
        # 2. The order of the training rows, and the rows of the validation loss.
        self.rows = self.fitted["train"].encoded
        self.sampler = BatchSampler([len(row) for row in self.rows], config.train, config.seed)
        self.pad_id = self.base.tokenizer.eos_token_id
        self.held_out = self.fitted["validation"].encoded[: config.train.validation_rows]
        # 3. Write config.yaml, and open the files that grow and the trackers.
        storage.write_bytes(folder.config_file, OmegaConf.to_yaml(config_tree(config)).encode())
        run = TrackedRun(folder.path.name, folder.path, config, self.trainable_params)
        self.trackers = RunTrackers(run, resumed_step)
        self.row_losses_file = AppendedFile(folder.validation_losses_file, read_validation_losses, resumed_step)
        self.bar = ProgressBar("training", config.train.steps, "steps", self.state.step)
        # 4. Train.
        if config.objective.name == "reward":
            self.reward = Reward(
                self._scorer(),
                self.rows,
                self.train_examples,
                self.sampler.rows_of_step,
                self._in_passes,
                self._evaluating,
                self.state.halvings,
            )
        loop = Loop(
            state=self.state,
            optimizer=self.optimizer,
            config=config.train,
            seed=config.seed,
            world=self.world,
            batches=self.reward.batches if self.reward else self._batches,
            loss_sum=self.reward.loss_sum if self.reward else functools.partial(target_loss, model),
            validate=self._validate,
            save_checkpoint=self._save_checkpoint,
            log_metrics=self._log_metrics,
            describe_rows=lambda step: (
                f"training rows {[self.train_examples[i].id for i in self.sampler.rows_of_step(step)]}"
            ),
            stop_requested=lambda: self.world.any(stop.requested()),
        )
        devices.restart_peak_memory(self.device)
        model.train()
        stop.finish_step_first = True
        try:
            with self.trackers.closed_on_error(), self._training_blocks():
                loop.train()
        finally:
            stop.finish_step_first = False
            self.bar.close()
        model.eval()
        # 5. Load the adapter of the step that is scored.
        if config.score.checkpoint == "best":
            self._load_best()

    @contextmanager
    def _training_blocks(self) -> Iterator[None]:
        """Inside the context, the blocks are compiled and recompute activations, as the configuration says."""
        train = self.config.train
        model: Any = self.arm.model
        architecture = self.config.model.architecture
        blocks: Any = model.get_submodule(layout_of(architecture).layers)
        tokens = train.steps * train.batch_size * sum(map(len, self.rows)) / len(self.rows)
        if train.recompute_activations:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            # accelerate's hooks move weights while a block runs, which cannot be compiled.
            wish = train.compile if self.arm.compiles and not self.config.model.device_map else "never"
            slow = products.without_instructions(self.device, train.dtype)
            if slow:
                log.info("this CPU has no instructions for bfloat16: products are computed in float32 and rounded")
            worth_it = compiling.decide(wish, self.device.type, block_weights(architecture), tokens, slow)
            compiled = compiling.compiled(blocks, model.get_input_embeddings()) if worth_it else nullcontext()
            with attention.rows_not_packed(), compiled:
                yield
        finally:
            if train.recompute_activations:
                model.gradient_checkpointing_disable()

    def _batches(self, step: int) -> list[Batch]:
        """The microbatches of an optimizer step for this process."""
        rows = sorted((self.rows[number] for number in self.sampler.rows_of_step(step)), key=len)
        return self._in_passes(self.world.local_rows(rows))

    def _in_passes(self, rows: Sequence[Encoded]) -> list[Batch]:
        """The microbatches of this process's rows of a step."""
        train, tokens = self.config.train, self._pass_tokens("training")
        batches = microbatches(rows, self.pad_id, train.microbatch_size, tokens, self.encoder.context)
        if train.shard:
            # All processes must make the same number of passes. One without targets adds zeros to the gradients.
            most = -self.world.smallest(-len(batches))
            batches += [empty_batch(self.pad_id)] * (most - len(batches))
        return [batch.to(self.device) for batch in batches]

    def _pass_tokens(self, during: str) -> int | None:
        """The most tokens of a forward pass: what the configuration says, or less after memory ran out."""
        limits = [halving.tokens for halving in self.state.halvings if halving.during == during]
        return min(filter(None, [self.config.train.microbatch_tokens, *limits]), default=None)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside the context, the model evaluates, and its blocks run uncompiled."""
        self.arm.model.eval()
        # Otherwise another mode or shape would be compiled again.
        with torch.compiler.set_stance("force_eager"):
            yield
        self.arm.model.train()

    def _validate(self) -> dict[str, float]:
        """The validation loss, and the scores of the rows that train.validation_answers asks for.

        The loss of each row is appended to validation_losses.jsonl. If the best adapter is scored, it is stored when
        its loss is the lowest so far.
        """
        state, count = self.state, self.config.train.validation_answers
        with self._evaluating():
            losses = self._row_losses()
        metrics = {"validation/loss": (loss := mean_loss(losses))}
        # The loop refuses a loss that is not finite, which JSON cannot represent.
        if math.isfinite(loss):
            self.row_losses_file.append([losses])
        is_best = all(loss < earlier for _, earlier in state.validation)
        if self.config.score.checkpoint == "best" and self.world.is_first and is_best:
            self.arm.save(self._best_folder(state.step), self.base.record)
        if count and math.isfinite(loss):
            examples, title = self.examples["validation"][:count], f"step {state.step}"
            with self._evaluating():
                rows, _ = self._scorer().within_memory(lambda smaller: smaller.rows(examples, title, losses=False))
            metrics |= {f"validation/{name}": score.value for name, score in summarise(rows, self.task).items()}
        return metrics

    def _row_losses(self) -> ValidationLosses:
        """The loss of each validation row, each process computing its share; smaller batches if memory runs out.

        Raises:
            MemoryError, RuntimeError: memory ran out, and every batch has a single row.
            UserError: memory ran out, and the model is sharded.
        """
        batches = even_passes(self.held_out, self.config.score.batch_size, self._pass_tokens("validation"))

        def of_batch(batch: list[int]) -> list[tuple[float, int]]:
            rows = collate([self.held_out[number] for number in batch], self.pad_id)
            return row_losses(self.arm.model, rows.to(self.device))

        try:
            found = in_shares(self.world, self.arm.model, batches, of_batch)
            return ValidationLosses(self.state.step, [loss / n for loss, n in found], [n for _, n in found])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or max(map(len, batches)) == 1:
                raise
        # A batch of one row cannot become smaller.
        tokens = max(sum(len(self.held_out[number]) for number in batch) for batch in batches if len(batch) > 1) // 2
        log.warning("validation: out of memory; batches have at most %d tokens from now on", tokens)
        self.state.halvings.append(Halving(self.state.step, "validation", tokens))
        devices.free_memory()
        return self._row_losses()

    def _best_folder(self, step: int) -> Path:
        # Each step has its own folder: to replace a folder would leave a moment without any.
        return self.folder.checkpoints / f"best-{step:08d}"

    def _load_best(self) -> None:
        """Load the adapter of the lowest validation loss. Only the first process has its file."""
        if self.world.is_first:
            self.arm.load_values(self._best_folder(self.state.best_step()))
        best = {name: part.data.cpu() for name, part in self.parts.items()} if self.world.is_first else {}
        for name, values in self.world.gather(best)[0].items():
            self.parts[name].data.copy_(values)

    def _save_checkpoint(self, state: TrainState) -> None:
        # The last step has a checkpoint too. A process that only scores what another one trained needs less memory.
        state.peak_memory_bytes = max(state.peak_memory_bytes, devices.peak_memory_bytes(self.device))
        if self.world.is_first:
            buffers = self.arm.changed_buffers()
            checkpoint.save(self.folder.checkpoints, state, self.parts, self.optimizer, self.inputs, buffers)

    def _log_metrics(self, rows: list[MetricsRow]) -> None:
        if self.reward is not None:
            for row in rows:
                row.values.update(self.reward.metrics.pop(row.step, {}))
        self.trackers.log(rows)
        if rows and "train/tokens" in (last := rows[-1].values):
            rate = last["train/tokens"] / max(last["train/seconds"], 1e-9)
            self.bar.advance(len(rows), f"loss {last.get('train/loss', math.nan):.3f}, {rate:.0f} tokens/s")

    def _scorer(self) -> Scorer:
        return Scorer(self.arm, self.encoder, self.task, self.config, self.base.record, self.world)

    def score(self, folder: RunFolder) -> dict[str, SplitScores]:
        """Score the splits and the neutral text of `score`, and write their predictions into the folder."""
        config, scorer = self.config.score, self._scorer()
        passes = wanted_passes(config.metrics, self.task, config.drift)
        scores = {split: scorer.score_split(split, self.examples[split], folder, passes) for split in config.splits}
        if config.forgetting is not None:
            scores[FORGETTING] = scorer.score_forgetting(config.forgetting, folder)
        return scores

    def record(self, folder: RunFolder, adapter_bytes: int, scores: dict[str, SplitScores]) -> RunRecord:
        """The content of result.json, of a run that is trained and scored."""
        config, inputs, state = self.config, self.inputs, self.state
        assert inputs.code is not None
        stored_params = self.arm.stored_params()
        return RunRecord(
            run_id=run_id(config),
            identity=run_record.from_tree(Identity, identity(config)),
            config=run_record.from_tree(ConfigRecord, config_tree(config)),
            seed=config.seed,
            code=inputs.code,
            versions=inputs.versions,
            execution=inputs.execution,
            base=self.base.record,
            trainable_params=self.trainable_params,
            share_of_lora=self.trainable_params / tying.lora_params(config.rank.r, config.model.architecture),
            data={
                split: run_record.DataRecord(digest=inputs.data[split], **fitted.counts)
                for split, fitted in self.fitted.items()
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
                peak_memory_bytes=state.peak_memory_bytes or devices.peak_memory_bytes(self.device),
                halvings=state.halvings or None,
                continued_from=state.continued_from or None,
            ),
            adapter_bytes=adapter_bytes,
            scores=scores,
            status="done",
            files=folder.checksums("adapter/*"),
            stored_params=stored_params if stored_params != self.trainable_params else None,
            more_ends=list(self.encoder.more_ends) or None,
            admission=self.admission,
        )


def _check_processes(config: Config, world: World) -> None:
    """Refuse a base model that cannot be spread as the configuration says over this number of processes."""
    if config.train.shard and world.size == 1:
        raise UserError(
            "train.shard=true: needs several processes that share the model; start torchrun --nproc-per-node N "
            "train.py ..., or use train.shard=false"
        )
    if world.size > 1 and config.model.device_map:
        raise UserError(
            f"model.device_map={config.model.device_map}: every process would spread the model over all GPUs; "
            "start one process without torchrun, or use model.device_map=null"
        )


def check_scores_mean_something(admission: Admission, config: Config) -> None:
    """Refuse scores that the arm of another method could get without predicting anything.

    The loss of a target gives the model the target's tokens. An arm that is not causal sees those that it must predict.

    Raises:
        UserError: an arm that is not causal has losses to score or a reward; or rows of a batch change each other.
    """
    name, score = config.tying.name, config.score
    if not admission.is_causal and config.objective.name == "reward":
        raise UserError(f"tying={name}: is not causal, so it has no likelihood of an answer; use objective=targets")
    if not (score.splits or score.forgetting):
        return
    wants_loss = score.metrics is None or any(map(is_loss, score.metrics)) or bool(score.forgetting) or score.drift
    if not admission.is_causal and wants_loss:
        raise UserError(
            f"tying={name}: is not causal (logits move by {admission.later_tokens:.2g} of the largest one when later "
            "tokens change), so its loss would see what it predicts; score answers only, with "
            "score.metrics=[METRIC] (or --metrics METRIC), score.forgetting=null and score.drift=false"
        )
    if not admission.keeps_rows_apart and score.batch_size > 1:
        raise UserError(
            f"tying={name}: a row's answer depends on the other rows of its batch (logits move by "
            f"{admission.other_rows:.2g} of the largest one); score rows singly, in a run with score.batch_size=1"
        )
