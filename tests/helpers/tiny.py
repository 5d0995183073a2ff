"""Configurations, options of conf/ by name, and tiny random models, for most tests."""

import copy
import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tiedlora.adapter import attach
from tiedlora.adapter.attach import Attached
from tiedlora.config import compose as configuration
from tiedlora.config.identity import run_id
from tiedlora.config.schema import Config, ModelConfig
from tiedlora.data.encoding import Encoded, Encoder
from tiedlora.models.base_model import BaseModel, load_base
from tiedlora.records.rows import PredictionRow, read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import Kind, RunScores, read_run_scores, read_scores
from tiedlora.runs.add_scores import add_scores
from tiedlora.scoring import decoding
from tiedlora.scoring.decoding import AnswerEnds, Output, batches_by_length, decode
from tiedlora.scoring.split import Scorer, in_shares
from tiedlora.tasks import Task, load_task
from tiedlora.training.distributed import ALONE
from tiedlora.tying import Tying

EIGHT = ("LoRA", "TA", "TB", "TAB", "Tuv", "TAuv", "TBuv", "TABuv")
TINY = ("tiny_llama", "tiny_gpt2")
PLACES = ("outputs", "cache")


def composed(words: Sequence[str]) -> Config:
    """As compose_config. Words that differ in outputs= and cache= alone are composed once: it takes longer than a test.

    Words with a path are composed each time, because what is there may have changed.
    """
    places = dict(word.split("=", 1) for word in words if word.startswith(tuple(f"{name}=" for name in PLACES)))
    others = tuple(word for word in words if word.partition("=")[0] not in PLACES)
    if any("/" in word.removeprefix("tying=peft/") for word in others):
        return configuration.compose_config(list(words))
    config = copy.deepcopy(_composed(others, os.environ.get("TIEDLORA_DATA")))
    return replace(config, **{name: os.path.abspath(value) for name, value in places.items()})


@functools.cache
def _composed(words: tuple[str, ...], _data_root: str | None) -> Config:
    return configuration.compose_config(list(words))


def tying_option(name: str, *overrides: str) -> Tying:
    return composed([f"tying={name}", *overrides]).tying


def model_option(name: str) -> ModelConfig:
    return composed([f"model={name}"]).model


def task_option(name: str, *overrides: str) -> Task:
    return load_task(composed([f"task={name}", *overrides]).task)


def tiny(name: str, dtype: str = "float32") -> BaseModel:
    return load_base(model_option(name), dtype, torch.device("cpu"), Path("unused"))


def saved_tiny(name: str, folder: Path) -> ModelConfig:
    """A tiny model as a folder of files, and its configuration."""
    base = tiny(name)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return replace(model_option(name), source="hub", path=str(folder))


def adapted(name: str, dtype: torch.dtype) -> tuple[BaseModel, Attached]:
    """A tiny model whose weights have a dtype, with a random TABuv."""
    base = tiny(name)
    attached = attach(base.model, "TABuv", 4)
    base.model.to(dtype)
    attached.adapter.to(torch.promote_types(dtype, torch.float32))
    randomise(attached.adapter, scale=0.2)
    return base, attached


def randomise(adapter: torch.nn.Module, seed: int = 1, scale: float = 0.5) -> None:
    """Make every part random and non-zero, so that every term of the formula has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether float32 logits differ by at most 1e-5 of the largest one."""
    return bool((one - two).abs().max() <= 1e-5 * two.abs().max())


def mask_of(rows: Sequence[Encoded]) -> torch.Tensor:
    """The attention mask (rows, longest row) of rows that are padded on the right."""
    lengths = torch.tensor([[len(row)] for row in rows])
    return (torch.arange(int(lengths.max())) < lengths).long()


def folder_of(config: Config) -> RunFolder:
    return RunFolder(Path(config.outputs) / run_id(config))


def score_more(folder: RunFolder, again: bool = False, data_root: str | None = None, **score: Any) -> RunScores:
    """Add the scores that `score`, values of config.score, names to the run, with the configuration of its folder.

    Returns all that it has then.
    """
    config = configuration.read_config(folder.config_file)
    config = replace(config, data_root=data_root, score=replace(config.score, **score))
    add_scores(folder, config, again)
    return read_run_scores(folder)


def rows_of(folder: RunFolder, split: str, kind: Kind = "answers", base: bool = False) -> list[PredictionRow]:
    """The rows of a file of scores of a run; with `base`, those of the base model beside it."""
    scored = read_scores(folder.scores_file(split, kind))
    return read_scores(folder.base_scores_file(scored.record.base)).rows if base else scored.rows


def losses_of(folder: RunFolder) -> dict[int, float]:
    """Step -> the logged training loss of a run."""
    rows = read_metrics(folder.metrics_file)
    return {row.step: row.values["train/loss"] for row in rows if "train/loss" in row.values}


def tiny_scorer(*overrides: str, context: int = 512) -> Scorer:
    """Scores with tiny_llama and a new TABuv, in batches of at most four rows."""
    config = configuration.compose_config(["model=tiny_llama", "score.batch_size=4", *overrides])
    base = tiny("tiny_llama")
    encoder = Encoder(base.tokenizer, config.task, context)
    return Scorer(attach(base.model, "TABuv"), encoder, load_task(config.task), config, base.record)


def little_memory(monkeypatch: Any, rows: int) -> list[int]:
    """From now on, more than so many prompts together do not fit. Returns the sizes of the batches that fit."""
    plain, sizes = decoding.padded_left, []

    def limited(prompts: Sequence[Any], *rest: Any) -> Any:
        if len(prompts) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. (a test)")
        sizes.append(len(prompts))
        return plain(prompts, *rest)

    monkeypatch.setattr(decoding, "padded_left", limited)
    return sizes


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    batch_tokens: int | None = None,
    stop: Sequence[str] = (),
    more_ends: Sequence[int] = (),
) -> list[Output]:
    """The answers to prompts, in batches as the scoring makes them."""
    ends = AnswerEnds(tokenizer, stop, max_new_tokens, more_ends)
    batches = batches_by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_size, batch_tokens)
    return in_shares(ALONE, model, batches, lambda batch: decode(model, [prompts[i] for i in batch], ends))
