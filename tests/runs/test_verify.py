"""scripts/verify.py: an unchanged run agrees, and each kind of change is named."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.hostile import change_lines, change_rows, put, put_in_scores
from helpers.task_rows import write
from helpers.tiny import score_more, tiny_scorer

from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.reading import plain
from tiedlora.records.rows import PredictionRow
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_scores
from tiedlora.runs import verify, verify_scores
from tiedlora.tasks import load_examples

ROWS = [{"question": f"What is {i} and 1?", "answer": f"{i}\n#### {i + 1}"} for i in range(40)]
ANSWERS = "scores/validation.answers.jsonl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, finish):
    """A finished run on a random model and local rows, never changed: tests work on copies."""
    place = tmp_path_factory.mktemp("verify")
    write(place / "data", "gsm8k", *ROWS, split="train")
    config = compose_config(
        [
            "model=tiny_llama",
            "task=gsm8k",
            "task.validation_from_train=12",
            "task.rows.validation=null",
            "task.max_new_tokens=6",
            "train.steps=4",
            "train.batch_size=4",
            "train.warmup_steps=1",
            # Fewer than are scored.
            "train.validation_rows=8",
            "train.dtype=float32",
            "train.threads=1",
            "score.batch_size=4",
            f"outputs={place}/outputs",
            f"cache={place}/cache",
            f"data_root={place}/data",
        ]
    )
    finish(config)
    return place, run_id(config)


@pytest.fixture
def copy(finished, tmp_path):
    place, name = finished
    shutil.copytree(place / "data", tmp_path / "data")
    shutil.copytree(place / "outputs", tmp_path / "outputs")
    return tmp_path / "outputs" / name


def base_file(folder: Path, kind: str = "answers") -> Path:
    run = RunFolder(folder)
    return run.base_scores_file(read_scores(run.scores_file("validation", kind)).record.base)


def data_of(folder: Path) -> Path:
    return folder.parents[1] / "data"


def wrong(folder: Path, rows: int = 4) -> dict[str, str]:
    findings = verify.verify(folder, data_root=str(data_of(folder)), rows=rows)
    return {finding.check: finding.explanation for finding in findings if finding.ok is False}


def test_an_untouched_run_agrees_in_every_check(copy):
    findings = verify.verify(copy, data_root=str(data_of(copy)), rows=100)
    assert [finding.check for finding in findings if not finding.ok] == ["result.json", "first lines"], "see UNKNOWN"
    checks = {finding.check for finding in findings}
    assert checks >= {"configuration", "files", "adapter", "base", "data train", "data validation"}
    files = [f"validation.{kind}{base}" for kind in ("answers", "losses") for base in ("", ".base")]
    assert checks >= {f"{check} {file}" for check in ("scores", "regenerate") for file in files}


def numbers(tree, section=""):
    """(dotted key of a value of a record, the object or list that holds the number, its key there) of every number."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        name = f"{section}.{key}".removeprefix(".") if isinstance(tree, dict) else section
        if isinstance(value, dict | list):
            yield from numbers(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, tree, key


OF_SCORES = {"execution.threads", "execution.processes", "seconds", "batch_halvings"}
UNKNOWN = {
    "results": {"execution.threads", "execution.processes", "training.peak_memory_bytes"},
    "configuration": set(),
    "validation.answers": OF_SCORES,
    "validation.losses": OF_SCORES,
    "test.drift": OF_SCORES,
    "answers of the base": OF_SCORES,
}
"""Record -> the numbers of a plain run that nothing in its folder, its rows or its base model can tell."""


@pytest.mark.parametrize(
    "whose", [pytest.param(whose, marks=pytest.mark.slow) if whose == "configuration" else whose for whose in UNKNOWN]
)
def test_each_number_of_a_record_is_checked_or_listed_as_not_checked(copy, whose):
    """One number at a time is changed. verify names it, or says that it is not checked."""
    path, rows = copy / "scores" / f"{whose}.jsonl", ""
    if whose == "test.drift":
        write(data_of(copy), "gsm8k", *ROWS[:4])
        score_more(RunFolder(copy), splits=["test"], data_root=str(data_of(copy)), metrics=["target_loss"], drift=True)
    if whose in ("results", "configuration"):
        path, record = copy / "result.json", json.loads((copy / "result.json").read_text())
    else:
        path = base_file(copy) if whose == "answers of the base" else path
        first, rows = path.read_text().split("\n", 1)
        record = json.loads(first)
    named, listed = set(), set()
    places = [
        (key, holder, place)
        for key, holder, place in numbers(record)
        if path.name != "result.json" or key.startswith(("config.", "identity.")) is (whose == "configuration")
    ]
    for key, holder, place in places:
        number = holder[place]
        holder[place] = number + 1 if isinstance(number, int) else number * 1.001 + 1e-6
        path.write_text(f"{json.dumps(record)}\n{rows}")
        holder[place] = number
        *found, result, first_lines = verify.verify(copy, data_root=str(data_of(copy)), rows=0)
        last = result if path.name == "result.json" else first_lines
        sections = last.explanation.partition(": ")[2].split(", ")
        says = "rows, recorded " if key == "rows" else f"{key} is "
        if any(finding.ok is False and says in finding.explanation for finding in found):
            named.add(key)
        elif any(f"{key}.".startswith(f"{section}.") for section in sections):
            listed.add(key)
    assert {key for key, *_ in places} == named | listed, "changed, and not a word"
    assert len(named) >= 7
    assert listed == UNKNOWN[whose]


def test_files_that_were_changed_together_are_checked_against_the_rows_and_the_configuration(copy):
    steps = RunFolder(copy).finished_record().training.steps
    change_lines(copy / "metrics.jsonl", lambda row: row.update({"train/tokens": 99}), [steps])
    put(copy, "training.tokens", 99)
    assert "training.tokens is " in wrong(copy, rows=0)["tokens"]
    change_lines(copy / "validation_losses.jsonl", lambda row: row["tokens"].reverse())
    assert "the target tokens of step 0 in validation_losses.jsonl" in wrong(copy, rows=0)["tokens"]
    description = copy / "adapter" / "adapter.json"
    description.write_text(description.read_text().replace('"alpha": 8.0', '"alpha": 80.0'))
    put(copy, "files", RunFolder(copy).checksums("adapter/*"))
    found = wrong(copy, rows=0)
    assert found["adapter"] == "its alpha is 80.0, recorded 8.0"


def test_without_the_logs_of_training_their_numbers_are_listed(copy):
    (copy / "metrics.jsonl").unlink()
    (copy / "validation_losses.jsonl").unlink()
    *findings, last, _ = verify.verify(copy, data_root=str(data_of(copy)), rows=0)
    assert not [finding for finding in findings if finding.ok is False]
    assert "training.seconds, training.tokens_per_s, training.validation_loss_first" in last.explanation


@pytest.mark.parametrize("base", ["", ".base"])
def test_a_changed_output_is_named_by_its_row(copy, base):
    path = base_file(copy) if base else copy / ANSWERS
    name = read_scores(path).rows[5].id
    change_rows(path, lambda row: row.update(output=f"#### {row['references'][0]}"), [5])
    found = wrong(copy, rows=100)
    assert f"row {name}:" in found[f"scores validation.answers{base}"]
    assert f"row {name}:" in found[f"regenerate validation.answers{base}"]
    # With an equal score, regeneration alone finds it.
    change_rows(path, lambda row: row.update(output="something else"), [5])
    assert list(wrong(copy, rows=100)) == [f"regenerate validation.answers{base}"]


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_file_with_another_sha256_than_the_records_is_named(copy, name):
    """A change without meaning (a space, a line end) is a change too."""
    (path,) = copy.rglob(name)
    path.write_bytes(path.read_bytes() + b"\n")
    name = path.relative_to(copy).as_posix()
    found = wrong(copy, rows=0)
    assert f"files.{name} is " in found["files"]
    assert ("adapter" in found) == (name == "adapter/adapter.safetensors"), "it has a sha256 of its own"
    path.unlink()
    assert f"files.{name} is None" in wrong(copy, rows=0)["files"]


@pytest.mark.parametrize("base", ["", ".base"])
def test_rows_without_the_sha256_of_the_first_line_are_named(copy, base):
    path = base_file(copy) if base else copy / ANSWERS
    path.write_bytes(path.read_bytes() + b"\n")
    found = wrong(copy, rows=0)
    assert list(found) == [f"scores validation.answers{base}"]
    assert "its rows have the sha256 " in found[f"scores validation.answers{base}"]


FIRST_LINE = {  # a key of a file of scores -> another value than that of its run and its rows
    "run_id": "another",
    "adapter": "0" * 64,
    "digest": "0" * 64,
    "shortened": 1,
    "output_tokens": 7,
    "cut_targets": 1,
    "has_targets": False,
    "source": "text.txt",
    "source_digest": "0" * 64,
    "metrics.exact_match_strict.value": 0.4321,
    "metrics.exact_match_strict.low": -0.1,
    "metrics.exact_match_strict.method": "bootstrap",
    "gain.exact_match_strict.high": 0.4321,
    "gain.exact_match_strict": ...,
}


@pytest.mark.parametrize("key", FIRST_LINE)
def test_a_first_line_that_its_rows_do_not_give_is_named(copy, key):
    put_in_scores(copy / ANSWERS, key, FIRST_LINE[key])
    named = f"scores/validation.answers.{key}"
    named += ".value" if FIRST_LINE[key] is ... else ""
    assert f"{named} is " in wrong(copy, rows=0)["scores validation.answers"]


def test_another_order_of_the_metrics_is_named_because_comparisons_use_the_first(copy):
    first = read_scores(copy / ANSWERS).record.metrics
    other = dict(reversed([*plain(first).items()]))
    put_in_scores(copy / ANSWERS, "metrics", other)
    assert f"is {[*first]}, recorded {[*other]}" in wrong(copy, rows=0)["scores validation.answers"]


@pytest.mark.parametrize("key", ["run_id", "adapter", "digest", "output_tokens", "metrics.exact_match_strict.value"])
def test_a_wrong_first_line_of_the_base_models_file_is_named(copy, key):
    put_in_scores(base_file(copy), key, FIRST_LINE[key])
    assert f"base/validation.answers.{key} is " in wrong(copy, rows=0)["scores validation.answers.base"]


def test_the_base_models_scores_of_another_kind_are_named(copy):
    shutil.copy(base_file(copy, "losses"), base_file(copy, "answers"))
    assert "kind is 'answers', recorded 'losses'" in wrong(copy, rows=0)["scores validation.answers.base"]


def test_a_run_that_was_moved_without_its_base_is_not_called_wrong(copy):
    shutil.rmtree(copy.parent / "base")
    findings = verify.verify(copy, data_root=str(data_of(copy)), rows=0)
    assert {finding.check: finding.ok for finding in findings}["scores validation.answers.base"] is None
    assert not [finding for finding in findings if finding.ok is False]


def test_an_added_split_is_checked_too(copy):
    before = RunFolder(copy).finished_record()
    write(data_of(copy), "gsm8k", *ROWS[:4])
    score_more(RunFolder(copy), splits=["test"], data_root=str(data_of(copy)), drift=True)
    assert RunFolder(copy).finished_record() == before
    findings = verify.verify(copy, data_root=str(data_of(copy)), rows=100)
    assert not [finding for finding in findings if finding.ok is False]
    assert {finding.check for finding in findings} >= {"regenerate test.drift", "regenerate test.answers.base"}
    change_rows(copy / "scores/test.drift.jsonl", lambda row: row["scores"].update(drift=3.0), [2])
    assert {"scores test.drift", "regenerate test.drift"} == set(wrong(copy, rows=100))


def test_an_adapter_of_another_base_model_is_named(copy):
    path = copy / "adapter" / "adapter.json"
    path.write_text(path.read_text().replace('"revision": "main"', '"revision": "other"'))
    found = wrong(copy, rows=0)
    assert "its base model is " in found["adapter"]
    assert "adapter/adapter.json" in found["files"]


def test_a_changed_data_row_is_named(copy):
    """A held-out row is named by its id. For training rows the record holds only a hash, so the split is named."""
    path = data_of(copy) / "gsm8k" / "train.jsonl"
    rows = read_scores(copy / ANSWERS).rows
    original = path.read_text()
    questions = [row.prompt.split("Question: ")[1].split("\n")[0] for row in rows]
    question = questions[3]
    path.write_text(original.replace(question, "What is 0 and 0?"))
    found = wrong(copy, rows=0)
    assert f"row {rows[3].id}:" in found["data validation"]
    assert "What is 0 and 0?" in found["data validation"]
    assert "data train" not in found
    trained = next(row["question"] for row in ROWS if row["question"] not in questions)
    path.write_text(original.replace(trained, "What is 0 and 0?"))
    found = wrong(copy, rows=0)
    assert list(found) == ["data train"]


def test_a_changed_configuration_key_is_named_and_gets_no_scores(copy, script):
    path = copy / "config.yaml"
    original = path.read_text()
    path.write_text(original.replace("steps: 4", "steps: 5"))
    assert "train.steps is 5, recorded 4" in wrong(copy, rows=0)["configuration"]
    assert "train.steps is 5, and was 4 in the run" in script("scripts/score.py", copy, "--split", "test")[2]
    path.write_text(original)
    for value in (0.5, "fast"):
        put(copy, "config.train.lr", value)
        assert "train.lr" in wrong(copy, rows=0)["configuration"], "what cannot be read is a finding too"


def test_a_renamed_folder_is_named(copy):
    moved = copy.rename(copy.with_name("best-run"))
    assert "the folder's name is 'best-run'" in wrong(moved, rows=0)["configuration"]


@pytest.fixture
def elsewhere(copy):
    """The copy, as if its record came from another processor."""
    put(copy, "execution.processor", "Another (AVX512)")
    for path in [*(copy / "scores").iterdir(), base_file(copy), base_file(copy, "losses")]:
        put_in_scores(path, "execution.processor", "Another (AVX512)")
    return copy


def regeneration(folder: Path):
    findings = verify.verify(folder, data_root=str(data_of(folder)), rows=100)
    return {finding.check: finding for finding in findings if finding.check.startswith("regenerate")}


def test_on_another_processor_an_output_may_differ_by_rounding(elsewhere, monkeypatch):
    assert not regeneration(elsewhere)["regenerate validation.answers"].by_rounding, "nothing differs yet"
    change_rows(elsewhere / ANSWERS, lambda row: row.update(output="something else"))
    wrong_here = regeneration(elsewhere)["regenerate validation.answers"]
    assert wrong_here.ok is False
    assert "rounding does not explain it" in wrong_here.explanation
    assert "Another (AVX512)" in wrong_here.explanation
    with monkeypatch.context() as patch:
        # As that of a model whose logits are not finite.
        patch.setattr(verify_scores, "largest_gap", lambda *_: math.nan)
        assert regeneration(elsewhere)["regenerate validation.answers"].ok is False
    # A gap as large as the logits of a random model allows every text.
    monkeypatch.setitem(verify_scores.TOLERANCES, "float32", verify_scores.Tolerances(1e-3, 100.0, 0.5, 0.05))
    close = regeneration(elsewhere)["regenerate validation.answers"]
    assert close.ok
    assert close.by_rounding
    assert close.explanation.startswith("12 of 12 outputs differ, none by more than another device's rounding")


def test_the_gap_of_another_answer_is_the_largest_of_its_logits(finished):
    scorer = tiny_scorer("task=gsm8k", "task.validation_from_train=12", "task.rows.validation=null")
    example = load_examples(scorer.task, "validation", str(finished[0] / "data"))[0]
    model, tokenizer = scorer.arm.model, scorer.encoder.tokenizer

    def expected(text, *end):
        ids, gaps = [*scorer.encoder.prompt(example.prompt)], []
        for token in (*tokenizer(text, add_special_tokens=False).input_ids, *end):
            logits = model(torch.tensor([ids])).logits[0, -1].detach()
            gaps.append(float(logits.max() - logits[token]))
            ids.append(token)
        return max(gaps)

    for text in "abc#1":
        answer = PredictionRow("0", example.prompt, [], {}, output=text, ended="length")
        for ended, end in (("length", ()), ("end", (tokenizer.eos_token_id,))):
            gap = verify_scores.largest_gap(model, scorer, example, answer, replace(answer, ended=ended))
            # The answer may have begun with a blank, and the smaller gap of the two counts.
            assert gap == pytest.approx(min(expected(text, *end), expected(f" {text}", *end)), abs=1e-5)


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize(("factor", "ok"), [(1.01, True), (1.2, False)])
def test_on_another_processor_the_mean_loss_must_agree(elsewhere, monkeypatch, factor, ok):
    write(data_of(elsewhere), "gsm8k", *ROWS[:8])
    added = score_more(
        RunFolder(elsewhere), data_root=str(data_of(elsewhere)), splits=["test"], metrics=["target_loss"]
    )
    (losses,) = added.of("test")
    assert losses.execution.processor != RunFolder(elsewhere).finished_record().execution.processor
    path = elsewhere / "scores/test.losses.jsonl"
    put_in_scores(path, "execution.processor", "Another (AVX512)")
    monkeypatch.setitem(verify_scores.TOLERANCES, "float32", verify_scores.Tolerances(1e-3, 0.01, 0.5, 0.05))

    def scale(row):
        total, tokens = row["scores"]["target_loss_by_token"]
        row["scores"]["target_loss_by_token"] = [total * factor, tokens]

    change_rows(path, scale)
    finding = regeneration(elsewhere)["regenerate test.losses"]
    assert finding.ok is ok
    assert finding.by_rounding is ok
    assert "the mean of 8 rows differs by" in finding.explanation
