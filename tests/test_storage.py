import errno
import os

import pytest
from cluster.s3_proxy import Fault

from bgray import retries, storage

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


# --- S3 that misbehaves ---------------------------------------------------------------------------


FILE = "s3://bgray-test/folder/file"
CONTENT = bytes(range(256)) * 40
ACTS = {
    "read": (lambda: storage.read_bytes(FILE), CONTENT),
    "read a part": (lambda: storage.open_file(FILE).read(1000), CONTENT[:1000]),
    "write": (lambda: storage.write_bytes(FILE, CONTENT), None),
    "size": (lambda: storage.size(FILE), len(CONTENT)),
    "exists": (lambda: storage.exists(FILE), True),
    "list": (lambda: storage.listdir("s3://bgray-test/folder"), ["file"]),
    "remove": (lambda: storage.remove("s3://bgray-test/folder/other"), None),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["503", "closed", "refused"])
def test_whatever_is_asked_is_asked_again_until_s3_answers(proxy, kind, act):
    storage.write_bytes(FILE, CONTENT)
    ask, expected = ACTS[act]
    proxy.fault = Fault(kind, times=3, seconds=0.3 if kind == "refused" else 60)
    assert ask() == expected
    assert storage.read_bytes(FILE) == CONTENT
    seen = {"503": "503", "closed": "connection closed", "refused": "no connection"}[kind]
    lines = retries.incidents()
    assert lines
    assert all(seen in line and "answered after" in line for line in lines)
    assert lines[0].startswith("s3://bgray-test/folder")


@pytest.mark.parametrize("act", ["read", "read a part"])
@pytest.mark.parametrize("kind", ["cut", "short"])
def test_a_body_that_comes_short_is_read_again(proxy, kind, act):
    storage.write_bytes(FILE, CONTENT)
    ask, expected = ACTS[act]
    proxy.fault = Fault(kind, times=2)
    assert ask() == expected
    (line,) = retries.incidents()
    assert line.startswith(f"{FILE}: ")
    assert line.endswith("and 3 tries")


def test_a_body_that_is_short_without_any_checksum_is_noticed_by_the_files_size(proxy, monkeypatch):
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    storage.write_bytes(FILE, CONTENT)
    proxy.fault = Fault("short", times=1)
    assert storage.read_bytes(FILE) == CONTENT
    (line,) = retries.incidents()
    assert "5120 of 10240 bytes came, answered" in line


@pytest.mark.parametrize("kind", ["cut", "short"])
def test_a_long_file_is_read_in_ranges_and_none_may_come_short(proxy, monkeypatch, kind):
    monkeypatch.setattr(storage, "CHUNK", 3000)
    storage.write_bytes(FILE, CONTENT)
    assert storage.read_bytes(FILE) == CONTENT
    proxy.fault = Fault(kind, times=1)
    proxy.requests.clear()
    assert storage.read_bytes(FILE) == CONTENT
    assert len(proxy.fault.suffered) == 1
    assert len(proxy.requests) == 2 * (1 + 4)  # the size and four ranges, twice


def test_a_request_without_an_answer_is_made_again(proxy, monkeypatch):
    storage.write_bytes(FILE, CONTENT)
    monkeypatch.setattr(storage, "READ_SECONDS", 1.0)
    proxy.fault = Fault("slow", times=1, delay=4.0)
    assert storage.read_bytes(FILE) == CONTENT
    (line,) = retries.incidents()
    assert "no answer in time" in line


def test_storage_that_stays_away_ends_within_the_bound_and_saying_so_costs_one_request(
    proxy, monkeypatch
):
    monkeypatch.setattr(retries, "RETRY_SECONDS", 2.0)
    proxy.fault = Fault("503")
    with pytest.raises(OSError, match="503 SlowDown; tried for") as caught:
        storage.write_bytes(FILE, CONTENT)
    assert caught.value.filename == FILE
    before = len(proxy.requests)
    with pytest.raises(OSError, match="1 try"):
        storage.write_bytes("s3://bgray-test/run.json", b"{}")
    assert len(proxy.requests) == before + 1


def test_a_missing_file_or_bucket_is_asked_for_once(proxy):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("s3://bgray-test/nothing")
    assert len(proxy.requests) == 2  # the file, and whether it is a folder
    with pytest.raises(FileNotFoundError, match="bucket does not exist") as caught:
        storage.write_bytes("s3://no-such-bucket/file", b"")
    assert len(proxy.requests) == 3
    assert caught.value.filename == "s3://no-such-bucket/file"
    assert retries.incidents() == []


def test_a_good_day_costs_no_request_more(proxy):
    storage.write_bytes(FILE, CONTENT)
    assert [r.split()[0] for r in proxy.requests] == ["PUT"]
    proxy.requests.clear()
    storage.read_bytes(FILE)
    assert [r.split()[0] for r in proxy.requests] == ["HEAD", "GET"]
    proxy.requests.clear()
    with storage.open_file(FILE) as file:
        file.seek(-8, 2)
        assert file.read(8) == CONTENT[-8:]
        assert file.read() == b""
        file.seek(16)
        assert file.read(16) == CONTENT[16:32]
    assert [r.split()[0] for r in proxy.requests] == ["HEAD", "GET", "GET"]


def test_others_who_use_the_file_system_themselves_have_its_own_patience(proxy):
    storage.write_bytes(FILE, CONTENT)
    fs, path = storage.filesystem(FILE)
    proxy.fault = Fault("503", times=2)
    assert fs.info(path)["size"] == len(CONTENT)
    assert len(proxy.fault.suffered) == 2
