"""A raw file's version is its content: copies, mounts and touches keep it, a changed byte does not."""

from __future__ import annotations

import os

import pytest

from llm4msr import storage
from llm4msr.data import versions
from llm4msr.data.versions import file_versions


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user,item\n1,2\n")
    return path


def test_a_touched_file_keeps_its_version(file, tmp_path):
    notes = str(tmp_path / "notes.json")
    before = file_versions([str(file)], notes)
    os.utime(file, (1, 1))
    assert file_versions([str(file)], notes) == before
    assert file_versions([str(file)], str(tmp_path / "other.json")) == before


def test_a_changed_file_of_equal_size_has_another(file, tmp_path):
    notes = str(tmp_path / "notes.json")
    before = file_versions([str(file)], notes)
    file.write_text("user,item\n1,3\n")
    os.utime(file, (1, 1))
    after = file_versions([str(file)], notes)
    assert after[0]["size"] == before[0]["size"] and after != before


def test_what_was_read_is_not_read_again(file, tmp_path, monkeypatch):
    other = tmp_path / "other.csv"
    other.write_text("x")
    notes = str(tmp_path / "notes.json")
    first = file_versions([str(file)], notes)
    read = []
    whole = versions._sha256
    monkeypatch.setattr(versions, "_sha256", lambda uri: read.append(uri) or whole(uri))
    both = file_versions([str(file), str(other)], notes)
    assert both[:1] == first and read == [str(other)]
    assert file_versions([str(other), str(file)], notes) == both[::-1] and read == [str(other)]


def test_objects_are_known_by_their_etag(bucket, tmp_path):
    uri = f"s3://{bucket}/log.csv"
    with storage.atomic_write(uri) as out:
        out.write(b"user,item\n")
    notes = tmp_path / "notes.json"
    assert file_versions([uri], str(notes)) == [storage.fingerprint(uri)]
    assert not notes.exists()


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(storage.StorageError, match=r"folder: cannot be read \(Is a directory\)"):
        file_versions([str(tmp_path / "folder")], str(tmp_path / "notes.json"))
