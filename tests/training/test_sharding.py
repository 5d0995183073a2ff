"""train.shard: two processes that share the base model train, validate, score, stop and resume as one process does."""

from pathlib import Path

import pytest
import torch
from helpers.forks import forked_world
from helpers.tiny import tiny
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tiedlora.adapter import attach
from tiedlora.config.identity import run_id
from tiedlora.data.batching import collate, empty_batch
from tiedlora.data.encoding import Encoded
from tiedlora.errors import UserError
from tiedlora.records.rows import read_metrics, read_predictions, read_validation_losses
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run, trainer
from tiedlora.runs.trainer import Trainer
from tiedlora.training import distributed
from tiedlora.training.loss import target_loss
from tiedlora.training.signals import StopSignal

STEPS = 5
UNEVEN = [
    # Steps of 3, 3 and 1 rows: the second process has fewer passes than the first, and in each third step none.
    "task.options.rows={train: 7, validation: 12, test: 12}",
    *(f"train.steps={STEPS}", "train.batch_size=3", "train.microbatch_size=1", "train.warmup_steps=1"),
    # Three batches of answers for two processes, which end after different numbers of tokens.
    *("score.batch_size=5", "train.compile=never"),
]


def folder_of(config):
    return RunFolder(Path(config.outputs) / run_id(config))


def losses(folder):
    return [row.values["train/loss"] for row in read_metrics(folder.metrics_file) if "train/loss" in row.values]


@pytest.fixture
def alone(finished_run):
    """The folder of one process's run."""
    return folder_of(finished_run(*UNEVEN))


@pytest.fixture
def shared(tiny_config, tmp_path):
    def build(*more):
        return tiny_config(*UNEVEN, "train.shard=true", f"outputs={tmp_path}/shared", *more)

    return build


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["train.recompute_activations=true"]])
def test_two_processes_that_share_the_model_are_one(alone, shared, more, monkeypatch):
    config = shared(*more)
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "requested", lambda _: next(calls) == 1)
        ended = forked_world(lambda rank: run.main(config))
    assert [code for code, _ in ended] == [75, 75], ended
    ended = forked_world(lambda rank: run.main(config))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "continuing from step 2" in ended[0][1]
    folder = folder_of(config)
    assert folder.path.name == alone.path.name, "sharding is no part of the identity"
    one, two = losses(alone), losses(folder)
    assert len(one) == len(two) == STEPS
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5
    assert abs(one[-1] - one[0]) > 1e-3, "it trained"
    first, second = (load_file(place.adapter / "adapter.safetensors") for place in (alone, folder))
    for name, values in first.items():
        assert (values - second[name]).abs().max() <= 1e-5 * values.abs().max()
    for ours, theirs in zip(
        *(read_validation_losses(place.validation_losses_file) for place in (folder, alone)), strict=True
    ):
        assert torch.allclose(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=0, atol=1e-5)
    for kind in ("validation", "validation.base"):
        ours, theirs = (read_predictions(place.predictions_file(kind)) for place in (folder, alone))
        assert [row.id for row in ours] == [row.id for row in theirs]
        assert [row.output for row in ours] == [row.output for row in theirs]


@pytest.mark.slow
def test_each_process_holds_half_of_every_block_and_all_of_the_adapter(shared):
    config = shared()

    def held(rank):
        with distributed.join_world(cuda=False) as world:
            loaded = Trainer(config, world)
            for name, parameter in loaded.arm.model.named_parameters():
                inside = name.startswith("model.layers.")
                assert isinstance(parameter, DTensor) is inside, name
                if inside:
                    assert parameter.to_local().numel() == parameter.numel() / 2, name
            assert "shared by several processes" in loaded.arm.cannot_merge()
            loaded.release()

    ended = forked_world(held)
    assert [code for code, _ in ended] == [0, 0], ended


def test_an_empty_batch_adds_zeros(tiny_config):
    """A process without rows makes the others' passes with it."""
    attached = attach(tiny("tiny_llama").model, "TABuv")
    target_loss(attached.model, collate([Encoded((1, 2, 3), (4, 5))], 256)).backward()
    parts = attached.adapter.trained_parts().values()
    before = [part.grad.clone() for part in parts]
    loss = target_loss(attached.model, empty_batch(256))
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(part.grad, grad) for part, grad in zip(parts, before, strict=True))


@pytest.mark.slow
def test_memory_that_runs_out_ends_the_run(shared, monkeypatch):
    """The other process is inside the same pass, so this one must not wait for it."""
    config, target_loss = shared(), trainer.target_loss

    def act(rank):
        def short(model, batch):
            if rank == 1:
                raise MemoryError
            return target_loss(model, batch)

        monkeypatch.setattr(trainer, "target_loss", short)
        run.main(config)

    (other, _), (code, told) = forked_world(act)
    assert code == 2, told
    assert "out of memory with 1 rows" in told
    assert "lower train.microbatch_tokens below" in told
    assert other not in (0, -14), "neither finished nor waiting"


def test_one_process_cannot_share(shared):
    with pytest.raises(UserError, match=r"^train.shard=true: needs several processes.*torchrun"):
        run.main(shared())


@pytest.mark.parametrize("other", ["model.quantization=nf4", "model.device_map=auto"])
def test_what_cannot_be_shared_is_refused(tiny_config, other):
    with pytest.raises(UserError, match=rf"^train.shard=true: cannot be combined with {other}"):
        tiny_config("train.shard=true", "model.source=hub", other)
