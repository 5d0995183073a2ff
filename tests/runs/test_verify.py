"""scripts/verify.py: an unchanged run agrees, and each kind of change is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.hostile import change_rows, put
from helpers.task_rows import write
from helpers.tiny import score_more, tiny_scorer

from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.records.rows import PredictionRow, read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import verify, verify_scores
from tiedlora.tasks import load_examples

ROWS = [{"question": f"What is {i} and 1?", "answer": f"{i}\n#### {i + 1}"} for i in range(40)]
VALIDATION = "predictions/validation.jsonl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, finish):
    """A finished run on a random model and local rows, never changed: tests work on copies."""
    place = tmp_path_factory.mktemp("verify")
    write(place / "data", "gsm8k", *ROWS, split="train")
    config = compose_config(
        [
            *("model=tiny_llama", "task=gsm8k", "task.validation_from_train=12", "task.rows.validation=null"),
            *("task.max_new_tokens=6", "train.steps=4", "train.batch_size=4", "train.warmup_steps=1"),
            *("train.dtype=float32", "train.threads=1", "score.batch_size=4"),
            *(f"outputs={place}/outputs", f"cache={place}/cache", f"data_root={place}/data"),
        ]
    )
    finish(config)
    return place, run_id(config)


@pytest.fixture
def copy(finished, tmp_path):
    place, name = finished
    shutil.copytree(place / "data", tmp_path / "data")
    shutil.copytree(place / "outputs" / name, tmp_path / name)
    return tmp_path / name


def wrong(folder: Path, rows: int = 4) -> dict[str, str]:
    findings = verify.verify(folder, data_root=str(folder.parent / "data"), rows=rows)
    return {finding.check: finding.explanation for finding in findings if finding.ok is False}


def test_an_untouched_run_agrees_in_every_check(copy):
    findings = verify.verify(copy, data_root=str(copy.parent / "data"), rows=100)
    assert [finding.check for finding in findings if not finding.ok] == ["result.json"], "what nothing can tell"
    checks = {finding.check for finding in findings}
    assert checks >= {"configuration", "files", "adapter", "base", "predictions validation"}
    assert checks >= {"data train", "data validation"}
    assert checks >= {"regenerate validation", "regenerate validation.base"}


def numbers(tree, section=""):
    """(dotted key of a value of a record, the object or list that holds the number, its key there) of every number."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        name = f"{section}.{key}".removeprefix(".") if isinstance(tree, dict) else section
        if isinstance(value, dict | list):
            yield from numbers(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, tree, key


UNKNOWN = {
    *("execution.threads", "execution.processes", "training.peak_memory_bytes"),
    *("scores.validation.seconds", "scores.validation.loss_seconds"),
}
"""The numbers of a plain run that nothing in its folder, its rows or its base model can tell."""


@pytest.mark.parametrize("whose", ["results", pytest.param("configuration", marks=pytest.mark.slow)])
def test_each_number_of_a_record_is_checked_or_listed_as_not_checked(copy, whose):
    """One number at a time is changed. verify names it, or says that it is not checked."""
    path = copy / "result.json"
    record = json.loads(path.read_text())
    named, listed = set(), set()
    places = [
        (key, holder, place)
        for key, holder, place in numbers(record)
        if key.startswith(("config.", "identity.")) is (whose == "configuration")
    ]
    for key, holder, place in places:
        number = holder[place]
        holder[place] = number + 1 if isinstance(number, int) else number * 1.001 + 1e-6
        path.write_text(json.dumps(record))
        holder[place] = number
        *found, last = verify.verify(copy, data_root=str(copy.parent / "data"), rows=0)
        sections = last.explanation.partition(": ")[2].split(", ")
        if any(finding.ok is False and f"{key} is " in finding.explanation for finding in found):
            named.add(key)
        elif any(f"{key}.".startswith(f"{section}.") for section in sections):
            listed.add(key)
    assert {key for key, *_ in places} == named | listed, "changed, and not a word"
    assert len(named) >= 20
    assert listed == (UNKNOWN if whose == "results" else set())


def test_files_that_were_changed_together_are_checked_against_the_rows_and_the_configuration(copy):
    steps = RunFolder(copy).finished_record().training.steps
    change_rows(copy / "metrics.jsonl", lambda row: row.update({"train/tokens": 99}), [steps])
    put(copy, "training.tokens", 99)
    assert "training.tokens is " in wrong(copy, rows=0)["tokens"]
    change_rows(copy / "validation_losses.jsonl", lambda row: row["tokens"].reverse())
    assert "the target tokens of step 0 in validation_losses.jsonl" in wrong(copy, rows=0)["tokens"]
    description = copy / "adapter" / "adapter.json"
    description.write_text(description.read_text().replace('"alpha": 8.0', '"alpha": 80.0'))
    put(copy, "files", RunFolder(copy).checksums("adapter/*"))
    found = wrong(copy, rows=0)
    assert found["adapter"] == "its alpha is 80.0, recorded 8.0"


def test_without_the_logs_of_training_their_numbers_are_listed(copy):
    (copy / "metrics.jsonl").unlink()
    (copy / "validation_losses.jsonl").unlink()
    *findings, last = verify.verify(copy, data_root=str(copy.parent / "data"), rows=0)
    assert not [finding for finding in findings if finding.ok is False]
    assert "training.seconds, training.tokens_per_s, training.validation_loss_first" in last.explanation


@pytest.mark.parametrize("kind", ["validation", "validation.base"])
def test_a_changed_output_is_named_by_its_row(copy, kind):
    path = copy / "predictions" / f"{kind}.jsonl"
    name = read_predictions(path)[5].id
    change_rows(path, lambda row: row.update(output=f"#### {row['references'][0]}"), [5])
    found = wrong(copy, rows=100)
    assert f"row {name}:" in found[f"predictions {kind}"]
    assert f"row {name}:" in found[f"regenerate {kind}"]
    # With an equal score, regeneration alone finds it.
    change_rows(path, lambda row: row.update(output="something else"), [5])
    assert list(wrong(copy, rows=100)) == ["files validation", f"regenerate {kind}"]


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors", "validation.jsonl", "validation.base.jsonl"])
def test_a_file_with_another_sha256_than_the_records_is_named(copy, name):
    """A change without meaning (a space, a line end) is a change too."""
    (path,) = copy.rglob(name)
    path.write_bytes(path.read_bytes() + b"\n")
    name, check = path.relative_to(copy).as_posix(), "files" if "adapter" in name else "files validation"
    found = wrong(copy, rows=0)
    assert f"files.{name} is " in found[check]
    assert ("adapter" in found) == (name == "adapter/adapter.safetensors"), "it has a sha256 of its own"
    path.unlink()
    assert f"files.{name} is None" in wrong(copy, rows=0)[check]


def test_an_added_splits_files_are_recorded_too(copy):
    before = RunFolder(copy).finished_record()
    write(copy.parent / "data", "gsm8k", *ROWS[:4])
    after = score_more(RunFolder(copy), splits=["test"], data_root=str(copy.parent / "data"))
    assert after.scores["test"].files.keys() == {"predictions/test.jsonl", "predictions/test.base.jsonl"}
    assert after.files == before.files
    assert not wrong(copy, rows=100)
    cut_off = (copy / "predictions/test.jsonl").read_text().splitlines(keepends=True)[:3]
    (copy / "predictions/test.jsonl").write_text("".join(cut_off))
    found = wrong(copy, rows=0)
    assert "predictions/test.jsonl" in found["files test"]
    assert "rows is 3, recorded 4" in found["predictions test"]


def test_an_adapter_of_another_base_model_is_named(copy):
    path = copy / "adapter" / "adapter.json"
    path.write_text(path.read_text().replace('"revision": "main"', '"revision": "other"'))
    found = wrong(copy, rows=0)
    assert "its base model is " in found["adapter"]
    assert "adapter/adapter.json" in found["files"]


def test_a_changed_data_row_is_named(copy):
    """A held-out row is named by its id. For training rows the record holds only a hash, so the split is named."""
    path = copy.parent / "data" / "gsm8k" / "train.jsonl"
    rows = read_predictions(copy / VALIDATION)
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
    return copy


def regeneration(folder: Path):
    findings = verify.verify(folder, data_root=str(folder.parent / "data"), rows=100)
    return {finding.check: finding for finding in findings if finding.check.startswith(("regenerate", "losses"))}


def test_on_another_processor_an_output_may_differ_by_rounding(elsewhere, monkeypatch):
    assert not regeneration(elsewhere)["regenerate validation"].by_rounding, "nothing differs yet"
    change_rows(elsewhere / VALIDATION, lambda row: row.update(output="something else"))
    wrong_here = regeneration(elsewhere)["regenerate validation"]
    assert wrong_here.ok is False
    assert "rounding does not explain it" in wrong_here.explanation
    assert "Another (AVX512)" in wrong_here.explanation
    # A gap as large as the logits of a random model allows every text.
    monkeypatch.setitem(verify_scores.TOLERANCES, "float32", verify_scores.Tolerances(1e-3, 100.0, 0.5, 0.05))
    close = regeneration(elsewhere)["regenerate validation"]
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
        answer = PredictionRow("0", example.prompt, [], text, {}, ended="length")
        for ended, end in (("length", ()), ("end", (tokenizer.eos_token_id,))):
            gap = verify_scores.largest_gap(model, scorer, example, answer, replace(answer, ended=ended))
            # The answer may have begun with a blank, and the smaller gap of the two counts.
            assert gap == pytest.approx(min(expected(text, *end), expected(f" {text}", *end)), abs=1e-5)


@pytest.mark.parametrize(("factor", "ok"), [(1.01, True), (1.2, False)])
def test_on_another_processor_the_mean_loss_must_agree(finished, elsewhere, monkeypatch, factor, ok):
    write(elsewhere.parent / "data", "gsm8k", *ROWS[:8])
    added = score_more(
        RunFolder(elsewhere), data_root=str(elsewhere.parent / "data"), splits=["test"], metrics=["target_loss"]
    )
    (here,) = added.scores["test"].executions
    assert here.processor != added.execution.processor
    put(elsewhere, "scores.test.executions", [{**vars(here), "processor": "Another (AVX512)"}])
    monkeypatch.setitem(verify_scores.TOLERANCES, "float32", verify_scores.Tolerances(1e-3, 0.01, 0.5, 0.05))

    def scale(row):
        total, tokens = row["scores"]["target_loss_by_token"]
        row["scores"]["target_loss_by_token"] = [total * factor, tokens]

    change_rows(elsewhere / "predictions/test.jsonl", scale)
    finding = regeneration(elsewhere)["losses test"]
    assert finding.ok is ok
    assert finding.by_rounding is ok
    assert "the mean of 8 losses differs by" in finding.explanation
