"""Which of several groups a claim compares, and what it says of tasks that one of several models has not run."""

import numpy as np
import pytest
from helpers.report_runs import scored_run, world

from tiedlora.config.schema import LrFactors
from tiedlora.page import matrix, write

CLAIM = """looks: [3, 5]
claims:
  - name: better
    method: {configuration: TABuv, rank: 8}
    comparator: {configuration: LoRA, at: equal_rank}
    better_by: 0.0
    tasks: %s
"""
CHANGES = {
    "rank.scaling": {"config.rank.scaling": "rslora"},
    "rank.alpha": {"config.rank.alpha": 16.0},
    "lr_factor.B": {"config.train.lr_factor": LrFactors(B=16.0)},
}


def report_of(tmp_path, tasks="[]"):
    path = tmp_path / "claims.yaml"
    path.write_text(CLAIM % tasks)
    return write.build([tmp_path / "runs"], claims=path)


def add(tmp_path, name, success, changes=None, rank=8):
    """Three seeds whose scores are near a rate of success."""
    base = np.zeros(400)
    for seed in range(3):
        draws = np.random.default_rng([seed, len(name)]).random(400)
        scored_run(
            tmp_path / "runs", (draws < success).astype(float), base, name=name, seed=seed, rank=rank, changes=changes
        )


@pytest.mark.parametrize("change", CHANGES)
def test_of_several_comparators_the_plain_one_is_compared_as_in_the_tables(tmp_path, change):
    add(tmp_path, "TABuv", 0.5)
    add(tmp_path, "LoRA", 0.3)
    add(tmp_path, "LoRA", 0.7, CHANGES[change])
    report = report_of(tmp_path)
    (found,) = report.answers
    assert found.verdict == "supported"
    assert found.pair.comparator.is_plain
    (row,) = [row for row in report.rows if row.group.label == "TABuv"]
    assert row.difference.value == pytest.approx(found.difference.value)


@pytest.mark.parametrize("change", CHANGES)
def test_without_a_plain_one_it_is_the_one_that_scales_its_steps_as_the_method(tmp_path, change):
    add(tmp_path, "TABuv", 0.5, CHANGES[change])
    for other in CHANGES:
        add(tmp_path, "LoRA", 0.3 if other == change else 0.7, CHANGES[other])
    (found,) = report_of(tmp_path).answers
    assert found.verdict == "supported"
    assert found.pair.comparator.step_size == found.pair.method.step_size


def test_sides_of_two_ranks_are_matched_by_alpha_for_each_rank(tmp_path):
    claim = CLAIM.replace("at: equal_rank", "rank: 2")
    for rank, name, success, change in (
        (8, "TABuv", 0.5, {"config.rank.scaling": "rslora"}),
        (2, "LoRA", 0.3, {"config.rank.scaling": "rslora"}),
        (2, "LoRA", 0.7, {"config.rank.alpha": 16.0}),
    ):
        add(tmp_path, name, success, change, rank)
    path = tmp_path / "claims.yaml"
    path.write_text(claim % "[]")
    (found,) = write.build([tmp_path / "runs"], claims=path).answers
    assert found.verdict == "supported"


def test_if_none_of_several_fits_the_answer_names_them(tmp_path):
    add(tmp_path, "TABuv", 0.5)
    for change in ("rank.scaling", "rank.alpha"):
        add(tmp_path, "LoRA", 0.3, CHANGES[change])
    (found,) = report_of(tmp_path).answers
    assert found.verdict == "undecided"
    assert "several groups fit, and no single one is plain" in found.reason
    assert "rank.scaling=rslora" in found.reason


def test_a_task_that_one_model_has_not_run_leaves_the_claim_undecided_for_it(tmp_path):
    """It was once left out as soon as another model had run it."""
    truth, options = {"LoRA": 0.3, "TABuv": 0.6}, {"seeds": 3, "rows": 200}
    for model, task in (("org/a", "chain_sum"), ("org/a", "gsm8k"), ("org/b", "chain_sum")):
        world(tmp_path / "runs", truth, model=model, task=task, **options)
    report = report_of(tmp_path, tasks="[chain_sum, gsm8k]")
    found = {verdict.model: (verdict.verdict.value, verdict.reason) for verdict in report.verdicts}
    assert found["a"] == ("supported", "2 of 2 informative tasks support it")
    assert found["b"] == ("undecided", "1 of 2 informative tasks support it")
    shown = {
        model.model: [cell.verdict for cell in model.rows[0].cells]
        for model in matrix.by_model(report.verdicts, ["a", "b"])
    }
    assert shown == {"a": ["supported", "supported"], "b": ["supported", "not run"]}
