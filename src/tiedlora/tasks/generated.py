"""Problems made by reasoning-gym, each with a worked answer that ends in `#### number`.

Any number of rows, none of them on disk, scored as GSM8K is. Keys of task.options: `dataset` names
reasoning-gym's generator, `parameters` are its own settings, and `rows` says how many to make a split.
"""

from __future__ import annotations

from typing import Any

from tiedlora.errors import UserError
from tiedlora.tasks.gsm8k import Gsm8k
from tiedlora.tasks.rows import Row

FIRST_SEED = {"test": 10_000_000, "validation": 20_000_000, "train": 30_000_000}
"""reasoning-gym draws row i from seed + i, so splits stay apart while none has ten million rows."""
HELD_OUT = ("test", "validation")


class Generated(Gsm8k):
    def generated_rows(self, split: str) -> list[Row]:
        """The split's rows, each question once; none of a training row's is also held out."""
        earlier = HELD_OUT[: HELD_OUT.index(split)] if split in HELD_OUT else HELD_OUT
        seen = {row.fields["question"] for other in earlier for row in self._make(other)}
        kept = []
        for row in self._make(split):
            if row.fields["question"] not in seen:
                seen.add(row.fields["question"])
                kept.append(row)
        return kept

    def _make(self, split: str) -> list[Row]:
        import reasoning_gym  # costs a second, and only this task needs it

        options = self.config.options
        unknown = set(options) - {"dataset", "parameters", "rows"}
        if unknown or not {"dataset", "rows"} <= set(options):
            raise UserError(f"task.options: needs dataset and rows, may have parameters; got {', '.join(options)}")
        parameters = options.get("parameters", {})
        if not isinstance(options["rows"], dict) or not isinstance(parameters, dict):
            raise UserError("task.options: rows and parameters must be mappings, as in rows={train: 100}")
        size = options["rows"].get(split)
        if not isinstance(size, int) or not 1 <= size < 10_000_000:
            raise UserError(f"task.options.rows.{split}={size}: must be a number from 1 to 9,999,999")
        seed = FIRST_SEED[split] + self.config.split_seed * 100_000_000
        try:
            made = reasoning_gym.create_dataset(options["dataset"], size=size, seed=seed, **parameters)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"task.options: reasoning-gym refuses them ({error})") from None
        where = f"{options['dataset']}[{split}]"
        return [Row(f"{where} row {i}", self._row(item)) for i, item in enumerate(made)]

    def _row(self, item: dict[str, Any]) -> dict[str, Any]:
        metadata, answer = item["metadata"], str(item["answer"])
        if "answer_cot" in metadata:
            return {"question": item["question"], "answer": metadata["answer_cot"]}
        steps = worked_sum(metadata["expression"]) if self.config.options["dataset"] == "chain_sum" else ""
        return {"question": item["question"], "answer": f"{steps}#### {answer}"}


def worked_sum(expression: str) -> str:
    """`35 + 94 - 16` as one line a step: `35 + 94 = 129` and `129 - 16 = 113`."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}\n")
        total = result
    return "".join(lines)


TASK = Generated
