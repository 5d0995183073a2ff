"""python examples/trl_grpo.py [MODEL]: Tied-LoRA in TRL's GRPOTrainer, on sums of one-digit numbers.

Needs tiedlora[peft] and `pip install trl`. MODEL is a name on the hub or a folder. docs/reward.md says when to take
this instead of objective=reward.
"""

import itertools
import re
import sys
import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tiedlora import TiedLoraConfig

PAIRS = itertools.product(range(10), repeat=2)
SUMS = [{"prompt": f"Question: {a} + {b} =\nAnswer:", "answer": a + b} for a, b in PAIRS]


def is_right(completions: list[str], answer: list[int], **_: object) -> list[float]:
    """1 for each completion whose last number is the answer."""
    last = [re.findall(r"-?\d+", completion)[-1:] for completion in completions]
    return [float(numbers == [str(right)]) for numbers, right in zip(last, answer, strict=True)]


def main(model: str) -> None:
    settings = GRPOConfig(
        tempfile.mkdtemp(),
        max_steps=4,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=12,
        learning_rate=1e-2,
        beta=0.0,  # no KL term
        scale_rewards=False,  # advantages are not divided by the deviation
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=is_right,
        args=settings,
        train_dataset=Dataset.from_list(SUMS),
        peft_config=TiedLoraConfig(r=8, tying="TAuv", task_type="CAUSAL_LM"),
    )
    trainer.train()
    for row in trainer.state.log_history:
        if "reward" in row:
            print(f"step {row['step']}: mean reward {row['reward']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct")
