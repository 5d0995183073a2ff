"""Reading folders of runs: what is read, and what is left out with its reason."""

import pytest
from helpers.hostile import put
from helpers.report_runs import BASE, GOOD, make_record, scored_run, write_lines, write_run

from tiedlora.analysis.runs import logged_curves, read_runs
from tiedlora.page import write
from tiedlora.records.rows import MetricsRow


def test_what_is_no_finished_run_is_listed_with_its_reason(tmp_path):
    scored_run(tmp_path, GOOD, BASE)
    for name in ("sweeps", ".hidden"):
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


def test_of_a_run_and_its_copy_the_one_with_more_scores_counts(tmp_path):
    here, there = write_run(tmp_path / "here", make_record()), scored_run(tmp_path / "there", GOOD, BASE)
    for roots in (["here", "there"], ["there", "here"]):
        (run,), (left_out,) = read_runs([tmp_path / root for root in roots])
        assert (run.path, left_out.path) == (there, here)
        assert left_out.reason == f"the same run as {there}"


def test_scores_that_only_the_copy_has_are_named(tmp_path):
    one, two = scored_run(tmp_path / "one", GOOD, BASE), scored_run(tmp_path / "two", GOOD, BASE, split="test")
    _, (left_out,) = read_runs([tmp_path / "one", tmp_path / "two"])
    unused = "answers of test, answers of test by the base"
    assert (left_out.path, left_out.reason) == (two, f"the same run as {one}; its scores are not used: {unused}")


def test_the_same_id_on_another_base_or_other_rows_is_no_copy(tmp_path):
    """An id has the name of the model's folder, and not what was in it."""
    other_base = {"base.digest": "sha256:2"}
    one = write_run(tmp_path / "one", make_record())
    write_run(tmp_path / "two", make_record(other_base))
    runs, left_out = read_runs([tmp_path / "one", tmp_path / "two"])
    assert (len(runs), left_out) == (2, [])
    assert runs[0].run_id == runs[1].run_id
    write_run(tmp_path / "rows", make_record({"data.train.digest": "other"}))
    _, (left_out,) = read_runs([tmp_path / "one", tmp_path / "rows"])
    assert left_out.reason == f"on other rows than the run of its id in {one}"


def test_a_run_under_an_earlier_name_is_no_second_seed(tmp_path):
    """The id begins with the name of an option, which may have been renamed since."""
    write_run(tmp_path, make_record())
    earlier = write_run(tmp_path / "earlier", make_record())
    put(earlier, "run_id", earlier.name.replace("TABuv", "TABuv_v0"))
    runs, left_out = read_runs([tmp_path, tmp_path / "earlier"])
    assert (len(runs), [other.path for other in left_out if "same run" in other.reason]) == (1, [earlier])


def test_a_strange_key_of_a_record_changes_nothing(tmp_path):
    """Such as `tree`, which is where the typed identity keeps all of its values."""
    put(scored_run(tmp_path, GOOD, BASE), "identity.tree", {})
    report = write.build([tmp_path])
    assert [row.group.configuration for row in report.rows] == ["TABuv"]


@pytest.mark.parametrize(
    ("key", "value"), [("identity.train.steps", float("nan")), ("identity.model.architecture", None)]
)
def test_a_record_that_cannot_be_compared_is_left_out(tmp_path, key, value):
    put(scored_run(tmp_path, GOOD, BASE, name="TABuv_b0"), key, value)
    scored_run(tmp_path, GOOD, BASE)
    report = write.build([tmp_path])
    assert [row.group.configuration for row in report.rows] == ["TABuv"]
    assert len(report.left_out) == 1


def test_the_same_run_twice_counts_once(tmp_path):
    scored_run(tmp_path / "a", GOOD, BASE)
    scored_run(tmp_path / "b", GOOD, BASE)
    runs, left_out = read_runs([tmp_path / "a", tmp_path / "b"])
    assert len(runs) == len(left_out) == 1
    assert "the same run" in left_out[0].reason


def test_a_curve_has_the_steps_that_logged_its_metric(tmp_path):
    folder = scored_run(tmp_path, GOOD, BASE)
    rows = [MetricsRow(1, {"train/loss": 2.0}), MetricsRow(2, {"validation/loss": 3}), MetricsRow(3, {"train/loss": 1})]
    write_lines(folder / "metrics.jsonl", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": "low"}\n{"step": 5, "train/lo')
    assert logged_curves(folder, "train/") == {"train/loss": {1: 2.0, 3: 1.0}}
    assert logged_curves(folder, "loss") == {}
