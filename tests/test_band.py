import dataclasses

import numpy as np
import pytest

from bgray.band import PROGRAMS, Note, Score, compose, piano_roll, play, song

PITCHED = (0, 33, 48)


def one_note(program, pitch, sample_rate, seconds=2.5, velocity=90):
    note = Note(program, pitch, 0.0, seconds, velocity)
    return play(Score(seconds, 120.0, (program,), (note,), timbre=3), sample_rate).mixture[0]


def power(audio):
    """Windowed power spectrum, padded to 2**19 samples."""
    return np.abs(np.fft.rfft(audio * np.hanning(len(audio)), 2**19)) ** 2


def test_the_same_seed_and_index_give_the_same_bits():
    first, second = song(1, 5, seconds=6), song(1, 5, seconds=6)
    assert first.notes == second.notes
    assert np.array_equal(first.roll, second.roll)
    for program, stem in first.stems.items():
        assert stem.tobytes() == second.stems[program].tobytes()


def test_consecutive_songs_and_seeds_differ():
    mixtures = [
        song(*key, seconds=4, sample_rate=16_000).mixture for key in ((1, 0), (1, 1), (2, 0))
    ]
    mixtures = [mixture[0] / np.linalg.norm(mixture) for mixture in mixtures]
    for i in range(3):
        assert np.abs(mixtures[i] @ mixtures[i - 1]) < 0.5


def test_the_composition_does_not_depend_on_the_sample_rate():
    low, high = (song(4, 2, seconds=5, sample_rate=rate) for rate in (16_000, 44_100))
    assert (low.notes, low.tempo_bpm, low.silent) == (high.notes, high.tempo_bpm, high.silent)
    assert (low.mixture.shape, high.mixture.shape) == ((1, 80_000), (1, 220_500))


@pytest.mark.parametrize("sample_rate", [16_000, 24_000, 44_100, 48_000])
def test_the_mixture_is_the_sum_of_the_stems_bit_for_bit(sample_rate):
    for index in range(3):
        piece = song(7, index, seconds=7.3, sample_rate=sample_rate)
        total = np.zeros((1, round(7.3 * sample_rate)), np.float32)
        for program in (-1, 0, 33, 48):
            assert piece.stems[program].dtype == np.float32
            total = total + piece.stems[program]
        assert np.array_equal(piece.mixture, total)
        assert np.isfinite(total).all()
        assert 0.3 < np.abs(total).max() <= 0.9
        assert np.abs(total[:, -10:]).max() < 0.01  # faded out
        assert abs(total.mean()) < 1e-4


def test_every_program_is_silent_in_some_of_40_songs_and_never_all():
    pieces = [song(0, i, seconds=3, sample_rate=16_000) for i in range(40)]
    for piece in pieces:
        assert tuple(piece.stems) == tuple(sorted(PROGRAMS))
        playing = {note.program for note in piece.notes}
        assert playing
        assert set(piece.silent) == set(PROGRAMS) - playing
        assert all(piece.stems[program].any() == (program in playing) for program in PROGRAMS)
    for program in PROGRAMS:
        assert 2 <= sum(program in piece.silent for piece in pieces) <= 20


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_asked_for_alone_always_plays(program):
    for index in range(5):
        piece = song(9, index, seconds=1, sample_rate=16_000, programs=(program,))
        assert list(piece.stems) == [program]
        assert piece.silent == ()
        assert np.abs(piece.mixture).max() > 0.3


@pytest.mark.parametrize("sample_rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("program", PITCHED)
def test_a_440_reads_within_5_cents(program, sample_rate):
    spectrum = power(one_note(program, 69, sample_rate))
    hz = np.arange(len(spectrum)) * sample_rate / 2**19
    near = (
        np.abs(1200 * np.log2(np.maximum(hz, 1) / 440)) < 80
    )  # strings: the centre of the vibrato
    centre = np.sum(hz[near] * spectrum[near]) / np.sum(spectrum[near])
    assert abs(1200 * np.log2(centre / 440)) < 5
    assert spectrum[near].max() > 0.05 * spectrum.max()


@pytest.mark.parametrize("sample_rate", [16_000, 48_000])
@pytest.mark.parametrize("pitch", [28, 33, 45, 52])
def test_the_bass_is_in_tune_over_its_range(pitch, sample_rate):
    spectrum = power(one_note(33, pitch, sample_rate))
    hz = np.arange(len(spectrum)) * sample_rate / 2**19
    expected = 440 * 2 ** ((pitch - 69) / 12)
    near = np.abs(hz - expected) < 0.3 * expected
    assert abs(1200 * np.log2(hz[near][spectrum[near].argmax()] / expected)) < 3


@pytest.mark.parametrize(("program", "pitch"), [(0, 96), (0, 103), (48, 84)])
def test_high_notes_at_16_khz_have_no_energy_off_their_partials(program, pitch):
    tail = one_note(program, pitch, 16_000)[4000:]  # past the hammer
    spectrum = power(tail)
    hz = np.arange(len(spectrum)) * 16_000 / 2**19
    fundamental = 440 * 2 ** ((pitch - 69) / 12)
    ratio = hz / fundamental
    # Stiffness raises partials, by less than 4 % here; an aliased one lands anywhere.
    off = (ratio < 0.9) | (np.abs(ratio - np.round(ratio * 0.99)) > 0.15)
    limit = {0: 1e-4, 48: 4e-3}[program]  # bow noise is there on purpose
    assert spectrum[off].sum() < limit * spectrum.sum()


def test_the_roll_of_a_small_score_is_as_worked_out_by_hand():
    notes = (
        Note(0, 60, 0.0, 0.5, 80),  # at 120 bpm: one beat = steps 0 to 23
        Note(33, 21, 0.5, 0.25, 80),  # half a beat = steps 24 to 35
        Note(48, 108, 0.75, 0.001, 80),  # too short for a step, gets step 36
        Note(-1, 38, 0.0, 1.0, 80),
        Note(0, 110, 0.0, 1.0, 80),  # above the piano
    )
    roll = piano_roll(notes, 120.0, 1.01)
    expected = np.zeros((49, 88), np.uint8)  # ceil(1.01 s * 48 steps/s)
    expected[0:24, 39] = expected[24:36, 0] = expected[36, 87] = 1
    assert roll.dtype == np.uint8
    assert np.array_equal(roll, expected)


def test_the_roll_of_a_song_is_that_of_its_pitched_notes():
    piece = song(1, 1, seconds=10, sample_rate=16_000)  # all four play
    pitched = tuple(note for note in piece.notes if note.program >= 0)
    assert len(pitched) < len(piece.notes)
    assert np.array_equal(piece.roll, piano_roll(pitched, piece.tempo_bpm, 10))
    assert set(np.flatnonzero(piece.roll.any(axis=0)) + 21) == {note.pitch for note in pitched}
    assert not song(1, 1, seconds=4, sample_rate=16_000, programs=(-1,)).roll.any()


def test_notes_stay_within_the_song_and_the_keyboard():
    for index in range(30):
        score = compose(np.random.default_rng([5, index]), 20.0, tuple(PROGRAMS))
        assert 70 <= score.tempo_bpm <= 150
        for note in score.notes:
            assert 0 <= note.start_seconds < note.start_seconds + note.duration_seconds <= 20.0001
            assert 21 <= note.pitch <= 108
            assert 1 <= note.velocity <= 127


def test_songs_are_broadband_dynamic_and_balanced():
    pieces = [song(6, i, seconds=10) for i in range(5)]
    spectrum = sum(power(piece.mixture[0]) for piece in pieces)
    hz = np.arange(len(spectrum)) * 48_000 / 2**19
    for low in 60 * 2 ** np.arange(7):  # octaves up to 7680 Hz
        share = spectrum[(hz >= low) & (hz < 2 * low)].sum() / spectrum.sum()
        assert 10 * np.log10(share) > -40, low
    rms = {program: [] for program in PROGRAMS}
    for piece in pieces:
        crest_db = 20 * np.log10(np.abs(piece.mixture).max() / piece.mixture.std())
        assert 8 < crest_db < 26
        for program, stem in piece.stems.items():
            if program not in piece.silent:
                rms[program].append(20 * np.log10(stem.std()))
    means = [np.mean(levels) for levels in rms.values()]
    assert max(means) - min(means) < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"programs": (0, 40)}, r"programs=\(0, 40\).*-1: 'drums', 0: 'piano', 33: 'bass'"),
        ({"programs": ()}, r"programs=\(\)"),
        ({"programs": (0, 0)}, r"programs=\(0, 0\).*each once"),
        ({"seconds": 0}, "seconds=0: allowed are finite numbers above 0"),
        ({"seconds": -1.5}, "seconds=-1.5"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"sample_rate": 8000}, "sample_rate=8000: allowed are whole Hz from 16000"),
        ({"sample_rate": 22050.5}, "sample_rate=22050.5"),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        song(0, 0, **options)


def test_a_song_shorter_than_a_beat_still_sounds():
    piece = song(0, 0, seconds=0.05)
    assert piece.mixture.shape == (1, 2400)
    assert np.abs(piece.mixture).max() > 0.1


def test_a_score_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        compose(np.random.default_rng(0), 1.0, (0,)).tempo_bpm = 90
