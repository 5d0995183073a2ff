"""A run as a study keeps it: no texts of the data, no paths, and still every check that a reader can make."""

import json
from pathlib import Path

import pytest
from helpers.hostile import change_rows
from helpers.task_rows import GOOD
from helpers.tiny import rows_of

from tiedlora import storage
from tiedlora.config.compose import compose_config
from tiedlora.config.identity import run_id
from tiedlora.export.study_records import export_adapter, export_record, export_scores
from tiedlora.page import write
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run, verify

ROWS = {
    "gsm8k": [{"question": f"What is {i} plus one?", "answer": f"{i}\n#### {i + 1}"} for i in range(30)],
    "hellaswag": [
        {**GOOD["hellaswag"], "ind": i, "ctx_a": f"Number {i} is.", "endings": ["a", "bb", "c", f"{i}"]}
        for i in range(30)
    ],
}


@pytest.fixture(scope="module", params=["gsm8k", "hellaswag"])
def study(request, tmp_path_factory):
    """(the folder, the run's own folder, the exported folder): a generated task, and one of choices."""
    place, task = tmp_path_factory.mktemp("study"), request.param
    data = place / "data" / task
    data.mkdir(parents=True)
    rows = ROWS[task]
    # GSM8K's validation rows are taken from its training rows.
    for split, of_split in {"train": rows if task == "gsm8k" else rows[:15], "validation": rows[15:]}.items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
    (place / "neutral.txt").write_text("A neutral sentence. " * 50)
    config = compose_config(
        [
            f"score.forgetting={place}/neutral.txt",
            "model=tiny_llama",
            f"task={task}",
            "task.rows.validation=12",
            "task.max_new_tokens=6",
            *(("task.validation_from_train=12",) if task == "gsm8k" else ()),
            "train.steps=2",
            "train.batch_size=4",
            "train.warmup_steps=1",
            "train.threads=1",
            "score.batch_size=4",
            f"outputs={place}/outputs",
            f"cache={place}/cache",
            f"data_root={place}/data",
        ]
    )
    run.main(config)
    own = RunFolder(place / "outputs" / run_id(config))
    kept = export_record(own, place / "kept" / "runs")
    export_scores(own, kept)
    export_adapter(own, kept)
    return place, own, kept


def findings(folder, place, **options):
    return verify.verify(folder.path, data_root=str(place / "data"), cache=place / "cache", **options)


def test_it_holds_no_text_of_the_data_and_no_path(study):
    place, _, kept = study
    files = [path for path in (place / "kept").rglob("*") if path.suffix in (".json", ".jsonl", ".yaml", ".gz")]
    texts = [storage.read_content(path.with_suffix("") if path.suffix == ".gz" else path).decode() for path in files]
    assert len(texts) > 10, "six files of scores are among them"
    assert not any("neutral sentence" in text for text in texts)
    assert not any("plus one" in text or "Number 3" in text or '"bb"' in text for text in texts)
    assert not any(str(place) in text for text in texts)
    scored = [path for path in (place / "kept").rglob("*.jsonl*") if {"scores", "base"} & set(path.parts)]
    assert len(scored) == 6
    assert all(path.suffix == ".gz" for path in scored)
    assert not any(row.prompt or row.references for row in rows_of(kept, "validation"))


def test_every_check_passes_with_the_data_at_hand(study):
    place, _, kept = study
    found = findings(kept, place, rows=100)
    assert [finding for finding in found if finding.ok is False] == []
    passed = {finding.check for finding in found if finding.ok}
    # A loss is checked without the text that it belongs to.
    assert {"adapter", "files", "scores validation.answers", "scores forgetting.losses.base"} <= passed
    again = [f"regenerate validation.{kind}{base}" for kind in ("answers", "losses") for base in ("", ".base")]
    assert set(again) <= passed


def test_without_the_adapter_its_hash_stays_and_the_rest_is_checked(study, tmp_path):
    place, own, _ = study
    kept = export_record(own, tmp_path / "runs")
    export_scores(own, kept)
    assert not kept.adapter.exists()
    assert kept.finished_record().files == own.finished_record().files
    by_check = {finding.check: finding.ok for finding in findings(kept, place)}
    assert by_check["adapter"] is by_check["regenerate"] is None
    assert by_check["scores validation.answers"] is True
    assert False not in by_check.values()


def test_without_the_data_the_scores_are_not_called_wrong(study, tmp_path):
    _, _, kept = study
    by_check = {finding.check: finding.ok for finding in verify.verify(kept.path, data_root=str(tmp_path), rows=0)}
    assert by_check["scores validation.answers"] is None
    assert False not in by_check.values()


def test_a_changed_score_or_base_file_is_found(study):
    place, _, kept = study
    for packed in [*(kept.path.parent / "base").glob("*.gz"), *kept.scores.glob("*.gz")]:
        path, before = packed.with_suffix(""), packed.read_bytes()
        path.write_bytes(storage.read_content(path))
        packed.unlink()
        change_rows(path, lambda row: row.update(shortened=True), [1])
        assert any(finding.ok is False for finding in findings(kept, place, rows=0)), path
        path.unlink()
        packed.write_bytes(before)
    assert all(finding.ok is not False for finding in findings(kept, place, rows=0))


def test_the_report_reads_a_study_as_it_reads_outputs(study):
    place, own, _ = study
    root = Path(place / "kept")
    (root / "study.yaml").write_text("name: x\n")
    of_study, of_outputs = write.build([root]), write.build([own.path.parent])
    assert of_study.left_out == []
    assert [row.score for row in of_study.rows] == [row.score for row in of_outputs.rows]
    assert [row.gain for row in of_study.rows] == [row.gain for row in of_outputs.rows]
