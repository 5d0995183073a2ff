"""What transformers would leave out of a GGUF file, so that the file's model and the loaded one would differ."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from tiedlora.errors import UserError

PLAIN = ("none", 1.0)
"""The values of a key of rope scaling that change nothing."""


def check(file: Path) -> None:
    """Refuse a GGUF file of which transformers would leave out something, as it does without a word.

    It reads no rope scaling, and skips every tensor for which its model has no place. Llama 3.1 and later have their
    scaling in such a tensor, `rope_freqs.weight`.

    Raises:
        UserError: the file has scaled positions, or a tensor that would be skipped.
    """
    reader = gguf.GGUFReader(file)
    # The context before the scaling is written also where nothing is scaled (Phi-3 of 4k).
    keys = [key for key in reader.fields if ".rope.scal" in key and not key.endswith(".original_context_length")]
    scaled = [f"{key}={value}" for key in keys if (value := reader.fields[key].contents()) not in PLAIN]
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    family = str(reader.fields["general.architecture"].contents())
    processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=config.to_dict())  # type: ignore[no-untyped-call]
    known = get_gguf_hf_weights_map(model, processor)
    # The experts of a layer are one tensor, and have names without an end there.
    skipped = [
        tensor.name for tensor in reader.tensors if not {tensor.name, tensor.name.removesuffix(".weight")} & {*known}
    ]
    if left_out := scaled + skipped:
        more = f" and {len(left_out) - 1} more" if left_out[1:] else ""
        raise UserError(
            f"{file}: has {left_out[0]}{more}, which transformers leaves out, so another model would be loaded; take "
            "the folder with config.json and *.safetensors that the file was made from: model.path=FOLDER"
        )
