"""The chunked cross-entropy equals the plain one, in value and in gradient."""

import pytest
import torch
from helpers.tiny import TINY, mask_of, randomise, tiny, tying_option
from torch.nn import functional as F

from tiedlora.adapter import attach
from tiedlora.data.batching import collate
from tiedlora.data.encoding import Encoded
from tiedlora.training import loss as chunked

ROWS = [Encoded(tuple(range(10, 10 + p)), (*range(40, 40 + t), 256)) for p, t in ((5, 4), (9, 1), (2, 12), (7, 7))]


def plain_loss(model, batch):
    """The plain loss: labels are -100 where nothing is trained, padding is masked, all logits are computed at once."""
    labels = torch.full(batch.input_ids.shape, -100).flatten()
    labels[batch.positions + 1] = batch.targets
    logits = model(input_ids=batch.input_ids, attention_mask=mask_of(ROWS)).logits
    shifted = labels.view(batch.input_ids.shape)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize(("chunk", "logits"), [(1, 10**6), (3, 10**6), (256, 10**6), (256, 600), (256, 1)])
@pytest.mark.parametrize("model_name", TINY)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_equals_the_plain_loss_and_its_gradients(model_name, dtype, tolerance, chunk, logits, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    monkeypatch.setattr(chunked, "LOGITS", logits)
    base = tiny(model_name)
    attached = attach(base.model, tying_option("TABuv"), 4)
    base.model.to(dtype)
    randomise(attached.adapter, scale=0.2)
    batch = collate(ROWS, pad_id=256)
    grads = []
    for loss in (plain_loss(base.model, batch), chunked.target_loss(base.model, batch)):
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in attached.adapter.parameters())])
        base.model.zero_grad()
    for plain, ours in zip(*grads, strict=True):
        # Llama's RMSNorm always computes in float32, in both computations, so both heads get the same numbers.
        assert (plain - ours).abs().max() <= tolerance * plain.abs().max()


def test_a_trained_head_is_refused():
    base = tiny("tiny_llama")
    base.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen"):
        chunked.target_loss(base.model, collate(ROWS, pad_id=256))
