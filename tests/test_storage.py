import errno
import os

import pytest

from bgray import storage

URLS = ["local", "s3"]


@pytest.fixture(params=URLS)
def root(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path)


def test_what_is_written_is_read_back_listed_and_removed_here_and_on_s3(root):
    url = storage.join(root, "a", "b.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"\x00two")
    storage.write_bytes(storage.join(root, "a", "c", "d"), b"")
    assert storage.read_bytes(url) == b"\x00two"
    assert storage.listdir(storage.join(root, "a")) == ["b.bin", "c"]
    storage.remove(url)
    storage.remove(url)  # a second time nothing happens
    assert storage.listdir(storage.join(root, "a")) == ["c"]


def test_a_missing_file_is_file_not_found_and_a_missing_folder_is_empty(root):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))
    assert storage.listdir(storage.join(root, "nowhere")) == []


def test_hidden_files_are_not_listed(root):
    for name in (".hidden", "seen"):
        storage.write_bytes(storage.join(root, "folder", name), b"x")
    assert storage.listdir(storage.join(root, "folder")) == ["seen"]


@pytest.mark.parametrize("at", ["fsync", "chmod", "replace"])
def test_a_write_that_dies_on_the_way_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, at):
    url = str(tmp_path / "run.json")
    storage.write_bytes(url, b"old")

    def dies(*_):
        raise OSError("no more")

    monkeypatch.setattr(os, at, dies)
    with pytest.raises(OSError, match="no more"):
        storage.write_bytes(url, b"new and longer")
    assert storage.read_bytes(url) == b"old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_ctrl_c_in_a_write_leaves_no_litter_either(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(str(tmp_path / "new"), b"x")
    assert os.listdir(tmp_path) == []


def test_colleagues_on_the_machine_may_read_what_is_written(tmp_path):
    storage.write_bytes(str(tmp_path / "file"), b"x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("s3://bucket/", "a", "b"), "s3://bucket/a/b"),
        (("/tmp/x", "y"), "/tmp/x/y"),
        (("results/", "y"), "results/y"),
    ],
)
def test_join_puts_exactly_one_slash_between_parts(parts, joined):
    assert storage.join(*parts) == joined


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        storage.write_bytes(str(tmp_path / "file"), b"x")
    assert error.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize(
    "act",
    [
        storage.exists,
        storage.size,
        storage.read_bytes,
        storage.listdir,
        storage.remove,
        lambda url: storage.write_bytes(url, b""),
    ],
)
def test_what_only_s3s_client_raises_is_an_os_error_with_the_url(act, monkeypatch):
    from botocore.exceptions import NoCredentialsError

    def fail(*_, **__):
        raise NoCredentialsError

    for name in ("exists", "info", "cat_file", "pipe_file", "rm_file", "size"):
        monkeypatch.setattr(f"s3fs.S3FileSystem.{name}", fail)
    with pytest.raises(OSError, match="Unable to locate credentials") as error:
        act("s3://bucket/file")
    assert error.value.filename == "s3://bucket/file"
