"""Several processes train, validate, score, stop and resume as one process does, also if they share the base model."""

import errno
import os
import time

import pytest
import torch
import torch.distributed as dist
from helpers.forks import forked_world
from helpers.tiny import folder_of, losses_of, rows_of, tiny
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tiedlora.adapter import attach
from tiedlora.adapter.full_arm import FullArm
from tiedlora.commands.train import check_flags
from tiedlora.errors import Paused, UserError
from tiedlora.records.rows import read_validation_losses
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run, trainer
from tiedlora.runs.loading import load
from tiedlora.scoring import decoding
from tiedlora.scoring.split import in_shares
from tiedlora.training import checkpoint, distributed
from tiedlora.training.signals import StopSignal

UNEVEN = [
    # Steps of 3, 3 and 1 rows: the second process has fewer passes than the first, and in each third step none.
    "task.options.rows={train: 7, validation: 12, test: 12}",
    "train.steps=5",
    "train.batch_size=3",
    "train.microbatch_size=1",
    "train.warmup_steps=1",
    # Three batches of answers for two processes, which end after different numbers of tokens.
    "score.batch_size=5",
    "train.compile=never",
]


def in_world(act, codes=(0, 0)):
    """What two processes say, which must end with these codes."""
    ended = forked_world(act)
    assert [code for code, _ in ended] == list(codes), ended
    return ended


class TestResume:
    """Two processes that stop after step 3 of 6 and continue."""

    @pytest.fixture
    def stopped(self, tiny_config, monkeypatch):
        """The configuration of the run. Its validation loss grows with every step."""
        config = tiny_config("score.checkpoint=best", "train.validate_every=1")

        loaded, begin = [], trainer.begin
        monkeypatch.setattr(trainer, "begin", lambda *parts: loaded.append(parts[1]) or begin(*parts))
        monkeypatch.setattr(trainer, "mean_loss", lambda _: float(loaded[-1].parts["qkv.B"].detach().abs().sum()))
        votes = []
        with monkeypatch.context() as patch:
            patch.setattr(StopSignal, "requested", lambda _self: votes.append(1) or len(votes) >= 3)
            in_world(lambda _rank: run.main(config), [75, 75])
        return config

    def test_the_best_step_is_scored_also_if_it_was_before_the_stop(self, stopped):
        ended = in_world(lambda _rank: run.main(stopped))
        assert "continuing from step 3" in ended[0][1]
        record = folder_of(stopped).finished_record()
        assert (record.training.scored_step, record.training.steps) == (0, 6)
        assert not load_file(folder_of(stopped).adapter / "adapter.safetensors")["qkv.v"].any(), "as at step 0"

    def test_processes_that_find_different_steps_are_refused(self, stopped, monkeypatch):
        def only_the_first_finds_it(rank):
            if rank:
                monkeypatch.setattr(checkpoint, "restore", lambda *_: None)
            run.main(stopped)

        for code, told in forked_world(only_the_first_finds_it):
            assert code == 2, told
            assert "of the 2 processes, one continues from step 0 and another from step 3" in told


@pytest.mark.parametrize("method", ["full", "peft/vera"])
def test_every_process_gets_the_best_weights_and_buffers(tiny_config, monkeypatch, method):
    config = tiny_config(f"tying={method}", "score.checkpoint=best", "train.validate_every=1", "train.steps=2")
    load_best = trainer.Training._load_best

    def act(rank):
        losses = iter(range(100))
        monkeypatch.setattr(trainer, "mean_loss", lambda _: float(next(losses)))

        def checked(training):
            loaded = training.loaded
            for buffer in loaded.arm.buffers().values():
                buffer.add_(1 + rank)
            here = {**loaded.parts, **loaded.arm.buffers()}
            before = {name: tensor.detach().clone() for name, tensor in here.items()}
            load_best(training)
            first, second = loaded.world.gather({name: tensor.detach().clone() for name, tensor in here.items()})
            for name, values in first.items():
                assert torch.equal(values, second[name]), name
            changed = {name for name, values in before.items() if not torch.equal(values, here[name])}
            assert changed >= set(loaded.arm.buffers())
            assert changed & set(loaded.parts), "the best step was the first, and the last one had other weights"

        monkeypatch.setattr(trainer.Training, "_load_best", checked)
        run.main(config)

    in_world(act)


def test_a_broadcast_gives_every_process_the_tensors_of_the_first_one():
    def act(rank):
        with distributed.join_world("cpu") as world:
            numbers = torch.arange(6).reshape(2, 3) + 10 * rank
            tensors = [numbers.float(), numbers.float().T, numbers.bfloat16(), numbers, numbers > 3]
            tensors.append(torch.nn.Parameter(numbers.double()))
            world.broadcast(tensors)
            expected = torch.arange(6).reshape(2, 3)
            for tensor in (tensors[0], tensors[1].T, *tensors[2:4], tensors[5]):
                assert torch.equal(tensor.double(), expected.double())
            assert torch.equal(tensors[4], expected > 3)

    in_world(act)


def test_every_process_validates_and_scores_its_share(tiny_config, tmp_path, monkeypatch):
    # Three batches for two processes.
    config = tiny_config("score.batch_size=5", "train.steps=2")
    alone = run.main(config)
    config.outputs = str(tmp_path / "together")
    asked = tmp_path / "asked"
    padded_left = decoding.padded_left

    def noted(prompts, *more):
        with asked.open("a") as file:
            file.write(f"{os.getpid()} {len(prompts)}\n")
        return padded_left(prompts, *more)

    monkeypatch.setattr(decoding, "padded_left", noted)
    in_world(lambda _rank: run.main(config))
    lines = asked.read_text().splitlines()
    assert sorted(int(line.split()[1]) for line in lines) == [2, 2, 5, 5, 5, 5], "base and adapted model"
    assert len({line.split()[0] for line in lines}) == 2
    one, two = RunFolder(tmp_path / "outputs" / alone.run_id), folder_of(config)
    assert rows_of(one, "validation", base=True) == rows_of(two, "validation", base=True)
    first, second = (read_validation_losses(place.validation_losses_file)[0] for place in (one, two))
    assert first == second, "before the first step, all processes have the same model"


def test_all_processes_score_what_the_first_one_lacks(tiny_config):
    config = tiny_config("score.metrics=null", "train.steps=2")
    in_world(lambda _rank: run.main(config))
    folder = folder_of(config)
    kept, gone = (folder.scores_file("validation", kind) for kind in ("answers", "losses"))
    stored, rows = kept.stat().st_mtime_ns, gone.read_bytes().split(b"\n")[1:]
    # As if a kill had come between the two.
    folder.result_file.unlink()
    gone.unlink()
    in_world(lambda _rank: run.main(config))
    assert kept.stat().st_mtime_ns == stored
    assert gone.read_bytes().split(b"\n")[1:] == rows


def test_memory_that_runs_out_in_one_process_is_known_in_all():

    def score(rank):
        def rows_of(batch):
            if rank == 1:
                raise MemoryError
            return batch

        with distributed.join_world("cpu") as world, pytest.raises(MemoryError):
            in_shares(world, tiny("tiny_llama").model, [[0], [1]], rows_of)

    in_world(score)


def test_a_process_that_fails_alone_ends_without_waiting_for_the_others(monkeypatch):
    """NCCL's end of the communication waits for processes that wait for this one; gloo's does not."""

    def act(rank):
        monkeypatch.setattr(dist, "destroy_process_group", lambda: time.sleep(1000))
        with distributed.join_world("cpu") as world:
            if rank == 1:
                raise OSError(errno.ENOSPC, "no space", "result.json")
            world.any(False)

    (other, _), (code, told) = forked_world(act, seconds=30)
    assert code == 2, told
    assert "result.json: the disk is full" in told
    assert other not in (0, -14), "neither finished nor waiting"


def test_processes_with_different_runs_or_rows_are_refused_before_they_train(tiny_config, monkeypatch):
    configs = [tiny_config(f"seed={seed}") for seed in range(2)]
    for code, told in in_world(lambda rank: run.main(configs[rank]), [2, 2]):
        assert "torchrun: its processes have different runs (" in told, code

    def other_rows(rank):
        def loaded(*parts):
            found = load(*parts)
            found.inputs.data["train"] = str(rank)
            return found

        monkeypatch.setattr(trainer, "load", loaded)
        run.main(configs[0])

    for _, told in in_world(other_rows, [2, 2]):
        assert "torchrun: its processes have different rows or base models (" in told
    assert not folder_of(configs[0]).result_file.exists()


def test_only_the_first_process_writes_the_adapter(tiny_config, monkeypatch):
    config = tiny_config("tying=full", "score.splits=[]")
    save = FullArm.save

    def act(rank):
        monkeypatch.setattr(FullArm, "save", lambda *parts: save(*parts) if rank == 0 else pytest.fail("saved"))
        run.main(config)

    in_world(act)
    assert folder_of(config).finished_record()


def test_a_sweep_is_refused_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for flag in ("-m", "--multirun", "--multi"):
        with pytest.raises(UserError, match=f"{flag}: each process of torchrun would train another cell"):
            check_flags([flag, "seed=0,1"])
    check_flags(["seed=0"])


def test_processes_that_stop_together_end_their_communication():
    def stop():
        with distributed.join_world("cpu") as world:
            # One that leaves at once would end the connection that the other is still making.
            world.any(False)
            raise Paused

    def act(_rank):
        with pytest.raises(Paused):
            stop()
        assert not dist.is_initialized()

    in_world(act)


def test_processes_on_gpus_connect_before_anything_fills_them(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    said = []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    monkeypatch.setattr(dist, "get_default_backend_for_device", lambda _: "nccl")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: said.append((backend, timeout)))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: said.append((tensor.device.type, tensor.numel())))
    with distributed.join_world("meta"):
        assert said == [("cpu:gloo,meta:nccl", distributed.LONGEST_WAIT), ("meta", 1)]


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_USE_DEEPSPEED", "true"), ("WORLD_SIZE", "2")]
)
def test_sharding_by_others_and_processes_without_a_rank_are_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"{name}.*: .*torchrun"), distributed.join_world("cpu"):
        pass


@pytest.mark.parametrize(
    ("passed_on", "rank", "warns"),
    [
        ("SIGTERM,SIGINT,SIGHUP,SIGQUIT", "0", True),
        ("SIGTERM,SIGINT,SIGHUP,SIGQUIT", "1", False),
        (distributed.TORCHRUN_SIGNALS, "0", False),
    ],
)
def test_the_first_process_says_which_signals_torchrun_keeps(monkeypatch, caplog, passed_on, rank, warns):
    for name, value in (("RUN_ID", "1"), ("SIGNALS_TO_HANDLE", passed_on)):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("RANK", rank)
    with distributed.join_world("cpu"):
        pass
    assert ("--signals-to-handle" in caplog.text) is warns


def test_a_sharded_model_is_refused():
    model = tiny("tiny_llama").model
    # A class with the real one's name, because to import the real one takes seconds.
    model.__class__ = type("FullyShardedDataParallel", (type(model),), {})
    with pytest.raises(UserError, match=r"sharded.*torchrun"):
        attach(model, "TABuv")


class TestShard:
    @pytest.fixture
    def shared(self, tiny_config):
        return tiny_config(*UNEVEN, "train.shard=true")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "more", [["train.shard=false"], ["train.shard=true"], ["train.shard=true", "train.recompute_activations=true"]]
    )
    def test_two_processes_train_as_one(self, finished_run, tiny_config, tmp_path, more, monkeypatch):
        """docs/method.md: the loss is a mean over the target tokens of the whole step, however its rows are spread."""
        alone = folder_of(finished_run(*UNEVEN))
        config = tiny_config(*UNEVEN, f"outputs={tmp_path}/shared", *more)
        calls = iter(range(100))
        with monkeypatch.context() as patch:
            patch.setattr(StopSignal, "requested", lambda _: next(calls) == 1)
            in_world(lambda _rank: run.main(config), [75, 75])
        ended = in_world(lambda _rank: run.main(config))
        assert "continuing from step 2" in ended[0][1]
        folder = folder_of(config)
        assert folder.path.name == alone.path.name, "neither processes nor sharding are part of the identity"
        ours, theirs = (place.finished_record() for place in (folder, alone))
        assert "2 processes" in str(ours.execution)
        assert ours.training.target_tokens == theirs.training.target_tokens
        one, two = losses_of(alone), losses_of(folder)
        assert two == pytest.approx(one, abs=1e-5)
        assert abs(one[5] - one[1]) > 1e-3, "it trained"
        first, second = (load_file(place.adapter / "adapter.safetensors") for place in (alone, folder))
        for name, values in first.items():
            assert (values - second[name]).abs().max() <= 1e-5 * values.abs().max()
        for base in (False, True):
            ours, theirs = (rows_of(place, "validation", base=base) for place in (folder, alone))
            assert [row.id for row in ours] == [row.id for row in theirs]
            assert [row.output for row in ours] == [row.output for row in theirs]

    @pytest.mark.slow
    def test_each_process_holds_half_of_every_block_and_all_of_the_adapter(self, shared):
        def held(_rank):
            with distributed.join_world("cpu") as world:
                loaded = load(shared, world)
                for name, parameter in loaded.arm.model.named_parameters():
                    inside = name.startswith("model.layers.")
                    assert isinstance(parameter, DTensor) is inside, name
                    if inside:
                        assert parameter.to_local().numel() == parameter.numel() / 2, name
                assert "shared by several processes" in loaded.arm.cannot_merge()
                loaded.release()

        in_world(held)

    @pytest.mark.slow
    def test_memory_that_runs_out_ends_the_run(self, shared, monkeypatch):
        """The other process is inside the same pass, so this one must not wait for it."""
        target_loss = trainer.target_loss

        def act(rank):
            def short(model, batch):
                if rank == 1:
                    raise MemoryError
                return target_loss(model, batch)

            monkeypatch.setattr(trainer, "target_loss", short)
            run.main(shared)

        (other, _), (code, told) = forked_world(act)
        assert code == 2, told
        assert "out of memory with 1 rows" in told
        assert "lower train.microbatch_tokens below" in told
        assert other not in (0, -14), "neither finished nor waiting"

    def test_one_process_cannot_share(self, shared):
        with pytest.raises(UserError, match=r"^train.shard=true: needs several processes.*torchrun"):
            run.main(shared)

    @pytest.mark.parametrize("other", ["model.quantization=nf4", "model.device_map=auto"])
    def test_what_cannot_be_shared_is_refused(self, tiny_config, other):
        with pytest.raises(UserError, match=rf"^train.shard=true: cannot be combined with {other}"):
            tiny_config("train.shard=true", "model.source=hub", other)
