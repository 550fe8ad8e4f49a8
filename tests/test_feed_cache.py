"""The feed cache: the same bytes, within bounds, whatever happens to its files and processes."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import feed_writer
import numpy as np
import pytest
from coordinates import recipe_of, same, training_folder
from feed_writer import SIZE, made_up

from bgray import data, feed_cache, feed_room, unit_file
from bgray.augment.gain import Gain
from bgray.augment.polarity import Polarity
from bgray.config import FeedCache
from bgray.feed import in_process
from bgray.feed_cache import BOOT, UnitCache
from bgray.feed_room import GIB, scan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training_folder(tmp_path_factory.mktemp("coordinates"))


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    """Neither a full disk nor a fast maker is to decide here."""
    monkeypatch.setattr(feed_room, "LEFT_FREE_GIB", 0.0)
    monkeypatch.setattr(feed_room, "LEFT_FREE", 0.0)
    monkeypatch.setattr(feed_cache, "TRIED", 10**6)


@pytest.fixture
def quick(monkeypatch):
    """Units that are made up; the list of those that were made."""
    made = []

    def make(recipe, number, *ranks):
        made.append(number)
        return made_up(recipe, number)

    monkeypatch.setattr(data, "make_unit", make)
    return made


def cache_of(path, units=1000, seed=0, **options):
    """With room for so many made-up units."""
    gib = units * (SIZE + unit_file.FRAME_BYTES) / GIB
    return UnitCache(FeedCache(str(path), gib), feed_writer.recipe(seed), **options)


def kept(cache):
    """Numbers of the units that are there."""
    return sorted(f.step // 2 for f in scan(cache.root) if f.path.parent == cache.folder and f.step
                  is not None)  # fmt: skip


def right(cache, numbers):
    for number in numbers:
        cache.tell(number)
        for a, b in zip(cache.unit(number, 10**6), made_up(cache.recipe, number), strict=True):
            np.testing.assert_array_equal(a, b)


# --- the same bytes


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_a_cached_stream_is_the_made_one_bit_for_bit_from_any_step_and_on_any_rank(
    folder, tmp_path, rank, world
):
    recipe = recipe_of(folder, augment=(Gain(), Polarity()))
    plain = list(in_process(recipe, 0, 11, rank, world))
    for start in (0, 0, 4, 10):
        cache = UnitCache(FeedCache(str(tmp_path), 1), recipe, rank, world)
        same(in_process(recipe, start, 11, rank, world, cache=cache), plain[start:])
        assert (cache.hits > 0) is (cache.made == 0)
    assert cache.notes == []


def test_the_second_reader_makes_nothing_and_may_not_write_to_what_it_reads(tmp_path, quick):
    first, second = cache_of(tmp_path), cache_of(tmp_path)
    right(first, range(5))
    assert quick == [0, 1, 2, 3, 4]
    right(second, range(5))
    assert quick == [0, 1, 2, 3, 4]
    unit = second.unit(3, 9)
    with pytest.raises(ValueError, match="read-only"):
        unit[0][0] = 1
    assert second.record({"hits": 3, "made": 3}) == {
        "path": str(tmp_path), "gib": second.settings.gib,
        "hits": 9, "made": 3, "waited": 0, "not_stored": 0, "hit_rate": 0.75,
    }  # fmt: skip


def test_what_was_read_stays_valid_when_its_file_goes(tmp_path, quick):
    cache = cache_of(tmp_path)
    right(cache, [0])
    unit = cache.unit(0, 9)
    shutil.rmtree(tmp_path)
    np.testing.assert_array_equal(unit[0], made_up(cache.recipe, 0)[0])
    right(cache, [0, 1])
    assert quick == [0, 0, 1]
    assert kept(cache) == [0, 1]


# --- files that are not what was written


def truncated(path, other):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path, other):
    os.truncate(path, 0)


def zeroed(path, other):
    path.write_bytes(bytes(path.stat().st_size))


def half_zeroed(path, other):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))


def without_a_footer(path, other):
    whole = path.read_bytes()
    path.write_bytes(whole[:-64] + bytes(64))


def samples_zeroed(path, other):
    """As after a power cut: its frame is there, and nothing else."""
    whole = path.read_bytes()
    path.write_bytes(whole[:2048] + bytes(len(whole) - 4096) + whole[-2048:])


def foreign(path, other):
    path.write_bytes(b"ARROW1\0\0 a file of somebody else's " * 1000)


def of_another_unit(path, other):
    shutil.copy(other, path)


def a_folder(path, other):
    path.unlink()
    path.mkdir()


DAMAGES = [truncated, emptied, zeroed, half_zeroed, without_a_footer, samples_zeroed, foreign]


@pytest.mark.parametrize("damage", [*DAMAGES, of_another_unit, a_folder])
def test_a_damaged_file_is_made_anew_and_no_wrong_byte_is_seen(tmp_path, quick, damage):
    first = cache_of(tmp_path)
    right(first, [0, 1])
    damage(first._path(1), first._path(0))
    second = cache_of(tmp_path)
    right(second, [0, 1])
    assert quick == [0, 1, 1]
    assert len(second.notes) == 1 + (damage is a_folder)  # which cannot be removed, either
    if damage is not a_folder:
        right(cache_of(tmp_path), [1])
        assert quick == [0, 1, 1]


def test_a_file_of_an_earlier_boot_is_checked_byte_by_byte_once(tmp_path, quick):
    first = cache_of(tmp_path)
    right(first, [0, 1])
    older = [first._path(i).with_name(f"{2 * i:09d}-0123456789ab.arrow") for i in (0, 1)]
    for i in (0, 1):
        first._path(i).rename(older[i])
    whole = bytearray(older[1].read_bytes())
    whole[10_000] ^= 1  # on no page of the sample
    older[1].write_bytes(whole)
    second = cache_of(tmp_path)
    assert second.has(1)
    right(second, [0, 1])
    assert quick == [0, 1, 1]
    assert sorted(path.name for path in second.folder.glob("*.arrow")) == [
        f"{step:09d}-{BOOT}.arrow" for step in (0, 2)
    ]


def test_a_page_that_the_sample_has_is_seen_to_have_changed(tmp_path, quick):
    first = cache_of(tmp_path)
    right(first, [0])
    unit = made_up(first.recipe, 0)
    place = first._path(0).read_bytes().index(unit[0].tobytes()[:64])
    with open(first._path(0), "r+b") as file:
        file.seek(place + 5)
        file.write(b"\x55")
    right(cache_of(tmp_path), [0])
    assert quick == [0, 0]


# --- bounds


def test_a_full_cache_keeps_the_beginning_and_is_read_again_and_again(tmp_path, quick):
    for _ in range(3):
        cache = cache_of(tmp_path, units=4)
        right(cache, range(8))
        cache.close()
        assert kept(cache) == [0, 1, 2, 3]
    # An LRU of this size would have made all 24.
    assert len(quick) == 8 + 4 + 4
    assert (cache.hits, cache.made, cache.not_stored) == (4, 4, 4)


def test_units_of_a_stream_that_nobody_uses_any_more_go_first(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(feed_cache.UnitCache, "_may_store", lambda self: True)
    old, live = cache_of(tmp_path, units=6, seed=1), cache_of(tmp_path, units=6, seed=2)
    right(old, range(3))
    right(live, range(2))
    old.close()
    live.close()
    long_ago = time.time() - 2 * feed_room.LIVE_SECONDS
    os.utime(old.folder / feed_room.USED, (long_ago, long_ago))
    new = cache_of(tmp_path, units=6, seed=3)
    right(new, [5, 6, 7])
    assert (kept(old), kept(live), kept(new)) == ([0], [0, 1], [5, 6, 7])
    # Then the furthest of those in use, whosever it is; never an earlier one.
    right(live, [2, 3])
    assert (kept(old), kept(live), kept(new)) == ([], [0, 1, 2, 3], [5, 6])
    right(new, [9])
    assert (kept(live), kept(new)) == ([0, 1, 2, 3], [5, 6])


def test_a_trial_close_behind_gets_what_has_no_room_in_the_long_run(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(feed_cache.UnitCache, "_may_store", lambda self: True)
    monkeypatch.setattr(feed_room, "WINDOW", 0.5)
    leader, follower = cache_of(tmp_path, units=6), cache_of(tmp_path, units=6)
    right(follower, [0])
    right(leader, range(3))
    for number in range(3, 20):
        right(leader, [number])
        right(follower, [number - 2])
    assert quick == list(range(20))
    assert kept(leader)[:2] == [0, 1]
    follower.close()  # alone it does not displace the beginning for itself
    before = kept(leader)
    right(leader, [30])
    assert kept(leader) == before


def test_the_disk_is_never_filled(tmp_path, quick, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(feed_room, "LEFT_FREE_GIB", (free + GIB) / GIB)
    cache = cache_of(tmp_path)
    right(cache, range(3))
    assert kept(cache) == []
    assert cache.not_stored == 3
    assert list(cache.folder.glob("*.making")) == []


def test_units_that_are_made_as_cheaply_as_stored_are_not_kept(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(feed_cache, "TRIED", 2)
    cache = cache_of(tmp_path)
    right(cache, range(2))
    cache._stores.extend([1.0] * 16)
    right(cache, range(2, 6))
    assert kept(cache) == [0, 1]
    assert "as cheaply" in cache.notes[0]
    right(cache, [0])  # what is there is taken
    assert cache.hits == 1


def test_old_sums_are_not_believed_where_the_folder_says_otherwise(tmp_path, quick, monkeypatch):
    cache = cache_of(tmp_path, units=4)
    right(cache, [0])
    (tmp_path / "foreign").write_bytes(bytes(3 * SIZE))
    monkeypatch.setattr(feed_room, "RECOUNT_SECONDS", 0.0)
    right(cache, [1, 2])
    assert kept(cache) == [0]
    assert (tmp_path / "foreign").exists()


# --- a disk that does not do what it should


@pytest.mark.parametrize("call", ["posix_fallocate", "write", "open", "rename"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses_is_told_of_once_and_tried_again_later(
    tmp_path, quick, monkeypatch, call, error
):
    cache = cache_of(tmp_path)
    right(cache, [0])
    real = getattr(os, call)

    def refuses(*args, **options):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, call, refuses)
    right(cache, range(1, 5))
    right(cache, [0])
    monkeypatch.setattr(os, call, real)
    assert len(cache.notes) == 1
    assert os.strerror(error) in cache.notes[0]
    assert (cache.hits, cache.made, cache.not_stored) == (1, 5, 4)
    assert kept(cache) == [0]
    right(cache, [5])
    assert kept(cache) == [0]
    cache._rest_until = 0.0
    right(cache, [6])
    assert kept(cache) == [0, 6]


def test_a_path_that_cannot_be_a_folder_only_costs_the_cache(tmp_path, quick):
    (tmp_path / "file").write_text("mine")
    cache = cache_of(tmp_path / "file")
    right(cache, range(3))
    assert cache.not_stored == 3
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_one_may_not_read_is_made_and_left_alone(tmp_path, quick, monkeypatch):
    right(cache_of(tmp_path), [0])
    read = unit_file.read

    def forbidden(path, name, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(unit_file, "read", forbidden)
    cache = cache_of(tmp_path)
    right(cache, [0, 0])
    monkeypatch.setattr(unit_file, "read", read)
    assert quick == [0, 0, 0]
    assert kept(cache) == [0]
    assert len(cache.notes) == 1


# --- several at a time


def test_who_wants_a_unit_that_is_being_made_waits_and_makes_a_later_one_meanwhile(
    tmp_path, monkeypatch
):
    began, go_on, made = threading.Event(), threading.Event(), []

    def make(recipe, number, *ranks):
        made.append((threading.current_thread().name, number))
        if number == 1 and threading.current_thread().name == "slow":
            began.set()
            assert go_on.wait(20)
        if number == 2:
            go_on.set()
        return made_up(recipe, number)

    monkeypatch.setattr(data, "make_unit", make)
    slow, other = cache_of(tmp_path), cache_of(tmp_path)
    right(slow, [0])
    right(other, [0])
    thread = threading.Thread(target=right, args=(slow, [1, 2]), name="slow")
    thread.start()
    assert began.wait(20)
    right(other, [1, 2])
    thread.join()
    numbers = [number for _, number in made]
    assert numbers == sorted(set(numbers))
    assert made[1] == ("slow", 1)
    assert made[2] == ("MainThread", 2)
    assert (other.hits, other.waited) == (2, 1)
    assert (slow.hits, slow.made) == (1, 2)


def test_the_wait_for_another_process_has_an_end(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(feed_cache, "WAIT_SECONDS", 0.1)
    stuck, cache = cache_of(tmp_path), cache_of(tmp_path)
    with stuck._claim(0) as claim:
        assert claim is not None
        right(cache, [0])
    assert (cache.made, cache.not_stored) == (1, 1)
    assert kept(cache) == []


def writer(*args):
    command = [sys.executable, str(Path(feed_writer.__file__)), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_maker_killed_in_the_middle_is_followed_by_who_waits_for_it(tmp_path, quick):
    process = writer(tmp_path, GIB, 0, 0, 3, 60)
    assert process.stdout.readline() == "making\n"
    cache = cache_of(tmp_path)
    assert (cache.folder / "000000000.making").exists()
    threading.Timer(0.3, process.kill).start()
    began = time.monotonic()
    right(cache, range(3))
    assert time.monotonic() - began < 20
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert cache.made == 3
    assert kept(cache) == [0, 1, 2]
    # What it has left goes, at the next look at the folder: its claim, and its name as a reader.
    (cache.folder / "000000100.making").write_bytes(bytes(1000))
    scan(tmp_path)
    assert set(feed_room.readers(cache.folder)) == {cache.reader}
    assert list(cache.folder.glob("*.making")) == []


def test_writers_at_a_time_keep_to_the_bound_and_make_each_unit_once(tmp_path):
    units, bound = 6, 6 * (SIZE + unit_file.FRAME_BYTES)
    writers = [writer(tmp_path, bound, seed, 0, 14, 0.01) for seed in (0, 0, 1)]
    most = 0
    while any(process.poll() is None for process in writers):
        found = 0
        for path in tmp_path.rglob("*"):
            with contextlib.suppress(OSError):
                found += path.stat().st_size if path.is_file() else 0
        most = max(most, found)
        time.sleep(0.01)
    told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in writers]
    assert [process.returncode for process in writers] == [0, 0, 0]
    assert (units - 2) * SIZE < most <= bound
    assert all(one["notes"] == [] for one in told)
    assert all(one["hits"] + one["made"] >= 15 for one in told)


# --- the file itself


def test_a_unit_is_an_arrow_file_that_others_can_read(tmp_path, quick):
    import pyarrow as pa

    cache = cache_of(tmp_path)
    right(cache, [0])
    with pa.OSFile(str(cache._path(0))) as file:
        table = pa.ipc.open_file(file).read_all()
    inputs, targets = made_up(cache.recipe, 0)
    assert table["inputs"].to_pylist() == [batch.tobytes() for batch in inputs]
    assert table["targets"].to_pylist() == [batch.tobytes() for batch in targets]
