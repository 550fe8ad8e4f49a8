import inspect
import io

import numpy as np
import pytest
import soundfile
import torch

from bgray.augment.low_pass import band_limit
from bgray.augment.pitch_shift import pitch_shift
from bgray.config import resolve_options
from bgray.data import Chunk, public
from bgray.metrics import si_sdr
from bgray.shards import Row, encode_flac
from bgray.tasks import TASKS, Unshift

RATE = 8000


def tone(hz, seconds=2.0, amplitude=0.5):
    time = np.arange(round(seconds * RATE)) / RATE
    return (amplitude * 32767 * np.sin(2 * np.pi * hz * time)).astype(np.int16)[None]  # (C, T)


def chunk(**voices):
    frames = next(iter(voices.values())).shape[1]
    flac = {name: encode_flac(audio, RATE) for name, audio in voices.items()}
    return Chunk(Row("a.wav", "g", 0, frames, flac), RATE)


def peak_hz(audio):
    audio = audio[0] / 32768 * np.hanning(audio.shape[-1])
    return np.abs(np.fft.rfft(audio)).argmax() * RATE / len(audio)


def test_the_prepared_input_is_the_shifted_column_at_the_targets_position():
    ramp = np.arange(4000, dtype=np.int16)[None]
    source = chunk(audio=ramp, shift_7=ramp + 10_000)
    for seed in range(5):
        x, y = Unshift(semitones=7.0).example([source], 0, np.random.default_rng(seed), 100)
        np.testing.assert_array_equal(x, y[0] + 10_000)
    x, y = Unshift(semitones=7.0).example([source], 0, None, 100)
    assert y[0, 0, 0] == 1950  # the centre


def test_both_ways_of_shifting_draw_the_same_crop():
    audio = tone(200)
    source = chunk(audio=audio, shift_12=audio)
    crops = [
        Unshift(shift=how).example([source], 0, np.random.default_rng(7), 1024)[1]
        for how in ("prepared", "on_the_fly")
    ]
    np.testing.assert_array_equal(*crops)


@pytest.mark.parametrize(("semitones", "factor"), [(12.0, 2.0), (7.0, 2 ** (7 / 12)), (-12.0, 0.5)])
def test_shifting_on_the_fly_multiplies_the_frequency_and_leaves_the_target(semitones, factor):
    source = chunk(audio=tone(300))
    task = Unshift(semitones=semitones, shift="on_the_fly")
    x, y = task.example([source], 0, None, 4000)  # 2 Hz a bin
    assert peak_hz(y[0]) == pytest.approx(300, abs=2)
    assert peak_hz(x) == pytest.approx(300 * factor, abs=4)


def test_a_crop_shifted_on_the_fly_is_as_loud_at_its_edges_as_in_its_middle():
    x, _ = Unshift(shift="on_the_fly").example([chunk(audio=tone(300))], 0, None, 4096)
    power = np.square(x[0].astype(float)).reshape(8, -1).mean(1)
    decibels = 10 * np.log10(power / power.mean())
    assert np.abs(decibels).max() < 1.5


def test_an_onset_stays_where_it_was_when_shifted_on_the_fly():
    audio = tone(400, seconds=2.0)
    audio[:, :8000] = 0  # starts after 1 s
    x, y = Unshift(shift="on_the_fly").example([chunk(audio=audio)], 0, None, 8000)
    onsets = [np.flatnonzero(np.abs(a.astype(int)) > 8000)[0] for a in (x[0], y[0, 0])]
    assert abs(onsets[0] - onsets[1]) < 0.06 * RATE  # half of Signalsmith's window of 120 ms


def test_a_shifted_crop_louder_than_full_scale_is_clipped_and_does_not_wrap_round(monkeypatch):
    monkeypatch.setattr(
        "bgray.tasks.unshift.pitch_shift", lambda audio, semitones, sample_rate: 3 * audio
    )
    source = chunk(audio=np.full((1, 8000), 20_000, np.int16))
    x, _ = Unshift(shift="on_the_fly").example([source], 0, None, 100)
    assert set(x.ravel().tolist()) == {32767}


def test_only_the_columns_that_are_used_are_read():
    assert Unshift().voices == ("audio", "shift_12")
    assert Unshift(semitones=-3.5).voices == ("audio", "shift_-3.5")
    assert Unshift(shift="on_the_fly").voices == ("audio",)


def test_the_scorer_rates_a_perfect_estimate_best_and_a_shifted_one_below_it():
    audio = torch.from_numpy(tone(300)[None] / 32768).float()[:, None]  # (B, S, C, T)
    shifted = pitch_shift(audio[0, 0].numpy(), 12, RATE)
    score = Unshift().scorer(RATE)
    best, worse = score(audio, audio), score(torch.from_numpy(shifted)[None, None], audio)
    assert best["val_stft"].item() == pytest.approx(0, abs=1e-4)
    assert worse["val_stft"] > best["val_stft"] + 1
    assert best["val_si_sdr"] > 80
    assert worse["val_si_sdr"] < 0
    noisy = audio + 0.01 * torch.randn(audio.shape, generator=torch.Generator().manual_seed(0))
    assert score(noisy, audio)["val_si_sdr"].item() == pytest.approx(
        si_sdr(noisy, audio).item(), abs=1e-5
    )


def test_of_several_shifts_each_example_draws_one_and_validation_takes_the_last():
    ramp = np.arange(4000, dtype=np.int16)[None]
    source = chunk(audio=ramp, shift_8=ramp + 8000, shift_10=ramp + 10_000, shift_12=ramp + 12_000)
    task = Unshift(semitones=(8.0, 10.0, 12.0))
    assert task.shifts == (8.0, 10.0, 12.0)
    assert task.voices == ("audio", "shift_8", "shift_10", "shift_12")
    differences = []
    for seed in range(60):
        x, y = task.example([source], 0, np.random.default_rng(seed), 100)
        differences.append(int(x[0, 0]) - int(y[0, 0, 0]))
    assert set(differences) == {8000, 10_000, 12_000}
    assert min(map(differences.count, set(differences))) > 10
    x, y = task.example([source], 0, None, 100)
    assert x[0, 0] - y[0, 0, 0] == 12_000


def test_what_is_drawn_in_training_alone_is_no_part_of_what_validation_compares():
    one, several = Unshift(semitones=12.0), Unshift(semitones=(8.0, 12.0))
    assert public(one) == public(several)
    assert public(one) != public(Unshift(semitones=(12.0, 8.0)))
    assert public(one) != public(Unshift(band_limit_target=True))


def noise(seconds=2.0):
    return np.random.default_rng(0).integers(-8000, 8000, (1, round(seconds * RATE)), np.int16)


def band_db(audio, low_hz, high_hz):
    """Energy of (T,) between two frequencies."""
    power = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) ** 2
    return 10 * np.log10(
        power[round(low_hz * len(audio) / RATE) : round(high_hz * len(audio) / RATE)].sum()
    )


@pytest.mark.parametrize("how", ["prepared", "on_the_fly"])
def test_a_band_limited_target_lacks_the_octave_that_the_shift_lost_and_nothing_else(how):
    source = chunk(audio=noise(), shift_12=noise())
    plain, limited = (
        Unshift(shift=how, band_limit_target=limit).example([source], 0, None, 8000)
        for limit in (False, True)
    )
    np.testing.assert_array_equal(plain[0], limited[0])
    before, after = plain[1][0, 0].astype(float), limited[1][0, 0].astype(float)
    assert band_db(before, 2010, 4000) - band_db(after, 2010, 4000) > 60
    # The crop's edges are as good as its middle, and below nothing is delayed.
    whole = band_limit(noise().astype(np.float32), 2000, RATE)[0]
    np.testing.assert_allclose(after, whole[4000:12000], atol=0.6)
    low = slice(0, round(1900 * 8000 / RATE))
    difference = np.abs(np.fft.rfft((after - before) * np.hanning(8000)))[low]
    assert difference.max() < 1e-3 * np.abs(np.fft.rfft(before * np.hanning(8000)))[low].max()


def test_a_target_stays_whole_where_the_shift_went_down():
    source = chunk(audio=noise())
    task = Unshift(semitones=(12.0, -12.0), shift="on_the_fly", band_limit_target=True)
    target = task.example([source], 0, None, 4000)[1]
    np.testing.assert_array_equal(target[0], noise()[:, 6000:10000])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"semitones": 25}, ("task.semitones", "must be within 24 of 0 and not 0, got 25")),
        ({"semitones": [8, 0]}, ("task.semitones", "must be within 24 of 0 and not 0, got 0")),
        ({"semitones": []}, ("task.semitones", "is empty; give at least one")),
        ({"semitones": [8, 8]}, ("task.semitones", "names one twice: 8, 8")),
        (
            {"semitones": -12, "band_limit_target": True},
            (
                "task.band_limit_target",
                "has no effect: only a shift up loses the highest frequencies",
            ),
        ),
    ],
)
def test_shifts_that_cannot_be_undone_are_named(options, problem):
    assert resolve_options(Unshift, options, "task")[1] == [problem]
    assert resolve_options(Unshift, {"semitones": [8, 10, 12]}, "task")[1] == []


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_all_that_the_framework_asks_and_its_defaults_are_allowed(name):
    assert resolve_options(TASKS[name], {}, "task")[1] == []
    task = TASKS[name]()
    assert task.kind in ("audio", "roll")
    assert task.full_scale == (1.0 if task.kind == "roll" else 32768.0)
    assert set(task.scores.values()) <= {"min", "max"}
    assert all(label.startswith("val_") for label in task.scores)
    assert task.sources
    assert task.voices
    for attribute in ("stems", "additive"):
        assert isinstance(getattr(task, attribute), bool)
    assert all(abs(s) <= 24 for s in (*task.shifts, *task.round_trips))
    assert set(task.data_defaults) <= {"sample_rate", "channels", "segment", "builtin_seconds"}
    assert all(weight > 0 for weight in task.default_loss.values())
    options = inspect.signature(TASKS[name]).parameters.values()
    assert all(option.kind is option.KEYWORD_ONLY for option in options)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_names_its_scores_in_the_order_and_with_the_names_of_its_scorer(name):
    task = TASKS[name]()
    x = torch.full((1, len(task.sources), 1, 8192), 0.1)
    some_silent = x.clone()
    some_silent[:, 1:] = 0  # of one source: the same again
    for target in (x, some_silent):
        found = task.scorer(RATE)(x, target)
        assert list(found) == [score for score in task.scores if score in found]
        assert next(iter(task.scores)) in found
        assert all(value.shape == () for value in found.values())
    assert set(task.scorer(RATE)(x, x)) | set(found) == set(task.scores)


@pytest.mark.parametrize("name", TASKS)
def test_doing_nothing_has_the_shape_of_an_estimate(name):
    task = TASKS[name]()
    inputs = torch.zeros(2, 88, 48)
    assert task.baseline(inputs).shape == (2, len(task.sources), 88, 48)


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].kind == "audio"])
def test_a_clip_is_heard_as_it_is_and_what_is_too_loud_is_clipped(name):
    audio = np.array([[0.5, -0.25, 1.5, -1.5], [0, 1 / 32768, 1.0, -1.0]], np.float32)
    (suffix, content), *more = TASKS[name]().clips(audio, RATE).items()
    assert suffix == ".wav"
    assert not more
    found, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    assert rate == RATE
    assert found.T.tolist() == [[16384, -8192, 32767, -32768], [0, 1, 32767, -32768]]


def test_doing_nothing_gives_the_input_back_as_the_one_source():
    x = torch.randn(2, 1, 8)
    assert torch.equal(Unshift().baseline(x)[:, 0], x)
