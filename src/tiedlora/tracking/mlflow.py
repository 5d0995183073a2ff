"""tracking=mlflow: an MLflow server, or a database in outputs/.

A run is written again as a whole when it continues.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas
from typing_extensions import override

from tiedlora import storage
from tiedlora.errors import UserError
from tiedlora.records.rows import MetricsRow
from tiedlora.tracking.run_trackers import Answers, TrackedRun, Tracker

if find_spec("mlflow") is None:
    raise UserError("tracking=mlflow: mlflow is not installed; run: pip install 'tiedlora[mlflow]'")

ID_TAG = "tiedlora_run_id"
LONGEST_PARAM = 500
"""The most characters of a parameter that every MLflow server takes."""
MOST_METRICS, MOST_PARAMS = 1000, 100
"""The most metrics and parameters of one request."""


class MlflowTracker(Tracker):
    """One MLflow run."""

    title = "MLflow"

    def __init__(self) -> None:
        self.client: Any = None
        self.run = ""
        """MLflow's own id of the run."""

    def start(self, run: TrackedRun, earlier: Sequence[MetricsRow]) -> None:
        """Open the run. An earlier run with this id is deleted, because all its rows come again."""
        # Without these, MLflow would report its use, and wait minutes for a server that is away. It reads them when it
        # is imported, so it is imported here.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient  # noqa: PLC0415
        from mlflow.entities import Param  # noqa: PLC0415

        # The database's migrations log many lines.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        outputs = Path(run.config.outputs)
        server = os.environ.get("MLFLOW_TRACKING_URI")
        if server is None:
            outputs.mkdir(parents=True, exist_ok=True)
        project, artifacts = run.config.tracking.project, None if server else f"file://{outputs}/mlartifacts"
        # The first client makes the tables of the database, and only one of several workers may.
        with nullcontext() if server else storage.locked(outputs / ".mlflow.lock"):
            self.client = MlflowClient(tracking_uri=server or f"sqlite:///{outputs}/mlflow.db")
            found = self.client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self.client.create_experiment(project, artifacts)
            for old in self.client.search_runs([experiment], f"tags.{ID_TAG} = '{run.run_id}'"):
                self.client.delete_run(old.info.run_id)
        tags = {ID_TAG: run.run_id, "group": run.group, "tags": ", ".join(run.tags)}
        self.run = self.client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        (flat,) = pandas.json_normalize(run.settings()).to_dict("records")
        # MLflow takes only these characters in a name.
        params = [Param(re.sub(r"[^\w./ -]", "_", key), str(value)[:LONGEST_PARAM]) for key, value in flat.items()]
        for first in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.run, params=params[first : first + MOST_PARAMS])
        self.log(earlier)

    @override
    def log(self, rows: Sequence[MetricsRow]) -> None:
        from mlflow.entities import Metric  # after `start`, as there  # noqa: PLC0415

        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, row.step) for row in rows for key, value in row.values.items()]
        for first in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.run, metrics=metrics[first : first + MOST_METRICS])

    def log_answers(self, answers: Answers) -> None:
        """Write the table as an artifact, which MLflow's page shows as a table."""
        columns = {column: [row[column] for row in answers] for column in answers[0]}
        self.client.log_table(self.run, columns, "answers.json")

    def finish(self, summary: Mapping[str, float | int], exit_code: int = 0) -> None:
        """Write the summary as metrics of step 0, and close the run."""
        self.log([MetricsRow(0, dict(summary))])
        self.client.set_terminated(self.run, "FAILED" if exit_code else "FINISHED")


TRACKER = MlflowTracker
