"""A task for lm-evaluation-harness that gives this project's score on the scored rows of a run.

The rows are those of predictions/<split>.jsonl, with the prompts and references that were used. So the harness asks
the same questions. This works only for tasks whose answer is a number after `####` (GSM8K and the generated tasks).
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from tiedlora import storage
from tiedlora.config.schema import Config
from tiedlora.errors import UserError
from tiedlora.records.rows import read_predictions
from tiedlora.tasks import load_task
from tiedlora.tasks.gsm8k import FLEXIBLE, STRICT, Gsm8k


def write_task(config: Config, predictions: Path, folder: Path) -> str | None:
    """Write `<name>.yaml` and its rows into `folder`.

    Args:
        predictions: a run's predictions/<split>.jsonl.

    Returns:
        The task's name for `lm_eval --tasks`; None if the answers of the run's task are not numbers.

    Raises:
        UserError: the split has not been scored, or its predictions are damaged.
    """
    if not isinstance(load_task(config.task), Gsm8k):
        return None
    split = predictions.stem
    if not predictions.is_file():
        raise UserError(f"{predictions}: is missing; score it: python scripts/score.py RUN --split {split}")
    # The name becomes the name of two files.
    name = f"tiedlora_{config.task.name}_{split}".replace("/", "_")
    rows = [{"prompt": row.prompt, "answer": "".join(row.references[:1])} for row in read_predictions(predictions)]
    storage.write_json_lines(folder / f"{name}.jsonl", rows)
    storage.write_bytes(folder / f"{name}.yaml", _task_yaml(config, name).encode())
    return name


def _task_yaml(config: Config, name: str) -> str:
    # Which match is taken: 0 is the first, -1 the last.
    patterns = {"strict": (STRICT.pattern, 0), "flexible": (f"({FLEXIBLE.pattern})", -1)}
    task = {
        "task": name,
        "dataset_path": "json",
        # The path is relative to this folder, where lm_eval is started. So the folder can be moved.
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
            {
                "name": filter_name,
                "filter": [
                    {"function": "regex", "regex_pattern": pattern, "group_select": match},
                    {"function": "take_first"},
                ],
            }
            for filter_name, (pattern, match) in patterns.items()
        ],
        "metadata": {"version": config.task.version},
    }
    return OmegaConf.to_yaml(OmegaConf.create(task))
