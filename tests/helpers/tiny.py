"""Options of conf/ by name, and tiny random models, for most tests."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tiedlora.config import compose as configuration
from tiedlora.config.schema import ModelConfig
from tiedlora.data.encoding import Encoded
from tiedlora.models.base_model import BaseModel, load_base
from tiedlora.tasks import Task, load_task
from tiedlora.tying import Tying

EIGHT = ("LoRA", "TA", "TB", "TAB", "Tuv", "TAuv", "TBuv", "TABuv")
TINY = ("tiny_llama", "tiny_gpt2")


def tying_option(name: str, *overrides: str) -> Tying:
    return configuration.compose_config([f"tying={name}", *overrides]).tying


def model_option(name: str) -> ModelConfig:
    return configuration.compose_config([f"model={name}"]).model


def task_option(name: str, *overrides: str) -> Task:
    return load_task(configuration.compose_config([f"task={name}", *overrides]).task)


def tiny(name: str, dtype: str = "float32") -> BaseModel:
    return load_base(model_option(name), dtype, torch.device("cpu"), Path("unused"))


def randomise(adapter: torch.nn.Module, seed: int = 1, scale: float = 0.5) -> None:
    """Make every part random and non-zero, so that every term of the formula has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def mask_of(rows: Sequence[Encoded]) -> torch.Tensor:
    """The attention mask (rows, longest row) of rows that are padded on the right."""
    lengths = torch.tensor([[len(row)] for row in rows])
    return (torch.arange(int(lengths.max())) < lengths).long()
