"""Several processes give the loss curve and the adapter of one process, with each row once; sharding is refused."""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import processes
from helpers.forks import forked_world
from helpers.tiny import tiny
from safetensors.torch import load_file

from tiedlora.adapter import attach
from tiedlora.config.identity import run_id
from tiedlora.config.project import PROJECT
from tiedlora.errors import UserError
from tiedlora.records.rows import read_metrics, read_predictions, read_validation_losses
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run, trainer
from tiedlora.scoring import split
from tiedlora.scoring.split import score_in_shares
from tiedlora.training import checkpoint, distributed
from tiedlora.training.distributed import World
from tiedlora.training.signals import StopSignal

STEPS = 20


def folder_of(config):
    return RunFolder(Path(config.outputs) / run_id(config))


@pytest.mark.slow
def test_two_processes_are_one(tiny_config, tiny_run, tmp_path):
    """docs/method.md: the loss is a mean over the target tokens of the whole step, however its rows are spread."""
    # 7 rows a step and 40 in all: the shares are unequal, and an epoch's last step is short.
    more = [f"train.steps={STEPS}", "train.batch_size=7", "train.checkpoint_every=20"]
    alone = run.main(tiny_config(*more))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(PROJECT / "train.py"), *tiny_run(*more), f"outputs={tmp_path}/together"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = processes.run(command, env=environment)
    assert done.returncode == 0, done.stderr
    (folder,) = (RunFolder(path.parent) for path in (tmp_path / "together").glob("*/result.json"))
    together = folder.record()
    assert together is not None
    assert together.run_id == alone.run_id, "the number of processes is no part of the identity"
    assert "2 processes" in str(together.execution)
    assert together.training.target_tokens == alone.training.target_tokens
    one, two = (
        [row for row in read_metrics(path / "metrics.jsonl") if "train/loss" in row.values]
        for path in (tmp_path / "outputs" / alone.run_id, folder.path)
    )
    assert len(one) == len(two) == STEPS
    for ours, theirs in zip(one, two, strict=True):
        assert abs(ours.values["train/loss"] - theirs.values["train/loss"]) <= 1e-5
        assert ours.values["train/tokens"] == theirs.values["train/tokens"]
    assert one[1].values["train/loss"] < one[0].values["train/loss"] - 0.01, "it trained"
    first = load_file(tmp_path / "outputs" / alone.run_id / "adapter" / "adapter.safetensors")
    second = load_file(folder.adapter / "adapter.safetensors")
    for name, values in first.items():
        assert (values - second[name]).abs().max() <= 1e-3 * values.abs().max()


class TestResume:
    """Two processes that stop after step 3 of 6 and continue."""

    @pytest.fixture
    def stopped(self, tiny_config, monkeypatch):
        """The configuration of the run. Its validation loss grows with every step."""
        config = tiny_config("score.checkpoint=best", "train.validate_every=1")

        trainers, row_losses = [], trainer.Trainer._row_losses
        monkeypatch.setattr(trainer.Trainer, "_row_losses", lambda self: trainers.append(self) or row_losses(self))
        monkeypatch.setattr(trainer, "mean_loss", lambda _: float(trainers[-1].parts["qkv.B"].detach().abs().sum()))
        votes = []
        with monkeypatch.context() as patch:
            patch.setattr(StopSignal, "requested", lambda self: votes.append(1) or len(votes) >= 3)
            ended = forked_world(lambda rank: run.main(config))
        assert [code for code, _ in ended] == [75, 75], ended
        return config

    def test_the_best_step_is_scored_also_if_it_was_before_the_stop(self, stopped):
        ended = forked_world(lambda rank: run.main(stopped))
        assert [code for code, _ in ended] == [0, 0], ended
        assert "continuing from step 3" in ended[0][1]
        record = folder_of(stopped).finished_record()
        assert (record.training.scored_step, record.training.steps) == (0, 6)
        assert not load_file(folder_of(stopped).adapter / "adapter.safetensors")["qkv.B"].any(), "as at step 0"

    def test_processes_that_find_different_steps_are_refused(self, stopped, monkeypatch):
        def only_the_first_finds_it(rank):
            if rank:
                monkeypatch.setattr(checkpoint, "restore", lambda *_: None)
            run.main(stopped)

        for code, told in forked_world(only_the_first_finds_it):
            assert code == 2, told
            assert "of the 2 processes, one continues from step 0 and another from step 3" in told


def test_every_process_validates_and_scores_its_share(tiny_config, tmp_path, monkeypatch):
    """Each batch is asked once, and losses and answers are those of one process, bit for bit."""
    # Three batches for two processes.
    config = tiny_config("score.batch_size=5", "train.steps=2")
    alone = run.main(config)
    config.outputs = str(tmp_path / "together")
    asked = tmp_path / "asked"
    predict = split.predict

    def noted(model, encoder, task, examples, *more):
        with asked.open("a") as file:
            file.write(f"{os.getpid()} {len(examples)}\n")
        return predict(model, encoder, task, examples, *more)

    monkeypatch.setattr(split, "predict", noted)
    ended = forked_world(lambda rank: run.main(config))
    assert [code for code, _ in ended] == [0, 0], ended
    lines = asked.read_text().splitlines()
    assert sorted(int(line.split()[1]) for line in lines) == [2, 2, 5, 5, 5, 5], "base and adapted model"
    assert len({line.split()[0] for line in lines}) == 2
    one, two = RunFolder(tmp_path / "outputs" / alone.run_id), folder_of(config)
    assert read_predictions(one.predictions_file("validation.base")) == read_predictions(
        two.predictions_file("validation.base")
    )
    first, second = (read_validation_losses(place.validation_losses_file)[0] for place in (one, two))
    assert first == second, "before the first step, all processes have the same model"


def test_memory_that_runs_out_in_one_process_is_known_in_all(tiny_config, monkeypatch):
    """Otherwise the others would wait for its share forever."""
    told = []

    def score(rank):
        with distributed.join_world(cuda=False) as world:
            base = tiny("tiny_llama")

            def rows_of(examples):
                if rank == 1:
                    raise MemoryError
                return list(examples)

            with pytest.raises(MemoryError):
                score_in_shares(world, base.model, ["a", "b"], [[0], [1]], rows_of)
            told.append(rank)
        assert told == [rank]

    ended = forked_world(score)
    assert [code for code, _ in ended] == [0, 0], ended


def test_each_row_is_in_one_share():
    rows = list(range(11))
    shares = [World(rank, 3).local_rows(rows) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == rows


@pytest.mark.parametrize("wish", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_is_refused(monkeypatch, wish):
    monkeypatch.setenv(wish, "true")
    with pytest.raises(UserError, match=rf"{wish}: .*torchrun"), distributed.join_world(cuda=False):
        pass


def test_a_sharded_model_is_refused():
    class FullyShardedDataParallel(torch.nn.Module):
        """A class with the real one's name, because to import the real one takes seconds."""

    with pytest.raises(UserError, match=r"sharded.*torchrun"):
        attach(FullyShardedDataParallel(), "TABuv")
    assert attach(tiny("tiny_llama").model, "TABuv").active
