"""The loop: schedule, optimizer groups, exact resume, stopping, and what it refuses."""

import itertools
import math
from dataclasses import replace
from resource import RUSAGE_SELF, getrusage

import pytest
import torch
from helpers.forks import forked
from helpers.tiny import tiny, tying_option

from tiedlora.adapter import attach
from tiedlora.config.schema import TrainConfig
from tiedlora.data.batching import BatchSampler, microbatches
from tiedlora.data.encoding import Encoded
from tiedlora.errors import StoppedEarly, UserError
from tiedlora.records.provenance import CodeVersion, ContinuedFrom, Execution
from tiedlora.records.rows import MetricsRow
from tiedlora.training import checkpoint
from tiedlora.training.checkpoint import RunInputs
from tiedlora.training.loop import Loop, TrainState
from tiedlora.training.loss import target_loss
from tiedlora.training.optimizer import build_optimizer, learning_rate
from tiedlora.tying import LrFactors

aten = torch.ops.aten
CONFIG = TrainConfig(
    steps=8, batch_size=3, lr=1e-2, warmup_steps=2, validate_every=4, checkpoint_every=3, log_every=2, clip=0.5
)
INPUTS = RunInputs(Execution("cpu", 1))
ROWS = [Encoded((1, 2, 3), (*tuple(range(20 + i, 24 + i + i % 3)), 256)) for i in range(10)]


def start(option="TABuv", config=CONFIG, seed=0, folder=None, stop_after=None, dropout=False):
    """A loop over a tiny model. Returns it with the trained parts and its log."""
    base = tiny("tiny_llama")
    overrides = ["tying.dropout=0.3"] if dropout else []
    attached = attach(base.model, tying_option(option, *overrides), 4, seed=seed)
    base.model.train()
    parts = attached.adapter.trained_parts()
    optimizer = build_optimizer(attached.parameter_groups(config.lr_factor), config)
    sampler = BatchSampler([len(row) for row in ROWS], config, seed)
    log: list[MetricsRow] = []
    state = (folder and checkpoint.restore(folder, parts, optimizer, INPUTS)) or TrainState()
    loop = Loop(
        state=state,
        optimizer=optimizer,
        config=config,
        seed=seed,
        batches=lambda step: microbatches([ROWS[i] for i in sampler.rows_of_step(step)], 256, config.microbatch_size),
        loss_sum=lambda batch: target_loss(base.model, batch),
        validate=lambda: {"validation/loss": float(sum(p.detach().abs().sum() for p in parts.values()))},
        save_checkpoint=lambda now: folder and checkpoint.save(folder, now, parts, optimizer, INPUTS),
        count_step=lambda: None,
        log_metrics=log.extend,
        describe_rows=lambda step: str(sampler.rows_of_step(step)),
        stop_requested=lambda: stop_after is not None and state.step >= stop_after,
    )
    return loop, parts, log


def finish(option="TABuv", config=CONFIG, seed=0, **more):
    loop, parts, log = start(option, config, seed, **more)
    loop.train()
    return {name: p.detach().clone() for name, p in parts.items()}, log, loop.state


def test_each_step_clips_its_gradient_before_the_update_and_draws_masks_of_its_own():
    loop, parts, _ = start(config=replace(CONFIG, clip=0.01))
    update, loss_sum, norms, seeds = loop.optimizer.step, loop.loss_sum, [], []

    def noted_update():
        norms.append(float(torch.stack([p.grad.norm() for p in parts.values()]).norm()))
        update()

    def noted_loss(batch):
        seeds.append(torch.initial_seed())
        return loss_sum(batch)

    loop.optimizer.step, loop.loss_sum = noted_update, noted_loss
    loop.train()
    assert len(norms) == len(set(seeds)) == 8
    assert max(norms) <= 0.01 * (1 + 1e-4)


def test_warm_up_moves_at_its_first_step_and_cosine_ends_at_its_minimum():
    config = replace(CONFIG, steps=10, warmup_steps=4, lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, config) for step in range(1, 11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(10, replace(config, schedule="constant")) == 1.0


def test_decay_and_rate_factors_go_to_their_parts():
    config = replace(CONFIG, weight_decay=0.1, lr_factor=LrFactors(A=1, B=2, u=3, v=4))
    loop, parts, _ = start("TABuv", config)
    by_part = {name[-1]: p for name, p in parts.items()}
    found = {}
    for group in loop.optimizer.param_groups:
        (letter,) = (k for k, p in by_part.items() if p is group["params"][0])
        found[letter] = (group["lr_factor"], group["weight_decay"])
    assert found == {"A": (1, 0.1), "B": (2, 0.1), "u": (3, 0.0), "v": (4, 0.0)}


def test_a_zero_factor_freezes_a_part_and_clipped_steps_are_counted():
    parts, _, state = finish(config=replace(CONFIG, lr_factor=LrFactors(u=0.0), clip=1e-6))
    assert torch.equal(parts["qkv.u"], torch.ones_like(parts["qkv.u"]))
    assert state.clipped_steps == 8
    assert finish(config=replace(CONFIG, clip=None))[2].clipped_steps == 0


def test_tokens_are_counted_without_padding_and_every_step_is_logged():
    _, log, state = finish()
    sampler = BatchSampler(list(map(len, ROWS)), TrainConfig(batch_size=3), 0)
    assert [row.step for row in log if "train/loss" in row.values] == list(range(1, 9))
    assert [row.step for row in log if "validation/loss" in row.values] == [0, 4, 8]
    assert state.tokens == sum(len(ROWS[i]) for step in range(1, 9) for i in sampler.rows_of_step(step))


@pytest.mark.parametrize("stop_after", [1, 3, 5, 7])
@pytest.mark.parametrize(("option", "dropout"), [("TABuv", False), ("TABuv", True), ("RaSA", False)])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop_after, option, dropout):
    whole, whole_log, whole_state = finish(option, dropout=dropout)
    with pytest.raises(StoppedEarly):
        finish(option, folder=tmp_path, stop_after=stop_after, dropout=dropout)
    resumed, log, state = finish(option, folder=tmp_path, dropout=dropout)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert state.validation == whole_state.validation
    assert (state.tokens, state.clipped_steps) == (whole_state.tokens, whole_state.clipped_steps)
    keys = ("train/loss", "train/grad_norm", "train/lr", "train/tokens")
    tail = [row for row in whole_log if row.step > stop_after and "train/loss" in row.values]
    ours = [row for row in log if "train/loss" in row.values]
    assert [(row.step, *(row.values[k] for k in keys)) for row in ours] == [
        (row.step, *(row.values[k] for k in keys)) for row in tail
    ]


def spoiled(where, steps, folder=None, stop_after=None, logged=None, **options):
    """A run whose loss or gradient is not finite at some steps. `logged` gets its log too, if the run fails."""
    config = replace(CONFIG, **{"log_every": 1, **options})
    loop, parts, log = start(config=config, folder=folder, stop_after=stop_after)
    loop.log_metrics = log.extend if logged is None else logged.extend
    whole = loop.loss_sum

    def loss_sum(batch):
        loss = whole(batch)
        if loop.state.step + 1 in steps:
            if where == "loss":
                return loss * math.inf
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    loop.loss_sum = loss_sum
    loop.train()
    return {name: p.detach().clone() for name, p in parts.items()}, log, loop.state


@pytest.mark.parametrize(("steps", "skipped"), [({6}, 0), ({2, 6}, 1)])
def test_a_non_finite_loss_stops_naming_step_rate_and_rows(tmp_path, steps, skipped):
    already = rf"skip_nonfinite \({skipped} are skipped" if skipped else "lower train.lr"
    logged = []
    with pytest.raises(UserError, match=rf"step 6: .*inf.*learning rate .*{already}.*rows"):
        spoiled("loss", steps, folder=tmp_path, logged=logged, skip_nonfinite=skipped, log_every=10)
    assert [row.step for row in logged if "train/lr" in row.values] == [1, 2, 3, 4, 5], "how it came there"
    # The last checkpoint is from before that step, and finite.
    loop, parts, _ = start()
    restored = checkpoint.restore(tmp_path, parts, loop.optimizer, INPUTS)
    assert (restored.step, restored.skipped_steps) == (3, skipped)
    assert all(torch.isfinite(p).all() for p in parts.values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_skipped_step_updates_nothing_and_says_step_rate_and_rows(where, caplog):
    ours, log, state = spoiled(where, {2, 5}, skip_nonfinite=2)
    assert (state.skipped_steps, state.step) == (2, 8)
    rows = BatchSampler([len(row) for row in ROWS], CONFIG, 0).rows_of_step(5)
    (said,) = (record.getMessage() for record in caplog.records if "step 5" in record.getMessage())
    assert "learning rate 0.00" in said
    assert "2 of train.skip_nonfinite=2" in said
    assert str(rows) in said
    assert [row.step for row in log if "train/skipped" in row.values] == [2, 5]
    assert [row.step for row in log if "train/loss" in row.values] == [1, 3, 4, 6, 7, 8]
    assert all(math.isfinite(value) for row in log for value in row.values.values())
    # Exactly the update is left out: a run whose optimizer does nothing at those steps gives the same result.
    loop, parts, _ = start()
    step, done = loop.optimizer.step, []
    loop.optimizer.step = lambda: done.append(1) or (None if len(done) in (2, 5) else step())
    loop.train()
    assert all(torch.equal(ours[name], parts[name]) for name in ours)


def test_a_non_finite_validation_loss_stops_before_its_checkpoint(tmp_path):
    loop, parts, _ = start(folder=tmp_path)
    whole = loop.validate
    loop.validate = lambda: {"validation/loss": math.nan} if loop.state.step == 8 else whole()
    with pytest.raises(UserError, match=r"step 8: the validation loss is nan; lower train\.lr"):
        loop.train()
    assert checkpoint.restore(tmp_path, parts, loop.optimizer, INPUTS).step == 6


def test_of_equal_losses_the_first_is_best_whose_adapter_is_stored():
    assert TrainState(validation=[[2, 1.0], [4, 0.5], [6, 0.5]]).best_step() == 4


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("name", "change", "says"),
        [
            ("tensors.safetensors", lambda data: data[:-3], "its tensors are not those it was written with"),
            ("state.json", lambda data: data.replace(b'"tokens": ', b'"tokens": 1'), "its state is not the one"),
        ],
    )
    def test_a_damaged_newest_one_is_named_and_the_one_before_used(self, tmp_path, caplog, name, change, says):
        finish(folder=tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006", "step-00000008"], "the newest are kept"
        newest = tmp_path / "step-00000008" / name
        newest.write_bytes(change(newest.read_bytes()))
        loop, parts, _ = start()
        assert checkpoint.restore(tmp_path, parts, loop.optimizer, INPUTS).step == 6
        assert f"step-00000008 is damaged ({says}" in caplog.text

    def test_if_all_are_damaged_the_run_starts_again_and_its_new_ones_are_kept(self, tmp_path):
        finish(folder=tmp_path)
        for damaged in tmp_path.glob("*/state.json"):
            damaged.write_text("{}")
        loop, parts, _ = start(folder=tmp_path)
        assert checkpoint.restore(tmp_path, parts, loop.optimizer, INPUTS) is None
        loop.state.step = 2
        checkpoint.save(tmp_path, loop.state, parts, loop.optimizer, INPUTS)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]

    def test_writing_one_copies_no_tensor(self, tmp_path):
        large = {"w": torch.nn.Parameter(torch.ones(25_000_000))}
        optimizer = torch.optim.AdamW(large.values())

        def act():
            before = getrusage(RUSAGE_SELF).ru_maxrss
            checkpoint.save(tmp_path, TrainState(step=1), large, optimizer, INPUTS)
            assert (tmp_path / "step-00000001" / "tensors.safetensors").stat().st_size > 100_000_000
            # In kB. A copy would be 100 MB.
            assert getrusage(RUSAGE_SELF).ru_maxrss - before < 50_000

        code, told = forked(act)
        assert code == 0, told

    @pytest.mark.parametrize(("saved", "own"), [("TAB", "TABuv"), ("TABuv", "TAB")])
    def test_another_configurations_checkpoint_is_passed_over(self, tmp_path, caplog, saved, own):
        finish(option=saved, folder=tmp_path)
        loop, parts, _ = start(option=own)
        assert checkpoint.restore(tmp_path, parts, loop.optimizer, INPUTS) is None
        assert "part/qkv.u is missing, is not of this run, or has another shape" in caplog.text

    @pytest.mark.parametrize(
        ("key", "before", "after", "says"),
        [
            ("versions", {"torch": "2.1", "numpy": "2"}, {"torch": "2.2", "numpy": "2"}, "{'torch': '2.1'}, now"),
            ("code", CodeVersion("a", False), CodeVersion("a", True), "commit a, now commit a with uncommitted"),
            ("device", Execution("cpu", 1), Execution("cpu", 2), "cpu, 1 threads, now cpu, 2 threads"),
            ("processor", Execution("cpu", 1, 1, "EPYC"), Execution("cpu", 1, 1, "Xeon"), "EPYC, now Xeon"),
        ],
    )
    def test_what_changed_is_said_alone(self, tmp_path, caplog, key, before, after, says):
        loop, parts, _ = start()
        name = key if key in ("versions", "code") else "execution"
        then, now = (replace(INPUTS, base="1", **{name: value}) for value in (before, after))
        checkpoint.save(tmp_path, loop.state, parts, loop.optimizer, then)
        checkpoint.restore(tmp_path, parts, loop.optimizer, now)
        (said,) = (record.getMessage() for record in caplog.records)
        assert f"other {key}: {says}" in said
        assert "numpy" not in said
        for other, says in (
            (replace(now, base="2"), "other base weights"),
            (replace(now, data={"train": "c"}), "other data"),
        ):
            with pytest.raises(UserError, match=says):
                checkpoint.restore(tmp_path, parts, loop.optimizer, other)

    def test_the_state_says_how_its_earlier_steps_were_made(self, tmp_path):
        loop, parts, _ = start()

        def continued(inputs, step=None):
            """The state of a run that continues with these inputs and saves a checkpoint at `step`."""
            restored = checkpoint.restore(tmp_path, parts, loop.optimizer, inputs)
            if step is not None:
                checkpoint.save(tmp_path, replace(restored, step=step), parts, loop.optimizer, inputs)
            return restored

        epyc, xeon = (Execution("cpu", 2, processor=name) for name in ("EPYC (AVX512)", "Xeon (AVX512)"))
        first = RunInputs(epyc, versions={"torch": "1"}, code=CodeVersion("a", False))
        second, third = replace(first, execution=xeon), replace(first, code=CodeVersion("b", False))
        checkpoint.save(tmp_path, replace(loop.state, step=3), parts, loop.optimizer, first)
        assert continued(first).continued_from == []
        assert continued(second) == continued(second), "a restore without a step changes nothing"
        (earlier,) = continued(second, step=5).continued_from
        assert earlier == ContinuedFrom(3, first.code, {"torch": "1"}, epyc)
        assert [part.step for part in continued(third, step=6).continued_from] == [3, 5]
        assert [part.execution for part in continued(third).continued_from] == [epyc, xeon]


class TestBatchSampler:
    LENGTHS = [(i * 7919) % 97 + 1 for i in range(203)]

    def sampler(self, bucket=True, batch_tokens=None, seed=0):
        return BatchSampler(self.LENGTHS, TrainConfig(batch_size=8, bucket=bucket, batch_tokens=batch_tokens), seed)

    @pytest.mark.parametrize("batch_tokens", [None, 300, 50])
    @pytest.mark.parametrize("bucket", [True, False])
    def test_every_row_once_an_epoch_in_another_order_each(self, bucket, batch_tokens):
        sampler = self.sampler(bucket, batch_tokens)
        epochs = [sampler.epoch(0), sampler.epoch(1)]
        assert [sampler.rows_of_step(step) for step in range(1, sum(map(len, epochs)) + 1)] == epochs[0] + epochs[1]
        for batches in epochs:
            assert sorted(row for batch in batches for row in batch) == list(range(203))
            for batch in batches:
                padded = len(batch) * max(self.LENGTHS[row] for row in batch)
                assert len(batch) <= 8
                assert batch_tokens is None or padded <= batch_tokens or len(batch) == 1
        assert epochs[0] != epochs[1]
        assert self.sampler(bucket, batch_tokens, seed=1).rows_of_step(1) != sampler.rows_of_step(1)

    def test_buckets_pad_less_and_still_mix_lengths_between_steps(self):
        def padding(sampler):
            batches = [[self.LENGTHS[i] for i in batch] for batch in sampler.epoch(0)]
            longest = list(map(max, batches))
            return sum(len(batch) * most - sum(batch) for batch, most in zip(batches, longest, strict=True)), longest

        bucketed, longest = padding(self.sampler())
        plain, _ = padding(self.sampler(False))
        assert bucketed < 0.4 * plain
        # Without the last shuffle, lengths would fall only where the second of the two groups begins.
        assert sum(later < earlier for earlier, later in itertools.pairwise(longest)) > 2
