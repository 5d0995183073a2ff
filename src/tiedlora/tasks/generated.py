"""Problems that reasoning-gym generates, each with a worked answer that ends in `#### number`.

The rows are generated in memory, and scored as those of GSM8K. Keys of task.options: `dataset` names reasoning-gym's
generator, `parameters` are the generator's own settings, and `rows` is the number of rows of each split.
"""

from __future__ import annotations

import functools
from typing import Any

from tiedlora.config.schema import TaskConfig
from tiedlora.errors import UserError
from tiedlora.tasks.gsm8k import Gsm8k
from tiedlora.tasks.rows import DataRow

FIRST_SEED = {"test": 10_000_000, "validation": 20_000_000, "train": 30_000_000}
"""reasoning-gym draws row i from seed + i. So splits do not overlap if each has fewer than ten million rows."""
BEFORE = {"test": (), "validation": ("test",), "train": ("test", "validation")}
"""Split -> the splits whose questions it must not contain."""


class Generated(Gsm8k):
    """Problems that Reasoning Gym makes, with a number as the answer, scored as GSM8K's."""

    generator = "reasoning-gym"
    options = ("dataset", "parameters", "rows")

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        # Each split is made once, because others are compared with it.
        self._made_rows = functools.cache(self._make_rows)

    def generated_rows(self, split: str) -> list[DataRow]:
        """The rows of a split. Each question is there once, and questions of its held-out splits are left out.

        Raises:
            UserError: task.options are incomplete, or reasoning-gym refuses them.
        """
        questions = {row["question"] for other in BEFORE[split] for row in self._made_rows(other)}
        rows = []
        for row in self._made_rows(split):
            if row["question"] not in questions:
                questions.add(row["question"])
                rows.append(row)
        return rows

    def _make_rows(self, split: str) -> list[DataRow]:
        """The rows of a split as reasoning-gym generates them, with repeated questions."""
        # The import of all generators, sympy and matplotlib takes a second, and a finished run does not need it.
        import reasoning_gym  # noqa: PLC0415

        options = self.config.options
        if not {"dataset", "rows"} <= set(options):
            raise UserError(f"task.options: needs dataset and rows; got {', '.join(options)}")
        parameters = options.get("parameters", {})
        if not isinstance(options["rows"], dict) or not isinstance(parameters, dict):
            raise UserError("task.options: rows and parameters must be mappings, as in rows={train: 100}")
        size = options["rows"].get(split)
        if not isinstance(size, int) or not 1 <= size < 10_000_000:
            raise UserError(f"task.options.rows.{split}={size}: must be a whole number from 1 to 9,999,999")
        seed = FIRST_SEED[split] + self.config.split_seed * 100_000_000
        try:
            # It makes an item only when it is asked for it.
            items = list(reasoning_gym.create_dataset(options["dataset"], size=size, seed=seed, **parameters))
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"task.options: reasoning-gym refuses them ({error})") from None
        where = f"{options['dataset']}[{split}]"
        return [
            DataRow(f"{where} row {i}", {"question": item["question"], "answer": self._worked_answer(item)})
            for i, item in enumerate(items)
        ]

    def _worked_answer(self, item: Any) -> str:
        """The worked steps and the answer of one item of reasoning-gym."""
        metadata = item["metadata"]
        if "answer_cot" in metadata:
            return str(metadata["answer_cot"])
        steps = worked_sum(metadata["expression"]) if self.config.options["dataset"] == "chain_sum" else ""
        return f"{steps}#### {item['answer']}"


def worked_sum(expression: str) -> str:
    """`35 + 94 - 16` as one line for each step: `35 + 94 = 129` and `129 - 16 = 113`."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}\n")
        total = result
    return "".join(lines)


TASK = Generated
