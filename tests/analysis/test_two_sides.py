"""Is B better than A: the report's numbers, a library's tests, other programs' files, and mistakes in one line."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.report_runs import BASE, GOOD, make_record, prediction_rows, score_run, scored_run, write_run
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from tiedlora.analysis import intervals, rules
from tiedlora.analysis.comparison import compare
from tiedlora.analysis.groups import group_runs
from tiedlora.analysis.intervals import Clusters
from tiedlora.analysis.row_files import read_row_file, read_samples
from tiedlora.analysis.runs import Measure, Scorebook, read_runs, run_roots
from tiedlora.analysis.two_sides import compare_sides, left_out, read_side
from tiedlora.errors import UserError
from tiedlora.places import PROJECT

HARNESS = PROJECT / "tests" / "fixtures" / "lm_eval"
STUDY = PROJECT / "studies" / "reward-or-targets"


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(path: Path, scores, **fields) -> Path:
    """A file with a row for each score; `fields` are lists of the same length."""
    own = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)] or [{}] * len(
        scores
    )
    return write_rows(
        path, [{"id": i, "correct": s, **more} for i, (s, more) in enumerate(zip(scores, own, strict=True))]
    )


def compared(a, b, *metrics, **options):
    """The tests of B against A, each a path or a list of paths."""
    cluster = options.pop("cluster", None)
    sides = [read_side(n, p if isinstance(p, list) else [p], cluster) for n, p in (("A", a), ("B", b))]
    return compare_sides(*sides, metrics, **options)


def binary(seed, rows, p):
    return (np.random.default_rng(seed).random(rows) < p).astype(int).tolist()


class TestAgainstTheReport:
    @pytest.mark.parametrize("names", [("TA", "LoRA"), ("LoRA (reward)", "LoRA"), ("peft/tinylora", "TA")], ids=str)
    @pytest.mark.parametrize("seeds", [1, 3])
    def test_every_number_of_a_study_is_that_of_its_report(self, names, seeds):
        """Of one seed it is an interval over rows, Newcombe's or a bootstrap; of three one over seeds and rows."""
        runs, _ = read_runs(run_roots([STUDY]))
        groups = {group.label: group for group in group_runs(runs)}
        method, comparator = (groups[name] for name in names)
        method.runs, comparator.runs = method.runs[:seeds], comparator.runs[:seeds]
        metrics = list(method.runs[0].scores.metrics("test"))
        tests = compared([run.path for run in comparator.runs], [run.path for run in method.runs], *metrics)
        assert len(tests) == len(metrics) >= 4
        for test in tests:
            difference, _ = compare(method, comparator, Measure("test", test.metric), Scorebook()).difference()
            assert test.difference == difference
            assert test.seeds == seeds == difference.count

    def test_what_a_report_would_not_compare_is_said(self, tmp_path):
        folders = [scored_run(tmp_path, GOOD, BASE, name=name, split="test") for name in ("LoRA", "TABuv")]
        folders += [scored_run(tmp_path, GOOD, BASE, changes={"config.train.steps": 300}, model="org/x", split="test")]
        (alike,), (unlike,) = (compared(folders[0], folder) for folder in folders[1:])
        assert not any("also differ" in note for note in alike.notes)
        assert "A and B also differ in model.name, train.steps" in unlike.notes

    def test_a_file_of_scores_has_the_numbers_of_its_run(self, tmp_path):
        outputs = tmp_path / "outputs"
        for seed, scores in ((0, GOOD), (1, binary(3, 50, 0.4))):
            record = make_record(seed=seed)
            write_run(outputs, record)
            score_run(outputs, record, "test", prediction_rows(scores))
        first, second = sorted(outputs.glob("TABuv-*"))
        (of_runs,) = compared(first, second)
        (of_files,) = compared(*(run / "scores" / "test.answers.jsonl" for run in (first, second)))
        assert of_files.difference == of_runs.difference
        assert of_files.p == of_runs.p
        assert of_runs.split == "test"


class TestHarness:
    def test_scores_are_those_that_the_harness_reports(self):
        for model in ("tiny", "smollm2"):
            folder = HARNESS / model
            (results,) = folder.glob("results_*.json")
            reported = json.loads(results.read_text())["results"]
            for file in read_samples(folder):
                own = reported[file.task]
                assert len(file.rows.ids) == own["sample_len"]
                for metric, values in file.rows.of_metric.items():
                    assert values.mean() == pytest.approx(own[metric if "," in metric else f"{metric},none"])

    def test_tasks_filters_and_rows_are_paired(self):
        choice, written = compared(HARNESS / "tiny", HARNESS / "smollm2")
        assert (choice.task, choice.metric, choice.rows, choice.answer) == ("sums_choice", "acc", 30, "not shown")
        assert (written.task, written.metric, written.rows) == ("sums_written", "exact_match,strict", 12)
        assert (written.answer, written.alone, written.p) == ("better", (0, 12), 2 / 2**12)
        (flexible,) = compared(HARNESS / "tiny", HARNESS / "smollm2", "exact_match,flexible")
        assert flexible.b == 1.0
        # Of texts there is no score of a row.
        (file,) = (file for file in read_samples(HARNESS / "tiny") if file.task == "sums_written")
        assert "is no number" in file.rows.unreadable["bleu,strict"]

    def test_a_document_that_is_there_twice_is_told_apart_by_its_place_in_the_data(self):
        for file in read_samples(HARNESS / "tiny"):
            assert len({name.split("/")[0] for name in file.rows.ids}) < len(file.rows.ids)

    def test_the_newest_output_counts_and_its_results_say_which_way_is_better(self, tmp_path):
        for model, more in (("a", 0.0), ("b", 1.5)):
            for time, extra in (("2026-01-01T10-00-00.5", 7), ("2026-01-02T10-00-00.5", 0)):
                folder = tmp_path / "out" / model
                folder.mkdir(parents=True, exist_ok=True)
                errors = [1 + more + extra + place / 8 * (1 + more) for place in range(8)]
                rows = [{"doc_hash": f"h{i}", "metrics": ["nats"], "nats": x} for i, x in enumerate(errors)]
                write_rows(folder / f"samples_prose_{time}.jsonl", rows)
                higher = {"higher_is_better": {"prose": {"nats": False}}}
                (folder / f"results_{time}.json").write_text(json.dumps(higher))
        (test,) = compared(tmp_path / "out" / "a", tmp_path / "out" / "b")
        assert (test.a, test.lower_is_better, test.answer) == (1.4375, True, "worse")
        assert any("the newest of 2 outputs of prose counts" in note for note in test.notes)


class TestStatistics:
    @pytest.mark.parametrize("seed", range(4))
    def test_mcnemar_is_that_of_statsmodels(self, seed, tmp_path):
        a, b = binary(seed, 80, 0.4), binary(100 + seed, 80, 0.55)
        (test,) = compared(scored(tmp_path / "a", a), scored(tmp_path / "b", b))
        table = np.histogram2d(a, b, bins=2)[0]
        assert test.test == "exact McNemar"
        assert test.p == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-12)
        assert test.alone == (int(table[1, 0]), int(table[0, 1]))

    @pytest.mark.parametrize("differing", [6, 7, 40, 151])
    def test_mcnemar_shows_the_smallest_difference_with_the_power_that_is_said(self, differing):
        rows = 400
        a, b = np.zeros(rows), np.repeat([1.0, 0.0], (differing, rows - differing))
        smallest = intervals.smallest_shown_by_mcnemar(a, b)
        counts = np.arange(differing + 1)
        rejects = np.array([stats.binomtest(int(count), differing).pvalue <= 0.05 for count in counts])
        above = rejects & (counts > differing / 2)
        chance = (1 + smallest * rows / differing) / 2
        assert stats.binom.pmf(counts, differing, chance)[above].sum() == pytest.approx(0.8)

    def test_five_rows_that_differ_show_nothing(self, tmp_path):
        (test,) = compared(scored(tmp_path / "a", [0] * 20), scored(tmp_path / "b", [1] * 5 + [0] * 15))
        assert (test.smallest, test.answer) == (None, "not shown")
        assert "only 5 rows differ, and the exact test needs 6" in test.notes

    def test_of_one_seed_it_is_students_paired_test(self):
        values = np.random.default_rng(0).normal(0.05, 0.3, (1, 120))
        assert intervals.level_of(values) == pytest.approx(stats.ttest_1samp(values[0], 0).pvalue)

    @pytest.mark.parametrize("seeds", [1, 3])
    @pytest.mark.parametrize("clusters", [None, Clusters(np.repeat(np.arange(12), 10))])
    def test_at_its_level_the_interval_ends_at_zero(self, seeds, clusters):
        values = np.random.default_rng(1).normal(0.0, 0.3, (seeds, 120))
        values += 0.02 - values.mean()
        if seeds > 1:
            half = intervals.both_interval(values, intervals.level_of(values, clusters), clusters)
            assert abs(half.low) < 1e-8
        # A level of exactly 5 % is that of the 95 % interval, whose end is then 0.
        found = intervals.over_examples(values, None, clusters or Clusters(np.arange(120))) if seeds == 1 else half
        width = found.value - found.low
        if seeds == 1:
            assert intervals.level_of(values - values.mean() + width, clusters) == pytest.approx(0.05)

    def test_a_difference_that_is_the_same_everywhere_has_the_level_of_a_test_of_signs(self):
        assert intervals.level_of(np.full((1, 4), 0.3)) == 2 / 2**4
        assert intervals.level_of(np.zeros((1, 4))) == 1.0

    @pytest.mark.parametrize("kind", ["rows", "clusters", "seeds"])
    def test_the_smallest_difference_is_shown_in_80_per_cent(self, kind):
        generator, draws = np.random.default_rng(2), 400
        clusters = Clusters(np.repeat(np.arange(20), 6)) if kind == "clusters" else None

        def drawn(mean):
            if kind == "seeds":
                of_rows, of_seeds = generator.normal(0, 0.3, (1, 120)), generator.normal(0, 0.02, (3, 1))
                return mean + of_rows + of_seeds + generator.normal(0, 0.3, (3, 120))
            of_clusters = np.repeat(generator.normal(0, 0.2, 20), 6) if clusters else 0.0
            return mean + of_clusters + generator.normal(0, 0.4, (1, 120))

        smallest = np.mean([intervals.smallest_shown(drawn(0.0), clusters) for _ in range(draws)])
        shown = np.mean([intervals.level_of(drawn(smallest), clusters) <= 0.05 for _ in range(draws)])
        assert shown == pytest.approx(0.8, abs=3 * np.sqrt(0.16 / draws) + 0.03)

    @pytest.mark.parametrize("sizes", ["5 equal", "8 equal", "20 equal", "50 unequal"])
    @pytest.mark.parametrize("spread", [0.3, 1.0])
    def test_intervals_over_dependent_rows_cover_93_to_98_per_cent(self, sizes, spread):
        """Right or wrong answers of two models of equal skill, which share what is hard, in whole clusters too."""
        generator, draws, inside = np.random.default_rng([int(sizes.split()[0]), round(10 * spread)]), 500, []
        while len(inside) < draws:
            count = int(sizes.split()[0])
            of = np.full(count, 10) if "un" not in sizes else 1 + generator.geometric(0.1, count)
            codes = np.repeat(np.arange(count), of)
            hard = generator.normal(size=count)[codes] + generator.normal(size=len(codes))
            taste = generator.normal(0, spread, (2, 1, count))[..., codes]
            a, b = (generator.random((2, 1, len(codes))) < 1 / (1 + np.exp(-hard - taste))).astype(float)
            clusters = Clusters.of(list(map(str, codes)))
            if clusters is not None:
                found = intervals.over_examples(b, a, clusters)
                inside.append(found.low <= 0 <= found.high)
        error = 3 * np.sqrt(0.05 * 0.95 / draws)
        assert 0.93 - error <= np.mean(inside) <= 0.98 + error

    def test_the_number_of_a_cluster_is_no_score_and_belongs_to_a_row(self, tmp_path):
        scores, articles = [[0, 1] * 10, [1] * 20], [row // 2 for row in range(20)]
        # The cluster stands first, and no --metric says which number is the score.
        a, b = (
            write_rows(tmp_path / name, [{"id": i, "article": articles[i], "correct": own[i]} for i in range(20)])
            for name, own in zip("ab", scores, strict=True)
        )
        (test,) = compared(a, b, cluster="article")
        assert (test.metric, test.clusters) == ("correct", 10)
        moved = scored(tmp_path / "moved", scores[1], article=[*articles[:19], 3])
        with pytest.raises(UserError, match=r"^the row 19 is of the cluster 3 in .*/moved and 9 in .*/a; give"):
            compared(moved, a, cluster="article")

    def test_fewer_than_five_clusters_give_a_warning(self, tmp_path):
        a, b = binary(1, 60, 0.5), binary(2, 60, 0.5)
        for count in (4, 5):
            names = [f"article {i % count}" for i in range(60)]
            paths = [scored(tmp_path / name, own, article=names) for name, own in (("a", a), ("b", b))]
            (test,) = compared(*paths, cluster="article")
            assert test.clusters == (count if count == 5 else 0)
            assert any(note.startswith("warning: rows of only 4 clusters") for note in test.notes) == (count == 4)
            assert (test.test == "t over clusters") == (count == 5)

    def test_tasks_hold_by_holms_procedure(self, tmp_path):
        folders = []
        for model in ("a", "b"):
            folder = tmp_path / model
            folder.mkdir()
            for task, better in (("one", 7), ("two", 8), ("three", 12)):
                right = [int(model == "b" and i < better) for i in range(40)]
                rows = [{"doc_hash": str(i), "metrics": ["acc"], "acc": right[i]} for i in range(40)]
                write_rows(folder / f"samples_{task}_2026-01-01T00-00-00.jsonl", rows)
            folders.append(folder)
        write_rows(tmp_path / "b" / "samples_four_2026-01-01T00-00-00.jsonl", rows)
        tests = compared(*folders)
        # 2 / 2^7 is 0.016 alone; it needs 0.05 / 1 as the last of three, and the others hold before it.
        assert {test.task: test.answer for test in tests} == dict.fromkeys(("one", "two", "three"), "better")
        assert [test.holds for test in tests] == rules.holm([test.p for test in tests])
        assert left_out(*(read_side(n, [p]) for n, p in zip("AB", folders, strict=True))) == ["only B has four"]
        (alone,) = compared(scored(tmp_path / "x", [0] * 40), scored(tmp_path / "y", [1] * 6 + [0] * 34))
        assert (alone.answer, alone.p) == ("better", 2 / 2**6)
        right = [int(i < 6) for i in range(40)]
        rows = [{"doc_hash": str(i), "metrics": ["acc"], "acc": right[i]} for i in range(40)]
        write_rows(tmp_path / "b" / "samples_one_2026-01-01T00-00-00.jsonl", rows)
        write_rows(tmp_path / "b" / "samples_two_2026-01-01T00-00-00.jsonl", rows)
        # 2 / 2^6 is 0.031, above 0.05 / 2, although each alone would be shown.
        assert [test.answer for test in compared(*folders) if test.task != "three"] == ["not shown"] * 2


class TestPairing:
    def test_the_order_of_rows_does_not_matter(self, tmp_path):
        names = [f"article {i // 8}" for i in range(64)]
        a = scored(tmp_path / "a", binary(1, 64, 0.5), article=names)
        b = scored(tmp_path / "b", binary(2, 64, 0.7), article=names)
        shuffled = tmp_path / "shuffled"
        shuffled.write_text("\n".join(np.random.default_rng(0).permutation(b.read_text().splitlines())))
        for cluster in (None, "article"):
            (one,), (other,) = compared(a, b, cluster=cluster), compared(a, shuffled, cluster=cluster)
            assert one == other
            # With the file in another order first, the clusters still belong to their rows.
            (turned,) = compared(shuffled, a, cluster=cluster)
            assert turned.p == pytest.approx(one.p, rel=1e-9)
            assert turned.difference.value == -one.difference.value

    def test_several_seeds_are_paired_in_their_order_and_one_is_beside_all(self, tmp_path):
        tables = np.random.default_rng(5).random((2, 3, 70))
        a, b = ([scored(tmp_path / f"{t}{s}", row.tolist()) for s, row in enumerate(tables[t])] for t in (0, 1))
        (test,) = compared(a, b)
        assert test.difference.both == intervals.both_interval(tables[1] - tables[0])
        assert (test.seeds, test.test) == (3, "t over seeds and rows")
        (beside,) = compared(a[:1], b)
        assert beside.difference.both == intervals.both_interval(tables[1] - tables[0, :1])
        assert any("A is one output beside 3 seeds" in note for note in beside.notes)

    def test_runs_are_paired_by_their_seeds(self, tmp_path):
        for name, seeds in (("LoRA", (0, 1, 2)), ("TABuv", (2, 1, 5))):
            for seed in seeds:
                record = make_record(name=name, seed=seed)
                write_run(tmp_path / name, record)
                score_run(tmp_path / name, record, "validation", prediction_rows(binary(seed, 50, 0.5)))
        (test,) = compared(tmp_path / "LoRA", tmp_path / "TABuv")
        # Equal seeds have equal scores here.
        assert (test.seeds, test.difference.value, test.split) == (2, 0.0, "validation")
        assert "2 seeds in common (1, 2)" in test.notes

    def test_a_metric_of_any_size_is_shown_as_it_is(self, tmp_path):
        a, b = scored(tmp_path / "a", [10.5, 20.0, 30.0, 12.0]), scored(tmp_path / "b", [11.0, 22.0, 30.5, 13.0])
        for lower, answer in ((False, "better"), (True, "worse")):
            (test,) = compared(a, b, lower=lower)
            assert (test.unit.factor, test.difference.value) == (1, 1.0)
            assert test.answer in (answer, "not shown")


NO_TORCH = """
import runpy, sys
sys.argv = ["compare.py", *sys.argv[1:]]
runpy.run_path("scripts/compare.py", run_name="__main__")
print(sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""


def test_it_loads_no_torch_and_prints_text_markdown_and_json(script):
    words = [HARNESS / "tiny", HARNESS / "smollm2"]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words], capture_output=True, text=True, timeout=120, cwd=PROJECT
    )
    *text, last = done.stdout.splitlines()
    assert last == "[]", done.stderr
    code, markdown, _ = script("scripts/compare.py", *words, "--format", "markdown")
    found = json.loads(script("scripts/compare.py", *words, "--format", "json")[1])
    assert code == 0
    document = (PROJECT / "docs" / "compare.md").read_text()
    shown = "\n".join(text).replace(f"{PROJECT}/", "")
    assert "\n".join(f"    {line}".rstrip() for line in shown.splitlines()) in document
    assert sum(line.startswith("| ") for line in markdown.splitlines()) == 4
    assert [(t["task"], t["B_is"], t["p"]) for t in found["tests"]][1] == ("sums_written", "better", 2 / 2**12)
    assert f"{100 * found['tests'][0]['difference']:+.1f}" in markdown


MISTAKES = {
    "nothing": ("", "takes two, A B; with several seeds or tasks: --a A1 A2 --b B1 B2"),
    "three": ("a.jsonl b.jsonl a.jsonl", "takes two, A B"),
    "a side alone": ("--a a.jsonl", "takes two, A B"),
    "the same": ("a.jsonl a.jsonl", "a.jsonl: is in A and in B"),
    "no file": ("a.jsonl nowhere.jsonl", "nowhere.jsonl: no such folder or file; give a run's folder, a file of rows"),
    "an empty path": ("a.jsonl ''", "A B: is empty"),
    "other rows": ("a.jsonl fewer.jsonl", "fewer.jsonl: lacks 3 rows of a.jsonl, such as 7; score both on the same"),
    "more rows": ("fewer.jsonl a.jsonl", "fewer.jsonl: lacks 3 rows of a.jsonl, such as "),
    "an id twice": ("a.jsonl twice.jsonl", "twice.jsonl:3: the id 0 is there twice (also in line 1)"),
    "an empty file": ("a.jsonl empty.jsonl", "empty.jsonl: has no rows; a row is such as"),
    "no JSON": ("a.jsonl prose.txt", "prose.txt:1: is no JSON"),
    "a list": ("a.jsonl list.json", "list.json:1: is no JSON object; a row is such as"),
    "no id": ("a.jsonl nameless.jsonl", "nameless.jsonl:1: has neither an id nor a doc_hash"),
    "no score": ("a.jsonl scoreless.jsonl", "scoreless.jsonl:1: has no score, a finite number, true or false (id: 1,"),
    "a score of no number": (
        "a.jsonl nan.jsonl",
        "nan.jsonl:2: has no score, a finite number, true or false (id: 1, co",
    ),
    "a folder without scores": ("a.jsonl folder", "folder: has no scores (inner: not a run: it holds none of a run's"),
    "two models": ("a.jsonl HARNESS", "lm_eval: has the outputs of smollm2, tiny; give the folder of one of them"),
    "another task": ("HARNESS/tiny run", "no task in common: A has sums_choice, sums_written, B has chain_sum"),
    "no metric": ("a.jsonl b.jsonl --metric f2", "--metric f2: no such metric; A and B have correct"),
    "a metric of A alone": ("a.jsonl b.jsonl --metric length", "--metric length: A: a.jsonl has no such metric"),
    "a metric of texts": (
        "HARNESS/tiny HARNESS/smollm2 --metric bleu,strict",
        "jsonl:1: bleu,strict is no number, and",
    ),
    "no metric in common": ("a.jsonl other.jsonl", "no metric in common: A has correct; B has words"),
    "a metric that one row lacks": ("b.jsonl holes.jsonl --metric correct", "holes.jsonl:4: correct is missing, and a"),
    "two numbers": ("b.jsonl b2.jsonl", "--metric: the rows have correct, length; say which of them is the score"),
    "no such cluster": (
        "a.jsonl b.jsonl --cluster article",
        "--cluster article: is no field of a.jsonl:1, which has id",
    ),
    "a cluster of a run": ("run a.jsonl --cluster article", "is of runs, which name their clusters themselves"),
    "another split": ("run run2 --split test", "score.py run --split test` scores one"),
    "a split of files": ("a.jsonl b.jsonl --split test", "--split test: is of runs, and A and B are files; leave it"),
    "runs with a direction": ("run run2 --lower-is-better", "--lower-is-better: is of files, and A and B are runs"),
    "a split that is none": ("run run2 --split dev", "argument --split: invalid choice: 'dev' (choose from"),
    "an option that is none": ("run run2 --metrics f1", "unrecognized arguments: --metrics f1; `compare.py --help` "),
    "two arms on a side": ("--a run arm --b run2", "A: a side is one arm, and run has"),
    "a seed twice": ("--a run copy --b run2", "A: seed 0 is there twice, run and copy; give one of them"),
    "a file twice": ("--a a.jsonl a.jsonl --b c1.jsonl c2.jsonl", "A: a.jsonl is there twice; give each seed once"),
    "other numbers of seeds": ("--a a.jsonl b.jsonl --b c1.jsonl c2.jsonl c3.jsonl", "A has 2 outputs and B has 3"),
    "other rows of a run": ("run rows", "were scored on other rows, or with other prompts"),
    "one row": ("one.jsonl one2.jsonl", "has one row, and an interval needs two"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "c1", "c2", "c3"):
        scored(Path(f"{name}.jsonl"), binary(1, 10, 0.5))
    for name in ("b", "b2"):
        scored(Path(f"{name}.jsonl"), binary(2, 10, 0.5), length=list(range(10)))
    scored(Path("fewer.jsonl"), binary(1, 7, 0.5))
    write_rows(Path("twice.jsonl"), [{"id": i, "correct": 1} for i in (0, 1, 0)])
    write_rows(Path("other.jsonl"), [{"id": i, "words": 1} for i in range(10)])
    write_rows(Path("holes.jsonl"), [{"id": i, "length": 1, **({"correct": 1} if i != 3 else {})} for i in range(10)])
    write_rows(Path("nameless.jsonl"), [{"correct": 1}])
    write_rows(Path("scoreless.jsonl"), [{"id": 1, "text": "x"}])
    write_rows(Path("nan.jsonl"), [{"id": i, "correct": float("nan") if i else 1.0} for i in range(10)])
    for name in ("one", "one2"):
        scored(Path(f"{name}.jsonl"), [1])
    Path("empty.jsonl").write_text("\n")
    Path("prose.txt").write_text("A sentence.\n")
    Path("list.json").write_text("[1, 2]\n")
    Path("folder/inner").mkdir(parents=True)
    for name, about, count in (
        ("run", {}, 50),
        ("run2", {"name": "LoRA"}, 50),
        ("arm", {"seed": 1, "rank": 2}, 50),
        ("rows", {"name": "TA"}, 50),
    ):
        record = make_record(**about)
        write_run(Path("made"), record)
        score_run(Path("made"), record, "validation", prediction_rows(GOOD[:count]))
        (Path("made") / record.run_id).rename(name)
    shutil.copytree("run", "copy")
    file = Path("rows/scores/validation.answers.jsonl")
    head, rest = file.read_text().split("\n", 1)
    file.write_text(json.dumps({**json.loads(head), "digest": "other"}) + "\n" + rest)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line(what, script):
    line, says = MISTAKES[what]
    words = [
        str(HARNESS) + word.removeprefix("HARNESS") if word.startswith("HARNESS") else word
        for word in shlex.split(line)
    ]
    code, out, err = script("scripts/compare.py", *words)
    assert says in err
    assert (code, out, len(err.splitlines()), err[:7]) == (2, "", 1, "error: ")


def test_a_row_of_true_and_false_is_one_of_ones_and_zeros(tmp_path):
    right = [{"id": i, "correct": i % 3 == 0} for i in range(9)]
    assert read_row_file(write_rows(tmp_path / "a", right)).rows.of_metric["correct"].sum() == 3
