"""tracking=trackio and tracking=mlflow: their own clients read a run back with the curves of metrics.jsonl."""

import fcntl
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock
from unittest.mock import MagicMock

import pytest
from helpers import processes

from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.places import PROJECT
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_run_scores
from tiedlora.tracking.run_trackers import TrackedRun

KEYS = ("train/loss", "validation/loss", "train/lr")
needs_trackio = pytest.mark.skipif(find_spec("trackio") is None, reason="needs the extra trackio")


def finished(words: list[str], tmp_path: Path) -> RunFolder:
    """Train to a pause, continue to the end, in new processes: the trackers keep state in theirs."""
    for more in (["train.pause_after=3"], []):
        done = processes.run_python(PROJECT / "train.py", *words, *more, cwd=tmp_path)
        assert done.returncode in (0, 75), done.stderr
        assert "has failed" not in done.stderr
    config = compose_config(words)
    return RunFolder(Path(config.outputs) / run_id(config))


def curve(folder: RunFolder, key: str) -> list[tuple[int, float]]:
    return [(row.step, row.values[key]) for row in read_metrics(folder.metrics_file) if key in row.values]


@needs_trackio
def test_trackio_reads_the_run_back(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = finished(tiny_run("tracking=trackio", "train.log_every=1"), tmp_path)

    def ask(*words: str):
        command = [Path(sys.executable).with_name("trackio"), *words, "--json"]
        return json.loads(processes.run(command, check=True).stdout)

    assert ask("list", "runs", "--project", "tiedlora")["runs"] == [folder.path.name]
    named = ("--project", "tiedlora", "--run", folder.path.name)
    for key in KEYS:
        values = ask("get", "metric", *named, "--metric", key)["values"]
        assert [(value["step"], value["value"]) for value in values] == curve(folder, key)
    (score,) = ask("get", "metric", *named, "--metric", "validation/exact_match_strict")["values"]
    assert score["value"] == read_run_scores(folder).metrics("validation")["exact_match_strict"].value


@pytest.mark.skipif(None in map(find_spec, ("mlflow", "sqlalchemy", "alembic")), reason="needs the extra mlflow")
def test_mlflow_reads_the_run_back(tiny_run, tmp_path):
    folder = finished(tiny_run("tracking=mlflow", "train.log_every=1"), tmp_path)
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder.path.parent}/mlflow.db")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tiedlora")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["tiedlora_run_id"] == folder.path.name
    assert (run.info.status, run.data.params["tying.name"]) == ("FINISHED", "TABuv")
    for key in KEYS:
        history = client.get_metric_history(run.info.run_id, key)
        assert sorted((metric.step, metric.value) for metric in history) == curve(folder, key)
    (answers, _) = read_run_scores(folder).of("validation")
    assert run.data.metrics["validation/exact_match_strict"] == answers.metrics["exact_match_strict"].value
    assert len(client.load_table(experiment.experiment_id, "answers.json")) == answers.rows


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_only_one_worker_at_a_time_makes_the_tables_of_mlflows_database(tiny_config, tmp_path, monkeypatch):
    from tiedlora.tracking.mlflow import MlflowTracker

    # mlflow itself sets it where a test has named a database.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, held = tiny_config("tracking=mlflow"), {}
    lock = Path(config.outputs) / ".mlflow.lock"

    def is_held() -> bool:
        try:
            with open(lock) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False

    class Client(MagicMock):
        """Notes at each call whether the lock is held."""

        def _get_child_mock(self, **names):
            def called(*_, **__):
                held[names["name"]] = is_held()
                return mock.DEFAULT

            return MagicMock(side_effect=called, **names)

    monkeypatch.setitem(sys.modules, "mlflow", MagicMock(MlflowClient=Client))
    monkeypatch.setitem(sys.modules, "mlflow.entities", MagicMock())
    run = TrackedRun("run", tmp_path, config, 1)
    MlflowTracker().start(run, [])
    assert held["get_experiment_by_name"]
    assert held["search_runs"]
    assert not held["log_batch"]
    # A server has its own order.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    MlflowTracker().start(run, [])
    assert not held["get_experiment_by_name"]


@needs_trackio
def test_trackio_shows_a_models_text_as_text():
    from tiedlora.tracking.trackio import MARKUP

    assert "<img src=x onerror=alert(1)> **a** `b` [c](d)".translate(MARKUP) == (
        "&lt;img src=x onerror=alert(1)&gt; \\*\\*a\\*\\* \\`b\\` \\[c\\](d)"
    )
