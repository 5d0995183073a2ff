"""Tasks: how rows become prompts and targets, and how an output is scored.

A task is one file here and one YAML in conf/task/ (docs/extending.md). The class `TASK` in the file turns rows into
examples and scores outputs. The YAML holds the protocol. Tasks know no model: prompts and targets are text. A user's
own rows need no file: own_rows.py reads them by configuration alone.

- base.py: what a task is (`Task`, `Example`);
- load.py: the task of a configuration, and the examples of its splits;
- rows.py: rows from local files or from the hub;
- metrics.py: metrics that several tasks use;
- task_metric.py: a task's scores as a metric of the `evaluate` package;
- each other file: a task.

It may import config, errors, storage and text.
"""

from tiedlora.tasks.base import Example, Score, Task, render
from tiedlora.tasks.load import NoSuchTask, digest, load_examples, load_task, register

__all__ = ["Example", "NoSuchTask", "Score", "Task", "digest", "load_examples", "load_task", "register", "render"]
