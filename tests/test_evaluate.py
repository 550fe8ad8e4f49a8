"""Whole tracks: separation on stem folders and shards, restoration, and what does not fit."""

import json
import os
import re

import numpy as np
import pytest
import soundfile
import torch
import yaml

from bgray import bss, evaluate
from bgray.config import ConfigError
from bgray.context import Context
from bgray.experiment import prepare_data, resolve, run_url
from bgray.records import evaluations
from bgray.shards import Options, prepare
from bgray.trial import run_trial

RATE = 8000
STEMS = ("drums", "bass")


def write_tracks(folder, *, num=3, seconds=4.0, silent_bass_in=()):
    """Stem folders of noise bursts (drums) and a tone (bass)."""
    time = np.arange(round(seconds * RATE)) / RATE
    for i in range(num):
        rng = np.random.default_rng(i)
        place = folder / f"track{i}"
        place.mkdir(parents=True)
        bursts = 0.2 * rng.standard_normal(len(time)) * (time % 0.5 < 0.1)
        tone = 0.2 * np.sin(2 * np.pi * (80 + 20 * i) * time) * (i not in silent_bass_in)
        soundfile.write(place / "drums.wav", bursts.astype(np.float32), RATE)
        soundfile.write(place / "bass.wav", tone.astype(np.float32), RATE)
    return folder


@pytest.fixture
def separation_run(tmp_path):
    """A run's folder, trained for a moment on shards of stems."""
    url = str(tmp_path / "shards")
    songs = write_tracks(tmp_path / "songs", num=4)
    options = Options(sample_rate=RATE, stems=True, validation_groups=("track3",))
    prepare(str(songs), url, options, workers=0)
    raw = {
        "name": "sep",
        "task": {"name": "separation", "instruments": list(STEMS)},
        "data": {"path": url, "sample_rate": RATE, "segment": 2048},
        "model": {"name": "conv_separator", "kernels": [9, 5], "inner_channels": 4},
        "train": {"steps": 2, "batch_size": 2},
        "validation": {"every": 2, "items": 1, "segment": 8192, "clips": 0},
        "runtime": {"results": str(tmp_path / "results"), "device": "cpu", "threads": 1},
    }
    experiment = resolve(raw, "test")
    run_trial(experiment, prepare_data(experiment), Context())
    return run_url(experiment)


def test_a_track_of_the_runs_own_validation_split_is_scored_as_bss_scores_it(separation_run):
    result = evaluate.evaluate(separation_run, device="cpu")
    assert list(result["bss"]) == ["track3"]
    found = result["bss"]["track3"]
    assert set(found) == set(STEMS)
    # By hand: the same track, the same model, museval's numbers.
    from bgray.inference import load
    from bgray.tracks import find

    trained = load(separation_run, torch.device("cpu"))
    (track,) = find(trained.experiment.data.path)
    target = track.load(STEMS)
    estimate = trained(target.sum(0))
    expected = bss.score_track(target, estimate, RATE, STEMS)
    for stem in STEMS:
        for metric in bss.METRICS:
            assert found[stem][metric] == pytest.approx(expected[stem][metric], abs=1e-3)
    written = json.load(open(f"{separation_run}/evaluation/scores.json"))
    assert written["bss"]["track3"] == found
    assert written["step"] == 2


def test_other_tracks_can_be_given_and_a_silent_source_has_no_score(separation_run, tmp_path):
    tracks = write_tracks(tmp_path / "test", num=2, silent_bass_in=(1,))
    result = evaluate.evaluate(separation_run, tracks=str(tracks), device="cpu")
    assert result["bss"]["track1"]["bass"]["SDR"] is None
    assert result["bss"]["track1"]["drums"]["uSDR"] is not None
    # One track plays the bass: its score is the median.
    assert result["bss_medians"]["bass"]["SDR"] == result["bss"]["track0"]["bass"]["SDR"]
    assert result["input"].keys() == result["task"].keys() == {"track0", "track1"}


def test_the_command_prints_medians_and_draws_boxes(separation_run, tmp_path, capsys):
    tracks = write_tracks(tmp_path / "test", num=2)
    evaluate.main([separation_run, "--tracks", str(tracks), "--seconds", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "medians over 2 tracks" in " ".join(out.split())
    assert all(metric in out for metric in bss.METRICS)
    svg = open(re.search(r"box plots: (\S+)", out).group(1)).read()
    assert svg.lstrip().startswith("<?xml")
    assert "drums" in svg


def test_tracks_that_do_not_fit_are_named_all_at_once(separation_run, tmp_path):
    tracks = write_tracks(tmp_path / "test", num=2)
    (tracks / "track0" / "bass.wav").unlink()
    for stem in STEMS:
        soundfile.write(tracks / "track1" / f"{stem}.wav", np.full(4000, 0.1, np.float32), 16000)
    with pytest.raises(ConfigError) as caught:
        evaluate.evaluate(separation_run, tracks=str(tracks), device="cpu")
    said = dict(caught.value.problems)
    assert "lacks bass" in said["track0"]
    assert "16000 Hz" in said["track1"]


def test_a_restoration_run_is_scored_on_whole_tracks_against_the_unprocessed_input(tiny):
    tiny["train"]["steps"], tiny["validation"]["every"] = 2, 2
    experiment = resolve(tiny, "test")
    run_trial(experiment, prepare_data(experiment), Context())
    result = evaluate.evaluate(run_url(experiment), limit=2, device="cpu")
    assert len(result["task"]) == 2
    assert "bss" not in result
    for name, scores in result["task"].items():
        assert scores.keys() == result["input"][name].keys() == {"val_stft", "val_si_sdr"}
        assert scores != result["input"][name]


def test_infinite_scores_are_null_in_json():
    found = evaluate.finite({"a": {"b": float("-inf"), "c": 1.0, "d": float("nan")}})
    assert found == {"a": {"b": None, "c": 1.0, "d": None}}


@pytest.mark.ray
@pytest.mark.slow
def test_many_tracks_are_scored_on_ray_as_they_are_here(separation_run, tmp_path, monkeypatch):
    tracks = str(write_tracks(tmp_path / "test", num=evaluate.MANY))
    on_ray = evaluate.evaluate(separation_run, tracks=tracks, device="cpu")
    monkeypatch.setattr(evaluate, "MANY", 100)
    here = evaluate.evaluate(separation_run, tracks=tracks, device="cpu")
    assert here["bss"].keys() == on_ray["bss"].keys()
    for name, sources in here["bss"].items():
        for source, scores in sources.items():
            # The number of threads changes the last digits of museval's least squares.
            assert scores == pytest.approx(on_ray["bss"][name][source], abs=1e-6)
    assert here["task"] == {n: pytest.approx(s, abs=1e-5) for n, s in on_ray["task"].items()}


def test_what_is_no_target_counts_as_interference(separation_run):
    """With the target alone museval could blame nothing on interference: SIR would be infinite."""
    raw = yaml.safe_load(open(f"{separation_run}/experiment.yaml"))
    raw["task"]["targets"] = ["bass"]
    experiment = resolve({**raw, "name": "one"}, "test")
    run_trial(experiment, prepare_data(experiment), Context())
    found = evaluate.evaluate(run_url(experiment), device="cpu")["bss"]["track3"]
    assert set(found) == {"bass"}
    assert np.isfinite(found["bass"]["SIR"])


def test_scores_of_a_part_never_replace_those_of_the_whole(separation_run):
    whole = evaluate.evaluate(separation_run, device="cpu")["place"]
    before = open(whole).read()
    part = evaluate.evaluate(separation_run, seconds=1, device="cpu")["place"]
    assert part != whole
    assert open(whole).read() == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--limit", "0"], "--limit: must be at least 1"),
        (["--seconds", "-2"], "--seconds: must be above 0"),
        (["--overlap", "0.9"], "--overlap: must be 0 to 0.5"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, text, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["run", *arguments])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_the_best_checkpoint_is_evaluated_when_it_is_asked_for_and_says_so(tiny, capsys):
    tiny["train"]["steps"], tiny["validation"]["every"] = 12, 2
    tiny["optim"] = {"name": "muon", "lr": 0.05}
    experiment = resolve(tiny, "test")
    run_trial(experiment, prepare_data(experiment), Context())
    url = run_url(experiment)
    scores = {s: m["val_stft"] for s, m in evaluations(url)}
    best = min(scores, key=scores.__getitem__)
    assert best != 12
    latest = evaluate.evaluate(url, limit=1, device="cpu")
    found = evaluate.evaluate(url, limit=1, device="cpu", checkpoint="best")
    assert (latest["step"], found["step"]) == (12, best)
    assert latest["place"] != found["place"]
    assert latest["task"] != found["task"]
    capsys.readouterr()
    evaluate.main([url, "--limit", "1", "--device", "cpu", "--checkpoint", "best"])
    assert f"after {best} steps (best)" in capsys.readouterr().out


def test_a_run_without_a_best_state_says_so(separation_run):
    os.remove(f"{separation_run}/checkpoint/best")
    with pytest.raises(ConfigError, match="has no best checkpoint yet"):
        evaluate.evaluate(separation_run, device="cpu", checkpoint="best")
