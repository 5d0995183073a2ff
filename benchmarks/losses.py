"""python benchmarks/losses.py --seeds 0 1 2: target_loss and forgetting against plain transformers.

It trains LoRA and TABuv on chain_sum (the embedded model, float32) and scores the losses. Then it writes each adapter
into the weights, loads them with AutoModelForCausalLM, and has transformers compute the loss of the same texts, one
text at a time, with labels of -100 where nothing is predicted. Every text's loss must agree within 1e-5 nats per token
with the cross-entropy of transformers' float32 logits. transformers' own number is compared too, and may differ by
2e-5 (4e-5 without AVX512): on a CPU, torch's float32 log_softmax over 49,152 logits has a bias of 1.05e-5 with AVX512,
and 2.26e-5 with AVX2, whose vectors are half as long (measured against float64).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

import tiedlora
from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.config.schema import FORGETTING
from tiedlora.export.folder import to_merged
from tiedlora.places import PROJECT
from tiedlora.records.loss_metrics import TARGET_LOSS
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_scores
from tiedlora.runs import run
from tiedlora.runs.library import config_of
from tiedlora.tasks import load_examples, load_task

TOLERANCE = 1e-5
OWN_TOLERANCE = 2e-5 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4e-5
"""How far transformers' own float32 loss may be off. Its bias was 1.05e-5 with AVX512, and 2.26e-5 with AVX2."""
TEXT = "\n\n".join((PROJECT / name).read_text() for name in ("LICENSE", "CONTRIBUTING.md"))
"""A text that has nothing to do with sums."""


def train(tying: str, seed: int, outputs: Path, *, steps: int, rows: int, characters: int) -> RunFolder:
    """Train and score one run.

    Args:
        rows: how many validation rows are scored.
        characters: how much of TEXT is scored. A passage has about 3,000.
    """
    neutral = outputs / "neutral.txt"
    neutral.write_text(TEXT[:characters])
    config = compose_config(
        [
            f"tying={tying}",
            f"seed={seed}",
            "task=chain_sum",
            "train=quick",
            f"train.steps={steps}",
            f"task.rows.validation={rows}",
            "train.dtype=float32",
            f"train.warmup_steps={min(5, steps)}",
            "train.batch_size=4",
            "train.validation_rows=2",
            "score.metrics=[target_loss]",
            "tracking=none",
            f"score.forgetting={neutral}",
            f"outputs={outputs}",
        ]
    )
    run.main(config)
    return RunFolder(outputs / run_id(config))


def adapted_model(folder: RunFolder) -> Any:
    """The adapted model, loaded by transformers from merged weights."""
    attached = tiedlora.load(folder.path, dtype="float32")
    with tempfile.TemporaryDirectory() as merged:
        to_merged(attached, None, Path(merged))
        return transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()


@functools.cache
def base_model(cache: str) -> tuple[Any, Any]:
    """The base model and its tokenizer, loaded by transformers."""
    (source,) = (Path(cache) / "models").glob("smollm2-135m-instruct-*/")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(source)


@dataclass(frozen=True)
class PlainLoss:
    """The mean loss of a text's predicted tokens, in nats."""

    own: float
    """As transformers returns it."""
    of_logits: float
    """From the same logits, with the softmax in float64."""


@torch.inference_mode()
def plain_loss(model: Any, given: Sequence[int], predicted: Sequence[int]) -> PlainLoss:
    """The loss that a model of transformers computes."""
    ids, labels = torch.tensor([[*given, *predicted]]), torch.tensor([[-100] * len(given) + list(predicted)])
    output = model(input_ids=ids, labels=labels)
    return PlainLoss(float(output.loss), float(F.cross_entropy(output.logits[0, :-1].double(), labels[0, 1:])))


def target_losses(folder: RunFolder, model: Any, tokenizer: Any, split: str) -> list[PlainLoss]:
    """The loss of each target of a split, after its prompt. It ends with the end-of-text token."""
    task = load_task(config_of(folder.path).task)
    return [
        plain_loss(
            model,
            tokenizer(example.prompt).input_ids,
            [*tokenizer(example.target).input_ids, tokenizer.eos_token_id],
        )
        for example in load_examples(task, split, None)
    ]


def passage_losses(folder: RunFolder, model: Any, tokenizer: Any) -> list[PlainLoss]:
    """The loss of each passage of neutral text after its first token."""
    rows = read_scores(folder.scores_file(FORGETTING, "losses")).rows
    passages = [tokenizer(row.references[0]).input_ids for row in rows]
    # The passages are consecutive pieces of the file: nothing is left out, and nothing is there twice.
    text = (folder.path.parent / "neutral.txt").read_text()
    assert "".join("".join(row.references[0] for row in rows).split()) == "".join(text.split())
    return [plain_loss(model, ids[:1], ids[1:]) for ids in passages]


@dataclass(frozen=True)
class Difference:
    """How far the recorded losses are from those of transformers, in nats per token."""

    of_mean: float
    of_text: float
    """The largest of a single text."""
    of_own_mean: float
    """Of the mean of transformers' own losses."""


def difference(folder: RunFolder, split: str, base: bool, plain: Sequence[PlainLoss]) -> Difference:
    """The difference of a run's recorded losses, or those of its base, from those that transformers computed."""
    scored = read_scores(folder.scores_file(split, "losses"))
    if base:
        scored = read_scores(folder.base_scores_file(scored.record.base))
    recorded = [row.scores[TARGET_LOSS] for row in scored.rows]
    mean = scored.record.metrics[TARGET_LOSS].value
    return Difference(
        abs(mean - statistics.mean(loss.of_logits for loss in plain)),
        max(abs(ours - loss.of_logits) for ours, loss in zip(recorded, plain, strict=True)),
        abs(mean - statistics.mean(loss.own for loss in plain)),
    )


def differences(folder: RunFolder, of_base: Sequence[bool] = (False, True)) -> dict[str, Difference]:
    """Name of a score -> its difference from transformers.

    Args:
        of_base: whether the base model is compared; both it and the adapted one by default.
    """
    found = {}
    base, tokenizer = base_model(config_of(folder.path).cache)
    for is_base in of_base:
        model = base if is_base else adapted_model(folder)
        ending = " of the base" if is_base else ""
        plain = target_losses(folder, model, tokenizer, "validation")
        found[f"{TARGET_LOSS}{ending}"] = difference(folder, "validation", is_base, plain)
        plain = passage_losses(folder, model, tokenizer)
        found[f"{FORGETTING}{ending}"] = difference(folder, FORGETTING, is_base, plain)
    return found


def check(found: Difference) -> None:
    """Fail if a loss differs by more than rounding."""
    assert max(found.of_mean, found.of_text) <= TOLERANCE
    assert found.of_own_mean <= OWN_TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--characters", type=int, default=12_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as outputs:
        for tying in ("LoRA", "TABuv"):
            for seed in arguments.seeds:
                sizes = {"steps": arguments.steps, "rows": arguments.rows, "characters": arguments.characters}
                folder = train(tying, seed, Path(outputs), **sizes)
                for name, found in differences(folder).items():
                    numbers = ", ".join(f"{key} {value:.1e}" for key, value in vars(found).items())
                    print(f"{tying} seed {seed} {name}, difference: {numbers}")
                    check(found)


if __name__ == "__main__":
    main()
