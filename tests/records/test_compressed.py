"""Files that a study stores compressed."""

import gzip

import pytest

from tiedlora import storage
from tiedlora.errors import UserError


def test_a_compressed_file_is_read_as_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    storage.write_compressed(path, b'{"id": "1"}\n' * 100)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl.gz"]
    assert storage.read_content(path) == b'{"id": "1"}\n' * 100
    assert storage.first_line(path) == b'{"id": "1"}\n'
    assert storage.is_here(path)
    path.write_bytes(b"newer\n")
    assert storage.read_content(path) == storage.first_line(path) == b"newer\n", "the plain file comes first"
    assert not storage.is_here(tmp_path / "others.jsonl")


@pytest.mark.parametrize(
    "data",
    [b"no gzip", gzip.compress(b"rows\n" * 99, mtime=0)[:-6], gzip.compress(b"x", mtime=0)[:12] + b"\xff" * 9],
    ids=["other format", "cut", "damaged"],
)
def test_a_damaged_file_is_one_line(tmp_path, data):
    (tmp_path / "rows.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz: is not a readable gzip file"):
        storage.read_content(tmp_path / "rows.jsonl")


def test_a_first_line_of_another_format_is_one_line(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz: is not a readable gzip file"):
        storage.first_line(tmp_path / "rows.jsonl")
