"""Feeds on coordinate shards: Ray Data, and what the feed cache does for them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from coordinates import recipe_of, same, training_folder
from test_leases import wait_until

from bgray import data, feed, feed_cache, feed_room
from bgray.augment.gain import Gain
from bgray.augment.polarity import Polarity
from bgray.config import FeedCache
from bgray.context import Context
from bgray.experiment import prepare_data, resolve, run_url
from bgray.feed import in_process, on_ray
from bgray.feed_cache import UnitCache
from bgray.records import CTRL_C, read_info
from bgray.trial import run_trial


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training_folder(tmp_path_factory.mktemp("coordinates"))


@pytest.fixture(scope="module")
def ray_here():
    from bgray.session import ray_session

    with ray_session() as ray:
        yield ray


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 3])
def test_ray_data_delivers_what_a_thread_makes_whatever_the_number_of_tasks(
    folder, ray_here, workers
):
    recipe = recipe_of(folder, augment=(Gain(), Polarity()))
    found = on_ray(recipe, 0, 13, workers=workers, cpus=0.25)
    same(found, in_process(recipe, 0, 13))


@pytest.mark.ray
@pytest.mark.parametrize(("lot", "ahead"), [(1, 1), (2, 1), (2, 2)])
def test_executions_follow_each_other_without_a_seam(folder, ray_here, monkeypatch, lot, ahead):
    monkeypatch.setattr(feed, "LOT", lot)
    monkeypatch.setattr(feed, "AHEAD", ahead)
    recipe = recipe_of(folder)
    found = on_ray(recipe, 2, 14, workers=1, cpus=0.25)  # units 0 to 4
    same(found, in_process(recipe, 2, 14))


def test_an_execution_is_begun_before_the_one_before_has_ended_and_no_earlier(folder, monkeypatch):
    monkeypatch.setattr(feed, "LOT", 4)
    monkeypatch.setattr(feed, "AHEAD", 2)
    log = []

    def lot(first, last, **_):
        log.append((first, last))
        for unit in range(first, last + 1):
            yield unit, {}

    monkeypatch.setattr(feed, "_lot", lot)
    options = {"rank": 0, "world": 1, "options": {}, "workers": 1, "cache": None}
    units = feed._from_tasks(recipe_of(folder), 3, 11, **options)
    seen = [next(units)[0] for _ in range(2)]
    assert log == [(3, 6)]
    seen.append(next(units)[0])
    wait_until(lambda: log == [(3, 6), (7, 10)])
    assert [*seen, *(unit for unit, _ in units)] == list(range(3, 12))
    assert log == [(3, 6), (7, 10), (11, 11)]


@pytest.mark.ray
def test_ray_data_started_in_the_middle_of_a_unit_delivers_a_ranks_share(folder, ray_here):
    recipe = recipe_of(folder)
    same(on_ray(recipe, 4, 8, 1, 2, cpus=0.25), in_process(recipe, 4, 8, 1, 2))


@pytest.mark.ray
def test_ray_datas_stream_can_be_left_early_and_the_next_one_starts(folder, ray_here):
    recipe = recipe_of(folder)
    early = on_ray(recipe, 0, 30, cpus=0.25)
    same([next(early)], in_process(recipe, 0, 1))
    early.close()
    same(on_ray(recipe, 5, 7, cpus=0.25), in_process(recipe, 5, 7))


def ray_that_delivers(monkeypatch, units):
    """on_ray's blocks replaced by those of these units."""
    import ray.data

    class Fake:
        class context:
            class execution_options:
                preserve_order = False

        def map_batches(self, *args, **kwargs):
            return self

        def iter_batches(self, **kwargs):
            assert self.context.execution_options.preserve_order
            for unit in units:
                zeros = np.zeros((3, 8, 1, 2), np.int16)
                yield feed._packed(unit, (zeros, zeros[:, :, None]), {})

    monkeypatch.setattr(ray.data, "read_datasource", lambda *args, **kwargs: Fake())


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([0, 2], r"delivered units \[2\] where unit 1 "),
        ([1, 0], r"delivered units \[1\] where unit 0 "),
        ([0, 0], r"delivered units \[0\] where unit 1 "),
        ([0, 1], "ended after unit 1; unit 2 was to be the last"),
    ],
    ids=["dropped", "reordered", "repeated", "cut off"],
)
def test_blocks_that_ray_data_drops_reorders_or_repeats_are_an_error(
    folder, monkeypatch, units, message
):
    ray_that_delivers(monkeypatch, units)
    with pytest.raises(RuntimeError, match=message):
        list(on_ray(recipe_of(folder), 0, 9))


# --- with the feed cache


@pytest.fixture
def _stored(monkeypatch):
    """Small units are kept, too, and on a full disk."""
    monkeypatch.setattr(feed_cache, "TRIED", 10**6)
    monkeypatch.setattr(feed_room, "LEFT_FREE_GIB", 0.0)
    monkeypatch.setattr(feed_room, "LEFT_FREE", 0.0)


def cache_of(recipe, path):
    return UnitCache(FeedCache(str(path), 1.0), recipe)


def no_tasks(*args, **options):
    raise AssertionError("Ray Data was started")


@pytest.mark.usefixtures("_stored")
def test_a_stream_that_is_all_in_the_cache_starts_no_ray(folder, tmp_path, monkeypatch):
    recipe = recipe_of(folder)
    made = list(in_process(recipe, 0, 12, cache=cache_of(recipe, tmp_path)))
    monkeypatch.setattr(feed, "_from_tasks", no_tasks)
    cache = cache_of(recipe, tmp_path)
    same(on_ray(recipe, 2, 12, cache=cache), made[2:])
    assert (cache.hits, cache.made) == (4, 0)
    assert feed_room.readers(cache.folder) == {}


@pytest.mark.usefixtures("_stored")
@pytest.mark.parametrize("lead", [0.0, 1e9])
def test_ray_starts_at_the_first_unit_that_is_missing_and_before_it_is_due(
    folder, tmp_path, monkeypatch, lead
):
    monkeypatch.setattr(feed, "LEAD_SECONDS", lead)
    recipe, asked = recipe_of(folder), []
    list(in_process(recipe, 0, 9, cache=cache_of(recipe, tmp_path)))  # units 0 to 2
    cache, seen = cache_of(recipe, tmp_path), []

    def tasks(recipe, first, last, **options):
        asked.append((first, last, list(seen)))
        for number in range(first, last + 1):
            yield data.make_unit(recipe, number), {"keep": True}

    monkeypatch.setattr(feed, "_from_tasks", tasks)
    for batch in on_ray(recipe, 0, 15, cache=cache):
        seen.append(batch.step)
    assert seen == list(range(15))
    ((first, last, before),) = asked
    assert (first, last) == (3, 4)
    assert len(before) < 9
    assert cache.record({})["hit_rate"] == 0.6
    assert cache.run_from(0, 4) == 5  # what tasks on other machines made is kept here


@pytest.mark.usefixtures("_stored")
def test_a_unit_that_went_after_its_task_had_left_it_is_made_again(folder, tmp_path, monkeypatch):
    recipe = recipe_of(folder)

    def tasks(recipe, first, last, **options):
        for _ in range(first, last + 1):
            yield None, {"made": 1}

    monkeypatch.setattr(feed, "_from_tasks", tasks)
    same(on_ray(recipe, 0, 6, cache=cache_of(recipe, tmp_path)), in_process(recipe, 0, 6))


def test_what_a_task_delivers_comes_out_as_it_was_and_may_not_be_written_to():
    unit = np.arange(48, dtype=np.int16).reshape(2, 3, 1, 8), np.ones((2, 3, 2, 1, 8), np.int16)
    table = feed._packed(5, unit, {"hits": 1})
    found, told = feed._unpacked(table)
    for a, b in zip(found, unit, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not a.flags.writeable
    assert told == {"hits": 1}
    assert feed._unpacked(feed._packed(5, None, {})) == (None, {})


@pytest.mark.ray
@pytest.mark.slow
def test_rays_tasks_keep_what_they_make_and_the_next_trial_goes_on_from_there(
    folder, ray_here, tmp_path
):
    recipe = recipe_of(folder, augment=(Gain(), Polarity()))
    plain = list(in_process(recipe, 0, 24))
    first = cache_of(recipe, tmp_path)
    same(on_ray(recipe, 0, 12, cpus=0.25, cache=first), plain[:12])
    assert (first.hits, first.made) == (0, 4)
    assert first.run_from(0, 7) == 4
    second = cache_of(recipe, tmp_path)
    same(on_ray(recipe, 1, 24, cpus=0.25, cache=second), plain[1:])
    assert (second.hits, second.made) == (4, 4)
    assert second.notes == []


# --- in a run's record


def train(tiny, results, *, cache="none", stop=lambda: "", **optim):
    raw = {**tiny, "optim": {"name": "adamw", "lr": 1e-3, **optim}}
    raw["runtime"] = {**tiny["runtime"], "results": str(results), "feed_cache": cache}
    experiment = resolve(raw, "test")
    run_trial(experiment, prepare_data(experiment), Context(stop=stop))
    info = read_info(run_url(experiment))
    return info, Path(run_url(experiment), "metrics.jsonl").read_bytes()


@pytest.mark.usefixtures("_stored")
def test_run_json_says_what_came_from_the_cache_and_the_training_is_the_same(tiny, tmp_path):
    cache = {"path": str(tmp_path / "units"), "gib": 1.0}
    info, plain = train(tiny, tmp_path / "off")
    assert "feed_cache" not in info
    assert not (tmp_path / "units").exists()
    info, made = train(tiny, tmp_path / "first", cache=cache)
    assert made == plain
    assert info["feed_cache"] == {
        **cache, "hits": 0, "made": 6, "waited": 0, "not_stored": 0, "hit_rate": 0.0
    }  # fmt: skip
    asked = itertools.count(1)
    train(tiny, tmp_path / "stopped", cache=cache, stop=lambda: CTRL_C if next(asked) == 8 else "")
    info, read = train(tiny, tmp_path / "stopped", cache=cache)
    assert read == plain
    found = info["feed_cache"]
    assert found["made"] == 0
    assert found["hits"] >= 6  # of both tries
    assert found["hit_rate"] == 1.0
    assert len(list((tmp_path / "units").glob("*/*.arrow"))) == 6


@pytest.mark.usefixtures("_stored")
def test_what_is_wrong_with_the_cache_is_a_warning_and_no_end(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    info, _ = train(tiny, tmp_path, cache={"path": str(tmp_path / "file"), "gib": 1.0})
    assert info["state"] == "finished"
    assert any("units are made and not kept" in text for text in info["warnings"])
    assert info["feed_cache"]["not_stored"] == 6
