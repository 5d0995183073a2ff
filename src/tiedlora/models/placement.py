"""Where and how the weights of a base model are kept: quantised by bitsandbytes, spread by accelerate, or plain."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from accelerate.utils import get_max_memory
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from tiedlora.adapter import linear
from tiedlora.config.schema import ModelConfig
from tiedlora.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")


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
        # The settings of nf4 are QLoRA's (arXiv 2305.14314, section 3).
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        bits = {"load_in_8bit": True} if config.quantization == "int8" else {"load_in_4bit": True, **nf4}
        settings = {"quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": device}}  # type: ignore[no-untyped-call]
    if config.device_map:
        settings["device_map"] = config.device_map
        settings["offload_folder"] = str(cache / "offload")
        settings["max_memory"] = get_max_memory()
        if config.gpu_memory:
            settings["max_memory"] |= dict.fromkeys(range(torch.accelerator.device_count()), config.gpu_memory)
        if config.cpu_memory:
            settings["max_memory"]["cpu"] = config.cpu_memory
    if settings:
        settings["dtype"] = dtype
    return settings


def input_device(model: Any) -> torch.device:
    """The device where the model expects token ids."""
    return linear.execution_device(model.get_input_embeddings())


@contextmanager
def weights_in_place(module: nn.Module, *inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Inside the block, the module's weights are where it runs, and so are `inputs`. For code that reads the weights
    instead of calling the module.
    """
    # Not accelerate's align_module_device, which does nothing for a module with several hooks.
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        yield inputs
        return
    moved, _ = hook.pre_forward(module, *inputs)
    try:
        yield moved
    finally:
        hook.post_forward(module, None)


def without_gradients(function: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Call the function, whose first argument is a model, without gradients.

    This is inference_mode for a model whose weights stay in place. Weights that are loaded or gathered in inference
    mode could not be used in training afterwards, so other models get no_grad.
    """

    @functools.wraps(function)
    def call(model: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        # accelerate and FSDP put weights in place only while a module runs.
        weights_move = any("_hf_hook" in vars(m) or hasattr(type(m), "_get_fsdp_state") for m in model.modules())
        with torch.no_grad() if weights_move else torch.inference_mode():
            return function(model, *args, **kwargs)

    return call
