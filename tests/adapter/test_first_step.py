"""What alpha and rank.scaling do to Adam's first step (docs/method.md, Rank and step size)."""

from statistics import mean

import pytest
import torch
from helpers.tiny import tiny
from torch.nn import functional as F

from tiedlora.adapter import attach
from tiedlora.config.schema import LrFactors, TrainConfig
from tiedlora.training.optimizer import build_optimizer

RANKS, ALPHA, SEEDS = (1, 4, 16), 4.0, range(6)


@pytest.fixture(scope="module")
def drops():
    """(scale, rank) -> how much one step of a tiny rate lowers the loss of LoRA, as the mean over seeds, in float64."""
    # GPT-2, because Llama's norm computes in float32, which rounds drops this small away.
    base = tiny("tiny_gpt2")
    base.model.double()
    ids = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))

    def loss():
        # transformers' own loss is computed in float32.
        return F.cross_entropy(base.model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def drop(rank, seed, alpha, scaling):
        attached = attach(base.model, "LoRA", rank, alpha, seed, scaling=scaling)
        attached.adapter.double()
        # eps must be far below the gradients, which a small s makes small too.
        optimizer = build_optimizer(attached.parameter_groups(LrFactors()), TrainConfig(lr=1e-6, eps=1e-20))
        before = loss()
        before.backward()
        optimizer.step()
        with torch.no_grad():
            after = loss()
        attached.detach()
        return float(before.detach() - after)

    scales = {"alpha = r": None, "standard": (ALPHA, "standard"), "rslora": (ALPHA, "rslora")}
    return {
        (name, rank): mean(drop(rank, seed, *(scale or (rank, "standard"))) for seed in SEEDS)
        for name, scale in scales.items()
        for rank in RANKS
    }


def test_the_drop_is_proportional_to_the_scale(drops):
    """At one rank, Adam's first step is the same whatever s is: the update, and so the drop, is proportional to s."""
    for rank in RANKS:
        alpha_is_rank = drops["alpha = r", rank]
        assert alpha_is_rank > 0
        assert drops["standard", rank] / alpha_is_rank == pytest.approx(ALPHA / rank, rel=0.01)
        assert drops["rslora", rank] / alpha_is_rank == pytest.approx(ALPHA / rank**0.5, rel=0.01)


def test_the_drop_grows_with_the_rank_unless_alpha_is_fixed(drops):
    """Every entry of B moves by the rate, and B has r columns: the drop is proportional to s r, but for A's draw."""
    for name, power in (("alpha = r", 1.0), ("standard", 0.0), ("rslora", 0.5)):
        for rank in RANKS[1:]:
            assert drops[name, rank] / drops[name, 1] == pytest.approx(rank**power, rel=0.3)
