"""python examples/custom_task.py [OVERRIDE ...]: train and score a task of your own.

Rows of your own need no class: task=rows takes files, templates and metrics by name (docs/own.md). A class is for
rows that a program makes, and for scoring that no metric does. This one makes its own rows (write a word backwards),
and scores the share of letters that stand in the right place. It takes the overrides of train.py; by default it trains
a tiny random model for a few steps.

In the repository a task is a file in src/tiedlora/tasks/ and an option in conf/task/: `train.py task=NAME` finds it
(docs/extending.md).
"""

import random
import sys

from tiedlora import errors, tasks
from tiedlora.config import compose
from tiedlora.runs import run
from tiedlora.tasks import Example, Task
from tiedlora.tasks.rows import DataRow


class Backwards(Task):
    fields = {"word": str}
    metrics = ("exact_match", "letters_in_place")

    def generated_rows(self, split: str) -> list[DataRow]:
        """Words of random letters. They are drawn once and divided among the splits, so no word is in two splits."""
        generator = random.Random(self.config.split_seed)
        words = sorted({"".join(generator.choices("abcdefgh", k=4)) for _ in range(200)})
        generator.shuffle(words)
        splits = {"train": words[:100], "validation": words[100:120], "test": words[120:140]}
        return [DataRow(f"backwards[{split}] row {i}", {"word": word}) for i, word in enumerate(splits[split])]

    def example(self, row: DataRow, id: str) -> Example:
        return super().example(row.with_fields(answer=row["word"][::-1]), id)

    def score(self, output: str, example: Example) -> dict[str, float]:
        word, answer = example.references[0].strip(), output.strip()
        in_place = sum(one == other for one, other in zip(word, answer, strict=False))
        return {"exact_match": float(answer == word), "letters_in_place": in_place / max(len(word), len(answer))}


def main(overrides: list[str]) -> None:
    defaults = [
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
    run.main(compose.compose_config([*defaults, *overrides]))


if __name__ == "__main__":
    with errors.exit_codes():
        main(sys.argv[1:])
