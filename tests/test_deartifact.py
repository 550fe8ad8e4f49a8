import json

import numpy as np
import pytest
import soundfile

from bgray import shards
from bgray.config import digest, resolve_options
from bgray.data import Chunk, make_unit, public, training_recipe, validation_set
from bgray.shards import Row, encode_flac
from bgray.tasks import Deartifact

RATE = 8000


def chunk(uses=1, key=(1, 2), **voices):
    frames = next(iter(voices.values())).shape[1]
    flac = {name: encode_flac(audio, RATE) for name, audio in voices.items()}
    return Chunk(Row("a.wav", "g", 0, frames, flac), RATE, key, uses)


def noise(seconds=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-6000, 6000, (1, round(seconds * RATE)), np.int16)


def tone(hz, seconds=3.0):
    time = np.arange(round(seconds * RATE)) / RATE
    return (10_000 * np.sin(2 * np.pi * hz * time)).astype(np.int16)[None]


def peak_hz(audio):
    return np.abs(np.fft.rfft(audio * np.hanning(len(audio)))).argmax() * RATE / len(audio)


def level_db(audio, low_hz, high_hz):
    power = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) ** 2
    scale = len(audio) / RATE
    return 10 * np.log10(power[round(low_hz * scale) : round(high_hz * scale)].mean())


def constant(semitones):
    return {"low": semitones, "high": semitones}


@pytest.fixture
def shifts(monkeypatch):
    """Every shift that is asked for; the audio is left as it is."""
    asked = []

    def spy(audio, semitones, sample_rate):
        asked.append((semitones, audio.shape[1]))
        return audio

    monkeypatch.setattr("bgray.tasks.deartifact.pitch_shift", spy)
    return asked


@pytest.mark.parametrize("semitones", [-12, -5, 7, 12])
def test_shifted_there_and_back_a_tone_has_its_pitch_and_its_loudness(semitones):
    task = Deartifact(**constant(semitones), passes=0)
    x, y = task.example([chunk(audio=tone(440))], 0, np.random.default_rng(0), 8000)
    assert peak_hz(x[0]) == pytest.approx(440, abs=1)
    assert level_db(x[0], 430, 450) == pytest.approx(level_db(y[0, 0], 430, 450), abs=1)
    assert not np.array_equal(x, y[0])


def test_the_way_is_there_and_then_back(shifts):
    source = [chunk(audio=noise())]
    Deartifact(**constant(7)).example(source, 0, np.random.default_rng(0), 800)
    Deartifact(**constant(-3)).example(source, 0, np.random.default_rng(0), 800)
    wide = 800 + 2 * RATE // 4  # a quarter of a second on both sides
    assert shifts == [(7.0, wide), (-7.0, wide), (-3.0, wide), (3.0, wide)]


def test_after_a_shift_up_input_and_target_lack_what_it_destroyed_3_db_a_pass(shifts):
    source = [chunk(audio=noise())]
    plain = Deartifact(passes=0).example(source, 0, None, 8000)[1][0, 0]
    for passes in (1, 6, 10):
        x, y = Deartifact(passes=passes).example(source, 0, None, 8000)
        np.testing.assert_array_equal(x, y[0])  # the shift is replaced: filtered alike
        # Up an octave and back: half of Nyquist is 2000 Hz.
        loss = level_db(plain, 1980, 2020) - level_db(x[0], 1980, 2020)
        assert loss == pytest.approx(3.01 * passes, rel=0.05)
        assert level_db(plain, 100, 900) - level_db(x[0], 100, 900) < 0.05 * passes


def test_the_filter_falls_with_the_shift_and_a_shift_down_or_none_has_none(shifts):
    source = [chunk(audio=noise())]
    losses = {}
    for semitones in (-12, -1, 0, 1, 6, 12):
        task = Deartifact(**constant(semitones), passes=6)
        x, y = task.example(source, 0, np.random.default_rng(0), 8000)
        start = source[0].crop_start(8000, np.random.default_rng(0))
        plain = noise()[0, start : start + 8000]
        losses[semitones] = level_db(plain, 2790, 2866) - level_db(y[0, 0], 2790, 2866)
        if semitones <= 0:
            np.testing.assert_array_equal(x[0], plain)
            np.testing.assert_array_equal(y[0, 0], plain)
    # 2828 Hz is 3 dB down at 6 semitones.
    assert losses[6] == pytest.approx(6 * 3.01, rel=0.05)
    assert losses[12] > 30 > losses[6] > 3 > losses[1] > 0


def test_the_filters_onset_lies_before_the_crop():
    loud = chunk(audio=np.full((1, 3 * RATE), 20_000, np.int16))
    _, y = Deartifact(passes=10).example([loud], 0, None, 4000)
    assert np.abs(y[0, 0] - 20_000).max() <= 1


def test_training_draws_every_whole_semitone_and_validation_an_octave_up(shifts):
    source = [chunk(audio=noise(0.2))]
    task = Deartifact(low=-3, high=4)
    rng = np.random.default_rng(0)
    for _ in range(200):
        task.example(source, 0, rng, 100)
    assert {semitones for semitones, _ in shifts[::2]} == set(range(-3, 5))
    shifts.clear()
    task.example(source, 0, None, 100)
    assert [semitones for semitones, _ in shifts] == [12.0, -12.0]


def test_prepared_inputs_are_the_drawn_column_at_the_targets_place():
    ramp = np.arange(4000, dtype=np.int16)[None]
    task = Deartifact(shift="prepared", pool=(-7.0, 0.5, 12.0), passes=0)
    assert task.round_trips == (-7.0, 0.5, 12.0)
    assert task.voices == ("audio", "roundtrip_-7", "roundtrip_0.5", "roundtrip_12")
    columns = {f"roundtrip_{s:g}": ramp + round(1000 * (s + 10)) for s in task.round_trips}
    source = [chunk(audio=ramp, **columns)]
    seen = set()
    for seed in range(30):
        x, y = task.example(source, 0, np.random.default_rng(seed), 100)
        assert len(set((x - y[0]).ravel())) == 1
        seen.add(int(x[0, 0]) - int(y[0, 0, 0]))
    assert seen == {3000, 10_500, 22_000}
    x, y = task.example(source, 0, None, 100)
    assert (x - y[0] == 22_000).all()
    assert y[0, 0, 0] == 1950


def test_prepared_or_not_validation_has_the_same_target_and_alike_inputs(tmp_path):
    folder = tmp_path / "songs"
    folder.mkdir()
    for i, hz in enumerate((220, 330, 440)):
        soundfile.write(folder / f"{i}.wav", (tone(hz, 5) + noise(5, i) // 8)[0], RATE)
    options = shards.Options(sample_rate=RATE, round_trips=(12.0,), validation=0.34)
    url = str(tmp_path / "shards")
    manifest = shards.prepare(str(folder), url, options, workers=0)
    items = [
        validation_set(manifest, url, Deartifact(shift=how, pool=(12.0,)), 8000, 2).load()
        for how in ("prepared", "on_the_fly")
    ]
    assert items[0]
    for (_, prepared, y), (_, fly, same) in zip(*items, strict=True):
        np.testing.assert_array_equal(y, same)
        peaks = [peak_hz(prepared[0]), peak_hz(fly[0])]
        assert peaks == pytest.approx([peak_hz(y[0, 0])] * 2, abs=1)
        near = level_db(prepared[0], 100, 900), level_db(fly[0], 100, 900)
        assert near[0] == pytest.approx(near[1], abs=1)


# --- reuse


def recipe_of(shards_url, task, **changes):
    options = {
        "task": task,
        "augment": (),
        "segment": 512,
        "batch_size": 8,
        "seed": 3,
        "groups_per_unit": 1,
        "batches_per_unit": 8,
    } | changes
    return training_recipe(shards.read_manifest(shards_url), shards_url, **options)


@pytest.mark.parametrize("reuse", [1, 2, 4, 100])
def test_a_window_is_shifted_once_for_about_as_many_examples_as_asked(shards_url, shifts, reuse):
    recipe = recipe_of(shards_url, Deartifact(reuse=reuse))
    chunks = len(shards.read_row_group(shards_url, recipe.groups[0][0], 0, voices=()))
    make_unit(recipe, 0)
    windows = len(shifts) // 2
    uses = 64 // chunks
    expected = 64 if reuse == 1 else chunks * max(1, round(uses / reuse))
    # Windows are drawn with replacement: some of them by nobody.
    assert 0.6 * expected <= windows <= expected
    width = 512 if reuse == 1 else 1024
    assert {length for _, length in shifts} == {width + 2 * RATE // 4}


@pytest.mark.parametrize("reuse", [1, 3])
@pytest.mark.parametrize("world", [2, 8])
def test_the_number_of_ranks_changes_no_example(shards_url, reuse, world):
    recipe = recipe_of(shards_url, Deartifact(reuse=reuse), batches_per_unit=4)
    whole = make_unit(recipe, 1)
    ranks = [make_unit(recipe, 1, rank, world) for rank in range(world)]
    for part in (0, 1):
        together = np.concatenate([rank[part] for rank in ranks], axis=1)
        np.testing.assert_array_equal(together, whole[part])


def test_which_example_comes_first_does_not_change_what_a_window_holds():
    draws = [np.random.default_rng(seed) for seed in range(6)]
    task, audio = Deartifact(reuse=4), noise()

    def examples(order):
        source = [chunk(uses=8, audio=audio)]
        found = {i: task.example(source, 0, np.random.default_rng(i), 700) for i in order}
        return [found[i] for i in range(len(draws))]

    for one, other in zip(examples(range(6)), examples([5, 3, 1, 0, 2, 4]), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_reused_windows_differ_between_chunks_and_units(shifts):
    ramp = np.arange(20_000, dtype=np.int16)[None]
    places = set()
    for key in [(0, 3, 0, 0), (0, 3, 0, 1), (0, 3, 1, 0), (1, 3, 0, 0)]:
        source = [chunk(uses=4, key=key, audio=ramp)]
        task = Deartifact(**constant(0), reuse=4)
        _, y = task.example(source, 0, np.random.default_rng(0), 200)
        places.add(int(y[0, 0, 0]))
    assert len(places) == 4


def test_crops_of_a_window_lie_all_over_it_and_input_lies_on_target(shifts):
    ramp = np.arange(20_000, dtype=np.int16)[None]
    source = [chunk(uses=8, audio=ramp)]
    task, starts = Deartifact(**constant(0), reuse=8), []
    for seed in range(100):
        x, y = task.example(source, 0, np.random.default_rng(seed), 500)
        np.testing.assert_array_equal(x, y[0])
        np.testing.assert_array_equal(np.diff(x[0]), 1)
        starts.append(int(x[0, 0]))
    assert 450 < max(starts) - min(starts) <= 500
    assert len(set(starts)) > 60


def test_a_chunk_shorter_than_the_segment_ends_in_zeros_with_reuse_as_without(shifts):
    short = np.arange(1, 51, dtype=np.int16)[None]
    for reuse in (1, 2):
        task = Deartifact(**constant(0), reuse=reuse)
        _, y = task.example([chunk(uses=4, audio=short)], 0, np.random.default_rng(0), 64)
        assert y[0, 0].tolist() == [*range(1, 51), *[0] * 14]


# --- validation and options


def test_validation_is_the_same_twice_and_the_same_whatever_training_draws(shards_url):
    manifest = shards.read_manifest(shards_url)
    tasks = [Deartifact(), Deartifact(), Deartifact(low=-2, high=5, reuse=4)]
    sets = [validation_set(manifest, shards_url, task, 2048, 3) for task in tasks]
    assert len({digest(s.listing) for s in sets}) == 1
    assert len({digest([x.tolist() for _, x, _ in s.load()]) for s in sets}) == 1
    other = validation_set(manifest, shards_url, Deartifact(passes=1), 2048, 3)
    assert digest(other.listing) != digest(sets[0].listing)
    assert json.dumps(public(Deartifact()))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"low": 3, "high": 2}, ("task.low", "must not be above high (2), got 3")),
        ({"high": 25}, ("task.high", "must be within 24 of 0, got 25")),
        ({"passes": -1}, ("task.passes", "must be at least 0, got -1")),
        ({"reuse": 0}, ("task.reuse", "must be at least 1, got 0")),
        (
            {"shift": "prepared", "reuse": 2},
            ("task.reuse", "has no effect with shift: prepared; leave it out"),
        ),
        (
            {"shift": "prepared", "pool": [3.0]},
            ("task.pool", "must contain 12, which validation uses, got [3.0]"),
        ),
        (
            {"shift": "prepared", "pool": [0.0, 12.0]},
            ("task.pool", "must be within 24 of 0 and not 0, got [0.0, 12.0]"),
        ),
        (
            {"shift": "prepared", "pool": [12.0, 12.0]},
            ("task.pool", "names one twice: [12.0, 12.0]"),
        ),
    ],
)
def test_options_that_make_no_sense_are_named(options, problem):
    assert resolve_options(Deartifact, options, "task")[1] == [problem]
