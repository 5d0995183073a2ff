"""A task for lm-evaluation-harness that gives this project's score: the rows a run was scored on, and how to read them.

The rows are those of predictions/<split>.jsonl, prompts and references as they were used, so the harness asks the very
same questions. For tasks whose answer is a number after `####` (GSM8K and its generated relatives).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records import run_record
from tiedlora.tasks import load_task
from tiedlora.tasks.gsm8k import FLEXIBLE, STRICT, Gsm8k


def write_task(config: Config, predictions: Path, folder: Path) -> str | None:
    """Write `<name>.yaml` and its rows into `folder`.

    Args:
        predictions: a run's predictions/<split>.jsonl.

    Returns:
        The task's name for `lm_eval --tasks`, or None if the task is not one whose answer is a number.

    Raises:
        UserError: the split has not been scored.
    """
    if not isinstance(load_task(config.task), Gsm8k):
        return None
    split = predictions.stem
    if not predictions.is_file():
        raise UserError(f"{predictions}: is missing; score it: python scripts/score.py RUN --split {split}")
    # The name becomes those of files.
    name = f"tiedlora_{config.task.name}_{split}".replace("/", "_")
    rows = [
        {"prompt": row["prompt"], "answer": "".join(row["references"][:1])}
        for row in run_record.read_predictions(predictions)
    ]
    storage.write_json_lines(folder / f"{name}.jsonl", rows)
    text = OmegaConf.to_yaml(OmegaConf.create(_task(config, name)))
    storage.write_bytes(folder / f"{name}.yaml", text.encode())
    return name


def _task(config: Config, name: str) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        # Seen from where lm_eval is started: inside the folder, so that the folder can move.
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": list(config.task.stop),
            "do_sample": False,
            "max_gen_toks": config.task.max_new_tokens,
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", r"\$", r"\.$"],
            }
        ],
        "filter_list": [
            {"name": "strict", "filter": [_regex(STRICT.pattern, 0), {"function": "take_first"}]},
            {"name": "flexible", "filter": [_regex(f"({FLEXIBLE.pattern})", -1), {"function": "take_first"}]},
        ],
        "metadata": {"version": config.task.version},
    }


def _regex(pattern: str, which: int) -> dict[str, Any]:
    return {"function": "regex", "regex_pattern": pattern, "group_select": which}
