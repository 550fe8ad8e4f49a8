"""What `runtime.feed_cache: auto` means: when trials share a stream, and where units then go."""

from types import SimpleNamespace

import pytest

from bgray import sharing
from bgray.config import ConfigError, FeedCache
from bgray.experiment import resolve
from bgray.resources import Plan
from bgray.sharing import automatic, settle, stream_of


def experiment(tiny, **changes):
    raw = {**tiny}
    for path, value in changes.items():
        section, _, name = path.partition("__")
        raw[section] = {**raw[section], name: value} if name else value
    return resolve(raw, "test")


@pytest.mark.parametrize(
    "change",
    [
        {"train__seed": 1},
        {"train__batch_size": 8},
        {"data__segment": 1024},
        {"data__batches_per_unit": 2},
        {"data__augment": ["polarity"]},
        {"task": {"name": "deartifact"}},
        {"runtime__workers": 2},
    ],
)
def test_what_changes_the_examples_is_another_stream(tiny, change):
    assert stream_of(experiment(tiny), "d") != stream_of(experiment(tiny, **change), "d")
    assert stream_of(experiment(tiny), "d") != stream_of(experiment(tiny), "e")


@pytest.mark.parametrize(
    "change", [{"loss": {"l1": 2.0}}, {"train__steps": 9}, {"optim": {"name": "adamw"}}]
)
def test_what_changes_only_the_training_is_the_same_stream(tiny, change):
    assert stream_of(experiment(tiny), "d") == stream_of(experiment(tiny, **change), "d")


def agenda(experiments, *, left=0, search=()):
    trials = {
        str(i): SimpleNamespace(experiment=e, data_hash="d") for i, e in enumerate(experiments)
    }
    draws = SimpleNamespace(left=left) if left else None
    return SimpleNamespace(trials=trials, draws=draws, sweep=SimpleNamespace(search=search))


def settled(*args, **options):
    found = agenda(*args, **options)
    first = next(iter(found.trials.values())).experiment
    return settle(Plan.make(first, len(found.trials), [{"CPU": 2}]), found).feed


def test_a_sweep_whose_trials_share_a_stream_gets_a_cache_in_its_data_folder(tiny, tmp_path):
    tiny["runtime"]["cache"] = str(tmp_path)
    one, other = experiment(tiny), experiment(tiny, loss={"l1": 2.0})
    feed = settled([one, other, experiment(tiny, train__seed=1)])
    assert feed.cache.path == f"{tmp_path}/feed"
    assert 0 < feed.cache.gib <= 50
    assert "2 trials see the same data" in feed.reason
    assert not (tmp_path / "feed").exists()


def test_a_sweep_of_seeds_alone_or_of_batch_sizes_gets_none(tiny):
    feed = settled([experiment(tiny), experiment(tiny, train__seed=1)])
    assert feed.cache is None
    assert feed.reason.endswith("; no feed cache: no two trials see the same data")


def test_draws_to_come_count_unless_they_change_the_data(tiny):
    assert settled([experiment(tiny)], left=5, search=("optim.lr",)).cache
    assert settled([experiment(tiny)], left=5, search=("train.batch_size",)).cache is None


def test_a_cache_is_asked_for_or_turned_off_by_hand(tiny, tmp_path):
    both = [experiment(tiny, runtime__feed_cache="none")] * 2
    assert settled(both).cache is None
    asked = experiment(tiny, runtime__feed_cache={"path": f"{tmp_path}/x", "gib": 3})
    assert settled([asked]).cache == FeedCache(f"{tmp_path}/x", 3)
    remote = experiment(tiny, runtime__feed_cache={"path": "s3://b/x", "gib": 3})
    with pytest.raises(ConfigError, match=r"feed_cache\.path: must be a local folder"):
        settled([remote])


def test_a_quarter_of_the_free_disk_counting_what_the_cache_holds_already(tmp_path, monkeypatch):
    disk = SimpleNamespace(f_frsize=2**20, f_bavail=8 * 2**10)
    monkeypatch.setattr(sharing, "os", SimpleNamespace(statvfs=lambda path: disk))
    monkeypatch.setattr(sharing, "used_bytes", lambda root: 4 * 2**30)
    assert automatic(str(tmp_path), 2)[0] == FeedCache(f"{tmp_path}/feed", 3.0)
    disk.f_bavail = 2**20
    assert automatic(str(tmp_path), 2)[0].gib == 50


@pytest.mark.parametrize("folder", ["s3://bucket/data", None])
def test_no_cache_where_it_could_not_be_mapped_or_the_disk_is_full(tmp_path, monkeypatch, folder):
    full = SimpleNamespace(f_frsize=4096, f_bavail=1000)
    monkeypatch.setattr(sharing, "os", SimpleNamespace(statvfs=lambda path: full))
    cache, why = automatic(folder or str(tmp_path), 2)
    assert cache is None
    assert why.startswith("no feed cache: ")
