"""Our side of a comparison: training as in train.py, and the base model and the token ids for it."""

from __future__ import annotations

from pathlib import Path

import torch

from tiedlora.config.schema import Config
from tiedlora.data.encoding import Encoded, Encoder, encode_rows
from tiedlora.models.base_model import BaseModel
from tiedlora.models.device import resolve_device
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs.inputs import read_rows
from tiedlora.runs.loading import cached_base, computing_as, load
from tiedlora.runs.trainer import Training, begin
from tiedlora.tasks import Example
from tiedlora.training.distributed import ALONE
from tiedlora.training.signals import StopSignal


def train(config: Config, folder: Path) -> Training:
    """Train as in train.py, without scoring. `folder` becomes the run's folder."""
    device = resolve_device(config.train.device)
    with StopSignal() as stop, computing_as(config.train, device):
        training = begin(config, load(config, ALONE), RunFolder(folder), folder / "checkpoint")
        training.train(stop)
    return training


def base_model(config: Config) -> BaseModel:
    """The base model of a configuration, on its device."""
    return cached_base(config, resolve_device(config.train.device))


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has computed everything, so that a time can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def encoder_of(config: Config, base: BaseModel) -> Encoder:
    """The encoder of the task's texts."""
    return Encoder(base.tokenizer, config.task, config.model.context)


def training_rows(config: Config, base: BaseModel) -> list[Encoded]:
    """The training rows as token ids."""
    return encode_rows(encoder_of(config, base), read_rows(config).examples["train"]).encoded


def validation_examples(config: Config) -> list[Example]:
    """The validation rows."""
    return read_rows(config).examples["validation"]
