"""objective=reward: the model answers the prompts of a step, and the scores of the answers change their likelihoods.

This is the plain group-relative policy gradient: on-policy, without a KL term and without clipping. A step has
train.batch_size prompts, and to each a group of objective.samples answers. An answer's advantage is its reward minus
the mean reward of its group, and the gradient of a step is that of

    - sum over answers of advantage * log p(answer | prompt) / number of answer tokens of the step.

For answers of one token its expectation is (samples - 1) / samples of the gradient of minus the mean reward, because an
answer is in its own group's mean. For longer ones it is about that, divided by their mean length. To the loop an answer
is a row, so everything else is as in training from targets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, cast

import torch
from torch import Tensor

from tiedlora.adapter.linear import execution_device
from tiedlora.adapter.parts import seed_of
from tiedlora.data.batching import Batch, sent
from tiedlora.data.encoding import Encoded
from tiedlora.models import output_head
from tiedlora.models.device import CPU
from tiedlora.records.run_record import Halving
from tiedlora.scoring.decoding import AnswerEnds, Choose, Output, batches_by_length, decode
from tiedlora.scoring.split import Scorer, in_shares, with_halved_batches
from tiedlora.scoring.wanted import reward_metric
from tiedlora.tasks import Example
from tiedlora.training.loss import token_losses


@dataclass(frozen=True)
class Answer(Encoded):
    """A sampled answer as a training row."""

    weight: float = 0.0
    """The factor on the cross-entropy of its tokens: the advantage, times a constant of the step."""


class Sampling:
    """Chooses tokens at random. The draws of an answer depend on nothing but the seed, the step and its number.

    Args:
        seed: of the run.
        step: the optimizer step.
        answers: how many answers are sampled.
        length: the most tokens of an answer.
        temperature: divides the logits.
        device: where the logits are.
    """

    def __init__(
        self, seed: int, step: int, answers: int, length: int, *, temperature: float, device: torch.device = CPU
    ) -> None:
        self.temperature = temperature
        self.entropies = torch.zeros(answers, length, device=device)
        """The entropy of the distribution that each token was drawn from, in nats, (answers, length)."""
        seeds = [seed_of(f"sample/{seed}/{step}/{answer}") for answer in range(answers)]
        draws = [torch.rand(length, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        # A running sum on a GPU has no fixed order of additions, and Apple's accelerator has no float64.
        on_the_cpu = torch.are_deterministic_algorithms_enabled() or device.type == "mps"
        self._uniform = sent(torch.stack(draws), CPU if on_the_cpu else device)

    def of(self, numbers: Sequence[int]) -> Choose:
        """`choose` of decode, for a batch of the answers with these numbers."""
        answers_of_rows = sent(torch.tensor(list(numbers)), self.entropies.device)

        def choose(model: Any, outputs: Tensor, rows: Tensor, position: int) -> Tensor:
            answers = answers_of_rows[rows]
            logits = output_head.after(model, outputs.float()) / self.temperature
            probabilities, log_probabilities = logits.softmax(-1), logits.log_softmax(-1)
            self.entropies[answers, position] = -(probabilities * log_probabilities).sum(-1)
            sums = probabilities.to(self._uniform.device).double().cumsum(-1)
            drawn = self._uniform[answers.to(sums.device), position].unsqueeze(1) * sums[:, -1:]
            # The first token whose running sum is above the draw. Rounding must not lead beyond the last one.
            tokens = torch.searchsorted(sums, drawn, right=True).clamp(max=sums.shape[-1] - 1)
            return tokens.squeeze(1).to(outputs.device)

        return choose


class Reward:
    """The objective, for the loop: `batches`, `loss_sum`, and the `metrics` of each step.

    Args:
        scorer: has the arm, the task, and the processes that sample together.
        rows, examples: the training rows, as token ids and as examples.
        rows_of_step: optimizer step -> the numbers of its prompts.
        in_passes: rows -> the microbatches of this process.
        evaluating: a context inside which the model is in evaluation mode.
        halvings: those of the run. Where memory runs out while sampling, it gets one for each halving of the batches.
    """

    def __init__(
        self,
        scorer: Scorer,
        rows: Sequence[Encoded],
        examples: Sequence[Example],
        *,
        rows_of_step: Callable[[int], list[int]],
        in_passes: Callable[[Sequence[Encoded]], list[Batch]],
        evaluating: Callable[[], AbstractContextManager[None]],
        halvings: list[Halving],
    ) -> None:
        self.scorer, self.rows, self.examples = scorer, rows, examples
        self.rows_of_step, self.in_passes, self.evaluating = rows_of_step, in_passes, evaluating
        self.halvings = halvings
        self.config, self.metric = scorer.config.objective, reward_metric(scorer.config.objective, scorer.task)
        self._step, self._answers = 0, list[Answer]()
        self.metrics: dict[int, dict[str, float]] = {}
        """Step -> its metrics, for the steps that this process has sampled."""

    def batches(self, step: int) -> list[Batch]:
        """This process's microbatches of the answers of a step, without those of weight 0.

        If memory runs out in a pass, the loop asks again. The answers are then the same.
        """
        if self._step != step:
            self._answers, self._step = self._sample(step), step
        return self.in_passes(self.scorer.world.local_rows(sorted(self._answers, key=len)))

    def loss_sum(self, batch: Batch) -> Tensor:
        """The weighted sum of the cross-entropy over a batch's answer tokens."""
        answers = cast(Sequence[Answer], batch.rows)
        weights = sent(torch.tensor([answer.weight for answer in answers for _ in answer.target]), batch.targets.device)
        losses = token_losses(self.scorer.arm.model, batch, self.config.temperature)
        return (weights.to(losses) * losses).sum().to(batch.targets.device)

    def _sample(self, step: int) -> list[Answer]:
        """The answers of a step that have a weight, in all processes the same."""
        scorer, config, started = self.scorer, self.config, time.perf_counter()
        numbers = [number for number in self.rows_of_step(step) for _ in range(config.samples)]
        prompts, asked = [self.rows[n].prompt for n in numbers], [self.examples[n] for n in numbers]
        length = scorer.config.task.max_new_tokens
        head = scorer.arm.model.get_output_embeddings()  # type: ignore[operator]
        device = execution_device(head)
        sampling = Sampling(scorer.config.seed, step, len(asked), length, temperature=config.temperature, device=device)

        def answers(smaller: Scorer) -> list[tuple[Output, float]]:
            task, score = smaller.config.task, smaller.config.score
            ends = AnswerEnds(smaller.encoder.tokenizer, task.stop, length, smaller.encoder.more_ends)
            batches = batches_by_length(
                [len(prompt) + length for prompt in prompts], score.batch_size, score.batch_tokens
            )

            def of_batch(batch: list[int]) -> list[tuple[Output, float]]:
                outputs = decode(model, [prompts[n] for n in batch], ends, choose=sampling.of(batch))
                table = sampling.entropies.cpu()
                entropies = [table[n, : len(o.ids)].sum() for n, o in zip(batch, outputs, strict=True)]
                return list(zip(outputs, map(float, entropies), strict=True))

            model: Any = smaller.arm.model
            return in_shares(smaller.world, model, batches, of_batch)

        with self.evaluating(), scorer.arm.folded_once():
            earlier = sum(each.during == "sampling" for each in self.halvings)
            found, times = scorer.within_memory(answers, earlier)
        longest = length + max(map(len, prompts))
        sizes = [with_halved_batches(scorer.config, n).score.batch_size for n in range(earlier + 1, times + 1)]
        self.halvings += [Halving(step, "sampling", size * longest) for size in sizes]
        outputs = [output for output, _ in found]
        rewards = [self._reward(output, example) for output, example in zip(outputs, asked, strict=True)]
        groups = [self._advantages(rewards[n : n + config.samples]) for n in range(0, len(rewards), config.samples)]
        advantages = [advantage for group in groups for advantage in group]
        tokens = sum(len(output.ids) for output in outputs)
        kept_tokens = sum(len(o.ids) for o, advantage in zip(outputs, advantages, strict=True) if advantage)
        self.metrics[step] = {
            "reward/mean": fmean(rewards),
            "reward/no_spread": fmean(not any(group) for group in groups),
            "reward/entropy": sum(entropy for _, entropy in found) / tokens,
            "reward/answer_tokens": tokens / len(outputs),
            "reward/sampled_tokens_per_s": tokens / (time.perf_counter() - started),
        }
        # The loop divides by the tokens of the rows that it gets. Those of the groups without spread count too.
        return [
            Answer(prompt, tuple(output.ids), advantage * kept_tokens / tokens)
            for prompt, output, advantage in zip(prompts, outputs, advantages, strict=True)
            if advantage
        ]

    def _reward(self, output: Output, example: Example) -> float:
        score = self.scorer.task.score(output.text.strip(), example)[self.metric]
        assert not isinstance(score, list)
        return float(score) + (self.config.ended_reward if output.ended != "length" else 0.0)

    def _advantages(self, rewards: Sequence[float]) -> list[float]:
        """Each reward minus the mean of the group; all 0 in a group without spread."""
        if max(rewards) - min(rewards) < 1e-12:
            return [0.0] * len(rewards)
        mean, deviation = math.fsum(rewards) / len(rewards), pstdev(rewards) if self.config.divide_by_deviation else 1.0
        return [(reward - mean) / deviation for reward in rewards]
