"""What a run trains and scores with, loaded and checked before anything is written: rows, base model and arm.

Consecutive runs of one process use the same base model and token ids, so a process keeps the last of each.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiedlora.adapter import TiedAdapter, attach_adapter, files
from tiedlora.adapter.arms import Arm, ArmSpec
from tiedlora.adapter.attach import new_arm
from tiedlora.config.identity import adapter_digest
from tiedlora.config.schema import Config, TrainConfig
from tiedlora.config.sizes import missed_budget, trainable_params
from tiedlora.data.batching import check_batch_tokens
from tiedlora.data.encoding import Encoded, EncodedRows, Encoder, load_or_encode
from tiedlora.errors import UserError
from tiedlora.families import layout_of
from tiedlora.models import device as devices
from tiedlora.models import products
from tiedlora.models.arithmetic import CHECKPOINT_BYTES, FULL_BYTES
from tiedlora.models.base_model import BaseModel, load_base
from tiedlora.other_methods import FULL
from tiedlora.records.loss_metrics import is_loss
from tiedlora.records.provenance import TOKEN_FILES, code_version, package_versions
from tiedlora.records.run_record import Admission
from tiedlora.runs.admission import measure
from tiedlora.runs.inputs import RunRows, SingleSlotCache, read_rows, warn_of_trained_rows
from tiedlora.scoring.split import Scorer
from tiedlora.tasks import Example, load_examples, load_task
from tiedlora.tracking.progress import running_clock
from tiedlora.training.checkpoint import RunInputs
from tiedlora.training.distributed import World, is_sharded, shard
from tiedlora.training.loss import chunks_within

log = logging.getLogger(__name__)

TOKENS: SingleSlotCache[dict[str, EncodedRows]] = SingleSlotCache()
_BASE: SingleSlotCache[BaseModel] = SingleSlotCache()
OF_OTHER_HEADS = re.compile("classifier|summary")
"""The start of the configuration's names of dropout in heads that a causal language model has not."""


@contextmanager
def computing_as(train: TrainConfig, device: torch.device) -> Iterator[None]:
    """Inside the block, the process computes as the run asks: its products, its algorithms, the chunks of its loss.

    Enter it before anything is computed on a GPU, because cuBLAS reads its part when it starts.
    """
    algorithms = devices.only_deterministic_algorithms() if train.deterministic else nullcontext()
    with algorithms, products.on_any_cpu(device, train.dtype), chunks_within(train.loss_memory_mb):
        yield


@dataclass(frozen=True)
class Loaded:
    """What a run of these processes trains and scores with. `load` makes it."""

    world: World
    """The processes that have loaded it. Each has all of it, but for a model that they share."""
    device: torch.device
    base: BaseModel
    encoder: Encoder
    rows: dict[str, EncodedRows]
    """The rows of train and validation as token ids, without those that do not fit."""
    train_examples: list[Example]
    """The examples of rows["train"], in its order."""
    examples: dict[str, list[Example]]
    """Split -> all examples that are scored; validation in any case."""
    arm: Arm
    """The adapter on the base model, or the arm of another method."""
    parts: dict[str, nn.Parameter]
    """Name -> what the arm trains."""
    admission: Admission | None
    """What was measured of another method; None for this project's own and full, and in processes but the first."""
    scorer: Scorer
    inputs: RunInputs
    """What the record and the checkpoints say of how the run is carried out."""

    @property
    def trainable_params(self) -> int:
        """How many numbers the optimizer changes."""
        return _count(self.parts)

    def release(self) -> None:
        """Restore the base model, because the next run of this process may use it."""
        self.arm.detach()
        self.base.model.eval()
        if is_sharded(self.base.model):
            # Its parts belong to these processes' connections, which end with the run.
            _BASE.clear()


def load(config: Config, world: World) -> Loaded:
    """Load what a run needs, and check it. The caller must release it.

    Raises:
        UserError: the rows or the base model cannot be loaded, no row fits, a row cannot be scored, the adapter does
            not fit the model, or check_scores_mean_something refuses the scores.
    """
    task = load_task(config.task)
    _check_processes(world, config.train.shard, config.model.device_map)
    local_index = world.local_index if world.size > 1 else None
    device = devices.set_up_device(config.train.device, config.train.threads, local_index)
    # 1. The rows and the base model. Consecutive runs share them.
    with running_clock("reading the rows"):
        read = read_rows(config)
    has_choices = bool(read.examples["validation"][0].choices)
    if config.objective.name == "reward" and read.examples["train"][0].choices:
        raise UserError(
            f"objective=reward: the answers of task={config.task.name} are compared by their likelihoods, and none "
            "is generated; take another task, or objective=targets"
        )
    with devices.watched_cores(device):
        base = cached_base(config, device, world if config.train.shard else None)
    _say_own_dropout(base.model)
    # 2. The rows as token ids, without those that do not fit. Given texts are compared whole, so no token ends them.
    encoder = Encoder(base.tokenizer, config.task, config.model.context, () if has_choices else base.more_ends)
    if (end := encoder.other_turn_end()) is not None:
        trained = base.tokenizer.eos_token
        log.info("the chat template ends an answer with %s, and each target ends with %s instead", end, trained)
    if encoder.may_think():
        log.info(
            "the chat template may let the model think before it answers, and all of it is scored as the answer; "
            "task.template_options={enable_thinking: false} turns it off"
        )
    rows = _encoded(read, encoder, base, Path(config.cache))
    check_batch_tokens(rows["train"].encoded, config.train)
    # 3. The rows that are scored. A mistake in them is known now, because later it would cost the time of a training.
    examples = {"validation": read.examples["validation"]}
    if "test" in config.score.splits:
        examples["test"] = load_examples(task, "test", config.data_root)
        warn_of_trained_rows(config.task.name, read.examples["train"], examples["test"])
    generates = not has_choices and not all(map(is_loss, config.score.metrics or task.metrics))
    for split in config.score.splits:
        scored = [encoder.scored(example, split) for example in examples[split]]
        if generates and (long := sum(encoder.cuts_answer(example) for example in scored)):
            most = config.task.max_new_tokens
            text = "%d of %d %s targets are longer than task.max_new_tokens=%d, so no answer can equal them; raise it"
            log.warning(text, long, len(scored), split, most)
    # 4. The adapter, or the arm of another method, which is admitted first.
    try:
        arm, admission = _attached(config, base, rows["train"].encoded, world)
        parts = arm.trained_parts()
        expected = trainable_params(config)
        assert expected in (None, _count(parts)), f"{_count(parts)} parameters, expected {expected}"
    except BaseException:
        # The next run of this process must not get a model with parts of this arm.
        _BASE.clear()
        raise
    if missed := missed_budget(config, _count(parts)):
        log.warning("budget: %s", missed)
    # 5. How the run is carried out.
    assert base.record.digest is not None
    versions, execution = package_versions() | encoder.versions, devices.execution_on(device, world.size)
    if (token_files := base.token_files.get(config.task.chat_template)) is not None:
        versions[TOKEN_FILES] = token_files
    return Loaded(
        world=world,
        device=device,
        base=base,
        encoder=encoder,
        rows=rows,
        train_examples=[read.examples["train"][number] for number in rows["train"].kept],
        examples=examples,
        arm=arm,
        parts=parts,
        admission=admission,
        scorer=Scorer(arm, encoder, task, config, base.record, world),
        inputs=RunInputs(execution, read.digests, base.record.digest, versions, code_version()),
    )


def cached_base(config: Config, device: torch.device, shared_by: World | None = None) -> BaseModel:
    """The base model of a configuration. The caller must detach its adapter, because the next run gets the same model.

    Args:
        shared_by: the processes that share the model; None if this process has the whole model.

    Raises:
        UserError: as models.base_model.load_base.
    """

    def make() -> BaseModel:
        first_device = device if shared_by is None else torch.device("cpu")
        with running_clock(f"loading {config.model.name}"):
            base = load_base(config.model, config.train.dtype, first_device, Path(config.cache))
        if shared_by is not None:
            shard(base.model, layout_of(config.model.architecture).layers, device, shared_by)
        return base

    return _BASE.get((config.model, config.train.dtype, device, shared_by), make)


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


def _check_processes(world: World, is_shared: bool, device_map: str | None) -> None:
    """Refuse a base model that cannot be spread as the configuration says over this number of processes."""
    if is_shared and world.size == 1:
        raise UserError(
            "train.shard=true: needs several processes that share the model; start torchrun --nproc-per-node N "
            "train.py ..., or use train.shard=false"
        )
    if world.size > 1 and device_map:
        raise UserError(
            f"model.device_map={device_map}: every process would spread the model over all GPUs; "
            "start one process without torchrun, or use model.device_map=null"
        )


def _say_own_dropout(model: nn.Module) -> None:
    """Log the dropout of the base model itself, such as GPT-2's: no key of a run shows it."""
    config: Any = model.config
    # Most families have no module of it, and read a number of their configuration.
    numbers = {
        value
        for name, value in config.get_text_config().to_dict().items()
        if re.search("dropout|pdrop", name) and not OF_OTHER_HEADS.match(name) and type(value) is float
    }
    shares = sorted({module.p for module in model.modules() if isinstance(module, nn.Dropout)} | numbers)
    if shares := [share for share in shares if share]:
        words = ", ".join(f"{share:g}" for share in shares)
        log.info("the base model's own dropout (%s) is active in training; its masks depend on the passes' size", words)


def _encoded(read: RunRows, encoder: Encoder, base: BaseModel, cache: Path) -> dict[str, EncodedRows]:
    """Split -> its rows as token ids. How many do not fit is logged."""

    def fitted(split: str, examples: list[Example]) -> EncodedRows:
        with running_clock(f"encoding the {split} rows"):
            encoded = load_or_encode(encoder, examples, read.digests[split], base.record, cache)
        if dropped := sorted(set(range(len(examples))) - set(encoded.kept)):
            first = examples[dropped[0]].id
            log.info("%d of %d %s rows do not fit, such as id %s", len(dropped), len(examples), split, first)
        return encoded

    return TOKENS.get(
        (encoder.config, read.digests, base.record, encoder.context),
        lambda: {split: fitted(split, examples) for split, examples in read.examples.items()},
    )


def _attached(config: Config, base: BaseModel, rows: list[Encoded], world: World) -> tuple[Arm, Admission | None]:
    """A new arm on the base model, and the checks of another method. One that does not fit leaves no trace."""
    rank, architecture = config.rank, config.model.architecture
    if config.tying.method is not None:
        spec = ArmSpec(config.tying, architecture, config.seed)
        if config.tying.method == FULL:
            log.info(
                "full fine-tuning: %.1f GB for weights, gradients and Adam's moments, beside activations; %.1f GB for "
                "a checkpoint; a step takes about 1.5 times an adapter's",
                *(size * base.model.num_parameters() / 1e9 for size in (FULL_BYTES, CHECKPOINT_BYTES)),
            )
            return new_arm(base.model, spec), None
        admission = _admission(config, spec, base, rows) if world.is_first else None
        return new_arm(base.model, spec), admission
    assert rank.alpha is not None
    adapter = TiedAdapter(config.tying, rank.r, rank.alpha, architecture, seed=config.seed, scaling=rank.scaling)
    if config.train.init_from:
        folder = Path(config.train.init_from)
        if adapter_digest(folder) != config.train.init_digest:
            raise UserError(f"train.init_from={folder}: holds another adapter than when this run was composed")
        files.start_from(adapter, folder, base.record)
    return attach_adapter(base.model, adapter, config.train.shard), None


def _admission(config: Config, spec: ArmSpec, base: BaseModel, rows: list[Encoded]) -> Admission:
    ids = [list(row.prompt + row.target) for row in rows]
    admission = measure(base.model, spec, base.record, ids, config.train.lr or 0.0)
    check_scores_mean_something(admission, config)
    for mark in admission.marks().values():
        log.warning("%s: %s", config.tying.name, mark)
    return admission


def _count(parts: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parts.values())
