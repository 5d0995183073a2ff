"""How often the program waits for the device: docs/gpu.md promises it."""

import math

import pytest
import torch
from helpers.second_device import NAME
from helpers.tiny import adapted, tiny_scorer

from tiedlora.runs import run
from tiedlora.scoring.decoding import LOOK_EVERY, AnswerEnds, choice_log_likelihoods, decode
from tiedlora.tasks import Example
from tiedlora.training.signals import StopSignal

QUIET = ("train.validate_every=0", "train.checkpoint_every=100", "train.steps=8", "score.splits=[]")


@pytest.mark.parametrize("words", [(), ("tying.dropout=0.1", "train.recompute_activations=true"), ("tying=RaSA",)])
def test_training_waits_only_where_it_logs(device, short, monkeypatch, words):
    waits = []
    # The loop asks this after each step, before it fetches any number, and after the last step again.
    monkeypatch.setattr(StopSignal, "requested", lambda _self: waits.append(device.waits.copy()) or False)
    run.main(short(*QUIET, "train.log_every=4", *words))
    assert len(waits) == 9
    assert not waits[3] - waits[0], "steps 2 to 4"
    (place,) = (waits[7] - waits[3]).items()
    assert place[0].startswith("item, training/loop.py:")
    assert place[1] == 1, "the numbers of four steps are fetched together"


def test_a_run_that_may_skip_updates_waits_at_each_step(device, short, monkeypatch):
    waits = []
    monkeypatch.setattr(StopSignal, "requested", lambda _self: waits.append(device.waits.total()) or False)
    run.main(short(*QUIET, "train.log_every=100", "train.skip_nonfinite=1"))
    assert waits[6] - waits[0] == 6


@pytest.fixture(scope="module")
def answering():
    """A model whose answers end at many places: prompts, and what ends the answers on the CPU."""
    base, _ = adapted("tiny_llama", torch.float32)
    prompts = [base.tokenizer(f"{n} and {n * n % 7}" * (1 + n % 3)).input_ids for n in range(20)]
    plain = decode(base.model, prompts, AnswerEnds(base.tokenizer, [], 40))

    def places(token: int) -> set[int]:
        return {output.ids.index(token) for output in plain if token in output.ids}

    # A string and a token that come early in some answers, and late or never in others.
    end, second = sorted(range(128), key=lambda token: len(places(token)), reverse=True)[:2]
    stop = [base.tokenizer.decode([second])]
    return base, prompts, lambda: AnswerEnds(base.tokenizer, stop, 40, [end])


def test_answers_are_those_of_the_cpu_with_a_wait_for_eight_tokens(answering, device):
    base, prompts, ends = answering
    for batch in (prompts[:1], prompts[3:8], prompts):
        expected = decode(base.model.cpu(), batch, ends())
        model = base.model.to(NAME)
        with device.counted() as waits:
            assert decode(model, batch, ends()) == expected
        assert waits.total() == math.ceil(max(len(output.ids) for output in expected) / LOOK_EVERY)
    base.model.cpu()
    assert len({len(output.ids) for output in expected}) > 5
    assert {output.ended for output in expected} == {"end", "stop", "length"}


def test_sampled_answers_wait_no_more_often(device, short):
    words = ("objective=reward", "objective.samples=2", "task.max_new_tokens=12", "train.log_every=100")
    config = short(*QUIET, *words)
    run.main(config)
    by_line = {line: count for line, count in device.waits.items() if "decoding.py" in line or "reward.py" in line}
    # Eight steps with one batch of eight answers: two looks, and the entropies.
    assert sum(by_line.values()) <= 8 * (math.ceil(12 / LOOK_EVERY) + 1), by_line


@pytest.mark.parametrize("what", ["losses", "drift", "choices"])
def test_scores_wait_once_a_batch(device, what):
    scorer = tiny_scorer("score.batch_size=4")
    scorer.arm.model.to(NAME)
    examples = [Example(str(n), f"{n} + 1 =", f" {n + 1}", (f" {n + 1}",)) for n in range(16)]
    with device.counted() as waits:
        if what in ("losses", "drift"):
            scorer.rows(examples, "", what)
        else:
            for start in range(0, 16, 4):
                choice_log_likelihoods(scorer.arm.model, [[start, 2], [3]] * 2, [[[1, 2], [3]]] * 4)
    assert waits.total() <= 4 + (what == "losses"), waits
