"""The baseline: PEFT's LoRA, trained with transformers' Trainer, and scored with transformers' generate or
generate_batch (continuous batching). Trainer also trains our TABuv, as a method of PEFT."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import common
import harness
import torch
from peft import LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig, Trainer, TrainerCallback, TrainingArguments

from tiedlora import TiedLoraConfig
from tiedlora.adapter import TiedAdapter
from tiedlora.config.schema import Config, TaskConfig
from tiedlora.data.batching import BatchSampler
from tiedlora.data.encoding import Encoded
from tiedlora.models.base_model import BaseModel
from tiedlora.models.device import peak_memory_bytes

TokenRow = dict[str, list[int]]


@dataclass
class TrainedBaseline:
    """A trained PEFT LoRA, and the costs of its training."""

    base: BaseModel
    model: Any
    losses: list[float]
    """The loss of each step."""
    tokens: int
    """The tokens of the timed steps, without padding."""
    seconds: float
    """The seconds of the timed steps."""

    def figures(self) -> dict[str, Any]:
        """The values that a measurement prints."""
        return {
            "losses": self.losses,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "peak": peak_memory_bytes(self.model.device),
        }


class _Collator:
    """Rows to one padded batch. It keeps how many tokens each batch has: step k trains on the k-th batch."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.batch_tokens: list[int] = []

    def __call__(self, rows: list[TokenRow]) -> dict[str, torch.Tensor]:
        self.batch_tokens.append(sum(len(row["input_ids"]) for row in rows))
        mask = [{"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            "input_ids": _padded(rows, "input_ids", self.pad_id),
            "labels": _padded(rows, "labels", -100),
            "attention_mask": _padded(mask, "attention_mask", 0),
        }


def _padded(rows: list[TokenRow], key: str, value: int) -> torch.Tensor:
    longest = max(len(row[key]) for row in rows)
    return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])


class _StepClock(TrainerCallback):  # type: ignore[misc]
    """The times at which the first timed step began and the last one ended. Between them, it waits for no GPU."""

    def __init__(self, skipped: int, steps: int) -> None:
        self.skipped, self.steps = skipped, steps
        self.times: list[float] = []

    def on_step_end(self, arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step in (self.skipped, self.steps):
            harness.wait_for(arguments.device)
            self.times.append(time.perf_counter())


class _LossTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that stores the loss of each step."""

    losses: list[torch.Tensor]

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        loss = super().compute_loss(*arguments, **keywords)
        self.losses.append(loss.detach())
        return loss


class _InOrderTrainer(_LossTrainer):
    """Returns the rows in the order in which they are given."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(dtype: str, order: str, steps: int, skipped: int, *overrides: str, method: str = "lora") -> TrainedBaseline:
    """Train an adapter of PEFT with Trainer, on the same tokens as our training.

    Args:
        order: `plain`, Trainer's random order, or `grouped`, exactly the batches of our length buckets.
        skipped: how many steps at the start are not timed.
        method: `lora`, PEFT's LoRA from the same initial values as ours, or `tied`, TABuv through TiedLoraConfig.
    """
    config = common.config(f"train.dtype={dtype}", "tying=LoRA_qkv", *overrides)
    base = harness.base_model(config)
    base.model.set_attn_implementation("sdpa")
    encoded, in_order = harness.training_rows(config, base), order != "plain"
    if in_order:
        sampler = BatchSampler([len(row) for row in encoded], config.train, config.seed)
        encoded = [encoded[number] for step in range(1, steps + 1) for number in sampler.rows_of_step(step)]
    if method == "tied":
        model = get_peft_model(base.model, TiedLoraConfig(r=common.RANK, tying="TABuv", task_type="CAUSAL_LM"))
    else:
        model = peft_lora(base.model, _initial_adapter(config))
    collator = _Collator(base.tokenizer.eos_token_id)
    clock = _StepClock(skipped, steps)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = (_InOrderTrainer if in_order else _LossTrainer)(
            model=model,
            args=_settings(config, steps, scratch),
            train_dataset=[_token_row(row) for row in encoded],
            data_collator=collator,
            callbacks=[clock],
        )
        trainer.losses = []
        trainer.train()
    # The loader may have collated one batch more than there were steps.
    tokens = sum(collator.batch_tokens[skipped:steps])
    losses = [float(loss) for loss in trainer.losses]
    return TrainedBaseline(base, model, losses, tokens, clock.times[1] - clock.times[0])


def _initial_adapter(config: Config) -> TiedAdapter:
    alpha = config.rank.alpha or config.rank.r
    return TiedAdapter(config.tying, config.rank.r, alpha, config.model.architecture, seed=config.seed)


def _token_row(row: Encoded) -> TokenRow:
    return {"input_ids": [*row.prompt, *row.target], "labels": [-100] * len(row.prompt) + list(row.target)}


def _settings(config: Config, steps: int, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=config.train.batch_size,
        learning_rate=config.train.lr,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=config.train.device == "cpu" or not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=config.seed,
        remove_unused_columns=False,
    )


def peft_lora(model: Any, adapter: TiedAdapter | None = None) -> Any:
    """PEFT's LoRA on q, k and v, like our tying=LoRA_qkv; with the values of `adapter` if it is given."""
    settings = LoraConfig(
        r=common.RANK,
        lora_alpha=common.RANK,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, settings)
    if adapter is not None:
        parts = adapter.parts()
        with torch.no_grad():
            for layer, block in enumerate(adapted.base_model.model.model.layers):
                for letter in "qkv":
                    site = getattr(block.self_attn, f"{letter}_proj")
                    site.lora_A["default"].weight.copy_(parts[f"{letter}.A"][layer])
                    site.lora_B["default"].weight.copy_(parts[f"{letter}.B"][layer])
    return adapted


def answers(
    model: Any, tokenizer: Any, prompts: list[tuple[int, ...]], task: TaskConfig, batch_size: int
) -> tuple[list[str], int]:
    """The greedy answers of transformers' generate, longest prompts first, and the number of their tokens."""
    end_id, outputs, tokens = tokenizer.eos_token_id, {}, 0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[end_id] * (longest - len(prompts[i])) + list(prompts[i]) for i in batch])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.inference_mode():
            generated = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=task.max_new_tokens,
                do_sample=False,
                stop_strings=list(task.stop) or None,
                tokenizer=tokenizer,
                pad_token_id=end_id,
            )
        for i, row in zip(batch, generated[:, longest:].tolist(), strict=True):
            written = row[: row.index(end_id)] if end_id in row else row
            tokens += len(written)
            outputs[i] = _up_to_stop(tokenizer.decode(written, skip_special_tokens=True), task.stop)
    return [outputs[i] for i in range(len(prompts))], tokens


def batch_answers(
    model: Any, tokenizer: Any, prompts: list[tuple[int, ...]], task: TaskConfig, rows: int
) -> tuple[list[str], int]:
    """The greedy answers of transformers' generate_batch, and the number of their tokens up to the end of the answer.

    It knows no stop strings, so it writes to the end of text or to the limit, and the text is cut afterwards.

    Args:
        rows: the most rows at once.
    """
    end_id, page = tokenizer.eos_token_id, 32
    longest = sorted((len(prompt) + task.max_new_tokens for prompt in prompts), reverse=True)[:rows]
    settings = GenerationConfig(
        max_new_tokens=task.max_new_tokens, do_sample=False, eos_token_id=end_id, pad_token_id=end_id
    )
    batching = ContinuousBatchingConfig(
        # Without a number of blocks, it takes nearly all of the memory that is free.
        num_blocks=sum(-(-length // page) for length in longest) + rows,
        page_size=page,
        max_requests_per_batch=rows,
        max_batch_tokens=1024,
    )
    with torch.inference_mode():
        results = model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=settings,
            continuous_batching_config=batching,
            progress_bar=False,
        )
    outputs, tokens = [], 0
    for result in results.values():
        ids = result.generated_tokens
        written = ids[: ids.index(end_id)] if end_id in ids else ids
        whole = tokenizer.decode(written, skip_special_tokens=True)
        outputs.append(_up_to_stop(whole, task.stop))
        # A text that was cut has nearly this share of the tokens.
        tokens += round(len(written) * len(outputs[-1]) / max(1, len(whole.strip())))
    return outputs, tokens


def _up_to_stop(text: str, stops: list[str]) -> str:
    first = len(text) - len(text.lstrip())
    places = [place for stop in stops if (place := text.find(stop, first)) >= 0]
    return text[: min(places, default=len(text))].strip()
