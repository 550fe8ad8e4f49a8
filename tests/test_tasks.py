import numpy as np
import pytest
import torch

from bgray.augment.pitch_shift import pitch_shift
from bgray.data import Chunk
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


def test_every_task_names_its_scores_in_the_order_and_with_the_names_of_its_scorer():
    for name, entry in TASKS.items():
        task = entry()
        x = torch.full((1, len(task.sources), 1, 8192), 0.1)
        assert list(task.scorer(RATE)(x, x)) == list(task.scores), name


def test_doing_nothing_gives_the_input_back_as_the_one_source():
    x = torch.randn(2, 1, 8)
    assert torch.equal(Unshift().baseline(x)[:, 0], x)
