"""Reading folders of runs: what is read, and what is left out with its reason."""

import numpy as np
import pytest
from helpers import processes
from helpers.hostile import put
from helpers.report_runs import scored_run, world, write_lines

from tiedlora.analysis.runs import read_run, read_runs
from tiedlora.config.project import PROJECT
from tiedlora.page import write
from tiedlora.records.rows import MetricsRow

GOOD = [1.0, 0.0] * 25
BASE = [0.0] * 50


def test_what_is_no_finished_run_is_listed_with_its_reason(tmp_path):
    scored_run(tmp_path, GOOD, BASE)
    for name in ("base", "sweeps", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos").mkdir()
    unfinished = tmp_path / "LoRA-r8-chain_sum-tiny-s0-0123456789"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("train: {lr: 0.003}\n")
    failed = tmp_path / "LoRA-r8-chain_sum-tiny-s1-0123456789"
    failed.mkdir()
    (failed / "error.txt").write_text("Traceback\nZeroDivisionError: division by zero\n")
    cut = scored_run(tmp_path, GOOD, BASE, seed=1)
    (cut / "result.json").write_text((cut / "result.json").read_text()[:200])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "result.json").write_text('{"accuracy": 1}')
    runs, left_out = read_runs([tmp_path])
    assert len(runs) == 1
    reasons = {folder.path.name: folder.reason for folder in left_out}
    assert reasons["photos"].startswith("not a run")
    assert "not finished" in reasons[unfinished.name]
    assert reasons[failed.name] == "failed: ZeroDivisionError: division by zero"
    assert "not valid JSON" in reasons[cut.name]
    assert "not a run's record" in reasons["foreign"]
    assert set(reasons) == {"photos", unfinished.name, failed.name, cut.name, "foreign"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("identity.task.name", "<script>"),
        ("training.tokens_per_s", float("nan")),
        ("scores", {"test": {"rows": 3, "digest": "d", "metrics": {"x": {"value": None}}}}),
    ],
)
def test_a_record_that_is_not_ours_is_left_out_not_fatal(tmp_path, path, value):
    put(scored_run(tmp_path, GOOD, BASE), path, value)
    runs, left_out = read_runs([tmp_path])
    assert not runs
    assert len(left_out) == 1


def test_a_strange_key_of_a_record_changes_nothing(tmp_path):
    """Such as `tree`, which is where the typed identity keeps all of its values."""
    put(scored_run(tmp_path, GOOD, BASE), "identity.tree", {})
    report = write.build([tmp_path])
    assert [row.group.configuration for row in report.rows] == ["TABuv"]


def test_the_same_run_twice_counts_once(tmp_path):
    scored_run(tmp_path / "a", GOOD, BASE)
    scored_run(tmp_path / "b", GOOD, BASE)
    runs, left_out = read_runs([tmp_path / "a", tmp_path / "b"])
    assert len(runs) == len(left_out) == 1
    assert "the same run" in left_out[0].reason


def test_no_torch_is_imported(tmp_path):
    world(tmp_path, {"LoRA": 0.5, "TABuv": 0.4}, seeds=2, rows=40)
    program = (
        "import sys, runpy; sys.argv = ['report.py', sys.argv[1], '--out', sys.argv[2]]\n"
        f"runpy.run_path({str(PROJECT / 'scripts/report.py')!r}, run_name='__main__')\n"
        "assert not {'torch', 'transformers', 'wandb'} & set(sys.modules)"
    )
    done = processes.run_python("-c", program, tmp_path, tmp_path / "report")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_thousand_folders_fit_in_memory_and_bad_ones_are_listed(tmp_path):
    """The bound is 1 GB. Time is not tested, because other tests on the same cores double it. (See docs/results.md.)"""
    names = ("LoRA", "TABuv", "TAB", "TA", "Tuv")
    generator = np.random.default_rng(1)
    for task in ("chain_sum", "squad", "gsm8k", "iwslt2017", "dialogsum"):
        for rank in (2, 8, 32, 128):
            for seed in range(10):
                base = np.zeros(20)
                for name in names:
                    ours = (generator.random(20) < 0.5).astype(float)
                    scored_run(tmp_path / "runs", ours, base, name=name, rank=rank, seed=seed, task=task)
    cut, unfinished = sorted(path for path in (tmp_path / "runs").iterdir() if "-s9-" in path.name)[:2]
    (cut / "result.json").write_text((cut / "result.json").read_text()[:300])
    (unfinished / "result.json").unlink()
    (tmp_path / "runs" / "foreign").mkdir()
    program = (
        "import re, sys, pathlib; from tiedlora.page import write\n"
        "report = write.build([pathlib.Path(sys.argv[1])])\n"
        "write.write(report, pathlib.Path(sys.argv[2]))\n"
        # getrusage is not used, because its peak survives exec: a child would report the peak of its parent.
        "peak = re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]\n"
        "print(len(report.runs), len(report.left_out), int(peak) // 1024)"
    )
    done = processes.run_python("-c", program, tmp_path / "runs", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    runs, left_out, mebibytes = map(int, done.stdout.split())
    assert (runs, left_out) == (998, 3)
    assert 0 < mebibytes < 1024


def test_a_curve_has_the_steps_that_logged_its_metric(tmp_path):
    folder = scored_run(tmp_path, GOOD, BASE)
    rows = [MetricsRow(1, {"train/loss": 2.0}), MetricsRow(2, {"validation/loss": 3}), MetricsRow(3, {"train/loss": 1})]
    write_lines(folder / "metrics.jsonl", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": "low"}\n{"step": 5, "train/lo')
    run = read_run(folder)
    assert run.curves("train/") == {"train/loss": ([1, 3], [2.0, 1.0])}
    assert run.curves("loss") == {}
