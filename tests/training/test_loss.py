"""The chunked cross-entropy equals the plain one, in value and in gradient."""

import weakref

import pytest
import torch
from helpers.tiny import TINY, mask_of, randomise, tiny, tying_option
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tiedlora.adapter import attach
from tiedlora.data.batching import collate
from tiedlora.data.encoding import Encoded
from tiedlora.training import loss as chunked

LENGTHS = ((5, 4), (9, 1), (2, 12), (7, 7), (3, 90), (1, 170))
ROWS = []
for prompt_length, target_length in LENGTHS:
    ROWS.append(Encoded(tuple(range(10, 10 + prompt_length)), (*range(40, 40 + target_length), 256)))


def plain_loss(model, batch):
    """The plain loss: labels are -100 where nothing is trained, padding is masked, all logits are computed at once."""
    labels = torch.full(batch.input_ids.shape, -100).flatten()
    labels[batch.positions + 1] = batch.targets
    logits = model(input_ids=batch.input_ids, attention_mask=mask_of(ROWS)).logits
    shifted = labels.view(batch.input_ids.shape)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("rows", [1, 48, 256, 10**6])
@pytest.mark.parametrize("model_name", TINY)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_equals_the_plain_loss_and_its_gradients(model_name, dtype, tolerance, rows, monkeypatch):
    monkeypatch.setattr(chunked, "CPU_CHUNK_ROWS", rows)
    base = tiny(model_name)
    attached = attach(base.model, tying_option("TABuv"), 4)
    base.model.to(dtype)
    randomise(attached.adapter, scale=0.2)
    batch = collate(ROWS, pad_id=256)
    assert len(batch.targets) > 256
    grads = []
    for loss in (plain_loss(base.model, batch), chunked.target_loss(base.model, batch)):
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in attached.adapter.parameters())])
        base.model.zero_grad()
    for plain, ours in zip(*grads, strict=True):
        # Llama's RMSNorm always computes in float32, in both computations, so both heads get the same numbers.
        assert (plain - ours).abs().max() <= tolerance * plain.abs().max()


def test_a_chunk_has_the_rows_that_the_device_and_the_memory_allow():
    cpu, other = torch.device("cpu"), torch.device("meta")
    # Published runs of SmolLM2 (49,152 tokens) had 256, which decides their rounding.
    assert [chunked.chunk_rows(v, cpu, 6) for v in (260, 49_152, 151_936, 262_144)] == [256] * 4
    assert [chunked.chunk_rows(v, other, 6) for v in (49_152, 262_144)] == [3472, 651]
    with chunked.chunks_within(100):
        assert [chunked.chunk_rows(v, cpu, 6) for v in (49_152, 262_144, 10**9)] == [256, 63, 1]
    assert chunked.chunk_rows(262_144, cpu, 6) == 256


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors that were made inside the block, and not freed, at one time.

    Args:
        before: tensors from before the block.
    """

    def __init__(self, *before):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in before}

    def __torch_dispatch__(self, operator, kinds, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        storage = made.untyped_storage() if isinstance(made, torch.Tensor) else None
        if storage is not None and storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(made, self.freed, storage.data_ptr(), storage.nbytes())
        return made

    def freed(self, place, size):
        self.seen.discard(place)
        self.bytes -= size


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_stay_within_their_memory(dtype, softcap, monkeypatch):
    monkeypatch.setattr(chunked, "CPU_CHUNK_ROWS", 10**6)
    # As on a GPU. On a CPU, fewer logits have a second copy at one time.
    monkeypatch.setattr(chunked, "CACHED_LOGITS", 10**9)
    generator = torch.Generator().manual_seed(0)
    vocabulary, hidden, targets = 5000, 8, 900
    weight = torch.randn(vocabulary, hidden, generator=generator).to(dtype)
    states = torch.randn(targets, hidden, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (targets,), generator=generator)
    peaks = {}
    for megabytes in (2, 8):
        with chunked.chunks_within(megabytes), PeakMemory(states, weight) as memory:
            chunked._TokenLosses.apply(states, chunked._Head(weight, None, softcap), labels).sum().backward()
        peaks[megabytes] = memory.peak / 1e6
    # Besides the logits there are a few numbers for each row.
    assert 0.9 * 2 < peaks[2] < 2 + 0.1, peaks
    assert 0.9 * 8 < peaks[8] < 8 + 0.1, peaks


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_softmax_takes_any_number_of_positions_at_a_time(dtype, softcap, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(rows, 8, generator=generator, dtype=dtype) for rows in (50, 90))
    labels = torch.randint(50, (90,), generator=generator)
    found = []
    for cached in (10**6, 50 * 7, 1):
        monkeypatch.setattr(chunked, "CACHED_LOGITS", cached)
        states = states.detach().requires_grad_()
        losses = chunked._TokenLosses.apply(states, chunked._Head(weight, None, softcap), labels)
        losses.sum().backward()
        found.append((losses.detach(), states.grad))
    logits = weight.double() @ states.detach().double().T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits.T, labels, reduction="none")
    for losses, gradient in found:
        assert torch.allclose(losses.double(), expected, rtol=1e-12 if dtype == torch.float64 else 0.02)
        assert torch.allclose(losses, found[0][0], rtol=1e-6)
        assert torch.allclose(gradient, found[0][1], rtol=1e-12 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize("rows", [1, 48, 10**6])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_trained_head_gets_its_gradient(softcap, rows, monkeypatch):
    """In any chunks, with a cap and a bias, from losses that have different weights."""
    monkeypatch.setattr(chunked, "CPU_CHUNK_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((90, 8), (50, 8), (50,))
    )
    tokens = torch.randint(50, (90,), generator=generator)
    of_each = torch.rand(90, generator=generator)
    grads = []
    for is_plain in (True, False):
        if is_plain:
            logits = F.linear(states, weight, bias)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            losses = F.cross_entropy(logits, tokens, reduction="none")
        else:
            losses = chunked._losses_of_trained_head(states, chunked._Head(weight, bias, softcap), tokens)
        (losses * of_each).sum().backward()
        grads.append([losses.detach(), *(each.grad.clone() for each in (states, weight, bias))])
        for each in (states, weight, bias):
            each.grad = None
    for plain, ours in zip(*grads, strict=True):
        assert (plain - ours).abs().max() <= 1e-12 * plain.abs().max()
