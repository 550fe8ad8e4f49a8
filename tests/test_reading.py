"""A sweep's folder is read as it is, again only where it changed, and whatever happens to it."""

import json
import os
import platform
import subprocess
import sys

import pytest

from bgray import leases, storage
from bgray.config import ConfigError
from bgray.reading import Reader, sweeps
from bgray.records import process
from bgray.specimen import Made, make

VARIANTS = [Made("baseline"), Made("wide", {"model.channels": [64]}, gain=0.05)]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request, tmp_path):
    """Where results lie."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture
def folder(root):
    url = f"{root}/sweep"
    make(url, VARIANTS, seeds=2, steps=100, items=4, clips=0)
    return url


@pytest.fixture
def taken(monkeypatch):
    """What is read, by path in the sweep's folder."""
    found = []
    real = storage.read_bytes

    def read(url):
        found.append("/".join(url.rsplit("/", 2)[1:]))
        return real(url)

    monkeypatch.setattr(storage, "read_bytes", read)
    return found


def change(url, **facts):
    """In a run.json."""
    info = json.loads(storage.read_bytes(f"{url}/run.json"))
    storage.write_bytes(f"{url}/run.json", json.dumps({**info, **facts}).encode())


def lease(**facts):
    who = {"token": "t", "what": "sweep x", **leases.here(), **process(), "command": "python"}
    return json.dumps({"beat": 1, **who, **facts}).encode()


def dead_process():
    """The pid of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# --- what is read


def test_a_sweep_reads_as_it_was_written(folder):
    results = Reader(folder).read()
    assert [(e.label, len(e.trials), dict(e.states)) for e in results.entries] == [
        ("baseline", 2, {"finished": 2}),
        ("wide", 2, {"finished": 2}),
    ]
    assert results.metric == "val_stft"
    assert results.entries[1].rows["val_stft"].parts.mean == pytest.approx(-0.05, abs=0.01)
    assert results.driver.state == "none"
    assert results.problems == []
    trial = results.entries[1].trials[0]
    assert results.curve(trial, "val_stft")[0].tolist() == list(range(10, 101, 10))
    assert len(results.curve(trial, "loss")[0]) == 10


def test_where_nothing_has_changed_nothing_is_read_and_it_is_the_same_object(folder, taken):
    reader = Reader(folder + "/")
    results = reader.read()
    assert results.entries
    del taken[:]
    assert reader.read() is results
    assert taken == []


def test_only_what_has_changed_is_read_again(folder, taken):
    reader = Reader(folder)
    results = reader.read()
    trial = next(iter(results.trials.values()))
    change(trial.url, step=90)
    del taken[:]
    newer = reader.read()
    assert newer is not results
    assert taken == [f"{trial.id}/run.json"]
    assert newer.trials[trial.id].step == 90
    assert results.trials[trial.id].step == 100


def test_a_log_that_grows_does_not_compare_anew(folder):
    reader = Reader(folder)
    results = reader.read()
    comparisons = results.comparisons
    trial = next(iter(results.trials.values()))
    path = f"{trial.url}/metrics.jsonl"
    storage.write_bytes(path, storage.read_bytes(path) + b'{"step":110,"loss":0.125}\n')
    change(trial.url, step=110)
    newer = reader.read()
    assert newer is not results
    assert newer.comparisons is comparisons
    assert newer.curve(newer.trials[trial.id], "loss")[1][-1] == 0.125


@pytest.mark.parametrize("what", ["scores", "state", "converged"])
def test_what_a_comparison_looks_at_makes_it_anew(folder, what):
    reader = Reader(folder)
    results = reader.read()
    before = results.comparisons
    trial = results.entries[1].trials[0]
    if what != "scores":
        change(trial.url, **{what: {"state": "diverged", "converged": False}[what]})
    else:
        path = f"{trial.url}/validation_items.jsonl"
        line = {"step": 100, "val_stft": [9.0] * 4, "val_si_sdr": [0.0] * 4}
        content = storage.read_bytes(path).splitlines(keepends=True)[:-1]
        storage.write_bytes(path, b"".join(content) + json.dumps(line).encode() + b"\n")
    after = reader.read().comparisons
    assert after is not before
    assert after["val_stft"].rows[1] != before["val_stft"].rows[1]


def test_variants_that_have_not_begun_wait(folder):
    more = [*VARIANTS, Made("later", state="waiting")]
    make(folder, more, seeds=2, steps=100, items=4, clips=0)
    results = Reader(folder).read()
    later = next(e for e in results.entries if e.label == "later")
    assert dict(later.states) == {"waiting": 2}
    assert later.changes == ()
    assert [trial.step for trial in later.trials] == [0, 0]
    assert results.entries[-1] is later


def test_a_trial_appears_when_it_begins(root):
    url = f"{root}/sweep"
    make(url, [VARIANTS[0], Made("wide", state="waiting")], seeds=1, steps=100, clips=0)
    reader = Reader(url)
    assert dict(reader.read().states) == {"finished": 1, "waiting": 1}
    make(url, VARIANTS, seeds=1, steps=100, clips=0)
    assert dict(reader.read().states) == {"finished": 2}


def test_clips_are_listed(root):
    url = f"{root}/sweep"
    make(url, VARIANTS[:1], seeds=1, steps=100, items=2, clips=1, clip_steps=1, clip_seconds=0.1)
    (trial,) = Reader(url).read().trials.values()
    assert trial.clips == ("000-input.wav", "000-step-000100.wav", "000-target.wav")


def test_on_s3_only_what_has_changed_is_read_again(s3, taken):
    url = f"{s3}/sweep"
    make(url, VARIANTS, seeds=1, steps=100, items=4, clips=0)
    reader = Reader(url)
    results = reader.read()
    assert dict(results.states) == {"finished": 2}
    trial = results.entries[1].trials[0]
    assert len(results.curve(trial, "val_stft")[0]) == 10
    del taken[:]
    assert reader.read() is results
    assert taken == []
    change(trial.url, step=90)
    del taken[:]
    assert reader.read().trials[trial.id].step == 90
    assert taken == [f"{trial.id}/run.json"]
    assert sweeps(s3) == [url]


# --- what can happen to it


def test_a_run_that_is_deleted_waits_again(folder):
    reader = Reader(folder)
    trial = reader.read().entries[1].trials[0]
    files, path = storage.filesystem(trial.url)
    files.rm(path, recursive=True)
    results = reader.read()
    assert results.trials[trial.id].state == "waiting"
    assert len(results.curve(results.trials[trial.id], "val_stft")[0]) == 0


def test_a_file_that_goes_between_listing_and_reading_is_not_there(folder, monkeypatch):
    reader = Reader(folder)
    reader.read()
    stamps = storage.stamps(folder)
    gone = next(path for path in stamps if path.endswith("experiment.yaml"))
    storage.remove(f"{folder}/{gone}")
    monkeypatch.setattr(storage, "stamps", lambda *_, **__: dict(stamps))
    states = Reader(folder).read().states
    assert states["waiting"] == 1
    assert states["finished"] == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b'{"state": "fini'),
        ("run.json", b"[]"),
        ("experiment.yaml", b"a: [1"),
        ("experiment.yaml", b"just text"),
        ("validation_items.jsonl", b'{"step": 1}\noops\n{"step": 2}\n'),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_shown(folder, taken, name, content):
    reader = Reader(folder)
    trial = reader.read().entries[1].trials[0]
    storage.write_bytes(f"{trial.url}/{name}", content)
    results = reader.read()
    assert len(results.problems) == 1
    assert f"{trial.id}/{name}" in results.problems[0]
    damaged = results.trials[trial.id]
    assert damaged.state == "damaged"
    assert "is damaged" in damaged.reason
    assert "\n" not in damaged.reason
    assert results.states["finished"] == 3
    del taken[:]
    assert reader.read() is results  # and it is not read again and again
    assert taken == []


def test_a_damaged_run_that_is_mended_is_shown_again(folder):
    reader = Reader(folder)
    trial = reader.read().entries[1].trials[0]
    whole = storage.read_bytes(f"{trial.url}/run.json")
    storage.write_bytes(f"{trial.url}/run.json", b"{")
    assert reader.read().trials[trial.id].state == "damaged"
    storage.write_bytes(f"{trial.url}/run.json", whole)
    results = reader.read()
    assert results.trials[trial.id].state == "finished"
    assert results.problems == []


def test_a_torn_last_line_of_scores_is_left_out(folder):
    reader = Reader(folder)
    results = reader.read()
    trial = results.entries[0].trials[0]
    path = f"{trial.url}/validation_items.jsonl"
    storage.write_bytes(path, storage.read_bytes(path) + b'{"step": 110, "val_st')
    newer = reader.read()
    assert newer.problems == []
    assert newer.comparisons["val_stft"] == results.comparisons["val_stft"]


def test_a_damaged_manifest_is_an_error_with_a_way_out(folder):
    storage.write_bytes(f"{folder}/sweep.json", b"{")
    with pytest.raises(ConfigError, match="is damaged"):
        Reader(folder).read()


ODD = [
    ({"variants": []}, "no name"),
    ({"mode": "least"}, "mode 'least'"),
    ({"variants": []}, "no variants"),
    ({"variants": {"a": {"label": "a"}}}, "variant a has no label or no runs"),
    ({"variants": {"a": {"runs": {}}}}, "variant a has no label or no runs"),
    ({"variants": {"a": {"label": "a", "runs": {"x": "y"}}}}, "a has a run without a seed"),
    ({"looks": 3}, "looks is no list"),
]


@pytest.mark.parametrize(("odd", "said"), ODD)
def test_a_manifest_of_other_content_is_an_error_with_a_way_out(folder, odd, said):
    whole = json.loads(storage.read_bytes(f"{folder}/sweep.json"))
    odd = odd if said == "no name" else {**whole, **odd}
    storage.write_bytes(f"{folder}/sweep.json", json.dumps(odd).encode())
    with pytest.raises(ConfigError, match=rf"is damaged \(.*{said}\); delete it: runs stay"):
        Reader(folder).read()


def test_a_folder_without_a_sweep_is_an_error_that_says_what_to_give(root):
    storage.write_bytes(f"{root}/x/notes.txt", b"")
    with pytest.raises(ConfigError, match="holds no sweep and no run"):
        Reader(f"{root}/x").read()


# --- who is at work


def test_a_run_whose_process_has_died_is_interrupted(folder):
    trial = Reader(folder).read().entries[0].trials[0]
    attempt = {"host": platform.node(), "pid": dead_process(), "pid_started": "1"}
    change(trial.url, state="running", attempts=[attempt])
    found = Reader(folder).read().trials[trial.id]
    assert found.state == "interrupted"
    assert "its process has died" in found.reason


def test_a_run_whose_process_lives_is_running(folder):
    trial = Reader(folder).read().entries[0].trials[0]
    attempt = {"host": platform.node(), **process()}
    change(trial.url, state="running", attempts=[attempt])
    assert Reader(folder).read().trials[trial.id].state == "running"


def test_runs_of_a_driver_that_lives_are_running_wherever_they_are(folder):
    trial = Reader(folder).read().entries[0].trials[0]
    change(trial.url, state="running", attempts=[{"host": "elsewhere", "pid": 1}])
    storage.write_bytes(f"{folder}/lease.json", lease())
    results = Reader(folder).read()
    assert results.driver.state == "running"
    assert results.driver.who["what"] == "sweep x"
    assert "token" not in results.driver.who
    assert results.trials[trial.id].state == "running"


def test_a_driver_of_this_machine_that_was_killed_is_dead_at_once(folder):
    trial = Reader(folder).read().entries[0].trials[0]
    change(trial.url, state="running", attempts=[{"host": "elsewhere", "pid": 1}])
    storage.write_bytes(f"{folder}/lease.json", lease(pid=dead_process()))
    results = Reader(folder).read()
    assert results.driver.state == "dead"
    assert results.trials[trial.id].state == "interrupted"


def test_a_driver_elsewhere_is_dead_once_its_heartbeat_stands_still(folder, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("bgray.reading.time.monotonic", lambda: clock[0])
    reader = Reader(folder)
    pace = leases.REMOTE if storage.is_remote(folder) else leases.LOCAL
    for beat in range(3):
        storage.write_bytes(f"{folder}/lease.json", lease(host="elsewhere", beat=beat))
        results = reader.read()
        assert results.driver.state == "running"
        clock[0] += pace.dead_seconds - 1
        assert reader.read() is results  # a heartbeat is no news
    clock[0] += 2
    newer = reader.read()
    assert newer is not results
    assert newer.driver.state == "dead"


# --- which folders are sweeps


def test_sweeps_are_the_folder_itself_or_those_in_it(root, folder):
    make(f"{root}/another", VARIANTS[:1], seeds=1, steps=100, clips=0)
    storage.write_bytes(f"{root}/notes/readme.txt", b"")
    assert sweeps(folder) == [folder]
    assert sweeps(root + "/") == [f"{root}/another", f"{root}/sweep"]


def test_a_sweep_of_which_no_run_has_begun_counts(root):
    make(f"{root}/sweep", [Made("baseline", state="waiting")], seeds=1, clips=0)
    assert sweeps(root) == [f"{root}/sweep"]
    assert dict(Reader(f"{root}/sweep").read().states) == {"waiting": 1}


def test_a_folder_of_single_runs_is_read_like_a_sweep(root, folder):
    storage.remove(f"{folder}/sweep.json")
    for path in storage.stamps(folder):
        if path.endswith("run.json"):
            change(f"{folder}/{path.rpartition('/')[0]}", variant=None, data_hash="d")
    assert sweeps(folder) == [folder]
    results = Reader(folder).read()
    assert sorted(len(entry.trials) for entry in results.entries) == [2, 2]
    assert results.name == "sweep"


def test_one_run_is_no_sweep_and_its_parent_is_named(folder):
    trial = Reader(folder).read().entries[0].trials[0]
    with pytest.raises(ConfigError, match=f"is one run; give its sweep's folder, {folder}"):
        sweeps(trial.url)


@pytest.mark.parametrize("name", ["empty", "none"])
def test_no_sweep_is_an_error(tmp_path, name):
    os.mkdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match="holds no sweep; give a sweep's folder"):
        sweeps(str(tmp_path / name))
