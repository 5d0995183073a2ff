"""A tiny random causal language model of each family in adapter/architectures.py."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# A wide range of weights, so that attention is far from uniform, and an update changes the logits.
BASICS = dict(vocab_size=260, bos_token_id=None, eos_token_id=256, pad_token_id=None, initializer_range=0.2)
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64
)
GROUPED = dict(num_key_value_heads=2)
# head_dim * heads differs from hidden_size if the family allows it: d_q = 48, d_kv = 24.
OWN_HEAD_DIM = dict(**GROUPED, head_dim=12)

NUMBERS = {
    "llama": OWN_HEAD_DIM,
    "mistral": OWN_HEAD_DIM,
    "qwen2": GROUPED,
    "qwen3": OWN_HEAD_DIM,
    "gemma": OWN_HEAD_DIM,
    "gemma2": dict(**OWN_HEAD_DIM, query_pre_attn_scalar=12, final_logit_softcapping=3.0, attn_logit_softcapping=5.0),
    "gemma3_text": dict(**OWN_HEAD_DIM, query_pre_attn_scalar=12, sliding_window=8),
    "olmo2": GROUPED,
    "smollm3": GROUPED,
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=48),
    "phi3": GROUPED,
    "gpt_neox": {},
}
FAMILIES = tuple(NUMBERS)
SCALED = {"granite": dict(**GROUPED, logits_scaling=8.0), "cohere": dict(**GROUPED, logit_scale=0.0625)}
"""Families without a layout of ours, whose logits have a factor."""
OTHERS = {"falcon": dict(multi_query=True), "olmo": {}}


def family_model(family: str, **changes):
    """A model in float32 and evaluation mode, with the same weights every time."""
    sizes = {} if family == "gpt2" else SIZES
    config = AutoConfig.for_model(family, **{**BASICS, **sizes, **(NUMBERS | SCALED | OTHERS)[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def model_of_images():
    """A Gemma 3 that also reads images, as from 4B on. Its other part has projections of the same names."""
    images = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = {**BASICS, **SIZES, **NUMBERS["gemma3_text"]}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=images, mm_tokens_per_image=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
