"""The whole report: its files, and a page on which nothing runs."""

import base64
import hashlib
import re

from helpers.hostile import HOSTILE
from helpers.report_runs import BASE, GOOD, scored_run

from tiedlora.page import write


def test_the_page_loads_nothing_and_its_policy_allows_its_own_script_and_style_alone(tmp_path):
    scored_run(tmp_path / "runs", GOOD, BASE, output=HOSTILE)
    write.write(write.build([tmp_path / "runs"]), tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<script>") == 1
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)([^\"]+)", page)
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
