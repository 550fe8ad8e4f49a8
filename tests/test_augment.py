import numpy as np
import pytest
import torch
import torchaudio

from bgray.augment import AUGMENTS
from bgray.augment.gain import Gain
from bgray.augment.low_pass import band_limit, low_pass, reach
from bgray.augment.pitch_shift import pitch_shift
from bgray.augment.polarity import Polarity
from bgray.config import resolve_options

RATE = 48000


def tone(hz, seconds=1.0, amplitude=0.3):
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE)) / RATE)).astype(
        np.float32
    )[None]


def strongest_hz(audio):
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(audio.shape[-1])))
    return float(spectrum.argmax() * RATE / audio.shape[-1])


def rms_db(audio):
    return float(10 * np.log10(np.mean(audio.astype(np.float64) ** 2)))


@pytest.mark.parametrize(("semitones", "hz"), [(12, 880), (-12, 220), (7, 659.26), (0.5, 452.89)])
def test_a_shifted_440_hz_tone_reads_the_expected_frequency(semitones, hz):
    assert strongest_hz(pitch_shift(tone(440), semitones, RATE)[0]) == pytest.approx(hz, abs=1.5)


@pytest.mark.parametrize("length", [1, 100, 5000, 48001])
def test_a_shift_keeps_length_and_type(length):
    shifted = pitch_shift(tone(440, 2)[:, :length], 5, RATE)
    assert shifted.shape == (1, length)
    assert shifted.dtype == np.float32
    assert np.isfinite(shifted).all()


def test_a_shift_is_the_same_bit_for_bit_when_repeated():
    noise = np.random.default_rng(0).standard_normal((2, RATE)).astype(np.float32)
    np.testing.assert_array_equal(pitch_shift(noise, 12, RATE), pitch_shift(noise, 12, RATE))


def test_a_shift_by_nothing_returns_the_audio_itself():
    audio = tone(440)
    assert pitch_shift(audio, 0.0, RATE) is audio


@pytest.mark.parametrize("semitones", [12, -12, 5])
def test_an_impulse_stays_where_it_is_when_shifted(semitones):
    audio = np.zeros((1, RATE), np.float32)
    audio[0, 24000] = 1
    energy = pitch_shift(audio, semitones, RATE)[0].astype(np.float64) ** 2
    assert (energy * np.arange(RATE)).sum() / energy.sum() == pytest.approx(24000, abs=5)


def test_the_tail_of_a_shifted_tone_keeps_its_loudness():
    shifted = pitch_shift(tone(440), 12, RATE)
    assert rms_db(shifted[:, -2048:]) == pytest.approx(rms_db(shifted[:, 20000:30000]), abs=1)


def test_a_shift_keeps_stereo_channels_apart():
    left, right = tone(440), np.zeros((1, RATE), np.float32)
    shifted = pitch_shift(np.concatenate([left, right]), 12, RATE)
    assert strongest_hz(shifted[0]) == pytest.approx(880, abs=1.5)
    assert np.abs(shifted[1]).max() < 1e-6


def gain_db(filtered, hz):
    """Of a tone, in the middle of a second: the ends are the filter's onset."""
    middle = slice(RATE // 4, 3 * RATE // 4)
    return rms_db(filtered(tone(hz))[:, middle]) - rms_db(tone(hz)[:, middle])


@pytest.mark.parametrize("passes", [1, 6, 10, 20])
def test_each_pass_of_a_low_pass_is_3_db_down_at_its_cutoff(passes):
    def filtered(audio):
        return low_pass(audio, 12000, RATE, passes)

    assert gain_db(filtered, 12000) == pytest.approx(-3.01 * passes, abs=0.02 * passes)
    # Butterworth through the bilinear transform: 1 / (1 + (tan(w/2) / tan(wc/2))^4)
    for hz in (3000, 6000, 13000):
        power = 1 / (1 + (np.tan(np.pi * hz / RATE) / np.tan(np.pi / 4)) ** 4)
        assert gain_db(filtered, hz) == pytest.approx(passes * 10 * np.log10(power), abs=0.1)


@pytest.mark.parametrize("cutoff_hz", [400, 6000, 12000, 22653.9])
def test_low_passes_are_torchaudios_one_after_the_other(cutoff_hz):
    noise = 0.1 * np.random.default_rng(0).standard_normal((2, 4000)).astype(np.float32)
    expected = torch.from_numpy(noise).double()
    for _ in range(6):
        expected = torchaudio.functional.lowpass_biquad(expected, RATE, cutoff_hz)
    found = low_pass(noise, cutoff_hz, RATE, passes=6)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, torch.Tensor.numpy(expected), atol=1e-7)


def test_ten_passes_at_half_of_nyquist_delay_by_7_samples():
    impulse = np.zeros((1, 1000), np.float32)
    impulse[0, 100] = 1
    response = low_pass(impulse, 12000, RATE, 10)[0].astype(np.float64)
    assert (response * np.arange(1000)).sum() / response.sum() == pytest.approx(107.07, abs=0.01)


def test_a_band_limit_removes_all_above_its_cutoff_and_nothing_below():
    def limited(audio):
        return band_limit(audio, 12000, RATE)

    assert all(abs(gain_db(limited, hz)) < 0.01 for hz in (20, 1000, 8000, 11500))
    assert all(gain_db(limited, hz) < -75 for hz in (12010, 13000, 18000, 23900))


def test_a_band_limit_delays_nothing_and_reaches_as_far_as_it_says():
    impulse = np.zeros((2, 2001), np.float32)
    impulse[0, 1000] = 1
    response = band_limit(impulse, 12000, RATE)
    np.testing.assert_allclose(response[0], response[0, ::-1], atol=1e-7)
    assert not np.abs(response[1]).any()
    far = np.flatnonzero(np.abs(response[0]) > 1e-6)
    assert far.max() - 1000 <= reach(12000, RATE) <= far.max() - 1000 + 9


def test_a_filter_at_nyquist_or_above_leaves_the_audio_alone():
    audio = tone(440)
    assert low_pass(audio, 24000, RATE, 10) is audio
    assert band_limit(audio, 30000, RATE) is audio
    assert reach(24000, RATE) == 0


def test_a_gain_of_6_0206_db_doubles():
    audio = tone(440)
    np.testing.assert_allclose(Gain().apply(audio, 6.0206, RATE), 2 * audio, rtol=1e-5)
    assert Gain().apply(audio, 6.0206, RATE).dtype == np.float32


def test_gain_draws_are_uniform_in_db_between_its_bounds():
    rng = np.random.default_rng(0)
    draws = np.array([Gain(-6, 3).draw(rng) for _ in range(2000)])
    assert -6 <= draws.min() < -5.9
    assert 2.9 < draws.max() <= 3
    assert draws.mean() == pytest.approx(-1.5, abs=0.2)


def test_polarity_flips_as_often_as_its_probability_says():
    rng = np.random.default_rng(0)
    assert np.mean([Polarity(0.25).draw(rng) for _ in range(4000)]) == pytest.approx(0.25, abs=0.03)
    assert not any(Polarity(0).draw(rng) for _ in range(100))
    np.testing.assert_array_equal(Polarity().apply(tone(440), True, RATE), -tone(440))
    np.testing.assert_array_equal(Polarity().apply(tone(440), False, RATE), tone(440))


@pytest.mark.parametrize("name", sorted(AUGMENTS))
def test_one_draw_applied_to_two_sounds_keeps_their_difference_in_proportion(name):
    augment = AUGMENTS[name]()
    draw = augment.draw(np.random.default_rng(3))
    assert draw == augment.draw(np.random.default_rng(3))
    source, target = tone(440), tone(300)
    together = augment.apply(source + target, draw, RATE)
    apart = augment.apply(source, draw, RATE) + augment.apply(target, draw, RATE)
    np.testing.assert_allclose(together, apart, atol=1e-6)


def test_options_are_checked_from_the_signature():
    assert resolve_options(Gain, {"low_db": -3}, "a") == ({"low_db": -3.0, "high_db": 6.0}, [])
    _, problems = resolve_options(Gain, {"low_db": 8.0}, "data.augment[0]")
    assert problems == [("data.augment[0].low_db", "must not be above high_db (6), got 8")]
    _, problems = resolve_options(Polarity, {"probability": 1.5}, "a")
    assert problems == [("a.probability", "must be <= 1, got 1.5")]
