"""The studies: their READMEs have the numbers of their records, and their records are small and clean."""

import pytest

from tiedlora.analysis.runs import read_runs, run_roots
from tiedlora.config.project import PROJECT
from tiedlora.page import readme, write
from tiedlora.sweeps.study import read_study

STUDIES = sorted(path.parent for path in (PROJECT / "studies").glob("*/study.yaml"))
LARGEST_BYTES = 60_000_000
"""Of all studies together."""

each_study = pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)


@each_study
def test_every_table_of_a_readme_has_the_numbers_of_the_records(folder):
    if not (folder / "runs").is_dir():
        pytest.skip("no run yet")
    text = (folder / "README.md").read_text()
    report = write.build([folder], claims=folder / "claims.yaml")
    assert readme.filled(text, report) == text, f"write it with scripts/report.py {folder} --readme"


def test_the_projects_readme_has_the_numbers_of_the_first_study():
    folder = PROJECT / "studies" / "tied-lora-smollm2"
    text = (PROJECT / "README.md").read_text()
    assert readme.filled(text, write.build([folder], claims=folder / "claims.yaml")) == text


@each_study
def test_every_record_has_a_clean_commit_and_no_texts(folder):
    assert read_study(folder).name == folder.name
    if not (folder / "runs").is_dir():
        pytest.skip("no run yet")
    runs, _ = read_runs(run_roots([folder]))
    for run in runs:
        assert all(code.dirty is False for code in run.record.code_versions), run.run_id
        assert "texts" in (run.record.left_out or []), run.run_id
        assert run.record.config.tree["data_root"] is None, run.run_id


def test_the_studies_are_small():
    files = [path for path in (PROJECT / "studies").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST_BYTES
