"""The code's version: any change makes it uncommitted, but not the records that a study writes while it runs."""

import subprocess

import pytest

from tiedlora.records import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "studies" / "s").mkdir(parents=True)
    (tmp_path / "studies" / "s" / "study.yaml").write_text("name: s\n")
    git("add", "-A")
    git("commit", "-m", "first")
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    return tmp_path


def test_records_of_a_study_leave_the_code_clean(checkout):
    (checkout / "studies" / "s" / "runs" / "a").mkdir(parents=True)
    (checkout / "studies" / "s" / "runs" / "a" / "result.json").write_text("{}")
    assert provenance.code_version().dirty is False


@pytest.mark.parametrize("path", ["code.py", "new.py", "studies/s/study.yaml", "studies/s/new.yaml"])
def test_any_other_change_is_uncommitted_code(checkout, path):
    (checkout / path).write_text("changed\n")
    assert provenance.code_version().dirty is True
