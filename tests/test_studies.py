"""The studies: the tables of READMEs have the numbers of their records, and their records are small and clean."""

import pytest

from tiedlora import storage
from tiedlora.config.project import PROJECT
from tiedlora.page import readme, write
from tiedlora.sweeps.study import read_study

STUDIES = sorted(path.parent for path in (PROJECT / "studies").glob("*/study.yaml"))
SHOWN_IN_FRONT = "sharing-against-lora"
"""The study whose numbers the project's README has."""
LARGEST_BYTES = 83_000_000
"""Of all studies together: 43 MB of the first two, and 40 MB for sharing-against-lora."""


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_every_table_has_the_numbers_of_the_records_which_have_a_clean_commit_and_no_texts(folder):
    assert read_study(folder).name == folder.name
    if not (folder / "runs").is_dir():
        pytest.skip("no run yet")
    report = write.build([folder], claims=folder / "claims.yaml")
    for page in (folder / "README.md", *([PROJECT / "README.md"] if folder.name == SHOWN_IN_FRONT else [])):
        text = page.read_text()
        assert readme.filled(text, report) == text, f"{page}: write it with scripts/report.py {folder} --readme"
    for run in report.runs:
        assert all(code.dirty is False for code in run.record.code_versions), run.run_id
        assert "texts" in (run.record.left_out or []), run.run_id
        assert run.record.config.tree["data_root"] is None, run.run_id
    for path in [*folder.glob("runs/*/predictions/*"), *folder.glob("runs/base/*")]:
        lines = storage.read_content(path.with_name(path.name.removesuffix(".gz"))).splitlines()
        assert all(b'"prompt": "", ' in line and b'"references": [], ' in line for line in lines), path


def test_the_studies_are_small():
    assert sum(path.stat().st_size for path in (PROJECT / "studies").rglob("*") if path.is_file()) < LARGEST_BYTES
