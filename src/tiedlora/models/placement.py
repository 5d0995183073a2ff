"""Where and how the weights of a base model are kept: quantised by bitsandbytes, spread by accelerate, or plain."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from tiedlora.config.schema import ModelConfig
from tiedlora.errors import UserError


def loading_settings(config: ModelConfig, dtype: torch.dtype, device: torch.device, cache: Path) -> dict[str, Any]:
    """The arguments of `from_pretrained` that quantise and place the weights; empty for a plain model.

    Args:
        dtype: the dtype of activations, and of the weights that are not quantised (embeddings, output head, norms).
        cache: weights that fit neither on a GPU nor into the CPU's memory are read from a folder below it.

    Raises:
        UserError: model.quantization is set, and bitsandbytes is not installed.
    """
    settings: dict[str, Any] = {}
    if config.quantization:
        if importlib.util.find_spec("bitsandbytes") is None:
            command = "pip install 'tiedlora[quantization]'"
            raise UserError(f"model.quantization={config.quantization}: needs bitsandbytes; run: {command}")
        settings = {"quantization_config": _bitsandbytes(config.quantization, dtype), "device_map": {"": device}}
    if config.device_map:
        settings["device_map"] = config.device_map
        settings["offload_folder"] = str(cache / "offload")
        if config.max_memory:
            # A GPU's number is a text in the configuration.
            limits = {int(name) if name.isdecimal() else name: size for name, size in config.max_memory.items()}
            settings["max_memory"] = limits
    return {"dtype": dtype, **settings} if settings else {}


def _bitsandbytes(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The settings of bitsandbytes. Those of nf4 are QLoRA's (arXiv 2305.14314, section 3)."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
