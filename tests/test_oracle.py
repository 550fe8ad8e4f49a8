"""The oracle against scipy, the log's draws, and a search that goes on where it was."""

import importlib.metadata
import json

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
import yaml

from bgray import band, oracle
from bgray.document import read
from bgray.metrics import usdr
from bgray.oracle import draws, phase_mix
from bgray.problems import ConfigError
from bgray.records import read_lines

SMALL = {
    "low": 256,
    "high": 2048,
    "step": 256,
    "draws": 3,
    "controls": [512],
    "noverlap_ratio": [0.25, 0.75],
    "builtin_songs": 2,
    "builtin_seconds": 1.0,
}


def slow_phase_mix(sources, window, noverlap_ratio):
    """One source and channel after the other through scipy, in float64."""
    options = {"nperseg": window, "noverlap": int(window * noverlap_ratio), "window": "hann"}
    spectra = np.array([[scipy.signal.stft(x, **options)[2] for x in s] for s in sources])
    mixture = spectra.sum(0) + 1e-10
    size = np.abs(mixture)
    phase = mixture / np.where(size == 0, 1, size)
    phase[size == 0] = 1
    made = [
        [scipy.signal.istft(np.abs(x) * p, **options)[1] for x, p in zip(s, phase, strict=True)]
        for s in spectra
    ]
    return np.array(made)[..., : sources.shape[-1]]


def stems(seconds=1.6):
    """Four instruments in stereo; the bass has a rest, for silence must stay silent."""
    song = band.song(3, 1, seconds=seconds, sample_rate=16000)
    left = np.concatenate(list(song.stems.values()))  # (S, T)
    sources = np.stack([left, 0.5 * left[::-1] + 0.1 * left], axis=1)  # (S, C, T)
    sources[2, :, 4000:12000] = 0
    return sources.astype(np.float64)[..., :-37]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("window", [256, 1408, 8320, 501])
def test_the_fast_path_scores_as_scipy_does(window, ratio):
    sources = stems()
    slow = slow_phase_mix(sources, window, ratio)
    reference = usdr(torch.from_numpy(slow), torch.from_numpy(sources))
    assert (reference < 60).all()
    exact = phase_mix(torch.from_numpy(sources), window, ratio)
    np.testing.assert_allclose(exact, slow, rtol=0, atol=1e-12)
    single = torch.from_numpy(sources).float()
    fast = usdr(phase_mix(single, window, ratio), single)
    np.testing.assert_allclose(fast, reference, rtol=0, atol=5e-6)


def test_a_source_alone_comes_back_and_silence_stays_silent():
    sources = torch.from_numpy(stems())
    sources[1:] = 0
    made = phase_mix(sources, 1024, 0.25)
    torch.testing.assert_close(made[0], sources[0], rtol=0, atol=1e-6)
    assert not made[1:].any()


def test_sources_in_phase_are_separated_perfectly_and_in_antiphase_not_at_all():
    tone = torch.from_numpy(stems())[:1]
    together = torch.cat([tone, 0.5 * tone])
    assert (usdr(phase_mix(together, 512), together) > 80).all()
    against = torch.cat([tone, -0.5 * tone])  # the mixture has the first one's sign
    loud, quiet = usdr(phase_mix(against, 512), against).tolist()
    assert loud > 80
    assert quiet == pytest.approx(-6.02, abs=0.01)


def test_blocks_change_nothing(monkeypatch):
    sources = torch.from_numpy(stems()).float()
    whole = phase_mix(sources, 640, 0.75)
    monkeypatch.setattr(oracle, "BLOCK", 1)
    torch.testing.assert_close(phase_mix(sources, 640, 0.75), whole, rtol=0, atol=1e-6)


def test_seed_42_draws_what_the_log_found_best():
    found = draws(42)
    assert found[:6] == [21120, 3840, 1024, 24448, 9216, 8192]
    assert len(set(found)) == 51
    for window, place in {14080: 17, 7808: 22, 6656: 27, 11264: 51}.items():
        assert found[place - 1] == window


def test_seed_1337_draws_what_the_log_found_best():
    found = draws(1337)
    assert len(set(found)) == 55
    for window, place in {5632: 9, 6912: 21, 11648: 37, 15232: 51, 8320: 52}.items():
        assert found[place - 1] == window
    assert 4096 in found  # the control of one seed is among the other's draws
    assert 4096 not in draws(42)


def test_a_grid_is_every_candidate_and_the_controls():
    question = oracle.parse({"oracle": {"search": "grid", "controls": [100, 4096]}}, "x.yaml")
    found = oracle.windows(question.oracle)
    assert len(found) == 255
    assert found[:2] == [100, 256]
    assert found[-1] == 32640


@pytest.fixture
def small(tmp_path):
    def make(**keys):
        settings = {**SMALL, "results": str(tmp_path / "results"), **keys}
        return {"name": "small", "oracle": settings}

    return make


def lines(tmp_path):
    return read_lines(str(tmp_path / "results" / "small" / "oracle.jsonl"))


def test_the_report_holds_what_direct_scores_say(small, tmp_path, capsys):
    assert oracle.run(small(), "small.yaml", dry=False) == 0
    report = json.loads((tmp_path / "results" / "small" / "oracle.json").read_text())
    first, second = report["overlaps"]
    assert [first["noverlap_ratio"], second["noverlap_ratio"]] == [0.25, 0.75]
    sums, counts = {}, {}
    for index in range(2):
        song = band.song(0, index, seconds=1.0, sample_rate=44100)
        sources = np.stack(list(song.stems.values())).astype(np.float64)
        made = slow_phase_mix(sources, 512, 0.25)
        scores = usdr(torch.from_numpy(made), torch.from_numpy(sources)).tolist()
        for program, value in zip(song.stems, scores, strict=True):
            if program not in song.silent and len(song.silent) < 3:
                name = band.PROGRAMS[program]
                sums[name] = sums.get(name, 0) + value
                counts[name] = counts.get(name, 0) + 1
    means = {name: sums[name] / counts[name] for name in sums}
    control = first["controls"]["512"]
    assert control == pytest.approx(
        {**means, "mean": sum(means.values()) / len(means)}, rel=0, abs=1e-6
    )
    assert set(first["seeds"]) == {"42", "1337"}
    out = capsys.readouterr().out
    assert "A window per target instead of" in out
    assert "the mean over" in out
    assert "do not quote it" in " ".join(out.split())


def test_what_is_scored_is_not_scored_again(small, tmp_path, monkeypatch):
    calls = []
    score = oracle.score

    def counting(track, settings):
        calls.extend((track.name, *pair) for pair in settings)
        return score(track, settings)

    monkeypatch.setattr(oracle, "score", counting)
    oracle.run(small(), "small.yaml", dry=True)
    assert not calls
    oracle.run(small(), "small.yaml", dry=False)
    once = len(calls)
    assert once == len(set(calls)) == len(lines(tmp_path))
    oracle.run(small(), "small.yaml", dry=False)
    assert len(calls) == once
    oracle.run(small(noverlap_ratio=[0.25, 0.5]), "small.yaml", dry=False)
    assert {ratio for *_, ratio in calls[once:]} == {0.5}
    shorter = len(calls)
    oracle.run(small(max_seconds=0.5, noverlap_ratio=[0.25]), "small.yaml", dry=False)
    assert len(calls) == shorter + once // 2  # other sound, other scores


def test_stopped_it_keeps_what_it_has_and_goes_on(small, tmp_path, monkeypatch):
    score, calls = oracle.score, []

    def stopping(track, settings):
        calls.append(track.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(track, settings)

    monkeypatch.setattr(oracle, "score", stopping)
    monkeypatch.setattr(oracle, "TASK", 3)
    with pytest.raises(KeyboardInterrupt):
        oracle.run(small(), "small.yaml", dry=False)
    kept = lines(tmp_path)
    assert kept
    oracle.run(small(), "small.yaml", dry=False)
    assert lines(tmp_path)[: len(kept)] == kept
    assert len(lines(tmp_path)) > len(kept)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_scores_what_this_process_scores(small, tmp_path, monkeypatch):
    def by_setting():
        keys = ("track", "window", "noverlap_ratio")
        return {tuple(row[key] for key in keys): row["sdr_db"] for row in lines(tmp_path)}

    oracle.run(small(), "small.yaml", dry=False)
    here = by_setting()
    (tmp_path / "results" / "small" / "oracle.jsonl").unlink()
    monkeypatch.setattr(oracle, "RAY_SECONDS", 0.0)
    monkeypatch.setattr(oracle, "TASK", 3)
    oracle.run(small(), "small.yaml", dry=False)
    there = by_setting()
    assert there.keys() == here.keys()
    for setting, scores in here.items():
        pairs = np.array([(scores[stem], there[setting][stem]) for stem in scores], float)
        np.testing.assert_allclose(pairs[:, 0], pairs[:, 1], rtol=0, atol=1e-6)  # None is NaN


def test_stems_that_rest_or_play_alone_are_not_scored_and_named(small, tmp_path, capsys):
    for name, playing in {"all": "abc", "two": "ab", "one": "a", "none": ""}.items():
        write_track(tmp_path / "in" / name, *"abc", silent=set("abc") - set(playing))
    raw = small(tracks=str(tmp_path / "in"), search="grid", low=512, high=513)
    assert oracle.run(raw, "small.yaml", dry=False) == 0
    report = json.loads((tmp_path / "results" / "small" / "oracle.json").read_text())
    expected = {"all": [], "two": ["c"], "one": ["a", "b", "c"], "none": ["a", "b", "c"]}
    assert report["resting"] == expected
    highest = max(f["tracks_db"][1] for f in report["overlaps"][0]["per_target"].values())
    assert highest < 20  # alone it would be 100
    out = capsys.readouterr().out
    assert "two: not scored, for they rest or play alone: c" in out
    assert "\nall:" not in out
    alone = small(tracks=str(tmp_path / "in" / "one"), search="grid", low=512, high=513)
    with pytest.raises(ConfigError, match="no track in which two stems play"):
        oracle.run(alone, "small.yaml", dry=False)


def write_track(folder, *names, seconds=0.3, silent=()):
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        sound = 0.1 * np.random.default_rng(i).standard_normal((round(8000 * seconds), 2))
        sound *= name not in silent
        soundfile.write(folder / f"{name}.wav", sound, 8000)


def test_musdbs_validation_tracks_are_picked_by_name_and_missing_ones_named(small, tmp_path):
    text = (
        importlib.metadata.distribution("musdb").locate_file("musdb/configs/mus.yaml").read_text()
    )
    titles = yaml.safe_load(text)["validation_tracks"]
    assert len(titles) == 14
    for title in ["Somebody - Else", *titles[:-1]]:
        write_track(tmp_path / "musdb" / "train" / title, "bass", "vocals", seconds=0.01)
    raw = small(tracks=str(tmp_path / "musdb"), subset="musdb_validation")
    with pytest.raises(ConfigError, match="1 of MUSDB's 14 validation tracks are not there"):
        oracle.run(raw, "small.yaml", dry=True)
    write_track(tmp_path / "musdb" / "train" / titles[-1], "bass", "vocals", seconds=0.01)
    question = oracle.parse(raw, "small.yaml")
    found = oracle.find_tracks(question.oracle, "small.yaml")
    assert [track.name for track in found] == [f"train/{title}" for title in titles]


def test_tracks_with_different_stems_are_named(small, tmp_path):
    write_track(tmp_path / "in" / "a", "bass", "vocals")
    write_track(tmp_path / "in" / "b", "bass", "drums")
    with pytest.raises(ConfigError, match="b has the stems bass, drums"):
        oracle.run(small(tracks=str(tmp_path / "in")), "small.yaml", dry=True)


def test_every_mistake_is_named_at_once_with_its_way_out(tmp_path):
    raw = {"oracle": {"draw": 3, "search": "exhaustive", "seeds": ["42"]}, "tracks": "x"}
    with pytest.raises(ConfigError) as error:
        oracle.run(raw, "oracle.yaml", dry=True)
    text = str(error.value)
    assert "oracle.draw: unknown key, did you mean 'draws'?" in text
    assert "oracle.search: expected one of 'random' or 'grid', got 'exhaustive'" in text
    assert "oracle.seeds[0]: expected int, got '42'" in text
    assert "tracks: unknown key" in text
    settings = {
        "low": 4096,
        "high": 4096,
        "seeds": [],
        "noverlap_ratio": [0, 0.5, 1.0],
        "controls": [4],
        "subset": "musdb_validation",
    }
    with pytest.raises(ConfigError) as error:
        oracle.run({"oracle": settings}, "oracle.yaml", dry=True)
    paths = [path for path, _ in error.value.problems]
    assert paths == [
        "oracle.low",
        "oracle.seeds",
        "oracle.noverlap_ratio[0]",
        "oracle.noverlap_ratio[2]",
        "oracle.controls[0]",
        "oracle.subset",
    ]


def test_the_command_takes_overrides_and_says_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"oracle": SMALL}))
    results = f"oracle.results={tmp_path / 'results'}"
    with pytest.raises(SystemExit) as done:
        oracle.main([str(path), "--dry", "--set", results, "--set", "oracle.draws=1"])
    assert done.value.code == 0
    assert "2 tracks" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    with pytest.raises(SystemExit) as done:
        oracle.main([str(path), "--set", "oracle.step=0"])
    assert done.value.code == 2
    assert "oracle.step: must be >= 1, got 0" in capsys.readouterr().err


def test_the_logs_question_is_the_default_of_the_yaml_in_sweeps():
    raw = read("sweeps/oracle.yaml")
    config = oracle.parse(raw, "sweeps/oracle.yaml").oracle
    assert config == oracle.Oracle()
    found = oracle.windows(config)
    assert {8320, 15232, 5632, 11648, 6912, 14080, 4096} <= set(found)
    assert len(found) == len({*draws(42), *draws(1337), 4096, 8192})
