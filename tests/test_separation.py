import json

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bgray import shards
from bgray.config import digest, resolve_options
from bgray.data import Chunk, make_unit, public, training_recipe, validation_set
from bgray.losses.mrstft import MultiResolutionStft
from bgray.metrics import si_sdr
from bgray.shards import Row, encode_flac
from bgray.tasks import Separation
from bgray.tasks.separation import activity, add_up

RATE = 8000
TWO = ("drums", "bass")


def chunk(**voices):
    audio = {name: np.asarray(a, np.int16) for name, a in voices.items()}  # (C, T)
    frames = next(iter(audio.values())).shape[1]
    flac = {name: encode_flac(a, RATE) for name, a in audio.items()}
    return Chunk(Row("a.wav", "g", 0, frames, flac), RATE)


def ramps(number, frames=1000):
    """Two stems: channel 0 says which chunk, channel 1 where; bass is the negated drums, +7."""
    drums = np.stack([np.full(frames, 100 + number), np.arange(frames)])
    return chunk(drums=drums, bass=7 - drums)


def noise(*shape, seed=0, amplitude=9000):
    return np.random.default_rng(seed).integers(-amplitude, amplitude, shape, np.int16)


def examples(task, chunks, count=50, length=100):
    return [task.example(chunks, 0, np.random.default_rng([7, i]), length) for i in range(count)]


# --- sums


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
    st.sampled_from([10, 3000, 20_000, 32_768, 100_000]),
)
def test_sources_add_up_to_the_mixture_exactly_however_loud(num, seed, amplitude):
    rng = np.random.default_rng(seed)
    sources = rng.uniform(-amplitude, amplitude, (num, 2, 50)).astype(np.float32)
    mixture, rounded = add_up(sources)
    assert mixture.dtype == rounded.dtype == np.int16
    np.testing.assert_array_equal(mixture.astype(int), rounded.astype(int).sum(0))
    # One factor for all of them: at most 1, and as large as full scale allows.
    peak = max(np.abs(sources).max(), np.abs(sources.sum(0)).max())
    factor = min(1, 32767 / peak)
    np.testing.assert_allclose(rounded, factor * sources, atol=0.6 + 2 * num)


def test_what_fits_is_not_touched():
    stems = noise(3, 2, 400).astype(np.float32)
    mixture, rounded = add_up(stems)
    np.testing.assert_array_equal(rounded, stems)
    np.testing.assert_array_equal(mixture, stems.sum(0))


def test_a_sum_that_would_clip_is_turned_down_with_its_sources():
    stems = np.array([[[30_000.0, 300.0]], [[29_000.0, -100.0]]])
    mixture, rounded = add_up(stems)
    assert rounded.tolist() == [[[16_660, 167]], [[16_105, -56]]]
    assert mixture.tolist() == [[32_765, 111]]


def test_sources_that_cancel_are_turned_down_where_they_themselves_would_clip():
    mixture, rounded = add_up(np.array([[[40_000.0]], [[-40_000.0]]]))
    assert mixture.tolist() == [[0]]
    assert rounded.tolist() == [[[32_765]], [[-32_765]]]


# --- examples


@pytest.mark.parametrize("mix", ["song", "random"])
def test_the_input_is_the_sum_of_its_targets_exactly(mix):
    loud = [
        chunk(
            **{
                name: noise(2, 900, seed=9 * n + i, amplitude=20_000)
                for i, name in enumerate("abcd")
            }
        )
        for n in range(3)
    ]
    task = Separation(
        instruments=("a", "b", "c", "d"), mix=mix, gain=(0.25, 1.25), swap_channels=True
    )
    assert task.additive
    for x, y in examples(task, loud, 20):
        assert x.dtype == y.dtype == np.int16
        np.testing.assert_array_equal(x.astype(int), y.astype(int).sum(0))
    x, y = task.example(loud, 1, None, 100)
    np.testing.assert_array_equal(x.astype(int), y.astype(int).sum(0))


def test_a_songs_instruments_stay_together():
    for x, y in examples(Separation(instruments=TWO), [ramps(0)]):
        np.testing.assert_array_equal(y[0] + y[1], 7)
        np.testing.assert_array_equal(x, 7)


def test_random_mixing_takes_each_instrument_from_another_chunk_and_place():
    chunks = [ramps(number) for number in range(4)]
    seen, same_place = set(), 0
    for _, (drums, bass) in examples(Separation(instruments=TWO, mix="random"), chunks, 200):
        np.testing.assert_array_equal(np.diff(drums[1]), 1)
        np.testing.assert_array_equal(np.diff(bass[1]), -1)
        seen.add((int(drums[0, 0]) - 100, 7 - int(bass[0, 0]) - 100))
        same_place += drums[1, 0] == 7 - bass[1, 0]
    assert seen == {(i, j) for i in range(4) for j in range(4) if i != j}
    assert same_place < 5


def test_random_mixing_of_more_instruments_than_chunks_repeats_chunks():
    (_, (drums, bass)), *_ = examples(Separation(instruments=TWO, mix="random"), [ramps(2)])
    assert drums[0, 0] == 102
    assert bass[0, 0] == 7 - 102


def test_instruments_are_programs_or_names_and_targets_come_in_their_own_order():
    task = Separation(instruments=(-1, 33, "choir"), targets=("choir", -1))
    assert task.voices == ("drums", "bass", "choir")
    assert task.sources == ("choir", "drums")
    assert not task.additive
    source = chunk(drums=[[1] * 50], bass=[[20] * 50], choir=[[300] * 50])
    x, y = task.example([source], 0, None, 10)
    assert set(x.ravel()) == {321}
    assert y[:, 0, 0].tolist() == [300, 1]
    assert task.baseline(torch.ones(2, 1, 5)).shape == (2, 2, 1, 5)


def test_an_instrument_that_does_not_play_is_a_target_of_exact_zeros():
    source = chunk(drums=noise(2, 500), bass=np.zeros((2, 500)))
    task = Separation(instruments=TWO, gain=(0.25, 1.25), swap_channels=True, min_activity=0.5)
    for x, y in examples(task, [source]):
        assert not y[1].any()
        np.testing.assert_array_equal(x, y[0])


def test_gains_are_drawn_for_each_instrument_and_evenly():
    source = chunk(drums=[[8000] * 200], bass=[[-4000] * 200])
    task = Separation(instruments=TWO, gain=(0.25, 1.25))
    found = np.array([y[:, 0, 0] for _, y in examples(task, [source], 400)]) / [8000, -4000]
    assert (found.min(0) < 0.27).all()
    assert (found.max(0) > 1.23).all()
    assert found.mean(0) == pytest.approx([0.75, 0.75], abs=0.05)
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.15


def test_channels_are_swapped_in_half_of_the_examples_for_each_instrument_alone():
    source = chunk(drums=[[1] * 50, [2] * 50], bass=[[10] * 50, [20] * 50])
    pairs = [
        tuple(map(int, y[:, 0, 0]))
        for _, y in examples(Separation(instruments=TWO, swap_channels=True), [source], 400)
    ]
    for left in [(1, 10), (2, 10), (1, 20), (2, 20)]:
        assert pairs.count(left) / 400 == pytest.approx(0.25, abs=0.08)
    for _, y in examples(Separation(instruments=TWO, swap_channels=True), [source], 5):
        assert sorted(y[0, :, 0]) == [1, 2]


def test_swapping_leaves_mono_alone():
    source = chunk(drums=[range(300)], bass=[range(300)])
    task = Separation(instruments=TWO, swap_channels=True)
    for _, y in examples(task, [source], 5):
        np.testing.assert_array_equal(np.diff(y), 1)


def test_five_seconds_or_a_tenth_of_one_and_longer_than_the_chunk():
    source = chunk(drums=noise(1, 5 * RATE), bass=noise(1, 5 * RATE, seed=1))
    for length in (800, 5 * RATE, 6 * RATE):
        x, y = Separation(instruments=TWO).example([source], 0, np.random.default_rng(0), length)
        assert x.shape == (1, length)
        assert y.shape == (2, 1, length)
        assert not x[:, 5 * RATE :].any()


# --- activity


def test_activity_is_the_share_of_samples_from_a_ten_thousandth_of_full_scale_on():
    # 1e-4 of 32768 is 3.28.
    stems = np.array([[[4, -4, 3, -3]], [[-32768, 0, 0, 0]], [[9, 9, 9, 9]]], np.int16)
    assert activity(stems) == 0.5 + 0.25 + 1


def half_silent():
    """Drums play in the second half alone, bass not at all."""
    drums = np.full((1, 2000), 1000)
    drums[:, :1000] = 0
    return chunk(drums=drums, bass=np.zeros((1, 2000)))


def test_crops_that_are_not_active_enough_are_drawn_again():
    task = Separation(instruments=TWO, min_activity=0.8)
    for _, y in examples(task, [half_silent()]):
        assert (y[0] != 0).mean() > 0.8
    loose = [(y[0] != 0).mean() for _, y in examples(Separation(instruments=TWO), [half_silent()])]
    assert min(loose) == 0
    assert np.mean(np.array(loose) > 0.8) < 0.7


def test_activity_must_exceed_the_minimum_and_two_that_play_are_2():
    steady = chunk(drums=[[1000] * 50], bass=[[1000] * 50])
    found = []

    class Spy(np.random.Generator):
        def integers(self, *args, **options):
            found.append(1)
            return super().integers(*args, **options)

    for minimum, draws in ((1.99, 1), (0.0, 1)):
        found.clear()
        rng = Spy(np.random.PCG64(0))
        Separation(instruments=TWO, min_activity=minimum).example([steady], 0, rng, 20)
        assert len(found) == draws
    lone = chunk(drums=[[1000] * 50], bass=[[0] * 50])
    found.clear()
    Separation(instruments=TWO, min_activity=1.0).example([lone], 0, Spy(np.random.PCG64(0)), 20)
    assert len(found) == 16  # 1.0 does not exceed 1.0


def test_after_four_crops_of_a_silent_chunk_the_next_chunk_is_asked():
    silent = chunk(drums=np.zeros((1, 500)), bass=np.zeros((1, 500)))
    loud = chunk(drums=np.full((1, 500), 77), bass=np.full((1, 500), 77))
    task = Separation(instruments=TWO, min_activity=0.8)
    for chunks in ([silent, loud], [silent, silent, silent, loud]):
        assert all((y == 77).all() for _, y in examples(task, chunks, 5))
    # The fifth is out of reach: silence is what there is.
    beyond = [silent, silent, silent, silent, loud]
    assert not any(y.any() for _, y in examples(task, beyond, 5))


def test_where_none_is_active_enough_the_most_active_is_taken():
    quiet = chunk(drums=np.arange(2000)[None] % 2000 > 1900, bass=np.zeros((1, 2000)))
    half = half_silent()
    task = Separation(instruments=TWO, min_activity=1.5)
    shares = [(y[0] > 500).mean() for _, y in examples(task, [quiet, half], 20)]
    assert min(shares) > 0.9


def test_the_same_generator_draws_the_same_example_whatever_was_redrawn():
    chunks = [half_silent(), ramps(1, 2000), half_silent()]
    task = Separation(instruments=TWO, min_activity=0.8, gain=(0.5, 1.0))
    for (x, y), (again, too) in zip(
        examples(task, chunks, 10), examples(task, chunks, 10), strict=True
    ):
        np.testing.assert_array_equal(x, again)
        np.testing.assert_array_equal(y, too)


# --- shards


@pytest.fixture(scope="module")
def stems_url(tmp_path_factory):
    """Eight stereo tracks of two stems; the bass of the first two is silent."""
    root = tmp_path_factory.mktemp("stems")
    for number in range(8):
        folder = root / "tracks" / f"track{number}"
        folder.mkdir(parents=True)
        for i, name in enumerate(TWO):
            audio = noise(3 * RATE, 2, seed=10 * number + i)
            if number < 2 and name == "bass":
                audio = 0 * audio
            soundfile.write(folder / f"{name}.wav", audio, RATE)
    options = shards.Options(sample_rate=RATE, channels=2, stems=True, validation=0.25)
    shards.prepare(str(root / "tracks"), str(root / "shards"), options, workers=0)
    return str(root / "shards")


@pytest.mark.parametrize("mix", ["song", "random"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_ranks_changes_no_example(stems_url, mix, world):
    task = Separation(
        instruments=TWO, mix=mix, gain=(0.25, 1.25), swap_channels=True, min_activity=0.8
    )
    recipe = training_recipe(
        shards.read_manifest(stems_url),
        stems_url,
        task=task,
        augment=(),
        segment=256,
        batch_size=8,
        seed=1,
        groups_per_unit=1,
        batches_per_unit=3,
    )
    inputs, targets = make_unit(recipe, 2)
    np.testing.assert_array_equal(inputs, targets.sum(2, dtype=np.int16))
    ranks = [make_unit(recipe, 2, rank, world) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in ranks], axis=1), inputs)
    np.testing.assert_array_equal(np.concatenate([y for _, y in ranks], axis=1), targets)


def test_validation_is_the_same_twice_and_whatever_training_does(stems_url):
    manifest = shards.read_manifest(stems_url)
    training = {"mix": "random", "gain": (0.25, 1.25), "swap_channels": True, "min_activity": 1.0}
    tasks = [Separation(instruments=TWO), Separation(instruments=TWO, **training)]
    plain, other = (validation_set(manifest, stems_url, task, 1024, 4) for task in tasks)
    assert digest(plain.listing) == digest(other.listing)
    assert plain.load()
    for (_, x, y), (_, same_x, same_y) in zip(plain.load(), other.load(), strict=True):
        np.testing.assert_array_equal(x, same_x)
        np.testing.assert_array_equal(y, same_y)
        np.testing.assert_array_equal(x, y.sum(0))
    one = Separation(instruments=TWO, targets=("bass",))
    assert digest(validation_set(manifest, stems_url, one, 1024, 4).listing) != digest(
        plain.listing
    )
    assert json.dumps(public(tasks[1]))


# --- scores


def audio(*levels, seed=0):
    """(1, S, 2, 8192) of noises this loud, full scale 1."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(1, len(levels), 2, 8192, generator=generator)
    return sources * torch.tensor(levels)[:, None, None]


def test_scores_are_means_over_the_targets_that_play():
    task = Separation(instruments=("a", "b", "c"))
    target = audio(0.1, 0.02, 0)
    estimate = target + audio(0.01, 0.01, 0.01, seed=1)
    found = {name: value.item() for name, value in task.scorer(RATE)(estimate, target).items()}
    # 0.1 against 0.01 is 20 dB, 0.02 against it 6.02 dB.
    assert found["val_si_sdr_a"] == pytest.approx(20, abs=0.2)
    assert found["val_si_sdr_b"] == pytest.approx(6.02, abs=0.3)
    assert "val_si_sdr_c" not in found
    assert found["val_si_sdr"] == pytest.approx(
        (found["val_si_sdr_a"] + found["val_si_sdr_b"]) / 2, abs=1e-4
    )
    assert found["val_usdr"] == pytest.approx((20 + 6.02) / 2, abs=0.2)
    assert found["val_leak_db"] == pytest.approx(-40, abs=0.1)
    distance = MultiResolutionStft(sample_rate=RATE)
    each = [distance(estimate[:, [i]], target[:, [i]]).item() for i in (0, 1)]
    assert found["val_stft"] == pytest.approx(np.mean(each), abs=1e-5)


def test_channels_of_a_source_are_one_signal():
    task = Separation(instruments=TWO)
    target = audio(0.1, 0.1)
    target[0, 0, 1] = 0  # the drums are on the left
    estimate = target + audio(0.01, 0.01, seed=1)
    found = task.scorer(RATE)(estimate, target)["val_si_sdr_drums"]
    together = si_sdr(estimate[0, 0].flatten(), target[0, 0].flatten())
    assert found.item() == pytest.approx(together.item(), abs=1e-5)
    assert 16 < found.item() < 18  # signal in one of two channels, noise in both


def test_a_target_at_minus_60_dbfs_counts_as_playing_and_below_it_does_not():
    task = Separation(instruments=TWO)
    for rms, heard in ((1.01e-3, True), (0.99e-3, False)):
        target = torch.stack([torch.full((2, 8192), 0.5), torch.full((2, 8192), rms)])[None]
        target = target * torch.tensor([1, -1]).repeat(4096)
        found = task.scorer(RATE)(target, target)
        assert ("val_si_sdr_bass" in found) == heard
        assert ("val_leak_db" in found) == (not heard)


def test_nothing_estimated_for_a_silent_target_leaks_minus_100_db():
    task = Separation(instruments=TWO)
    target = audio(0.1, 0)
    assert task.scorer(RATE)(target, target)["val_leak_db"].item() == pytest.approx(-100)


def test_a_lone_target_has_no_scores_of_its_own_and_the_first_is_the_metric():
    several, lone = Separation(), Separation(targets=("vocals",))
    assert list(several.scores)[:3] == ["val_si_sdr", "val_usdr", "val_stft"]
    assert several.scores["val_si_sdr_vocals"] == "max"
    assert list(lone.scores) == ["val_si_sdr", "val_usdr", "val_stft", "val_leak_db"]


def test_the_mixture_as_estimate_scores_what_the_others_loudness_says():
    task = Separation(instruments=TWO)
    target = audio(0.1, 0.05)
    estimate = task.baseline(target.sum(1))
    found = task.scorer(RATE)(estimate, target)
    assert found["val_si_sdr_drums"].item() == pytest.approx(6.02, abs=0.2)
    assert found["val_si_sdr_bass"].item() == pytest.approx(-6.02, abs=0.4)


# --- options


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"instruments": []}, ("instruments", "is empty; give at least one")),
        ({"instruments": [33, "bass"]}, ("instruments", "names one twice: bass, bass")),
        (
            {"instruments": [-1, 200]},
            ("instruments", "instrument 200: programs are 0 to 127, and -1 is drums"),
        ),
        (
            {"targets": ["voice"]},
            ("targets", "'voice' is not one of the instruments drums, bass, other, vocals"),
        ),
        ({"targets": []}, ("targets", "is empty; give at least one")),
        (
            {"gain": [1.25, 0.25]},
            ("gain", "must be [low, high] with 0 < low <= high, got [1.25, 0.25]"),
        ),
        (
            {"min_activity": 4},
            (
                "min_activity",
                "must be at least 0 and below the number of instruments (4), got 4",
            ),
        ),
    ],
)
def test_options_that_make_no_sense_are_named(options, problem):
    name, text = problem
    assert (f"task.{name}", text) in resolve_options(Separation, options, "task")[1]


def test_the_logs_settings_are_allowed():
    for options in (
        {"instruments": [-1, 0, 48, 33], "min_activity": 0.8},
        {"instruments": [-1, 48]},
        {"targets": ["vocals"], "gain": [0.25, 1.25], "swap_channels": True, "mix": "random"},
    ):
        assert resolve_options(Separation, options, "task")[1] == []


def test_a_lone_instrument_is_no_validation_item_because_copying_it_would_be_perfect():
    task = Separation(instruments=("drums", "bass"))
    loud = np.full((1, 1000), 5000, np.int16)
    silent = np.zeros((1, 1000), np.int16)
    assert task.scorable(2 * loud, np.stack([loud, loud]))
    assert not task.scorable(loud, np.stack([loud, silent]))
    assert not task.scorable(silent, np.stack([silent, silent]))
    # Of one target alone, what else plays is in the mixture.
    one = Separation(instruments=("drums", "bass"), targets=("bass",))
    assert one.scorable(2 * loud, loud[None])
    assert not one.scorable(loud, loud[None])
