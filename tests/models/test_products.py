"""bfloat16 products on a CPU without instructions for them."""

import pytest
import torch
from helpers.tiny import randomise, tiny
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tiedlora.adapter import attach
from tiedlora.models import products

CPU = torch.device("cpu")


class Seen(TorchDispatchMode):
    """Keeps the dtypes of all products that reach torch."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in products.PRODUCTS:
            self.dtypes += [value.dtype for value in args if isinstance(value, torch.Tensor)]
        return operator(*args, **(kwargs or {}))


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.bfloat16)


CASES = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with a bias": lambda x, w: F.linear(x, w, w[:, 0].contiguous()),
    "one vector": lambda x, w: F.linear(x[0, 0], w),
    "batches": lambda x, w: torch.bmm(x, w.T.expand(len(x), -1, -1)),
    "Conv1D": lambda x, w: torch.addmm(w[:, 0], x[0], w.T),
    "added batches": lambda x, w: torch.baddbmm(x[:, :, :1], x, w.T.expand(len(x), -1, -1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_product_is_the_float32_product_rounded_once(case, mode):
    x, w = random(3, 5, 16), random(24, 16)
    expected = CASES[case](x.float(), w.float()).bfloat16()
    with Seen() as seen, products.InFloat32(), mode():
        result = CASES[case](x, w)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)
    assert set(seen.dtypes) == {torch.float32}


@pytest.mark.parametrize("length", [8, 600])
def test_a_training_pass_computes_every_product_in_float32(length):
    """Rows of more than 512 tokens use torch's fused attention."""
    base = tiny("tiny_llama", "bfloat16").model
    attached = attach(base, "TABuv", 4)
    randomise(attached.adapter)
    ids = torch.randint(0, 200, (2, length), generator=torch.Generator().manual_seed(0))

    def gradients():
        base.zero_grad()
        base(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
        return {name: part.grad.clone() for name, part in attached.trained_parts().items()}

    plain = gradients()
    with Seen() as seen, products.InFloat32():
        widened = gradients()
    assert set(seen.dtypes) == {torch.float32}
    for name, gradient in plain.items():
        assert (widened[name] - gradient).abs().max() <= 0.05 * gradient.abs().max(), name


# (kernels for bfloat16, AVX512, its bfloat16 instructions, AMX's), dtype, whether products are widened.
RUNS = [
    ((False, False, False, False), "bfloat16", True),
    ((True, True, False, False), "bfloat16", True),
    ((True, True, True, False), "bfloat16", False),
    ((True, True, False, True), "bfloat16", False),
    ((True, False, False, False), "bfloat16", False),  # ARM
    ((False, False, False, False), "float32", False),
]


@pytest.mark.parametrize(("processor", "dtype", "slow"), RUNS)
def test_only_bfloat16_on_a_cpu_without_instructions_is_widened(monkeypatch, processor, dtype, slow):
    kernels, avx512, avx512_bf16, amx = processor
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert products.without_instructions(CPU, dtype) == slow
    assert isinstance(products.on_any_cpu(CPU, dtype), products.InFloat32) == slow
    assert not products.without_instructions(torch.device("cuda"), dtype)
