"""A run's parts, loaded and checked, and what is done with them: train, score, record."""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from tiedlora import storage, tying
from tiedlora import text as present
from tiedlora.config import adapter_folder
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records.run_folder import RunFolder, code, config_record, identity, run_id, versions
from tiedlora.runs import reuse
from tiedlora.tasks import Task, load_examples
from tiedlora.training.distributed import Processes
from tiedlora.training.signals import Stop

if TYPE_CHECKING:
    from tiedlora.adapter import Attached
    from tiedlora.data.encoding import Encoder
    from tiedlora.models.base_model import Base

log = logging.getLogger(__name__)


class Prepared:
    """A run's parts, loaded and checked: nothing is written before all of them are there."""

    def __init__(self, config: Config, task: Task, us: Processes) -> None:
        # torch and transformers cost seconds; a wrong configuration, or a finished run, does not wait for them.
        import torch

        from tiedlora.adapter import TiedAdapter, attach_adapter, files
        from tiedlora.data import token_cache
        from tiedlora.data.encoding import Encoder
        from tiedlora.training import allocator

        self.config, self.task, self.us = config, task, us
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.device = torch.device(device_of(config.train.device))
        if self.device.type == "cuda" and us.count > 1:
            self.device = torch.device("cuda", us.local_rank)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            allocator.keep_freed()
        rows, digests = reuse.rows(config)
        self.examples = dict(rows)
        self.base: Base = reuse.base(config, self.device)
        self.encoder: Encoder = Encoder(self.base.tokenizer, config.task, config.model.context)
        fitted = reuse.TOKENS.get(
            (config.task, digests, self.base.record, config.model.context),
            lambda: {
                split: token_cache.fitted(self.encoder, examples, digests[split], self.base.record, Path(config.cache))
                for split, examples in rows.items()
            },
        )
        self.examples["train"] = [rows["train"][number] for number in fitted["train"].kept]
        self.encoded = {split: made.encoded for split, made in fitted.items()}
        self.counts = {split: made.counts for split, made in fitted.items()}
        assert config.rank.alpha is not None
        architecture = config.model.architecture
        adapter = TiedAdapter(config.tying, config.rank.r, config.rank.alpha, architecture, config.seed)
        # Before it is put on the model, so that an adapter that does not fit leaves the model as it was.
        if config.train.init_from:
            folder = Path(config.train.init_from)
            if adapter_folder.digest(folder) != config.train.init_digest:
                raise UserError(f"train.init_from={folder}: holds another adapter than when this run was composed")
            files.start_from(adapter, folder, self.base.record)
        self.attached: Attached = attach_adapter(self.base.model, adapter)
        self.trainable_params = self.attached.adapter.trainable_params()
        expected = tying.trainable_params(config.tying, config.rank.r, config.model.architecture)
        assert self.trainable_params == expected, f"{self.trainable_params} parameters, the formula says {expected}"
        self.facts = {
            "data": digests,
            "base": self.base.record["digest"],
            "versions": versions(),
            "code": code(),
            "device": self.device_name(),
        }

    def release(self) -> None:
        """Leave the base model as it was loaded: the next cell of a sweep may use it again."""
        self.attached.detach()
        self.base.model.eval()

    def device_name(self) -> str:
        """What the run was carried out on."""
        import torch

        several = f", {self.us.count} processes" if self.us.count > 1 else ""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device) + several
        return f"cpu, {torch.get_num_threads()} threads" + several

    def train_and_score(self, folder: RunFolder, stop: Stop) -> dict[str, Any]:
        """Train from the newest checkpoint or from the start, score, and write result.json last."""
        from tiedlora.adapter import save
        from tiedlora.scoring import scoring

        config = self.config
        progress, tracker = self.train(folder, stop)
        adapter_bytes = save(self.attached.adapter, folder.adapter, self.base.record)
        scores = {}
        for split in config.score.splits:
            examples = self.examples.get(split) or load_examples(self.task, split, config.data_root)
            scores[split] = scoring.score_split(
                self.attached, self.encoder, self.task, examples, config, self.base.record, split, folder
            )
            scores[split]["files"] = folder.prediction_checksums(split)
        result = {**self.header(), **self.training_record(progress), "adapter_bytes": adapter_bytes, "scores": scores}
        result["files"] = folder.checksums("adapter/*")
        result["status"] = "done"
        tracker.finish(present.flat_summary(result))
        storage.write_json(folder.result_file, result)
        folder.tidy()
        return result

    def train(self, folder: RunFolder, stop: Stop, resume_from: Path | None = None) -> Any:
        """The training loop with everything it is handed.

        Args:
            resume_from: where the checkpoints are that it goes on from; None means the folder's own.
        """
        from tiedlora.adapter import load, save
        from tiedlora.data.encoding import Order, microbatches
        from tiedlora.scoring.decoding import mean_loss
        from tiedlora.tracking.tracker import Progress as Bar
        from tiedlora.tracking.tracker import Tracker
        from tiedlora.training import checkpoint, compiling, loop
        from tiedlora.training.loss import target_loss

        config, model, rows = self.config, self.attached.model, self.encoded["train"]
        parts = self.attached.adapter.trained_parts()
        optimizer = loop.build_optimizer(parts, config.train)
        progress = checkpoint.restore(resume_from or folder.checkpoints, parts, optimizer, self.facts)
        if progress is not None:
            log.info("going on from step %d", progress.step)
        progress = progress or loop.Progress()
        storage.write_bytes(folder.config_file, OmegaConf.to_yaml(config_record(config)).encode())
        tracker = Tracker(folder.metrics_file, progress.step)
        if config.tracking.backend == "wandb":
            tracker.start_wandb(config.tracking, folder.path.name, self.header(), folder.path)

        order = Order([len(row) for row in rows], config.train, config.seed)
        pad = self.base.tokenizer.eos_token_id
        held_out = self.encoded["validation"][: config.train.validation_rows]
        validation = [batch.to(self.device) for batch in microbatches(held_out, pad, config.score.batch_size)]

        def best(step: int) -> Path:
            # A folder a step: replacing one would leave a moment without any.
            return folder.checkpoints / f"best-{step:08d}"

        def validate() -> float:
            model.eval()
            with compiling.eager():
                loss = mean_loss(model, validation)
            model.train()
            if config.score.checkpoint == "best" and all(loss < earlier for _, earlier in progress.validation):
                save(self.attached.adapter, best(progress.step), self.base.record)
            return loss

        def batches(step: int) -> list[Any]:
            chosen = self.us.share(sorted((rows[number] for number in order.rows(step)), key=len))
            limits = config.train.microbatch_size, config.train.microbatch_tokens
            passes = microbatches(chosen, pad, *limits, self.encoder.context)
            return [batch.to(self.device) for batch in passes]

        bar = Bar("training", config.train.steps, "steps", progress.step)

        def take(new: list[dict[str, Any]]) -> None:
            tracker.log(new)
            if new and "train/tokens" in (last := new[-1]):
                rate = last["train/tokens"] / max(last["train/seconds"], 1e-9)
                bar.advance(len(new), f"loss {last.get('train/loss', math.nan):.3f}, {rate:.0f} tokens/s")

        calls = loop.Calls(
            batches=batches,
            loss_sum=lambda batch: target_loss(model, batch),
            validate=validate,
            save=lambda now: checkpoint.save(folder.checkpoints, now, parts, optimizer, self.facts),
            log=take,
            describe=lambda step: f"training rows {[self.examples['train'][i].id for i in order.rows(step)]}",
            stop=lambda: self.us.any(stop.asked()),
            add_up=self.us.add_up,
            process=self.us.rank,
        )
        model.train()
        stop.in_loop = True
        try:
            with self.blocks(sum(map(len, rows)) / len(rows)):
                loop.train(progress, calls, optimizer, config.train, config.seed)
        except BaseException:
            tracker.finish({}, exit_code=1)
            raise
        finally:
            stop.in_loop = False
            bar.close()
        model.eval()
        if config.score.checkpoint == "best":
            adapter_folder, _ = load(best(progress.best_step()))
            for name, parameter in adapter_folder.parts().items():
                self.attached.adapter.parts()[name].data.copy_(parameter.data)
        return progress, tracker

    @contextmanager
    def blocks(self, mean_length: float) -> Iterator[None]:
        """The model's blocks as training wants them: compiled, and recomputing activations, if the run says so.

        Args:
            mean_length: tokens a training row, which tells how long the run is.
        """
        from tiedlora.adapter import architectures
        from tiedlora.training import compiling

        config, model = self.config, self.attached.model
        blocks: Any = model.get_submodule(architectures.layout_of(config.model.architecture).layers)
        weights = sum(p.numel() for p in blocks.parameters())
        token_cache = config.train.steps * config.train.batch_size * mean_length
        if config.train.recompute_activations:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        try:
            compiled = compiling.decide(config.train.compile, self.device.type, weights, token_cache)
            with compiling.compiled(blocks) if compiled else nullcontext():
                yield
        finally:
            if config.train.recompute_activations:
                model.gradient_checkpointing_disable()  # type: ignore[operator]

    def header(self) -> dict[str, Any]:
        """What the record says before anything is trained."""
        config = self.config
        lora = tying.lora_params(config.rank.r, config.model.architecture)
        return {
            "run_id": run_id(config),
            "identity": identity(config),
            "config": config_record(config),
            "seed": config.seed,
            "code": self.facts["code"],
            "versions": self.facts["versions"],
            "device": self.facts["device"],
            "base": self.base.record,
            "trainable_params": self.trainable_params,
            "share_of_lora": self.trainable_params / lora,
        }

    def training_record(self, progress: Any) -> dict[str, Any]:
        """What the record says of the data and of training."""
        config = self.config
        first, last = progress.validation[0][1], progress.validation[-1][1]
        best = config.score.checkpoint == "best"
        return {
            "data": {split: {**self.counts[split], "digest": self.facts["data"][split]} for split in self.counts},
            "training": {
                "steps": progress.step,
                "tokens": progress.tokens,
                "target_tokens": progress.target_tokens,
                "seconds": progress.seconds,
                "tokens_per_s": progress.tokens / progress.seconds,
                "clipped_share": progress.clipped_steps / progress.step,
                "skipped_steps": progress.skipped_steps,
                "validation_loss_first": first,
                "validation_loss_last": last,
                "best_step": progress.best_step(),
                "scored_step": progress.best_step() if best else progress.step,
                "peak_memory_bytes": self.peak_memory(),
            },
        }

    def peak_memory(self) -> int:
        """Bytes: of the GPU where there is one, else the process's largest resident size."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_of(name: str) -> str:
    """What torch calls the device that train.device names: auto takes CUDA where there is one.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"train.device={name}: no CUDA device here; use train.device=auto or cpu")
    return name
