"""Memory runs out while training or validating: the passes are halved, and the run goes on and resumes exactly.

Here a pass above a number of tokens fails as torch's allocator does. tests/drills/test_faults.py sets real limits.
"""

from dataclasses import replace

import pytest
from helpers.forks import forked_world, killed_after
from helpers.tiny import folder_of, losses_of
from safetensors.torch import load_file

from tiedlora.config.identity import run_id
from tiedlora.data.encoding import Encoded
from tiedlora.errors import UserError, is_out_of_memory
from tiedlora.records.rows import read_metrics, read_validation_losses
from tiedlora.runs import run, trainer

ADAPTER = "adapter/adapter.safetensors"
SPARSE = ("train.checkpoint_every=100", "train.validate_every=0")


def too_small(monkeypatch, name, tokens, from_call=1, backward=False):
    """From a call of the loss on, a batch of more than so many tokens, padding included, does not fit."""
    plain, calls = getattr(trainer, name), []

    def limited(model, batch):
        calls.append(1)
        loss = plain(model, batch)
        if len(calls) >= from_call and batch.input_ids.numel() > tokens:
            if not backward:
                refuse()
            loss.register_hook(lambda _: refuse())
        return loss

    monkeypatch.setattr(trainer, name, limited)


def refuse():
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.mark.parametrize(
    ("status", "is_memory"),
    [
        ("ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("EXECUTION_FAILED when calling `cublasSgemm(handle)`", False),
    ],
)
def test_what_cublas_says_on_a_full_gpu_is_known(status, is_memory):
    assert is_out_of_memory(RuntimeError(f"CUDA error: CUBLAS_STATUS_{status}")) is is_memory


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_without_memory_is_taken_again_in_smaller_passes(
    tiny_config, finish, tmp_path, monkeypatch, caplog, backward
):
    plain = tiny_config(f"outputs={tmp_path}/plain", *SPARSE)
    finished = finish(plain)
    config = tiny_config(*SPARSE)
    # A step is one pass of four rows, and each row has about 128 tokens. The third step is the first without memory.
    too_small(monkeypatch, "target_loss", 300, from_call=3, backward=backward)
    record = run.main(config)
    assert record.run_id == run_id(plain)
    (halving,) = record.training.halvings
    assert (halving.step, halving.during) == (3, "training")
    assert f"step 3: out of memory; passes have at most {halving.tokens} tokens" in caplog.text
    ours, theirs = losses_of(folder_of(config)), losses_of(folder_of(plain))
    assert ours[1] == theirs[1]
    assert ours[2] == theirs[2]
    assert ours != theirs, "other passes round otherwise"
    assert max(abs(ours[step] - theirs[step]) for step in theirs) <= 1e-5, "the sums are the same"
    assert (record.training.tokens, record.training.target_tokens) == (
        finished.training.tokens,
        finished.training.target_tokens,
    )


# A validation is two passes of six rows, so the third call is in the validation after step 3.
@pytest.mark.parametrize(
    ("name", "tokens", "from_call", "step"),
    [("target_loss", 300, 3, 3), ("row_losses", 500, 3, 3), ("target_loss", 300, 1, 1), ("row_losses", 500, 1, 0)],
)
def test_killed_after_the_halving_it_resumes_exactly_also_with_more_memory(
    tiny_config, tmp_path, monkeypatch, name, tokens, from_call, step
):
    """The limit on the passes is in a checkpoint before any result was computed with it.

    A halving in step 1 leaves a checkpoint of step 0, which has the first validation already.
    """
    options = (*SPARSE[:1], "train.validate_every=3")
    whole, killed = tiny_config(f"outputs={tmp_path}/whole", *options), tiny_config(*options)
    with monkeypatch.context() as patch:
        too_small(patch, name, tokens, from_call)
        expected = run.main(whole)

    def short_of_memory():
        too_small(monkeypatch, name, tokens, from_call)
        run.main(killed)

    killed_after(short_of_memory, lambda state: bool(state.halvings))
    record = run.main(killed)
    assert record.training.halvings == expected.training.halvings
    assert [halving.step for halving in record.training.halvings] == [step], "after the resume, the memory is enough"
    assert record.training.validation_loss_last == expected.training.validation_loss_last
    assert losses_of(folder_of(killed)) == losses_of(folder_of(whole))
    for read, file in ((read_metrics, "metrics_file"), (read_validation_losses, "validation_losses_file")):
        ours, theirs = (read(getattr(folder_of(config), file)) for config in (killed, whole))
        assert [row.step for row in ours] == [row.step for row in theirs], file
    assert (folder_of(killed).path / ADAPTER).read_bytes() == (folder_of(whole).path / ADAPTER).read_bytes()


def test_if_one_process_has_too_little_memory_all_make_smaller_passes(tiny_config, finish, tmp_path, monkeypatch):
    alone = tiny_config(f"outputs={tmp_path}/alone", *SPARSE)
    finish(alone)
    config = tiny_config(*SPARSE)

    def second_is_small(rank):
        if rank == 1:
            too_small(monkeypatch, "target_loss", 200, from_call=2)
        run.main(config)

    ended = forked_world(second_is_small)
    assert [code for code, _ in ended] == [0, 0], ended
    record = folder_of(config).finished_record()
    assert [(halving.step, halving.during) for halving in record.training.halvings] == [(2, "training")]
    first, second = (load_file(folder_of(run_config).path / ADAPTER) for run_config in (alone, config))
    for part, values in first.items():
        assert (values - second[part]).abs().max() <= 1e-4 * values.abs().max()


def test_a_single_row_that_does_not_fit_ends_the_run_with_a_line(tiny_config, monkeypatch):
    config = tiny_config(*SPARSE)
    too_small(monkeypatch, "target_loss", 1)
    with pytest.raises(UserError, match=r"step 1: out of memory with a single row of \d+ tokens; .*recompute_act"):
        run.main(config)
    # With memory again, the same command goes on.
    monkeypatch.undo()
    record = run.main(config)
    assert record.training.steps == 6
    assert record.training.halvings[0].step == 1


def test_a_validation_row_that_does_not_fit_ends_the_run(tiny_config, monkeypatch):
    """The row is longer than all others of a batch together, so batches of other rows are halved until it is clear."""

    def with_a_long_row(*args, begin=trainer.begin):
        training = begin(*args)
        first, *others = training.held_out
        return replace(training, held_out=[Encoded(first.prompt * 30, first.target), *others])

    monkeypatch.setattr(trainer, "begin", with_a_long_row)
    too_small(monkeypatch, "row_losses", 500)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run.main(tiny_config(*SPARSE))
