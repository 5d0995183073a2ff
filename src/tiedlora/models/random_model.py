"""Tiny untrained models for tests. They have any sizes, need no files, and always have the same weights."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tiedlora.config.schema import ModelConfig
from tiedlora.errors import UserError

END_OF_TEXT = 256
"""The id of the end-of-text token. The ids below it are the bytes."""


def random_model(config: ModelConfig) -> tuple[Any, Any]:
    """A float32 model of the configuration's sizes, and a tokenizer with one token for each byte.

    Raises:
        UserError: random models of this family are not supported.
    """
    a = config.architecture
    sizes = {
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
    if a.family not in sizes:
        raise UserError(f"model.architecture.family={a.family}: a random model can be one of {', '.join(sizes)}")
    settings = AutoConfig.for_model(
        a.family,
        vocab_size=a.vocabulary,
        max_position_embeddings=config.context,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT,
        pad_token_id=None,
        **sizes[a.family],
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
