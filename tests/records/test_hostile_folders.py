"""Malformed run folders, with every command that reads one: a table with their messages, and a search for more."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.hostile import change_rows, put, put_in_scores, refused, snapshot
from helpers.tiny import composed, score_more

from tiedlora.analysis.runs import logged_curves, read_run
from tiedlora.page import write
from tiedlora.records.rows import read_metrics
from tiedlora.records.run_folder import RunFolder
from tiedlora.records.scores import read_run_scores, read_scores
from tiedlora.runs import run

pytest_plugins = ["helpers.hostile_runs"]
SECRET = "hunter2-0123456789abcdef"
RESULTS = {  # a key of result.json, its new value, and words of the message: one for each rule
    "a key that is missing": ("run_id", ..., "has no 'run_id'"),
    "a path for an id": ("run_id", "../../x", "'run_id' is '../../x'"),
    "a path as a name": ("identity.task.name", "../../x", "'identity.task.name' is '../../x', which cannot be a value"),
    "script for a model": ("base.name", "<script>", "'base.name' is '<script>', which is no name"),
    "a base that is not known": ("base.digest", None, "'base.digest' is None"),
    "a list for a part": ("identity.tying.A", [], "identity.tying.A=[]: must be a mapping"),
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
    "another status": ("status", "running", "'status' is 'running'"),
    "a file outside the folder": ("files", {"/etc/passwd": "0" * 64}, "'files./etc/passwd.[key]' is"),
    "a path for a sha256": ("files", {"adapter/x": "../../x"}, "is '../../x', which cannot be"),
}
FIRST_LINES = {  # the same for the first line of a file of scores
    "a key that is missing": ("seconds", ..., "has no 'seconds'"),
    "scores of an unknown split": ("split", "\x1b[2J", "'split' is '\\x1b[2J'"),
    "scores of another split": ("split", "test", "holds answers of test; restore the file"),
    "an unknown kind": ("kind", "looks", "'kind' is 'looks'"),
    "no metric": ("metrics", {}, "'metrics' is {}"),
    "a metric of another kind": (
        "metrics",
        {"target_loss": {"value": 1.0, "low": 0.5, "high": 2.0, "method": "bootstrap"}},
        "'metrics.target_loss' is no metric of answers",
    ),
    "scores of no rows": ("rows", 0, "'rows' is 0"),
    "a score above one": ("metrics.exact_match_strict.value", 57.0, "is no value with an interval within [-1, 1]"),
    "a gain above one": ("gain.exact_match_strict.high", 57.0, "'gain.exact_match_strict' is no value with an"),
    "a gain over no base": ("base", "", "has a gain over a base model that it does not name; restore the file"),
    "a path for the base": ("base", "../../../x", "'base' is '../../../x'"),
    "a path for a sha256": ("rows_sha256", "../../x", "'rows_sha256' is '../../x'"),
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


@pytest.mark.parametrize("what", FIRST_LINES)
def test_a_wrong_first_line_of_scores_is_named_by_whoever_reads_it(what, folder, words):
    key, value, says = FIRST_LINES[what]
    path = folder / "scores" / "validation.answers.jsonl"
    put_in_scores(path, key, value)
    with refused(says, folder) as refusal:
        read_run_scores(RunFolder(folder))
    assert str(refusal.value).startswith(str(path))
    with refused(says, folder):
        run.main(composed(words))
    left_out = read_run(folder)
    assert says in left_out.reason


@pytest.mark.parametrize("key", ["run_id", "adapter"])
def test_the_scores_of_another_adapter_are_not_taken_for_those_of_the_run(key, folder, words, script):
    path = folder / "scores" / "validation.losses.jsonl"
    put_in_scores(path, key, "another")
    says = f"{path}: holds the scores of another adapter"
    with refused(says, folder):
        run.main(composed(words))
    assert says.removeprefix(f"{folder}/") in read_run(folder).reason
    code, _, err = script("scripts/export.py", folder, "--to", "hub-card")
    assert (code, err.startswith(f"error: {says}")) == (2, True)
    # As the message says.
    path.unlink()
    run.main(composed(words))
    assert read_run_scores(RunFolder(folder)).of("validation")


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


@pytest.mark.usefixtures("place")
def test_the_result_of_another_run_is_not_taken_for_this_one(folder, words):
    put(folder, "run_id", "TAB-r2-chain_sum-tiny-s7-0123456789")
    with refused("is the result of another run, TAB-r2-chain_sum-tiny-s7-0123456789", folder):
        run.main(composed(words))


def test_every_command_refuses_what_is_no_runs_folder_in_one_line(folder, words, tmp_path, script):
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
    *logged, error = err.splitlines()
    assert (code, [line for line in logged if "targets are longer than task.max_new_tokens=4" not in line]) == (2, [])
    assert "a file is where a folder is needed" in error
    assert folder.read_text() == "a file where the run's folder should be"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("result.json", (2, 1)),
        ("config.yaml", (2, 1)),
        ("scores/validation.answers.jsonl", (3, 0)),
        ("error.txt", (2, 1)),
    ],
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
        is_readable = (folder / "result.json").is_file() and name == "config.yaml"
        assert len(write.build([tmp_path / "outputs"]).runs) == is_readable


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
    (folder / "scores" / "validation.answers.jsonl").unlink()
    (folder / "scores" / "validation.answers.jsonl").symlink_to(secret)
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


@pytest.mark.usefixtures("place")
def test_a_run_that_was_moved_writes_beside_itself(folder):
    """The record holds the place where the run was made. That place may not exist any more, or a stranger chose it."""
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"(?m)^outputs: .*$", "outputs: /nowhere/of/mine", text))
    score_more(RunFolder(folder), splits=["test"])
    assert list((folder.parent / "base").glob("chain_sum-test-*.jsonl"))


def cut(data: bytes) -> bytes:
    """The last row is not there as a whole, as after a kill of a program that appends."""
    return data[:-9]


def without_last_row(path: Path) -> None:
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *rows[:-1], ""]))
    change_rows(path, lambda _row: None)


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def with_field(**fields: object) -> Callable[[Path], None]:
    return lambda path: change_rows(path, lambda row: row.update(fields), [0])


DAMAGE = {  # what is wrong with a file of scores -> how to damage it, and words of the one line
    "empty": (with_bytes(lambda _data: b""), "answers.jsonl:1: is not the record of scores"),
    "a first line that is cut": (with_bytes(lambda data: data[:99]), "answers.jsonl:1: is not the record of scores"),
    "brackets": (with_bytes(lambda _data: b"[" * 100_000), "answers.jsonl:1: is not the record of scores"),
    "a row as the first line": (
        with_bytes(lambda data: data.split(b"\n", 1)[1]),
        "answers.jsonl:1: is not the record of scores",
    ),
    "a last row that is cut": (with_bytes(cut), "its rows have the sha256 "),
    "a changed row": (
        with_bytes(lambda data: data.replace(b'"prompt": "', b'"prompt": "x')),
        "its rows have the sha256 ",
    ),
    "a row too few": (without_last_row, "has 5 rows, recorded 6; restore the file"),
    "an id that is a number": (with_field(id=3), "answers.jsonl:2: is no row of scores"),
    "a score that is none": (
        with_field(scores={"exact_match_strict": float("nan")}),
        "answers.jsonl:2: is no row of scores",
    ),
    "a key twice": (
        with_bytes(lambda data: data.replace(b'{"run_id"', b'{"run_id": "x", "run_id"', 1)),
        "is not the record of scores (the key 'run_id' is there twice)",
    ),
    "likelihoods without choices": (with_field(log_likelihoods=[0.0]), "answers.jsonl:2: is no row of scores"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_of_scores_is_one_line(what, folder, tmp_path, script):
    path = folder / "scores" / "validation.answers.jsonl"
    damage, says = DAMAGE[what]
    damage(path)
    before = snapshot(folder)
    with refused(says) as refusal:
        read_scores(path)
    assert str(refusal.value).startswith(f"{path}:")
    assert len(str(refusal.value).splitlines()) == 1
    code, out, err = script("scripts/verify.py", folder, "--rows", "0")
    assert (code, err) == (3, "")
    assert says in out
    report = write.build([tmp_path / "outputs"])
    notes = [note for row in report.rows for note in row.notes]
    assert any(says in text for text in [*notes, *(left_out.reason for left_out in report.left_out)])
    code, _, err = script("scripts/export.py", folder, "--to", "peft", "--out", tmp_path / "peft")
    assert (code, len(err.splitlines())) == (2, 1)
    assert not (tmp_path / "peft").exists()
    assert snapshot(folder) == before


def test_metrics_that_are_cut_or_garbage_are_passed_over(folder, words):
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


def test_a_file_of_the_base_model_that_was_changed_is_named(folder, words):
    run.main(composed([*words, "seed=1"]))
    bases = sorted((folder.parent / "base").glob("*.jsonl"))
    assert len(bases) == 2, "answers and losses"
    for file in bases:
        whole = file.read_bytes()
        head, *rows = whole.splitlines(keepends=True)

        def reorder(path, head=head, rows=rows):
            path.write_bytes(head + b"".join(reversed(rows)))
            change_rows(path, lambda _row: None)

        for damage, says in (
            (reorder, "holds the scores of other rows; remove it"),
            (with_bytes(cut), "its rows have the sha256 "),
        ):
            damage(file)
            data = file.read_bytes()
            with refused(says):
                run.main(composed([*words, "seed=2"]))
            assert file.read_bytes() == data
        file.write_bytes(whole)
