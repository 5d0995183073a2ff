"""Finished runs and saved adapters, loaded back: what notebooks and scripts/ build on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tiedlora.adapter import Attached, attach_adapter, files
from tiedlora.config import compose
from tiedlora.config.adapter_folder import adapter_folder
from tiedlora.config.check import check_device
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.models.base_model import BaseModel, load_base
from tiedlora.models.device import resolve_device


def config_of(run: Path | str) -> Config:
    """The resolved configuration of a run.

    Raises:
        UserError: the folder is no run.
    """
    path = os.path.join(os.path.expanduser(run), "config.yaml")
    if not os.path.isfile(path):
        raise UserError(f"{run}: is not a run's folder (it has no config.yaml); give a run, or pass the base model")
    return compose.read_config(Path(path))


def base_of(run: Path | str, dtype: str | None = None, device: str = "cpu", cache: str | None = None) -> BaseModel:
    """The base model and tokenizer that a run was trained on.

    Args:
        dtype: float32 or bfloat16; None takes the run's own.
        cache: where converted models are kept; None takes the run's own folder.

    Raises:
        UserError: no run, or its base model cannot be had here.
    """
    config = config_of(run)
    check_device("device", device)
    return load_base(config.model, dtype or config.train.dtype, resolve_device(device), Path(cache or config.cache))


def load(source: Path | str, model: Any = None, *, dtype: str | None = None, device: str = "cpu") -> Attached:
    """Put a saved adapter on its base model.

    Args:
        source: a run's folder, or a folder that `save_pretrained` wrote.
        model: the base model; None loads the one a run was trained on (`source` must then be a run).
        dtype: of the base model that is loaded; None takes the run's own.

    Returns:
        The adapter on the model: `.model` is ready to use, `.detach()` gives the base back.

    Raises:
        UserError: nothing to load there, a damaged file, or a base model that is not the one it was trained on.
    """
    adapter, trained_on = files.load(adapter_folder(source))
    if model is None:
        base = base_of(source, dtype, device)
        if base.record != trained_on:
            raise UserError(f"{source}: was trained on {trained_on}, the base model here is {base.record}")
        model = base.model
    return attach_adapter(model, adapter)
