"""objective=reward: its gradient is that of the mean reward, draws are pure, a run resumes; and score.drift."""

from contextlib import nullcontext

import pytest
import torch
from helpers.task_rows import GOOD, write
from helpers.tiny import folder_of, logits, randomise, tiny_scorer

from tiedlora.config.compose import compose_config
from tiedlora.data.batching import microbatches
from tiedlora.data.encoding import Encoded
from tiedlora.errors import UserError
from tiedlora.records.rows import read_metrics
from tiedlora.records.scores import read_run_scores
from tiedlora.runs import reward as reward_module
from tiedlora.runs import run
from tiedlora.runs.reward import Reward, Sampling
from tiedlora.tasks import Example

FORM = ("objective=reward", "objective.ended_reward=0.5", "task.max_new_tokens=12")
"""A random model does not solve a problem, but some of its answers end by themselves."""


def objective(*words: str, prompts: int = 1, tokens: int | None = None):
    """The reward objective on a tiny model in float64 whose reward is the share of even token ids, and its parts."""
    scorer = tiny_scorer("objective=reward", "task.max_new_tokens=1", "score.batch_size=64", *words)
    model = scorer.arm.model.double().eval()
    randomise(scorer.arm.adapter.double(), scale=0.3)
    rows = [Encoded(tuple(range(65 + n, 75 + n)), (1,)) for n in range(prompts)]
    examples = [Example(str(n), "", "", ("A",)) for n in range(prompts)]

    def in_passes(own):
        return microbatches(own, 256, tokens=tokens)

    reward = Reward(
        scorer,
        rows,
        examples,
        rows_of_step=lambda _step: list(range(prompts)),
        in_passes=in_passes,
        evaluating=nullcontext,
        halvings=[],
    )
    reward._reward = lambda output, _example: sum(token % 2 == 0 for token in output.ids) / len(output.ids)
    return reward, model, list(scorer.arm.trained_parts().values()), rows


def gradient(reward: Reward, parts, step: int) -> torch.Tensor:
    """The gradient of a step as the loop computes it, as one vector."""
    batches = reward.batches(step)
    count = sum(len(batch.targets) for batch in batches)
    losses = [reward.loss_sum(batch) / count for batch in batches]
    return torch.cat([g.flatten() for g in torch.autograd.grad(sum(losses), parts)])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_gradient_is_that_of_the_mean_reward(temperature):
    samples = 64
    words = (f"objective.samples={samples}", f"objective.temperature={temperature}")
    reward, model, parts, rows = objective(*words)

    def probability() -> torch.Tensor:
        last = model(input_ids=torch.tensor([rows[0].prompt])).logits[0, -1]
        return (last / temperature).softmax(-1)[::2].sum()

    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-probability(), parts)])
    mean = torch.stack([gradient(reward, parts, step) for step in range(1, 101)]).mean(0) * samples / (samples - 1)
    assert float(mean @ exact / exact.norm() ** 2) == pytest.approx(1.0, abs=0.1)
    assert float(torch.cosine_similarity(mean, exact, 0)) > 0.95
    # A small step along it makes the rewarded tokens more likely, by as much as the exact gradient says.
    before, rate = probability().item(), 1e-3
    with torch.no_grad():
        places = torch.split(mean, [part.numel() for part in parts])
        for part, values in zip(parts, places, strict=True):
            part -= rate * values.view(part.shape)
    assert probability().item() - before == pytest.approx(rate * float(mean @ exact), rel=0.05)


def test_the_draws_follow_the_distribution():
    outputs = torch.tensor([[0.0, 1.0, 2.0, -1.0, -50.0]]).expand(4000, -1)
    model = torch.nn.Module()
    model.config = object()
    tokens = Sampling(0, 1, 4000, 1, temperature=2.0).of(range(4000))(model, outputs, torch.arange(4000), 0)
    expected = (outputs[0] / 2.0).softmax(-1)
    found = torch.bincount(tokens, minlength=5) / 4000
    assert torch.allclose(found, expected, atol=4 * 0.5 / 4000**0.5)


def test_answers_depend_on_seed_and_step_and_not_on_the_batches():
    sampled = {}
    for name, words in {"one": ["score.batch_size=1"], "all": [], "seed": ["seed=1"]}.items():
        reward, *_ = objective("task.max_new_tokens=5", "objective.samples=6", *words, prompts=3)
        sampled[name] = [sorted(answer.target for answer in reward._sample(step)) for step in (1, 2)]
    assert sampled["one"] == sampled["all"] != sampled["seed"]
    assert sampled["all"][0] != sampled["all"][1]


def test_the_gradient_does_not_depend_on_microbatches():
    found = []
    for tokens in (None, 40):
        reward, _, parts, _ = objective("task.max_new_tokens=5", "objective.samples=6", prompts=3, tokens=tokens)
        found.append(gradient(reward, parts, 1))
    assert len(reward.batches(1)) > 1
    assert torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-14)


def test_tokens_of_groups_without_spread_count_too():
    """Two groups, of which one has no spread: its gradient is zero, and its tokens are among those of the step."""
    reward, _, parts, rows = objective("task.max_new_tokens=3", "objective.samples=6", prompts=2)
    own_reward = reward._reward
    both = gradient(reward, parts, 1)
    assert len(reward._answers) == 12
    tokens = [sum(len(answer.target) for answer in reward._answers if answer.prompt == row.prompt) for row in rows]
    alone = []
    for kept in (0, 1):
        reward._step = 0
        # The examples' targets are equal; their ids tell the groups apart.
        reward._reward = lambda output, example, kept=kept: own_reward(output, example) * (example.id == str(kept))
        alone.append(gradient(reward, parts, 1))
        assert len(reward._answers) == 6
        assert sum(len(batch.targets) for batch in reward.batches(1)) == tokens[kept]
    # The loop divides by the tokens of the group that it gets; the weights make it those of the step.
    assert torch.allclose(alone[0] + alone[1], both, rtol=1e-6, atol=1e-12)


def test_advantages_are_rewards_less_the_mean_of_the_group():
    reward, *_ = objective()
    assert reward._advantages([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]
    assert reward._advantages([0.3] * 4) == [0.0] * 4
    reward.config.divide_by_deviation = True
    assert reward._advantages([1.0, 0.0, 1.0, 0.0]) == [1.0, -1.0, 1.0, -1.0]


def test_a_run_learns_from_the_reward_it_gets_and_resumes_to_the_same_bytes(tiny_config, tmp_path):
    whole = run.main(tiny_config(*FORM))
    config = tiny_config(*FORM, "train.pause_after=3", f"outputs={tmp_path}/paused")
    assert run.main(config) is None
    config.train.pause_after = None
    resumed = run.main(config)
    assert resumed.files == whole.files
    rows = [row.values for row in read_metrics(folder_of(config).metrics_file) if "reward/mean" in row.values]
    assert len(rows) == 6
    assert {name.removeprefix("reward/") for name in rows[0] if name.startswith("reward/")} == {
        "mean",
        "no_spread",
        "entropy",
        "answer_tokens",
        "sampled_tokens_per_s",
    }
    assert any(row["train/grad_norm"] > 0 for row in rows)
    assert whole.identity.tree["objective"]["name"] == "reward"


def test_an_arm_of_peft_is_trained_by_reward(tiny_config):
    pytest.importorskip("peft")
    record = run.main(tiny_config(*FORM, "tying=peft/vera", "train.steps=2", "score.splits=[]"))
    assert record.training.steps == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["objective.samples=4"], "objective.samples=4: needs objective=reward; add it, or leave this key out"),
        (["objective=reward", "objective.samples=1"], "objective.samples=1: must be greater than or equal to 2"),
        (["objective=reward", "score.checkpoint=best"], "score.checkpoint=best: is the step of the lowest validation"),
        (["objective=reward", "train.shard=true"], "train.shard=true: objective=reward samples from a whole model"),
        (["objective=reward", "task.shuffle_targets=true"], "task.shuffle_targets=true: objective=reward learns from"),
        (["objective=reward", "objective.metric=f1"], "objective.metric=f1: the reward must be a score of a single"),
    ],
)
def test_a_wrong_combination_is_one_line(tiny_run, words, says):
    with pytest.raises(UserError) as caught:
        run.main(compose_config(tiny_run(*words)))
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("hellaswag", "objective=reward: the answers of task=hellaswag are compared by their likelihoods"),
        ("iwslt2017", "objective=reward: the reward must be a score of a single answer, and those of task=iwslt2017"),
    ],
)
def test_a_task_without_a_score_of_an_answer_is_refused(tiny_config, task, says, tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, task, {**GOOD[task], "source_id": split, "ctx_a": f"A {split}."}, split=split)
    with pytest.raises(UserError) as caught:
        run.main(tiny_config("objective=reward", f"data_root={tmp_path}", task=task))
    assert str(caught.value).startswith(says)


def test_the_drift_is_a_sum_over_the_vocabulary():
    scorer = tiny_scorer()
    examples = [Example(str(n), f"{n} + {n} =", f" {2 * n}", ("x",)) for n in range(5)]
    assert [row.scores for row in scorer.rows(examples, "start", "drift")] == [{"drift": 0.0}] * 5
    randomise(scorer.arm.adapter, scale=0.3)
    found = [row.scores["drift"] for row in scorer.rows(examples, "moved", "drift")]
    for example, value in zip(examples, found, strict=True):
        row = scorer.encoder.example(example)
        ids, first = torch.tensor([row.prompt + row.target]), len(row.prompt) - 1
        log_p = logits(scorer.arm.model, ids)[0, first:-1].double().log_softmax(-1)
        scorer.arm.disable()
        log_q = logits(scorer.arm.model, ids)[0, first:-1].double().log_softmax(-1)
        scorer.arm.enable()
        assert value == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)


def test_a_finished_run_gets_its_drift_later_and_keeps_its_other_scores(finished_run, tiny_config):
    folder = folder_of(finished_run())
    before = read_run_scores(folder).metrics("validation")
    run.main(tiny_config("score.drift=true"))
    after = read_run_scores(folder)
    assert list(after.metrics("validation")) == [*before, "drift"]
    assert {name: after.metrics("validation")[name] for name in before} == before
    run.main(tiny_config("score.drift=true"))
    assert read_run_scores(folder) == after


def test_memory_that_runs_out_while_sampling_halves_the_batches_once_for_all_steps(monkeypatch):
    reward, *_ = objective("score.batch_size=8", "objective.samples=8")
    whole, sizes = reward_module.decode, []

    def decode(model, prompts, *others, **options):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise MemoryError
        return whole(model, prompts, *others, **options)

    monkeypatch.setattr(reward_module, "decode", decode)
    for step in (1, 2):
        reward.batches(step)
    assert sizes == [8, 4, *[2] * 8]
    # Prompts of 10 tokens, and answers of one.
    assert [(each.step, each.during, each.tokens) for each in reward.halvings] == [
        (1, "sampling", 44),
        (1, "sampling", 22),
    ]
