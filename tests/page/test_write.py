"""The whole report: its files, and a page on which nothing runs."""

import base64
import hashlib
import re
import shutil

from helpers.hostile import HOSTILE
from helpers.report_runs import BASE, GOOD, report_of_claim, scored_run, world

from tiedlora.page import write


def test_the_page_loads_nothing_and_its_policy_allows_its_own_script_and_style_alone(tmp_path):
    scored_run(tmp_path / "runs", GOOD, BASE, output=HOSTILE)
    write.write(write.build([tmp_path / "runs"]), tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<script>") == 1
    assert not re.findall(r"src=\"(?!data:)([^\"]+)", page)
    assert not re.findall(r"<(?!a )\w+[^>]* href=\"(?!#|data:)([^\"]+)", page)
    # A link loads nothing by itself. It leads to the report's own tables.
    links = re.findall(r"<a [^>]*href=\"(?!#)([^\"]+)", page)
    assert sorted(links) == sorted(path.name for path in (tmp_path / "report").glob("*.csv"))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        ((text),) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(r"<[^>]* (?:style|on[a-z]+)=", page), "an attribute that the policy would refuse"


def test_equal_runs_give_equal_files(tmp_path):
    scored_run(tmp_path / "runs", GOOD, BASE)
    for name in ("one", "two"):
        write.write(write.build([tmp_path / "runs"]), tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert {"index.html", *(f"results.{ending}" for ending in ("csv", "md", "tex"))} <= set(one)
    assert {f"{figure}.{ending}" for figure in ("pareto", "curves") for ending in ("png", "svg")} <= set(one)
    assert one == two


def test_no_file_of_a_report_names_a_folder_of_this_machine(tmp_path):
    """Faults name the file with its path, and people pass a report on."""
    world(tmp_path / "runs", {"LoRA": 0.6, "TABuv": 0.6}, seeds=3, rows=40)
    scored_run(tmp_path / "runs", GOOD, BASE, name="TAB")
    (damaged,) = (tmp_path / "runs").glob("TABuv-*-s0-*")
    with (damaged / "scores" / "validation.answers.jsonl").open("a") as file:
        file.write("{")
    failed = tmp_path / "runs" / "TA-r8-squad-tiny-s0-0123456789"
    failed.mkdir()
    (failed / "error.txt").write_text(f"tiedlora.errors.UserError: {tmp_path}/data/squad/train.jsonl:1: is no row\n")
    shutil.copytree(tmp_path / "runs", tmp_path / "more")
    report = report_of_claim(tmp_path, roots=("runs", "more"))
    assert any("train.jsonl" in folder.reason for folder in report.left_out)
    write.write(report, tmp_path / "report")
    texts = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert b"train.jsonl:1: is no row" in texts["index.html"]
    assert [name for name, text in texts.items() if bytes(tmp_path) in text] == []
