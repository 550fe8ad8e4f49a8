"""What a sweep's folder says about variants, trials and curves."""

import json

import numpy as np
import pytest

from bgray import storage
from bgray.compare import compare_sweep
from bgray.reading import Reader
from bgray.results import Change, as_text
from bgray.specimen import Made, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("results") / "sweep")
    variants = [
        Made("baseline"),
        Made("worse", {"optim.lr": 0.05}, gain=-0.05),
        Made("better", {"model.kernels": [7, 23, 41]}, gain=0.1, minutes_to_10k=60, vram_gib=9.0),
        Made("lost", {"optim.extra": True}, state="failed", reason="ValueError: no", until=40),
        Made("later", {"optim.lr": 1.0}, state="waiting"),
    ]
    make(url, variants, seeds=2, steps=200, log_every=5, items=6, clips=0)
    return url


@pytest.fixture(scope="module")
def results(folder):
    return Reader(folder).read()


def entry(results, label):
    return next(e for e in results.entries if e.label == label)


def change(results, label, seed, **timing):
    """Of one trial's run.json, in what was read."""
    info = entry(results, label).trials[seed].info
    info["timing"] = {**info["timing"], **timing}


def test_the_baseline_comes_first_then_the_better_ones(results):
    assert [e.label for e in results.entries] == ["baseline", "better", "worse", "lost", "later"]
    assert [e.number for e in results.entries] == [0, 2, 1, 3, 4]
    assert results.baseline is results.entries[0]


def test_the_rows_are_those_of_the_compare_command(results, folder):
    for metric in ("val_stft", "val_si_sdr"):
        said = compare_sweep(folder, metric)
        assert results.comparisons[metric] == said
        for row in said.rows:
            assert entry(results, row.label).rows[metric] == row


def test_what_differs_from_the_baseline_is_said_setting_by_setting(results):
    assert entry(results, "worse").changes == (Change("optim.lr", 0.005, 0.05),)
    assert entry(results, "better").changes[0].text() == "kernels [41] → [7, 23, 41]"
    assert entry(results, "lost").changes == (Change("optim.extra", None, True),)
    assert entry(results, "baseline").changes == entry(results, "later").changes == ()
    assert set(results.varying) == {"optim.lr", "model.kernels", "optim.extra"}


def test_seed_name_and_runtime_are_no_settings(results):
    keys = results.settings(results.variants[0]).keys()
    assert "optim.lr" in keys
    assert not {"train.seed", "name", "runtime.results"} & keys
    assert results.settings(results.entries[0]) == results.settings(results.variants[0])
    assert results.settings(entry(results, "later")) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (1e-4, "0.0001"), ([1, 2.5], "[1, 2.5]"), (True, "True"), ("x", "x"), (3, "3")],
)
def test_settings_are_written_as_a_person_does(value, text):
    assert as_text(value) == text


def test_states_reasons_and_steps_of_trials(results):
    first, second = entry(results, "lost").trials
    assert (first.state, first.reason, first.step) == ("failed", "ValueError: no", 40)
    assert (second.state, second.step) == ("finished", 200)
    assert dict(results.states) == {"finished": 7, "failed": 1, "waiting": 2}


def test_costs_are_the_most_memory_and_the_middle_time(folder):
    results = Reader(folder).read()
    better = entry(results, "better")
    assert better.vram_gib == 9.0
    assert better.time_to_10k["time_to_10k_steps"] == 3600
    assert better.data_wait_share == pytest.approx(0.12)
    change(results, "better", 0, vram_peak_gib=9.5, time_to_10k_steps=100.0)
    assert better.vram_gib == 9.5
    assert better.time_to_10k["time_to_10k_steps"] == 3600  # of two the slower one
    change(results, "better", 1, packed=True)
    assert better.time_to_10k["time_to_10k_steps"] == 100
    assert better.time_to_10k_text == "~2 min"
    change(results, "better", 0, packed=True)
    assert better.time_to_10k_text == "(~60 min)"
    assert entry(results, "later").vram_gib is None
    assert entry(results, "later").time_to_10k == {}
    assert entry(results, "later").time_to_10k_text == "-"


def test_curves_are_by_step_and_minutes_as_logged(results):
    better = entry(results, "better").trials[0]
    steps, values = results.curve(better, "val_stft")
    assert steps.tolist() == list(range(20, 201, 20))
    # What is logged has seven digits.
    assert values[-1] == pytest.approx(better.info["metrics"]["val_stft"], rel=1e-6)
    minutes = results.minutes(better, np.array([0, 5, 100, 200, 300]))
    # 60 minutes to 10k steps, and a second of warm-up.
    expected = np.array([0, 5 * 0.006, 0.6, 1.2, np.nan]) + np.array([0, 1, 1, 1, 0]) / 60
    np.testing.assert_allclose(minutes, expected)


def test_minutes_are_of_all_that_took_time(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a")], seeds=1, steps=100, items=2, clips=0)
    (trial,) = Reader(url).read().entries[0].trials
    lines = [
        {"step": 50, "train_seconds": 60, "warm_up_seconds": 6, "other_seconds": 30},
        {"step": 100, "train_seconds": 120, "warm_up_seconds": 6, "other_seconds": 90},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    storage.write_bytes(f"{trial.url}/timing.jsonl", text.encode())
    results = Reader(url).read()
    minutes = results.minutes(results.trials[trial.id], np.array([50, 75, 100]))
    np.testing.assert_allclose(minutes, [1.6, 2.6, 3.6])


def test_what_is_not_logged_has_no_curve_and_no_time(results):
    later = entry(results, "later").trials[0]
    assert [len(part) for part in results.curve(later, "val_stft")] == [0, 0]
    assert [len(part) for part in results.curve(later, "loss")] == [0, 0]
    assert np.isnan(results.minutes(later, np.array([1.0, 2.0]))).all()
    assert len(results.curve(entry(results, "better").trials[0], "no such")[0]) == 0


def test_scores_come_first_among_the_names(results):
    assert results.curve_names() == ["val_stft", "val_si_sdr", "loss", "loss_l1", "grad_norm"]


def test_progress_is_the_last_logged_step_of_a_running_trial_only(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a", state="running", until=50), Made("b")], seeds=1, steps=100, clips=0)
    info = {"step": 20}
    results = Reader(url).read()
    running, done = (entry(results, label).trials[0] for label in "ab")
    for trial in (running, done):
        trial.info.update(info)
    # The specimen's process is another machine's, so it is not known to be dead.
    assert running.state == "running"
    assert results.progress(running) == 50
    assert results.progress(done) == 20


def test_before_the_first_evaluation_it_says_why_there_is_no_comparison(tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a", state="running", until=5), Made("b", state="waiting")], seeds=1, clips=0)
    results = Reader(url).read()
    assert results.comparisons == {}
    assert "no run has been evaluated yet" in results.why_not
    assert [(e.label, e.rows) for e in results.entries] == [("a", {}), ("b", {})]
    assert results.metric == "val_stft"


def test_without_a_manifest_the_first_run_is_the_baseline(folder, tmp_path):
    url = str(tmp_path / "sweep")
    make(url, [Made("a"), Made("b", {"optim.lr": 1.0})], seeds=1, steps=100, clips=0)
    manifest = json.loads(storage.read_bytes(f"{url}/sweep.json"))
    storage.remove(f"{url}/sweep.json")
    for order, id in enumerate(reversed(list(manifest["variants"]))):
        (run,) = manifest["variants"][id]["runs"].values()
        info = json.loads(storage.read_bytes(f"{url}/{run}/run.json"))
        info["attempts"][0]["started"] = f"2026-01-0{order + 1}T00:00:00Z"
        storage.write_bytes(f"{url}/{run}/run.json", json.dumps(info).encode())
    results = Reader(url).read()
    assert [e.label for e in results.entries] == ["optim.lr=1.0", "optim.lr=0.005"]
    assert results.metric == "val_stft"
    assert results.rungs == []
