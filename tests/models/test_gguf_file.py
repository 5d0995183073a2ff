"""GGUF files of which transformers would leave out something are refused, and nothing is converted."""

from contextlib import nullcontext

import gguf
import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tiedlora.errors import UserError
from tiedlora.models import base_model, gguf_file


def write(file, *tensors, **keys):
    """A llama of one layer, with more tensors, and more keys below `llama.`."""
    settings = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(8)
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.{key.replace('__', '.')}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in LlamaForCausalLM(settings).state_dict().items():
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", tensor.numpy())
    for name in tensors:
        writer.add_tensor(name, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_changes_nothing_is_no_reason(tmp_path):
    file = tmp_path / "plain.gguf"
    write(file, rope__freq_base=10000.0, rope__scaling__type="none", rope__scaling__original_context_length=64.0)
    gguf_file.check(file)


@pytest.mark.parametrize(
    ("tensors", "keys", "named"),
    [
        (["rope_freqs.weight"], {}, "has rope_freqs.weight, which"),
        (["blk.0.attn_q.bias", "blk.0.attn_k.bias"], {}, "has blk.0.attn_q.bias and 1 more, which"),
        ([], {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, "llama.rope.scaling.type=linear and 1"),
        ([], {"rope__scale_linear": 2.0}, "has llama.rope.scale_linear=2.0, which"),
    ],
)
def test_what_would_be_left_out_is_named(tmp_path, tensors, keys, named):
    file = tmp_path / "x.gguf"
    write(file, *tensors, **keys)
    with pytest.raises(UserError, match=r"transformers leaves out.* model.path=FOLDER") as error:
        base_model._converted(file.name, "0" * 64, tmp_path, nullcontext(file))
    assert named in str(error.value)
    assert not list((tmp_path / "models").glob("*/"))
