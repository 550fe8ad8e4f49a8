import os
from pathlib import Path

import pytest

from bgray.config import ConfigError
from bgray.growing import Growing
from bgray.lines import as_text, read_lines


@pytest.fixture
def path(tmp_path):
    return Path(tmp_path, "metrics.jsonl")


def add(path, *steps, torn=""):
    with path.open("a") as file:
        file.write("".join(as_text({"step": step, "loss": 1 / step}) for step in steps) + torn)


def test_each_reading_has_what_the_whole_file_has(path):
    growing = Growing(str(path))
    assert growing.lines() == []
    for steps in ((2,), (4, 6), (), (8, 10, 12)):
        add(path, *steps)
        assert growing.lines() == read_lines(str(path))


def test_what_was_read_is_not_read_again(path):
    add(path, *range(1, 1001))
    growing = Growing(str(path))
    first = growing.lines()[0]
    add(path, 1001)
    # Of the same length, far from the end: who looked at it again would see it.
    with path.open("r+b") as file:
        file.write(b'{"step":7')
    found = growing.lines()
    assert len(found) == 1001
    assert found[0] is first
    assert found[0]["step"] == 1


def test_a_torn_line_is_left_out_until_it_is_whole(path):
    growing = Growing(str(path))
    add(path, 2, torn='{"step":4,')
    assert [line["step"] for line in growing.lines()] == [2]
    with path.open("a") as file:
        file.write('"loss":1}\n')
    assert [line["step"] for line in growing.lines()] == [2, 4]


def test_a_file_that_was_cut_is_read_anew(path):
    add(path, 2, 4, 6)
    growing = Growing(str(path))
    growing.lines()
    path.with_name("other").write_text(as_text({"step": 2, "loss": 0.25}))
    os.replace(path.with_name("other"), path)
    add(path, 4, 6, 8)
    assert growing.lines() == read_lines(str(path))
    os.truncate(path, 0)  # the same file as before
    add(path, 1, 2, 3, 4, 5)
    assert growing.lines() == read_lines(str(path))


def test_a_damaged_line_is_named(path):
    add(path, 2)
    growing = Growing(str(path))
    growing.lines()
    add(path, 4, torn="{oh\n")
    add(path, 6)
    for _ in range(2):
        with pytest.raises(ConfigError, match="line 3 of 4 is damaged"):
            growing.lines()


def test_on_a_bucket_it_is_the_whole_file(s3):
    from bgray import storage

    growing = Growing(f"{s3}/metrics.jsonl")
    for last in (2, 4):
        text = "".join(as_text({"step": step}) for step in range(2, last + 1, 2))
        storage.write_bytes(f"{s3}/metrics.jsonl", text.encode())
        assert [line["step"] for line in growing.lines()] == list(range(2, last + 1, 2))
