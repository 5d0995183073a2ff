"""python examples/custom_task.py [OVERRIDE ...]: a task of your own with the harness's whole run around it.

A task turns rows into prompt and target, and scores an output. This one makes its own rows (write a word backwards), so
it needs no data. Overrides are those of train.py; the default is a tiny random model and a few steps.

In the repository a task is a file in src/tiedlora/tasks/ and an option in conf/task/: `train.py task=NAME` finds it.
"""

import random
import sys
from typing import Any

from tiedlora import errors, tasks
from tiedlora.config import compose
from tiedlora.runs import run
from tiedlora.tasks import Example, Task
from tiedlora.tasks.rows import Row


class Backwards(Task):
    fields = {"word": str}
    metrics = ("exact_match",)

    def generated_rows(self, split: str) -> list[Row]:
        """Words of random letters, drawn once and dealt to the splits, so that no word is in two of them."""
        generator = random.Random(self.config.split_seed)
        words = sorted({"".join(generator.choices("abcdefgh", k=4)) for _ in range(200)})
        generator.shuffle(words)
        dealt = {"train": words[:100], "validation": words[100:120], "test": words[120:140]}
        return [Row(f"backwards[{split}] row {i}", {"word": word}) for i, word in enumerate(dealt[split])]

    def example(self, row: dict[str, Any], id: str) -> Example:
        return super().example({**row, "answer": row["word"][::-1]}, id)

    def score(self, output: str, example: Example) -> dict[str, float]:
        return {"exact_match": float(output.strip() == example.references[0].strip())}


def main(overrides: list[str]) -> None:
    mine = [
        "model=tiny_llama",
        "train=tiny",
        "train.dtype=float32",
        "task=gsm8k",
        "task.name=backwards",
        "task.kind=backwards",
        "task.prompt='Backwards: {word}\nAnswer:'",
        "task.target=' {answer}'",
        "task.validation_from_train=0",
        "task.rows.validation=null",
        "task.max_new_tokens=8",
    ]
    tasks.register("backwards", Backwards)
    run.main(compose.compose_config([*mine, *overrides]))


if __name__ == "__main__":
    with errors.exit_codes():
        main(sys.argv[1:])
