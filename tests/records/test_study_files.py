"""A finished study is one archive: equal records give equal bytes, and what is unpacked is what was packed."""

import io
import tarfile
import threading

import pytest
from helpers.report_runs import scored_run

from tiedlora import storage
from tiedlora.analysis.runs import read_runs, run_roots
from tiedlora.errors import UserError
from tiedlora.records import study_files


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("TIEDLORA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "study.yaml").write_text("name: small\n")
    for seed in (0, 1):
        scored_run(folder / "runs", [1.0, 0.0], seed=seed)
    (folder / "runs" / "x.lock").touch()
    (folder / "clusters.json").write_text("{}")
    return folder


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_study_is_read_as_before_and_unpacked_once(study, monkeypatch):
    before = {name: data for name, data in files_of(study).items() if not name.endswith((".lock", "study.yaml"))}
    ids = [run.run_id for run in read_runs(run_roots([study]))[0]]
    sha256 = study_files.finish(study)
    assert sorted(path.name for path in study.iterdir()) == ["records.tar.xz", "study.yaml"]
    assert (study / "study.yaml").read_text().endswith(f"records: {sha256}\n")
    assert files_of(study_files.records_folder(study)) == before
    assert [run.run_id for run in read_runs(run_roots([study]))[0]] == ids
    monkeypatch.setattr(study_files, "_unpack", lambda *_: pytest.fail("unpacked again"))
    study_files.records_folder(study)
    with pytest.raises(UserError, match="is finished"):
        study_files.finish(study)


def test_equal_records_give_equal_archives(study, tmp_path):
    storage.copy_folder(study, tmp_path / "other")
    assert study_files.finish(study) == study_files.finish(tmp_path / "other")


def test_a_process_that_was_killed_before_its_archive_was_there_leaves_no_second_line(study):
    plan = (study / "study.yaml").read_text()
    sha256 = study_files.finish(study)
    finished = (study / "study.yaml").read_text()
    unpacked = files_of(study_files.records_folder(study))
    # As the kill leaves it: the line, and the records as files. One of them has changed since.
    (study / "records.tar.xz").unlink()
    for name, data in unpacked.items():
        storage.write_bytes(study / name, data)
    (study / "clusters.json").write_text('{"gsm8k": {}}')
    again = study_files.finish(study)
    assert (study / "study.yaml").read_text() == finished.replace(sha256, again)
    assert finished.startswith(plan)
    assert files_of(study_files.records_folder(study)).keys() == unpacked.keys()


def test_where_the_plan_cannot_be_written_the_records_stay_as_files(study, monkeypatch):
    before = files_of(study)
    monkeypatch.setattr(storage, "write_bytes", lambda *_: (study / "full" / "disk").touch())
    with pytest.raises(OSError, match="full"):
        study_files.finish(study)
    assert files_of(study) == before


def test_the_archive_is_on_the_disk_before_the_files_are_removed(study, monkeypatch):
    flush, flushed = storage.flush_to_disk, []

    def noted(path):
        flush(path)
        flushed.append((path.name, (study / "records.tar.xz").exists(), (study / "runs").exists()))

    monkeypatch.setattr(storage, "flush_to_disk", noted)
    study_files.finish(study)
    # The content, and then the entry of the folder.
    assert (".records.tar.xz.tmp", False, True) in flushed
    assert flushed[-1] == ("small", True, True)


def test_a_second_command_that_finishes_the_study_waits_and_keeps_the_archive(study, monkeypatch):
    unpack, said = study_files._unpack, []

    def second():
        with pytest.raises(UserError) as error:
            study_files.finish(study)
        said.append(str(error.value))

    thread = threading.Thread(target=second)

    def unpack_late(archive, out):
        if thread.ident is None:
            thread.start()
            thread.join(0.3)
        unpack(archive, out)

    monkeypatch.setattr(study_files, "_unpack", unpack_late)
    sha256 = study_files.finish(study)
    thread.join()
    assert said == [f"{study}: is finished; its records are in records.tar.xz"]
    assert storage.sha256(study / "records.tar.xz") == sha256


def test_records_that_could_not_be_read_again_stay_as_files(study, monkeypatch):
    before = files_of(study)
    monkeypatch.setattr(study_files, "LARGEST_COUNT", 3)
    with pytest.raises(UserError, match="more than 3 files, which no study has"):
        study_files.finish(study)
    assert files_of(study) == before


def test_an_archive_without_runs_is_no_study_that_has_not_begun(study, tmp_path):
    (study / "runs").rename(tmp_path / "away")
    archive_of(study, (tarfile.TarInfo("clusters.json"), b""))
    with pytest.raises(UserError, match=r"records\.tar\.xz: holds no folder runs, which every study has; restore"):
        study_files.runs_folder(study)


def archive_of(study, *entries):
    """An archive with these entries, which study.yaml names."""
    path = study / "records.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for entry, data in entries:
            tar.addfile(entry, io.BytesIO(data))
    (study / "study.yaml").write_text(f"name: small\nrecords: {storage.sha256(path)}\n")


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "runs/../../outside", "runs/link"])
def test_an_archive_cannot_write_outside_of_its_folder(study, name, tmp_path):
    entry = tarfile.TarInfo(name)
    if name == "runs/link":
        entry.type, entry.linkname = tarfile.SYMTYPE, "../../outside"
    (study / "runs").rename(tmp_path / "away")
    archive_of(study, (entry, b""))
    with pytest.raises(UserError, match=r"records\.tar\.xz: (holds|is not a readable archive)"):
        study_files.records_folder(study)
    assert not list((tmp_path / "cache" / "studies").glob("*[!k]/*"))


def test_an_archive_that_is_another_one_damaged_or_too_large_is_refused(study, monkeypatch):
    sha256 = study_files.finish(study)
    archive = study / "records.tar.xz"
    data = archive.read_bytes()
    archive.write_bytes(data[:-100])
    with pytest.raises(UserError, match=rf"has the sha256 \w+, and study\.yaml says {sha256}"):
        study_files.records_folder(study)
    (study / "study.yaml").write_text(f"name: small\nrecords: {storage.sha256(archive)}\n")
    with pytest.raises(UserError, match="is not a readable archive"):
        study_files.records_folder(study)
    archive.write_bytes(data)
    (study / "study.yaml").write_text(f"name: small\nrecords: {sha256}\n")
    for limit, value, says in (("LARGEST_COUNT", 3, "more than 3 files"), ("LARGEST_BYTES", 100, "more than 0 GiB")):
        monkeypatch.setattr(study_files, limit, value)
        with pytest.raises(UserError, match=f"{says}, which no study has"):
            study_files.records_folder(study)
    (study / "runs").mkdir()
    with pytest.raises(UserError, match=r"has runs/ and records\.tar\.xz"):
        study_files.records_folder(study)
