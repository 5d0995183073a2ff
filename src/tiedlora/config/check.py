"""Refuse impossible values of a configuration before anything is loaded, with one line that names the key.

The rules of a single key are in the schema. Rules about several keys, or about files, are functions here.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import fields

from tiedlora import tying
from tiedlora.config.embedded import embedded_model
from tiedlora.config.schema import Config, ModelConfig, ObjectiveConfig, TrainConfig
from tiedlora.config.sizes import trainable_params
from tiedlora.errors import UserError
from tiedlora.other_methods import FULL, TyingConfig

LARGEST_RANDOM = 10**9
"""Most parameters of a random model."""
SMALLEST_VOCABULARY = 257
"""Of a random model (models/)."""
LARGEST_MISS = 2
"""By which factor the size of a new run may miss its budget. From 5 % on, a miss is marked."""


def check(config: Config) -> None:
    """Refuse impossible values.

    Raises:
        UserError: a value is impossible; the message names the key, the value and what is allowed.
    """
    if config.score.forgetting is not None:
        check_forgetting(config.score.forgetting)
    check_device("train.device", config.train.device)
    _check_training(config)
    _check_objective(config)
    if config.tying.method is None:
        tying.check_tying(config.tying, config.rank.r, config.model.architecture)
    else:
        _check_method(config)
    _check_placement(config)
    _check_sizes(config.model)
    _check_rank(config)


def check_new_run(config: Config) -> None:
    """Refuse what a new run cannot have. Finished runs of earlier versions may have it, and stay readable.

    Raises:
        UserError: the message names the key.
    """
    model = config.model
    if model.source == "embedded" and not model.path:
        embedded_model(model.name)
    if model.source == "random" and model.path:
        raise UserError(
            f"model.path={model.path}: a random model is in no folder; leave it out, or set model.source=hub"
        )
    if config.tracking.backend in ("wandb", "auto") and "/" in config.tracking.project:
        raise UserError(
            f"tracking.project={config.tracking.project}: W&B's names hold no '/'; give the team as tracking.entity"
        )
    if config.train.init_digest is not None and not config.train.init_from:
        raise UserError("train.init_digest: is filled in by the program; name the adapter with train.init_from=RUN")
    _check_last_rate(config.train)
    if config.tying.method is not None and config.tying.dropout:
        raise UserError(
            f"tying.dropout={config.tying.dropout:g}: has no effect on {config.tying.method}; set the method's own "
            "argument, such as tying.arguments.lora_dropout=0.1"
        )
    is_sized = config.tying.method is None or config.tying.knob is not None
    count = trainable_params(config) if config.budget is not None and is_sized else None
    if config.budget is not None and count and not 1 / LARGEST_MISS <= count / config.budget <= LARGEST_MISS:
        raise UserError(
            f"budget={config.budget}: the nearest size of {config.tying.name} on this model has {count:,} parameters; "
            "choose a budget near to it, or another tying"
        )
    terms = tying.terms(config.tying).values() if config.tying.method is None and not config.train.init_from else ()
    for part, term in itertools.product(tying.PARTS, terms):
        spec: tying.Part = getattr(term, part)
        if spec.trained and spec.init == 0.0 and getattr(config.train.lr_factor, part) == 0.0:
            raise UserError(
                f"train.lr_factor.{part}=0: {part} starts at zero, so the update would always stay zero; raise it, or "
                "start from a trained adapter (train.init_from)"
            )


def _check_last_rate(train: TrainConfig) -> None:
    if train.schedule == "constant" and train.min_lr:
        raise UserError(
            f"train.min_lr={train.min_lr:g}: changes nothing with train.schedule=constant; set train.min_lr=0"
        )
    if train.lr is not None and train.min_lr > train.lr:
        raise UserError(f"train.min_lr={train.min_lr:g}: is above train.lr={train.lr:g}; lower it")


def check_forgetting(source: str) -> None:
    """Refuse what cannot name neutral text. Whether it exists is another question: the run may be read elsewhere."""
    if not source.endswith(".txt"):
        raise UserError(f"score.forgetting={source!r:.80}: must be FILE.txt")


def check_device(key: str, name: str) -> None:
    """Refuse a device name that torch would not know.

    Args:
        key: the name of the setting in the message.
    """
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:(0|[1-9]\d?))?", name, re.ASCII):
        raise UserError(f"{key}={name}: choose auto, cpu, cuda or cuda:NUMBER (mps and xpu were never tried)")


def check_dtype(name: str) -> None:
    """Refuse a dtype in which no base model is loaded or written.

    Raises:
        UserError: it is neither float32 nor bfloat16.
    """
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype={name!s:.40}: choose 'float32' or 'bfloat16'")


def _check_training(config: Config) -> None:
    train: TrainConfig = config.train
    trained = tying.trained_parts(config.tying)
    if config.tying.method is None and not trained:
        raise UserError("tying: none of A, B, u and v is trained; set tying.PART.trained=true for one of them")
    if config.tying.method is None and not any(getattr(train.lr_factor, part) > 0 for part in trained):
        raise UserError("train.lr_factor: is 0 for every trained part, so nothing would be trained; raise one of them")
    if train.warmup_steps > train.steps:
        raise UserError(
            f"train.warmup_steps={train.warmup_steps}: is more than train.steps={train.steps}; lower it, or set it to 0"
        )


def _check_objective(config: Config) -> None:
    if config.objective.name == "targets":
        default = ObjectiveConfig()
        for item in fields(default):
            if (value := getattr(config.objective, item.name)) != getattr(default, item.name):
                raise UserError(f"objective.{item.name}={value}: needs objective=reward; add it, or leave this key out")
    elif config.score.checkpoint == "best":
        raise UserError(
            "score.checkpoint=best: is the step of the lowest validation loss, which objective=reward does not lower; "
            "use last"
        )
    elif config.task.shuffle_targets:
        raise UserError("task.shuffle_targets=true: objective=reward learns from no targets; leave one of them out")
    elif config.train.shard:
        raise UserError("train.shard=true: objective=reward samples from a whole model; use train.shard=false")


def _check_method(config: Config) -> None:
    """Refuse what another method than this project's own cannot have."""
    tying_config, train = config.tying, config.train
    if tying_config.terms is not None:
        raise UserError(f"tying.terms: {tying_config.method} has no terms; set tying.terms=null")
    for key in ("targets", "layers", "dropout") if tying_config.method == FULL else ():
        if (value := getattr(tying_config, key)) != getattr(TyingConfig(), key):
            raise UserError(f"tying.{key}={value}: full fine-tuning trains every weight of the base; leave it out")
    layers = tying.adapted_layers(tying_config, config.model.architecture)
    tying.check_layers("tying.layers", layers, config.model.architecture)
    for name in tying.PARTS:
        if (factor := getattr(train.lr_factor, name)) != 1.0:
            raise UserError(
                f"train.lr_factor.{name}={factor:g}: {tying_config.method} has no part {name}; "
                "use tying.lr_factors='{PATTERN: FACTOR}'"
            )
    if train.init_from:
        raise UserError(f"train.init_from: starts an adapter of A, B, u and v; {tying_config.method} has none")
    if train.shard or config.model.device_map or config.model.quantization:
        raise UserError(
            f"tying.method={tying_config.method}: needs the whole model, unquantised and on one device; use "
            "train.shard=false, model.device_map=null and model.quantization=null"
        )


def _check_placement(config: Config) -> None:
    """Refuse wishes about the place of the base model's weights that cannot be met together."""
    model = config.model
    for name in ("gpu_memory", "cpu_memory"):
        size = getattr(model, name)
        if size is not None and model.device_map is None:
            raise UserError(f"model.{name}={size}: limits what model.device_map fills; set model.device_map=auto")
    if config.train.shard and (model.device_map or model.quantization):
        other = "device_map" if model.device_map else "quantization"
        raise UserError(
            f"train.shard=true: cannot be combined with model.{other}={getattr(model, other)}; set one to null"
        )
    if model.device_map is None:
        return
    if model.source == "random":
        raise UserError(f"model.device_map={model.device_map}: a random model has no files to load; use null")
    if config.train.compile == "always":
        raise UserError(
            f"train.compile=always: blocks are not compiled with model.device_map={model.device_map} (weights move); "
            "use train.compile=auto"
        )


def _check_sizes(model: ModelConfig) -> None:
    """Refuse sizes that do not fit each other, and a random model that would not fit into memory."""
    a = model.architecture
    if a.heads % a.kv_heads:
        raise UserError(f"model.architecture.kv_heads={a.kv_heads}: must divide heads={a.heads}")
    if model.source != "random":
        return
    if a.family == "gpt2" and a.hidden != a.heads * a.head_dim:
        raise UserError(f"model.architecture.hidden={a.hidden}: must be heads x head_dim={a.heads * a.head_dim}")
    if a.vocabulary < SMALLEST_VOCABULARY:
        raise UserError(
            f"model.architecture.vocabulary={a.vocabulary}: a random model needs {SMALLEST_VOCABULARY} or more, one "
            "for each byte and one for the end of a text"
        )
    if a.head_dim % 2:
        raise UserError(f"model.architecture.head_dim={a.head_dim}: must be even (for rotary embeddings)")
    layer_params = 2 * (a.heads + a.kv_heads) * a.head_dim + 3 * a.intermediate
    params = a.hidden * (2 * a.vocabulary + model.context + a.layers * layer_params)
    if params > LARGEST_RANDOM:
        raise UserError(
            f"model.architecture: a random model of about {params:,} parameters; they are for tests, "
            f"{LARGEST_RANDOM:,} at most"
        )


def _check_rank(config: Config) -> None:
    limit = tying.largest_rank(config.tying, config.model.architecture)
    for name, term in (config.tying.terms or {}).items():
        if term.rank.isdecimal() and int(term.rank) > limit:
            raise UserError(f"tying.terms.{name}.rank={term.rank}: is more than a projection's smaller side, {limit}")
    if config.rank.r > limit:
        raise UserError(f"rank.r={config.rank.r}: is more than a projection's smaller side, {limit}; lower it")
