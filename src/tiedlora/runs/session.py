"""The parts of a run: rows, base model, token ids, adapter. All are loaded and checked before anything is written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from tiedlora.adapter import TiedAdapter, attach_adapter, files
from tiedlora.adapter.admission import measure
from tiedlora.adapter.arms import Arm, ArmSpec
from tiedlora.adapter.attach_arm import new_arm
from tiedlora.config import adapter_folder
from tiedlora.config.families import layout_of
from tiedlora.config.schema import Config
from tiedlora.config.sizes import missed_budget, trainable_params
from tiedlora.data import token_cache
from tiedlora.data.encoding import EncodedRows, Encoder
from tiedlora.errors import UserError
from tiedlora.models.base_model import BaseModel, load_base
from tiedlora.models.device import execution_on
from tiedlora.records.provenance import code_version, package_versions
from tiedlora.records.run_record import Admission
from tiedlora.runs.admission_rules import check_scores_mean_something
from tiedlora.runs.inputs import RunRows, read_rows, warn_of_trained_rows
from tiedlora.runs.process_cache import SingleSlotCache
from tiedlora.runs.process_device import set_up_device
from tiedlora.tasks import Example, Task, load_examples
from tiedlora.training import sharding
from tiedlora.training.checkpoint import RunInputs
from tiedlora.training.distributed import World

log = logging.getLogger(__name__)

TOKENS: SingleSlotCache[dict[str, EncodedRows]] = SingleSlotCache()
_BASE: SingleSlotCache[BaseModel] = SingleSlotCache()


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
            layers = layout_of(config.model.architecture).layers
            sharding.shard(base.model, layers, device, shared_by)
        return base

    return _BASE.get((config.model, config.train.dtype, device, shared_by), make)


class RunSession:
    """The parts of a run.

    Raises:
        UserError: the rows or the base model cannot be loaded, no row fits, or the adapter does not fit the model.
    """

    def __init__(self, config: Config, task: Task, world: World) -> None:
        self.config, self.task, self.world = config, task, world
        local_index = world.local_index if world.size > 1 else None
        self.device = set_up_device(config.train.device, config.train.threads, local_index)
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
        # 1. The rows and the base model. Consecutive runs share them.
        rows = read_rows(config)
        self.base = cached_base(config, self.device, world if config.train.shard else None)
        # 2. The rows as token ids, without those that do not fit.
        # Given texts are compared whole, so no token ends them.
        more_ends = () if rows.examples["validation"][0].choices else self.base.more_ends
        self.encoder = Encoder(self.base.tokenizer, config.task, config.model.context, more_ends)
        self.fitted = self._fit(rows)
        self.train_examples = [rows.examples["train"][number] for number in self.fitted["train"].kept]
        self.validation_examples = rows.examples["validation"]
        self._test_examples = self._read_test_rows(rows) if "test" in config.score.splits else []
        # 3. The adapter, or the arm of another method. An arm of another method is admitted first.
        try:
            self.admission = self._admission() if config.tying.method is not None and world.is_first else None
            self.attached: Arm = self._attach()
            self.trainable_params = sum(parameter.numel() for parameter in self.attached.trained_parts().values())
            expected = trainable_params(config)
            assert expected in (None, self.trainable_params), f"{self.trainable_params} parameters, expected {expected}"
        except BaseException:
            # The next run of this process must not get a model with parts of this arm.
            _BASE.clear()
            raise
        if missed := missed_budget(config, self.trainable_params):
            log.warning("budget: %s", missed)
        # 4. The values for the record and the checkpoints.
        self.execution = execution_on(self.device, world.size)
        self.code, self.versions, self.data_digests = code_version(), package_versions(), rows.digests
        self.versions |= self.encoder.versions

    def _read_test_rows(self, rows: RunRows) -> list[Example]:
        """The test rows. They are read before training, because a mistake in them would cost the time of a training."""
        examples = load_examples(self.task, "test", self.config.data_root)
        warn_of_trained_rows(self.config.task.name, rows.examples["train"], examples)
        return examples

    def _fit(self, rows: RunRows) -> dict[str, EncodedRows]:
        config, base, cache = self.config, self.base, Path(self.config.cache)

        def fitted(split: str, examples: list[Example]) -> EncodedRows:
            encoded = token_cache.load_or_encode(self.encoder, examples, rows.digests[split], base, cache)
            if dropped := sorted(set(range(len(examples))) - set(encoded.kept)):
                first = examples[dropped[0]].id
                log.info("%d of %d %s rows do not fit, such as id %s", len(dropped), len(examples), split, first)
            return encoded

        return TOKENS.get(
            (config.task, rows.digests, base.record, config.model.context),
            lambda: {split: fitted(split, examples) for split, examples in rows.examples.items()},
        )

    def _attach(self) -> Arm:
        """A new arm on the base model. One that does not fit leaves no trace."""
        if self.config.tying.method is None:
            return attach_adapter(self.base.model, self._adapter(), self.config.train.shard)
        return new_arm(self.base.model, self._spec())

    def _spec(self) -> ArmSpec:
        return ArmSpec(self.config.tying, self.config.model.architecture, self.config.seed)

    def _admission(self) -> Admission:
        rows = [list(row.prompt + row.target) for row in self.fitted["train"].encoded]
        admission = measure(self.base.model, self._spec(), self.base.record, rows, self.config.train.lr or 0.0)
        check_scores_mean_something(admission, self.config)
        for mark in admission.marks().values():
            log.warning("%s: %s", self.config.tying.name, mark)
        return admission

    def _adapter(self) -> TiedAdapter:
        config = self.config
        assert config.rank.alpha is not None
        rank, architecture = config.rank, config.model.architecture
        adapter = TiedAdapter(config.tying, rank.r, config.rank.alpha, architecture, config.seed, rank.scaling)
        if config.train.init_from:
            folder = Path(config.train.init_from)
            if adapter_folder.adapter_digest(folder) != config.train.init_digest:
                raise UserError(f"train.init_from={folder}: holds another adapter than when this run was composed")
            files.start_from(adapter, folder, self.base.record)
        return adapter

    @property
    def model(self) -> Any:
        """The base model with the adapter on it."""
        return self.attached.model

    def inputs(self) -> RunInputs:
        """The inputs that a checkpoint of this run must agree with."""
        assert self.base.record.digest is not None
        return RunInputs(self.execution, self.data_digests, self.base.record.digest, self.versions, self.code)

    def examples(self, split: str) -> list[Example]:
        """The rows of a split of `score.splits` for scoring."""
        return self.validation_examples if split == "validation" else self._test_examples

    def release(self) -> None:
        """Restore the base model, because the next cell of a sweep may use it."""
        self.attached.detach()
        self.base.model.eval()
        if self.config.train.shard:
            # Its parts belong to these processes' connections, which end with the run.
            _BASE.clear()
