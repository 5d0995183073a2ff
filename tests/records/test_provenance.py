"""The code's version: any change makes it uncommitted, but not the records that a study writes while it runs."""

import subprocess

import pytest

import tiedlora
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
    provenance.code_version.cache_clear()
    yield tmp_path
    provenance.code_version.cache_clear()


def test_without_a_commit_of_its_own_the_code_is_a_version(checkout, monkeypatch):
    known = provenance.code_version()
    assert (known.version, known.short, str(known)) == (None, known.commit[:8], f"commit {known.commit}")
    # A copy of the files in another repository, and an installed package.
    (checkout / "copy").mkdir()
    for place in (checkout / "copy", None):
        monkeypatch.setattr(provenance, "PROJECT", place)
        provenance.code_version.cache_clear()
        version = provenance.code_version()
        assert version == provenance.CodeVersion(None, None, tiedlora.__version__)
        assert version.short == str(version) == f"version {tiedlora.__version__}"


RECORD = "studies/s/runs/a/result.json"


@pytest.mark.parametrize("path", ["code.py", "new.py", "studies/s/study.yaml", "studies/s/new.yaml", RECORD])
def test_any_change_but_a_studys_record_is_uncommitted_code(checkout, path):
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text("changed\n")
    version = provenance.code_version()
    assert version.dirty is (path != RECORD)
    (checkout / "later.py").write_text("changed while the process runs\n")
    assert provenance.code_version() == version, "the process has read the code as it was"
