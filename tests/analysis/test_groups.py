"""Groups: which runs are averaged, at which learning rate, and what is marked or refused."""

import json

from helpers.hostile import put_in_scores
from helpers.report_runs import BASE, GOOD, make_record, primary_row, scored_run, write_config

from tiedlora.analysis.groups import differing_values, group_runs
from tiedlora.analysis.runs import read_runs
from tiedlora.page import write
from tiedlora.records.provenance import CodeVersion, ContinuedFrom, Execution
from tiedlora.records.selection import RateChoice, Selection, write_selection
from tiedlora.tying import LrFactors


def test_the_rate_is_chosen_on_validation_over_the_seeds_that_all_rates_share(tmp_path):
    for lr, right, seeds in ((1e-3, 10, 2), (1e-2, 30, 5), (3e-2, 20, 2)):
        for seed in range(seeds):
            scored_run(tmp_path, [1.0] * right + [0.0] * (50 - right), BASE, lr=lr, seed=seed)
    (group,) = group_runs(read_runs([tmp_path])[0])
    assert group.lr == 1e-2
    assert [run.seed for run in group.runs] == [0, 1, 2, 3, 4]
    assert group.rates == (1e-3, 1e-2, 3e-2)
    assert not group.marks


def ended(root, lr, seed=0, changes=None, **files):
    """The folder of a run without a result: failed with error="...", or pruned with pruned="..."."""
    record = make_record(changes, lr=lr, seed=seed)
    folder = root / record.run_id
    folder.mkdir(parents=True)
    write_config(folder, record)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)


def test_a_winner_at_the_edge_and_a_failed_rate_are_marked_and_a_single_rate_is_not(tmp_path):
    scored_run(tmp_path, [1.0] * 10 + [0.0] * 40, BASE, lr=1e-3)
    (group,) = group_runs(*read_runs([tmp_path]))
    assert not group.marks
    for lr, right in ((1e-2, 20), (3e-2, 30), (1e-1, 40)):
        scored_run(tmp_path, [1.0] * right + [0.0] * (50 - right), BASE, lr=lr)
    (group,) = group_runs(*read_runs([tmp_path]))
    assert group.lr == 1e-1
    assert group.marks == ["the chosen rate 0.1 is at the edge of those tried (0.001 to 0.1)"]
    ended(tmp_path, 1e-1, seed=1, error="UserError: the loss is nan")
    (group,) = group_runs(*read_runs([tmp_path]))
    assert group.lr == 3e-2, "a rate that diverges at one seed is not a rate to use"
    assert any("seed 1 at lr 0.1 failed" in mark for mark in group.marks)


def test_a_failure_counts_for_its_own_group_only(tmp_path):
    """Two specifications without a name of their own: their folders' names differ in the hash alone."""
    mine, other = ({"config.tying.dropout": dropout} for dropout in (0.1, 0.2))
    for changes in (mine, other):
        scored_run(tmp_path, GOOD, BASE, changes=changes)
    ended(tmp_path, 1e-2, seed=1, changes=other, error="tiedlora.errors.Diverged: step 3\n")
    groups = group_runs(*read_runs([tmp_path]))
    found = {group.runs[0].record.identity.tying["dropout"]: group.diverged_seeds for group in groups}
    assert found == {0.1: set(), 0.2: {1}}


def test_a_failed_copy_of_a_finished_run_is_no_failure(tmp_path):
    done = scored_run(tmp_path / "here", GOOD, BASE)
    ended(tmp_path / "there", 1e-2, error="tiedlora.errors.Diverged: step 3\n")
    assert (tmp_path / "there" / done.name).exists()
    (group,) = group_runs(*read_runs([tmp_path / "here", tmp_path / "there"]))
    assert (len(group.runs), group.short_marks) == (1, [])
    # A copy under another name, beside the run that has finished since.
    (tmp_path / "there" / done.name).rename(tmp_path / "here" / f"{done.name}.bak")
    (group,) = group_runs(*read_runs([tmp_path / "here"]))
    assert (len(group.runs), group.rates, group.short_marks) == (1, (0.01,), [])


def test_scores_that_were_made_by_other_code_than_the_other_seeds_are_marked(tmp_path):
    folders = [scored_run(tmp_path, GOOD, BASE, seed=seed) for seed in range(2)]
    put_in_scores(folders[1] / "scores" / "validation.answers.jsonl", "code", {"commit": "b" * 40, "dirty": True})
    put_in_scores(folders[1] / "scores" / "validation.answers.jsonl", "execution.device", "cuda")
    (group,) = group_runs(*read_runs([tmp_path]))
    assert group.short_marks == ["mixed"]
    assert group.marks == [
        "mixed commits of the answers on validation: aaaaaaaa; bbbbbbbb",
        "mixed devices of the answers on validation: cpu, 1 threads; cuda, 1 threads",
        "the answers on validation were scored by uncommitted code",
    ]


def test_other_protocols_are_other_rows_and_named(tmp_path):
    scored_run(tmp_path, GOOD, BASE)
    scored_run(tmp_path, GOOD, BASE, changes={"config.train.steps": 300})
    for dropout in (0.1, 0.2):
        scored_run(tmp_path, GOOD, BASE, changes={"config.tying.dropout": dropout})
    scored_run(tmp_path, GOOD, BASE, changes={"config.rank.alpha": 16.0})
    groups = group_runs(read_runs([tmp_path])[0])
    assert {(group.configuration, group.variant) for group in groups} == {
        ("TABuv (rank.alpha=8.0)", "train.steps=100"),
        ("TABuv (rank.alpha=16.0)", "train.steps=100"),
        ("custom (TABuv) (tying.dropout=0.1)", "train.steps=100"),
        ("custom (TABuv) (tying.dropout=0.2)", "train.steps=100"),
        ("TABuv", "train.steps=300"),
    }


def test_other_rates_of_a_part_are_another_arm_in_the_same_setting(tmp_path):
    for factors in (LrFactors(), LrFactors(B=16.0)):
        scored_run(tmp_path, GOOD, BASE, name="LoRA", changes={"config.train.lr_factor": factors})
    groups = group_runs(read_runs([tmp_path])[0])
    assert {group.configuration for group in groups} == {"LoRA (lr_factor.B=1.0)", "LoRA (lr_factor.B=16.0)"}
    assert len({group.setting for group in groups}) == 1


def test_another_base_model_of_the_same_name_is_another_setting(tmp_path):
    for seed, digest in enumerate(("sha256:1", "sha256:2")):
        scored_run(tmp_path, GOOD, BASE, seed=seed, changes={"base.digest": digest})
    assert [group.variant for group in group_runs(read_runs([tmp_path])[0])] == ["base=sha256:1", "base=sha256:2"]


def test_mixed_data_have_no_mean(tmp_path):
    scored_run(tmp_path, GOOD, BASE, name="LoRA")
    scored_run(tmp_path, GOOD, BASE, seed=0)
    scored_run(tmp_path, GOOD, BASE, seed=1, changes={"data.train.digest": "other"})
    row = primary_row(write.build([tmp_path]).rows, "TABuv")
    assert row.score is None
    assert any("different data" in note for note in row.notes)


def test_a_run_that_was_continued_elsewhere_is_marked(tmp_path):
    earlier = ContinuedFrom(
        step=40,
        code=CodeVersion("b" * 40, dirty=True),
        versions={"torch": "2.12", "transformers": "5.24"},
        execution=Execution("cpu", threads=2, processor="AMD EPYC (AVX512)"),
    )
    changes = {"training.continued_from": [earlier], "execution.processor": "Intel Xeon (AVX512)"}
    scored_run(tmp_path, GOOD, BASE, changes=changes)
    report = write.build([tmp_path])
    assert primary_row(report.rows, "TABuv").group.marks == [
        "mixed commits: aaaaaaaa, bbbbbbbb",
        "made by uncommitted code",
        "mixed versions of torch: 2.12, 2.13",
        "mixed devices: cpu, 1 threads; cpu, 2 threads",
        "mixed processors: AMD EPYC (AVX512); Intel Xeon (AVX512)",
    ]
    assert "code aaaaaaaa, bbbbbbbb;" in report.summary()


def test_groups_on_other_rows_are_not_subtracted(tmp_path):
    scored_run(tmp_path, GOOD, BASE, name="LoRA")
    folder = scored_run(tmp_path, GOOD, BASE)
    put_in_scores(folder / "scores" / "validation.answers.jsonl", "digest", "other rows")
    row = primary_row(write.build([tmp_path]).rows, "TABuv")
    assert row.score is not None
    assert row.against.difference is None
    assert any("other data" in note for note in row.notes)


def test_a_seed_without_the_split_is_missing_not_filled_in(tmp_path):
    for seed, split, model in ((0, "test", "tiny"), (1, "validation", "tiny"), (0, "validation", "other")):
        scored_run(tmp_path, GOOD, BASE, split=split, seed=seed, model=f"org/{model}")
    other, row = write.build([tmp_path]).rows
    assert (row.measure.split, row.seeds) == ("test", (0,))
    assert (other.measure.split, other.seeds) == ("validation", (0,)), "another model has a split of its own"
    assert any("not scored on test: seed 1" in note for note in row.notes)


def recorded(root, sweep, lr, lrs, runs, tied=()):
    """The group of the report, after a sweep has recorded a choice among these rates, with these runs at the chosen."""
    choice = RateChoice(
        "tiny",
        "chain_sum",
        "TABuv",
        8,
        lr,
        lrs,
        "validation/loss",
        1.0,
        seeds=len(runs),
        trials=len(runs) * len(lrs),
        failed=0,
        edge=False,
        run_ids=[path.name for path in runs],
        tied=list(tied),
    )
    write_selection(root / "sweeps" / sweep / "selection.json", Selection(sweep, "loss", [choice]))
    (group,) = write.build([root]).groups
    return group


def test_a_race_that_ended_as_a_tie_is_marked_and_a_record_from_before_races_is_none(tmp_path):
    run = scored_run(tmp_path, GOOD, BASE, lr=1e-2)
    group = recorded(tmp_path, "s", 1e-2, [1e-3, 3e-3, 1e-2, 3e-2], [run], tied=[3e-3])
    assert group.marks == ["the choice of the rate 0.01 is a tie with 0.003"]
    assert group.short_marks == ["rate tied"]
    file = tmp_path / "sweeps" / "s" / "selection.json"
    tree = json.loads(file.read_text())
    del tree["choices"][0]["tied"]
    file.write_text(json.dumps(tree))
    (group,) = write.build([tmp_path]).groups
    assert group.marks == group.short_marks == []


def test_the_choice_that_a_sweep_recorded_stands(tmp_path):
    """A staged search compares on other seeds than the report would, so its choice is not made again."""
    paths = {lr: scored_run(tmp_path, GOOD if lr == 1e-2 else BASE, BASE, lr=lr) for lr in (1e-3, 1e-2)}
    group = recorded(tmp_path, "s", 1e-3, [1e-4, 1e-3, 1e-2], [paths[1e-3]])
    assert group.lr == 1e-3
    assert group.rates == (1e-4, 1e-3, 1e-2), "pruned rates have no run, and count as tried"
    assert group.marks == ["selection.json chose the rate 0.001; the runs here would choose 0.01"]
    (tmp_path / "sweeps" / "s" / "selection.json").write_text("{}")
    report = write.build([tmp_path])
    assert report.groups[0].lr == 1e-2
    assert report.left_out[0].reason.startswith("has no 'sweep'")


def test_of_several_recorded_choices_the_one_of_the_fewest_seeds_stands_unless_another_had_more_rates(tmp_path):
    """The choice at a look decides its verdict, so a later sweep with more seeds must not change it."""
    paths = {
        (lr, seed): scored_run(tmp_path, GOOD, BASE, lr=lr, seed=seed) for lr in (1e-3, 1e-2, 1e-1) for seed in range(3)
    }

    def record(sweep, lr, lrs, seeds):
        return recorded(tmp_path, sweep, lr, lrs, [paths[lr, seed] for seed in range(seeds)])

    assert record("b-look", 1e-3, [1e-3, 1e-2], 2).lr == 1e-3
    group = record("a-later", 1e-2, [1e-3, 1e-2], 3)
    assert group.lr == 1e-3
    assert "another selection.json chose 0.01" in group.marks
    assert record("c-more-rates", 1e-1, [1e-3, 1e-2, 1e-1], 3).lr == 1e-1


def test_long_values_in_names_are_cut_and_stay_different():
    prompts = ["Solve the following problem. {q}", "Solve the following problem step by step. {q}"]
    names = differing_values(["a", "a"], [{"prompt": prompt} for prompt in prompts])
    assert all(name.startswith("prompt=Solve the following p... #") for name in names)
    assert len(set(names)) == 2
