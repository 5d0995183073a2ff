"""The report's numbers: they are computed from predictions, and equal to those of the records."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.hostile import change_rows
from helpers.report_runs import (
    BASE,
    GOOD,
    METRIC,
    make_config,
    make_record,
    prediction_rows,
    primary_row,
    score_run,
    scored_run,
    world,
    write_run,
)

from tiedlora.analysis import intervals
from tiedlora.analysis.groups import RunGroup, group_runs
from tiedlora.analysis.intervals import pseudo_values
from tiedlora.analysis.results import AgainstLora, result_rows
from tiedlora.analysis.runs import Scorebook, read_runs, run_roots
from tiedlora.errors import UserError
from tiedlora.page import write
from tiedlora.places import PROJECT
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_scores
from tiedlora.tasks import Example, load_task


def test_every_number_equals_a_recomputation_from_predictions(tmp_path):
    world(tmp_path, {"LoRA": 0.5, "TABuv": 0.4, "TA": 0.2}, seeds=4, rows=60)
    rows = write.build([tmp_path]).rows
    lora = primary_row(rows, "LoRA")
    for row in rows:
        ours = np.array([recomputed(run.path) for run in row.group.runs])
        base = recomputed(row.group.runs[0].path, base=True)
        assert row.score.value == pytest.approx(ours.mean())
        assert row.gain.value == pytest.approx((ours - base).mean())
        if row.group.label != "LoRA":
            theirs = np.array([recomputed(run.path) for run in lora.group.runs])
            per_seed = ours.mean(1) - theirs.mean(1)
            # Student's t by hand: 3.182 is the 97.5 % point of 3 degrees of freedom.
            half = 3.18245 * per_seed.std(ddof=1) / 2
            assert row.against.difference.value == pytest.approx(per_seed.mean())
            assert row.against.difference.seeds.low == pytest.approx(per_seed.mean() - half, abs=1e-6)
            assert row.against.retained.value == pytest.approx((ours - base).mean() / (theirs - base).mean())


def recomputed(path, base=False):
    folder = RunFolder(path)
    file = folder.scores_file("validation", "answers")
    if base:
        file = folder.base_scores_file(read_scores(file).record.base)
    return np.array([json.loads(line)["scores"][METRIC] for line in file.read_text().splitlines()[1:]])


def numbers(interval):
    return interval.value, interval.low, interval.high


@pytest.mark.parametrize("kind", ["binary", "mean"])
def test_one_run_has_the_intervals_of_its_record_which_are_those_of_its_rows(tmp_path, kind):
    generator = np.random.default_rng(2)
    if kind == "binary":
        ours, base = (generator.random((2, 200)) < [[0.5], [0.3]]).astype(float)
    else:  # as for F1
        ours, base = generator.beta([[2], [1]], 5, (2, 200))
    scored_run(tmp_path, ours, base, metric="score")
    row = primary_row(write.build([tmp_path]).rows, "TABuv")
    (recorded,) = row.group.runs[0].scores.of("validation")
    assert (row.score.examples, row.gain.examples) == (recorded.metrics["score"], recorded.gain["score"])
    assert row.score.seeds is None
    paired = intervals.over_examples(ours[None], base[None])
    assert numbers(paired) == pytest.approx(numbers(recorded.gain["score"]), abs=1e-12)


def test_one_run_has_the_intervals_of_its_record_for_a_corpus_metric_too(tmp_path):
    generator = np.random.default_rng(7)
    words = ["the", "cat", "dog", "sat", "ran", "on", "over", "mat", "hill", "and", "then", "it", "was", "seen"]
    references = [" ".join(generator.choice(words, 9)) for _ in range(40)]
    outputs = [text if number % 3 else " ".join(text.split()[::-1]) for number, text in enumerate(references)]
    task = load_task(make_config(task="iwslt2017", kind="iwslt2017").task)
    ours = [
        dataclasses.replace(row, output=output, scores=task.score(output, Example(row.id, "", reference, (reference,))))
        for row, output, reference in zip(prediction_rows([0.0] * 40), outputs, references, strict=True)
    ]
    record = make_record(task="iwslt2017", kind="iwslt2017")
    write_run(tmp_path, record)
    recorded = score_run(tmp_path, record, "test", ours, task=task)["answers"]
    rows = write.build([tmp_path]).rows
    assert [row.measure.metric for row in rows] == ["bleu", "chrf"]
    for row in rows:
        assert row.score.examples == recorded.metrics[row.measure.metric]
        assert row.score.examples.low < row.score.value < row.score.examples.high


def test_rows_that_disagree_with_their_first_line_give_no_interval(tmp_path):
    folder, other = (RunFolder(scored_run(tmp_path, GOOD, BASE, seed=seed)) for seed in range(2))
    own, others = (each.scores_file("validation", "answers") for each in (folder, other))
    for path in (folder.base_scores_file(read_scores(own).record.base), others):
        head, *rows = path.read_text().splitlines(keepends=True)
        path.write_text(head + "".join(reversed(rows)))
        change_rows(path, lambda _row: None)
        row = primary_row(write.build([tmp_path]).rows, "TABuv")
        assert row.gain.examples is None, "rows in another order"
        assert len([note for note in row.notes if "no interval over examples" in note]) == 1
    assert any("its scores are of other examples" in note for note in row.notes)
    change_rows(own, lambda row: row.update(scores={METRIC: 0.0}), [0])
    row = primary_row(write.build([tmp_path]).rows, "TABuv")
    assert row.score.examples is None
    assert any("verify.py" in note for note in row.notes)


def test_a_method_without_a_rank_is_not_compared_with_lora_of_the_default_rank(monkeypatch):
    monkeypatch.setattr(RunGroup, "rank", 8)
    runs, _ = read_runs(run_roots([PROJECT / "studies" / "reward-or-targets"]))
    groups = [group for group in group_runs(runs) if group.label in ("LoRA", "peft/tinylora")]
    (row,) = [row for row in result_rows(groups, Scorebook()) if row.group.is_other_method and row.primary]
    assert row.against == AgainstLora()


def test_damaged_clusters_are_an_error_and_no_missing_scores(tmp_path):
    scored_run(tmp_path / "runs", GOOD, BASE)
    (tmp_path / "clusters.json").write_text("{")
    with pytest.raises(UserError, match=r"clusters\.json: is not valid JSON"):
        write.build([tmp_path / "runs"])


def test_corpus_scores_are_served_by_pseudo_values():
    """For a ratio of sums (as in BLEU), pseudo-values give the score and the spread of resampled sentences."""
    generator = np.random.default_rng(3)
    length = generator.integers(5, 30, 400).astype(float)
    counts = np.stack([generator.binomial(length.astype(int), 0.6), length], axis=1)

    def score(sums):
        return float(sums[0] / sums[1])

    values = pseudo_values(counts, score)
    assert values.mean() == pytest.approx(score(counts.sum(0)))
    drawn = generator.integers(0, 400, (2000, 400))
    resampled = np.array([score(counts[rows].sum(0)) for rows in drawn])
    found = intervals.bootstrap_mean(values, (0.0, 1.0))
    expected = np.quantile(resampled, [0.025, 0.975])
    assert [found.low, found.high] == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))


def test_a_seed_far_from_the_others_is_flagged(tmp_path):
    for seed in range(6):
        right = 5 if seed == 4 else 140 + seed
        scored_run(tmp_path, [1.0] * right + [0.0] * (200 - right), [0.0] * 200, seed=seed)
    row = primary_row(write.build([tmp_path]).rows, "TABuv")
    assert any(note.startswith("seed 4 is far from the others") for note in row.notes)


@pytest.mark.parametrize("name", ["LoRA", "TABuv"])
def test_a_difference_over_fewer_seeds_than_a_side_has_says_so(tmp_path, name):
    for arm in ("LoRA", "TABuv"):
        world(tmp_path, {arm: 0.5}, seeds=4 if arm == name else 3)
    assert "compared with LoRA: 3 seeds in common" in primary_row(write.build([tmp_path]).rows, "TABuv").notes
