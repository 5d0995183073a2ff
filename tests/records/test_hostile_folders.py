"""Malformed run folders, with every command that reads one: a table with their messages, and a search for more."""

import json
import os
import re
import shutil

import pytest
from helpers.hostile import put, refused, snapshot
from helpers.tiny import composed, score_more

from tiedlora.analysis.runs import logged_curves, read_run
from tiedlora.page import write
from tiedlora.records.rows import read_metrics, read_predictions
from tiedlora.records.run_folder import RunFolder
from tiedlora.runs import run

pytest_plugins = ["helpers.hostile_runs"]
SECRET = "hunter2-0123456789abcdef"
RESULTS = {  # a key of result.json, its new value, and words of the message: one for each rule
    "a key that is missing": ("run_id", ..., "has no 'run_id'"),
    "a path for an id": ("run_id", "../../x", "'run_id' is '../../x'"),
    "a path as a name": ("identity.task.name", "../../x", "'identity.task.name' is '../../x', which cannot be a value"),
    "script for a model": ("base.name", "<script>", "'base.name' is '<script>', which is no name"),
    "a base that is not known": ("base.digest", None, "'base.digest' is None"),
    "a list for a part": ("identity.tying.A", [], "identity.tying.A=[]: must be a dictionary"),
    "a list for the terms": ("identity.tying.terms", [], "identity.tying.terms=[]: must be a valid dictionary"),
    "a text for a number": ("identity.rank.r", "8", "'identity.rank.r' is '8'"),
    "a flag for a count": ("trainable_params", True, "'trainable_params' is True"),
    "a number that is none": (
        "identity.train.lr",
        float("nan"),
        "which cannot be a value of a run's record of this project: must be a finite number",
    ),
    "a list of factors": ("identity.train.lr_factor", [1], "'identity.train.lr_factor' is [1]"),
    "no training rows": ("data.train", ..., "has no 'data.train'"),
    "scores of an unknown split": ("scores.\x1b[2J", {}, "'scores.␛[2J.[key]' is"),
    "no metric": ("scores.validation.metrics", {}, "'scores.validation.metrics' is {}"),
    "scores of no rows": ("scores.validation.rows", 0, "'scores.validation.rows' is 0"),
    "a score above one": (
        "scores.validation.metrics.exact_match_strict",
        {"value": 57.0, "low": 0, "high": 1},
        "is no value with an interval within [-1, 1]",
    ),
    "base without gain": ("scores.validation.gain", ..., "has only one of base and gain"),
    "gain of other metrics": ("scores.validation.gain", {}, "has other metrics than"),
    "another status": ("status", "running", "'status' is 'running'"),
    "a file outside the folder": ("files", {"/etc/passwd": "0" * 64}, "'files./etc/passwd.[key]' is"),
    "a path for a sha256": ("scores.validation.files", {"predictions/x": "../../x"}, "is '../../x', which cannot be"),
}


@pytest.mark.parametrize("what", RESULTS)
def test_a_wrong_result_is_named_by_whoever_reads_it(what, folder, words):
    key, value, says = RESULTS[what]
    put(folder, key, value)
    with refused(says, folder):
        RunFolder(folder).record()
    with refused(says, folder):
        run.main(composed(words))
    left_out = read_run(folder)
    assert says in left_out.reason


TEXTS = {
    "cut short": (b'{"run_id": "TABuv', "is not valid JSON"),
    "a list": (b"[]", "must hold a JSON object"),
    "not UTF-8": (b'{"run_id": "\xff"}', "is not valid JSON"),
    "a hundred thousand brackets": (b"[" * 100_000, "is not valid JSON"),
    "a key twice": (b'{"run_id": "TABuv", "training": {"steps": 1, "steps": 2}}', "the key 'steps' is there twice"),
}
COMMANDS = (
    ("scripts/score.py", "--split", "validation"),
    ("scripts/verify.py", "--rows", "0"),
    ("scripts/export.py", "--to", "hub-card"),
)


@pytest.mark.parametrize("what", TEXTS)
def test_a_damaged_result_ends_every_command_in_a_line(what, folder, words, script):
    data, says = TEXTS[what]
    (folder / "result.json").write_bytes(data)
    before = snapshot(folder)
    for name, *arguments in COMMANDS:
        code, out, err = script(name, folder, *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), name
        assert says in err
    code, _, err = script("train.py", *words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert says in err
    assert snapshot(folder) == before


DOUBLING = {  # under 1 kB, and more values than any memory holds
    "aliases of aliases": "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(12)),
    "an alias of itself": "a: &a [*a]\n",
    "interpolations": "".join(f"a{n}: '{f'${{a{n + 1}}}' * 9}'\n" for n in range(12)) + "a12: x\n",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", DOUBLING)
def test_a_small_file_of_yaml_with_endless_values_is_refused_at_once(what, folder, tmp_path, script):
    text = DOUBLING[what]
    assert len(text) < 1000
    says = "is an alias; write out what it stands for" if "alias" in what else ".yaml: "
    study, claims = tmp_path / "study" / "study.yaml", tmp_path / "claims.yaml"
    study.parent.mkdir()
    for path in (folder / "config.yaml", study, claims):
        path.write_text(text)
    for name, *arguments in (
        *((name, folder, *rest) for name, *rest in COMMANDS[:2]),
        ("scripts/study.py", "plan", study.parent),
        ("scripts/report.py", folder.parent, "--claims", claims, "--out", tmp_path / "report"),
    ):
        code, out, err = script(name, *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), name
        assert says in err, name
    # Of a run that is not finished, the report needs config.yaml only for its name.
    (folder / "result.json").unlink()
    assert script("scripts/report.py", folder.parent, "--out", tmp_path / "report")[2].count("Traceback") == 0


def test_the_result_of_another_run_is_not_taken_for_this_one(folder, words, place):
    put(folder, "run_id", "TAB-r2-chain_sum-tiny-s7-0123456789")
    with refused("is the result of another run, TAB-r2-chain_sum-tiny-s7-0123456789", folder):
        run.main(composed(words))


def test_what_is_no_folder(folder, words, tmp_path, script):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    for source in (tmp_path / "file", tmp_path / "loop", tmp_path / "empty", tmp_path / "none", "x" * 5000):
        for name, *arguments in (*COMMANDS, ("scripts/generate.py", "--prompt", "1")):
            code, out, err = script(name, source, *arguments)
            assert (code, out, len(err.splitlines())) == (2, "", 1), (name, source)
    assert snapshot(tmp_path) == before
    shutil.rmtree(folder)
    folder.write_text("a file where the run's folder should be")
    code, _, err = script("train.py", *words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "a file is where a folder is needed" in err
    assert folder.read_text() == "a file where the run's folder should be"


@pytest.mark.parametrize(
    ("name", "says"),
    [("result.json", (2, 1)), ("config.yaml", (2, 1)), ("predictions/validation.jsonl", (3, 0)), ("error.txt", (2, 1))],
)
def test_pipes_and_loops_are_not_waited_for(name, says, folder, tmp_path, script):
    path = folder / name
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to(path)):
        path.unlink(missing_ok=True)
        make()
        if name == "error.txt":
            (folder / "result.json").unlink(missing_ok=True)
        code, _, err = script("scripts/verify.py", folder, "--rows", "0")
        assert (code, len(err.splitlines())) == says, err
        assert len(write.build([tmp_path / "outputs"]).runs) == (folder / "result.json").is_file()


def test_links_out_of_the_folder_show_and_copy_nothing(folder, tmp_path, script):
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    (folder / "adapter" / "key").symlink_to(secret)
    assert script("scripts/export.py", folder, "--to", "hub-card", "--out", tmp_path / "card")[0] == 0
    assert {path.name for path in (tmp_path / "card").iterdir()} == {"README.md", "adapter.json", "adapter.safetensors"}
    failed = tmp_path / "outputs" / "LoRA-r8-chain_sum-tiny-s1-0123456789"
    failed.mkdir()
    (failed / "error.txt").symlink_to(secret)
    (failed / "result.json").symlink_to(secret)
    (folder / "predictions" / "validation.jsonl").unlink()
    (folder / "predictions" / "validation.jsonl").symlink_to(secret)
    _, out, err = script("scripts/report.py", tmp_path / "outputs", "--out", tmp_path / "report")
    (failed / "result.json").unlink()
    _, more, errors = script("scripts/report.py", tmp_path / "outputs", "--out", tmp_path / "report")
    assert SECRET not in out + err + more + errors
    for path in (tmp_path / "report").iterdir():
        assert SECRET.encode() not in path.read_bytes()


def test_starting_over_removes_links_and_not_what_they_lead_to(folder, words, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("kept")
    (folder / "checkpoint").symlink_to(tmp_path / "mine")
    (folder / ".adapter.1.tmp").symlink_to(tmp_path / "mine")
    run.main(composed([*words, "force=true"]))
    assert (tmp_path / "mine" / "work.txt").read_text() == "kept"
    assert RunFolder(folder).record() is not None


def test_a_run_that_was_moved_writes_beside_itself(folder, place):
    """The record holds the place where the run was made. That place may not exist any more, or a stranger chose it."""
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"(?m)^outputs: .*$", "outputs: /nowhere/of/mine", text))
    score_more(RunFolder(folder), splits=["test"])
    assert list((folder.parent / "base").glob("chain_sum-test-*.jsonl"))


ROWS = {
    "empty": (b"", "holds no predictions"),
    "cut short": (b'{"id": "0", "prompt', "validation.jsonl:1: is not a prediction"),
    "brackets": (b"[" * 100_000, "validation.jsonl:1: is not a prediction"),
    "a key twice": (b'{"id": "0", "id": "1"}', "is not a prediction (the key 'id' is there twice)"),
}
FIELDS = {
    "an id that is a number": {"id": 3},
    "a score that is none": {"scores": {"exact_match_strict": float("nan")}},
    "likelihoods without choices": {"log_likelihoods": [0.0]},
}


@pytest.mark.parametrize("what", [*ROWS, *FIELDS])
def test_wrong_predictions(what, folder, tmp_path, script):
    path = folder / "predictions" / "validation.jsonl"
    lines = path.read_bytes().splitlines()
    data, says = ROWS.get(what, (None, "validation.jsonl:2: is not a prediction"))
    if data is None:
        data = b"\n".join([lines[0], json.dumps({**json.loads(lines[1]), **FIELDS[what]}).encode(), *lines[2:]])
    path.write_bytes(data)
    before = snapshot(folder)
    with refused(says):
        read_predictions(path)
    code, out, err = script("scripts/verify.py", folder, "--rows", "0")
    assert (code, err) == (3, "")
    assert says in out
    (row, *_) = write.build([tmp_path / "outputs"]).rows
    assert any(says in note for note in row.notes)
    code, _, err = script("scripts/export.py", folder, "--to", "peft", "--out", tmp_path / "peft")
    assert (code, len(err.splitlines())) == (2, 1)
    assert not (tmp_path / "peft").exists()
    assert snapshot(folder) == before


def test_metrics_that_are_cut_or_garbage_are_passed_over(folder, tmp_path, words):
    path = folder / "metrics.jsonl"
    garbage = [b'{"step": 9, "train/loss": ', b"\x00\xff\xfe", b'{"step": "x"}', b"3", b"[]", b"null", b"[" * 100_000]
    garbage += [b'{"step": 1, "train/loss": 1, "train/loss": 2}']
    odd = [b'{"step": 1e400, "train/loss": 1}', b'{"step": 1, "train/loss": NaN}', b'{"train/loss": 1}']
    whole = read_metrics(path)
    path.write_bytes(path.read_bytes() + b"\n".join([*odd, *garbage]))
    assert read_metrics(path) == whole
    assert len(logged_curves(folder, "train/")["train/loss"]) == 1
    (folder / "result.json").unlink()
    again = run.main(composed(words))
    assert [row.step for row in read_metrics(path)] == [row.step for row in whole]
    assert again.status == "done"


def test_a_cache_of_the_base_model_that_was_changed_is_named(folder, words):
    run.main(composed([*words, "seed=1"]))
    answers, losses = sorted((folder.parent / "base").glob("*.jsonl"), key=lambda path: "-loss-" in path.name)
    for cache in (answers, losses):
        whole = cache.read_bytes()
        lines = whole.splitlines()
        for data, says in (
            (b"\n".join(reversed(lines)), "holds the predictions of other rows; remove it"),
            (b"\n".join(lines)[:-9], "is not a prediction"),
        ):
            cache.write_bytes(data)
            with refused(says):
                run.main(composed([*words, "seed=2"]))
            assert cache.read_bytes() == data
        cache.write_bytes(whole)
