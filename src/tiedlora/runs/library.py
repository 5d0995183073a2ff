"""Load finished runs and saved adapters, for notebooks and scripts/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tiedlora.adapter.arms import Arm
from tiedlora.adapter.attach import attach_saved
from tiedlora.config import compose
from tiedlora.config.check import check_device, check_dtype
from tiedlora.config.identity import adapter_folder
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.models.base_model import BaseModel, load_base
from tiedlora.models.device import resolve_device
from tiedlora.records.run_folder import RunFolder


def config_of(run: Path | str) -> Config:
    """The resolved configuration of a run's folder.

    Raises:
        UserError: the folder is not a run's, or its config.yaml is wrong, or not that of its result.json.
    """
    path = os.path.join(os.path.expanduser(run), "config.yaml")
    if not os.path.isfile(path):
        raise UserError(
            f"{run}: is not a run's folder (it has no config.yaml); give a run (in Python, you may pass the base model)"
        )
    record = RunFolder(Path(path).parent).record()
    return compose.read_finished_config(Path(path), record.config.tree) if record else compose.read_config(Path(path))


def base_of(run: Path | str, dtype: str | None = None, device: str = "cpu", cache: str | None = None) -> BaseModel:
    """The base model and tokenizer that a run was trained on.

    Args:
        dtype: float32 or bfloat16; None takes the run's own.
        device: as train.device.
        cache: the folder of converted models; None takes TIEDLORA_CACHE, or else the run's own.

    Raises:
        UserError: the folder is not a run's, or its base model cannot be loaded here.
    """
    config = config_of(run)
    check_device("device", device)
    if dtype is not None:
        check_dtype(dtype)
    return load_base(
        config.model,
        dtype or config.train.dtype,
        resolve_device(device),
        Path(compose.cache_is_in(config, cache)),
    )


def load(source: Path | str, model: Any = None, *, dtype: str | None = None, device: str | None = None) -> Arm:
    """Load a saved adapter and attach it to its base model.

    Args:
        source: a run's folder, or a folder that `save_pretrained` has written.
        model: the base model. A BaseModel (of `base_of`) is compared with the one that the adapter was trained on; a
            model of transformers has no record that could be compared. None loads the one that the run was trained on
            (`source` must then be a run).
        dtype: the dtype of the base model that is loaded; None takes the run's own.
        device: where this model is loaded, as train.device; None is the CPU.

    Returns:
        The adapter on the model. `.model` is ready to use; `.detach()` restores the base.

    Raises:
        UserError: there is no adapter, a file is damaged, the base model is not the one that it was trained on, or
            `dtype` or `device` is given beside a model.
    """
    folder = adapter_folder(source)
    if model is not None and (dtype, device) != (None, None):
        raise UserError(
            "dtype and device: are those of a base model that load() loads; the one that is given stays as it is"
        )
    base = base_of(source, dtype, device or "cpu") if model is None else model
    return attach_saved(base.model, folder, base.record) if isinstance(base, BaseModel) else attach_saved(base, folder)
