"""Work units and validation items, on the coordinate shards of `coordinates`."""

import dataclasses
import pickle
import threading

import numpy as np
import pytest
from coordinates import (
    FRAMES,
    RATE,
    Folder,
    coordinates,
    recipe_of,
    same,
    training_folder,
    write_folder,
)

from bgray import carried, data, shards
from bgray.augment.gain import Gain
from bgray.augment.polarity import Polarity
from bgray.config import ConfigError, digest
from bgray.data import Batch, Chunk, make_unit
from bgray.feed import in_process
from bgray.prefetch import Prefetched
from bgray.tasks import Unshift


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training_folder(tmp_path_factory.mktemp("coordinates"))


# --- the stream


def test_a_stream_started_at_any_step_goes_on_exactly_like_the_unbroken_one(folder):
    recipe = recipe_of(folder, augment=(Gain(), Polarity()))
    whole = list(in_process(recipe, 0, 11))
    assert [batch.step for batch in whole] == list(range(11))
    for start in range(11):
        same(in_process(recipe, start, 11), whole[start:])


def test_a_stream_may_end_in_the_middle_of_a_unit(folder):
    recipe = recipe_of(folder)
    same(in_process(recipe, 1, 5), list(in_process(recipe, 0, 9))[1:5])


def test_a_recipe_sent_to_another_process_makes_the_same_unit(folder):
    recipe = recipe_of(folder, augment=(Gain(),))
    sent = pickle.loads(pickle.dumps(recipe))
    for a, b in zip(make_unit(recipe, 4), make_unit(sent, 4), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batch_size", [8, 32], ids=["fewer rows than chunks", "more"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_batches_side_by_side_are_the_single_workers_batches(folder, batch_size, world):
    recipe = recipe_of(folder, batch_size=batch_size, augment=(Gain(), Polarity()))
    ranks = [list(in_process(recipe, 2, 7, rank, world)) for rank in range(world)]
    together = [
        Batch(
            parts[0].step,
            np.concatenate([part.inputs for part in parts]),
            np.concatenate([part.targets for part in parts]),
        )
        for parts in zip(*ranks, strict=True)
    ]
    same(together, in_process(recipe, 2, 7))


def test_each_rank_decodes_only_its_share_of_the_chunks(folder, monkeypatch):
    decoded = []
    decode = shards.decode_flac
    monkeypatch.setattr(shards, "decode_flac", lambda flac: decoded.append(flac) or decode(flac))
    recipe = recipe_of(folder, batch_size=32)
    chunks = len(data.read_groups(recipe, 0))
    shares = []
    for rank in range(4):
        decoded.clear()
        make_unit(recipe, 0, rank, 4)
        assert len(decoded) == len(set(decoded))  # each voice once, for all batches of the unit
        shares.append(set(decoded))
    assert len(set().union(*shares)) == 2 * chunks
    # A quarter of them, and one more where its borders lie within chunks; two voices each.
    assert all(len(share) <= 2 * (-(-chunks // 4) + 1) for share in shares)


def test_another_seed_is_another_stream_and_each_unit_another_draw(folder):
    first, other = (make_unit(recipe_of(folder, seed=seed), 0)[1] for seed in (3, 4))
    assert not np.array_equal(first, other)
    starts = [where(make_unit(recipe_of(folder), unit)[1]) for unit in range(4)]
    assert len({tuple(s) for s in starts}) == 4


def where(targets):
    """(chunk number, first sample) of every crop of (n, B, 1, 2, T)."""
    crops = targets.reshape(-1, 2, targets.shape[-1])
    return [(int(crop[0, 0]) - 1, int(crop[1, 0]) - 1) for crop in crops]


@pytest.mark.parametrize("groups_per_unit", [1, 4, 9])
def test_every_pass_over_the_data_reads_every_row_group_exactly_once(
    folder, monkeypatch, groups_per_unit
):
    reads = []
    read = shards.read_row_group

    def spy(url, shard, index, voices=None):
        reads.append((shard, index))
        return read(url, shard, index, voices)

    monkeypatch.setattr(shards, "read_row_group", spy)
    recipe = recipe_of(folder, groups_per_unit=groups_per_unit)
    count = len(recipe.groups)
    assert count == 7
    for unit in range(-(-3 * count // groups_per_unit)):
        data.read_groups(recipe, unit)
    passes = [tuple(reads[i * count : (i + 1) * count]) for i in range(3)]
    assert all(set(one) == set(recipe.groups) for one in passes)
    assert len(set(passes)) == 3  # three different orders


def test_no_training_crop_comes_from_the_validation_split(folder):
    recipe = recipe_of(folder, groups_per_unit=7, batches_per_unit=6)
    numbers = {number for number, _ in where(make_unit(recipe, 0)[1])}
    assert numbers == set(range(44))


def test_a_crop_is_a_stretch_of_one_chunk_and_the_input_lies_on_the_target(folder):
    starts = set()
    for batch in in_process(recipe_of(folder), 0, 12):
        np.testing.assert_array_equal(batch.inputs, -batch.targets[:, 0])
        for number, ramp in batch.targets[:, 0]:
            assert len(set(number)) == 1
            np.testing.assert_array_equal(np.diff(ramp), 1)
            starts.add(int(ramp[0]) - 1)
    assert min(starts) >= 0
    assert max(starts) <= FRAMES - 64
    assert len(starts) > 80  # of 96 crops: all over the chunk
    assert max(starts) - min(starts) > 700


@pytest.mark.parametrize(("batch_size", "batches"), [(32, 3), (5, 7)])
def test_all_chunks_of_a_unit_are_cut_about_equally_often(folder, batch_size, batches):
    recipe = recipe_of(folder, batch_size=batch_size, batches_per_unit=batches)
    numbers = [number for number, _ in where(make_unit(recipe, 0)[1])]
    chunks = len(data.read_groups(recipe, 0))
    counts = np.unique(numbers, return_counts=True)[1]
    assert len(counts) == chunks
    assert counts.max() - counts.min() <= batches  # at most one a batch


def chunk(audio, rate=RATE):
    voices = {
        "audio": shards.encode_flac(audio, rate),
        "shift_12": shards.encode_flac(-audio, rate),
    }
    return Chunk(shards.Row("a.wav", "g", 0, audio.shape[1], voices), rate)


def test_a_chunk_shorter_than_the_segment_starts_at_0_and_ends_in_zeros():
    short = chunk(coordinates(0, frames=50))
    x, y = Unshift().example([short], 0, np.random.default_rng(0), 64)
    np.testing.assert_array_equal(y[0, 1], [*range(1, 51), *[0] * 14])
    np.testing.assert_array_equal(x, -y[0])


def test_a_crop_reaching_over_both_ends_of_a_chunk_has_zeros_on_both_sides():
    found = chunk(coordinates(0, frames=4)).crop("audio", -2, 9)[1]
    assert found.tolist() == [0, 0, 1, 2, 3, 4, 0, 0, 0]
    assert chunk(coordinates(0, frames=4)).crop("audio", 5, 2).tolist() == [[0, 0], [0, 0]]


def test_input_and_target_get_the_same_augmentation_and_rows_different_ones(folder):
    recipe = recipe_of(folder, augment=(Gain(low_db=-3.0, high_db=6.0), Polarity()))
    plain = make_unit(dataclasses.replace(recipe, augment=()), 0)[1]
    inputs, targets = make_unit(recipe, 0)
    np.testing.assert_array_equal(inputs, -targets[:, :, 0])
    factors = targets[..., 1, -1] / plain[..., 1, -1]  # (n, B, 1); the ramp's end, hundreds
    assert len(np.unique(np.round(factors, 2))) > 15
    assert (factors < 0).any()
    assert (factors > 0).any()
    assert (np.abs(factors) < 10 ** (6 / 20) * 1.05).all()


def test_where_augmentation_would_clip_input_and_target_are_turned_down_together(folder):
    recipe = recipe_of(folder, augment=(Gain(low_db=12.0, high_db=12.0),))
    y = np.array([[[-20000, 10000, 40]]], np.int16)  # (S, C, T)
    x = y[0] // 2
    found_x, found_y = data._augment(recipe, x, y, np.random.default_rng(0))
    # 12 dB is 3.98 times, 79600; what fits is 32767 / 20000 times.
    assert found_y.tolist() == [[[-32767, 16384, 66]]]
    assert found_x.tolist() == [[-16384, 8192, 33]]


def test_an_octave_shifted_on_the_fly_has_the_prepared_ones_spectrum(shards_url):
    manifest = shards.read_manifest(shards_url)
    crops = {
        how: data.validation_set(manifest, shards_url, Unshift(shift=how), 8000, 2).load()
        for how in ("prepared", "on_the_fly")
    }
    for (_, prepared, target), (_, fly, same_target) in zip(*crops.values(), strict=True):
        np.testing.assert_array_equal(target, same_target)
        ours, theirs, plain = (
            np.abs(np.fft.rfft(a[0] * np.hanning(8000))) for a in (fly, prepared, target[0])
        )
        # 1 Hz a bin. Two tones a song; their octaves are the two highest peaks of the input.
        assert ours.argmax() == pytest.approx(2 * plain.argmax(), abs=3)
        assert ours.argmax() == pytest.approx(theirs.argmax(), abs=1)
        level = 10 * np.log10(np.sum(ours**2) / np.sum(theirs**2))
        assert level == pytest.approx(0, abs=1)


# --- the thread in between


def numbered(count):
    for step in range(count):
        yield Batch(step, np.zeros(1, np.int16), np.zeros(1, np.int16))


def test_prefetching_changes_neither_the_order_nor_the_end():
    with Prefetched(numbered(20), ahead=2) as batches:
        assert [batch.step for batch in batches] == list(range(20))


def test_an_error_of_the_feed_is_raised_where_the_batch_was_due():
    def breaks():
        yield from numbered(2)
        raise OSError("the bucket is gone")

    seen = []
    with Prefetched(breaks()) as batches, pytest.raises(OSError, match="the bucket is gone"):
        seen.extend(batch.step for batch in batches)
    assert seen == [0, 1]


def test_a_feed_that_stalls_says_so_20_times_and_is_then_given_up():
    let_go, said = threading.Event(), []

    def stalls():
        yield from numbered(1)
        let_go.wait()
        yield from ()

    with Prefetched(stalls(), stall_seconds=0.01, on_stall=said.append) as batches:
        stream = iter(batches)
        assert next(stream).step == 0
        said.clear()
        with pytest.raises(TimeoutError, match="no batch for 0 s"):
            next(stream)
        let_go.set()
    assert said == pytest.approx([0.01 * i for i in range(1, 21)])


def test_a_feed_that_comes_back_after_a_stall_goes_on_without_a_gap():
    back = threading.Event()

    def slow():
        yield from numbered(1)
        back.wait()
        yield Batch(1, np.zeros(1, np.int16), np.zeros(1, np.int16))

    with Prefetched(slow(), stall_seconds=0.01, on_stall=lambda seconds: back.set()) as batches:
        assert [batch.step for batch in batches] == [0, 1]


def test_leaving_early_stops_the_thread_and_closes_the_generator():
    closed = threading.Event()

    def endless():
        try:
            yield from numbered(10**9)
        finally:
            closed.set()

    with Prefetched(endless(), ahead=2) as batches:
        next(iter(batches))
    assert closed.is_set()
    assert "bgray-feed" not in {thread.name for thread in threading.enumerate()}


# --- validation


def items_of(folder, segment=64, items=6, **task):
    return data.validation_set(folder.manifest, folder.url, Unshift(**task), segment, items)


def test_the_same_request_gives_the_same_frozen_items_and_the_same_audio(folder):
    first, again = items_of(folder), items_of(folder)
    assert first.listing == again.listing
    for (i, x, y), (j, x2, y2) in zip(first.load(), again.load(), strict=True):
        assert i == j
        np.testing.assert_array_equal(x, x2)
        np.testing.assert_array_equal(y, y2)


@pytest.mark.parametrize(
    "change", [{"segment": 65}, {"items": 5}, {"semitones": 7.0, "shift": "on_the_fly"}]
)
def test_the_listings_hash_changes_with_what_is_scored(folder, change):
    assert digest(items_of(folder).listing) != digest(items_of(folder, **change).listing)


def test_validation_crops_are_the_centres_of_evenly_spread_validation_chunks(folder):
    found = items_of(folder, items=3).load()
    # Chunks 44 to 52 are the validation split; a third of the way apart.
    assert [int(y[0, 0, 0]) - 1 for _, _, y in found] == [44, 47, 50]
    for _, x, y in found:
        assert y[0, 1, 0] - 1 == (FRAMES - 64) // 2
        np.testing.assert_array_equal(x, -y[0])


def test_more_items_than_chunks_asks_for_each_chunk_once(folder):
    found = items_of(folder, items=100).load()
    assert [int(y[0, 0, 0]) - 1 for _, _, y in found] == list(range(44, 53))


@pytest.mark.parametrize("world", [2, 3, 7])
def test_every_item_is_scored_by_exactly_one_rank(folder, world):
    validation = items_of(folder, items=5)
    shares = [validation.load(rank, world) for rank in range(world)]
    numbers = sorted(number for share in shares for number, _, _ in share)
    assert numbers == [0, 1, 2, 3, 4]
    alone = {number: y for number, _, y in validation.load()}
    for share in shares:
        for number, _, y in share:
            np.testing.assert_array_equal(y, alone[number])


def partly_silent(tmp_path, silent):
    def voices(number):
        audio = coordinates(number) * (0 if number in silent else 10)
        return {"audio": audio, "shift_12": audio}

    url = str(tmp_path)
    return Folder(url, write_folder(url, {"validation-00000.parquet": 6}, voices))


def test_a_silent_chunk_is_left_out_and_its_place_taken_by_another(tmp_path):
    folder = partly_silent(tmp_path, silent={0, 4})
    assert [item[0] for item in items_of(folder, items=3).items] == [
        "file001.wav @0",
        "file002.wav @0",
        "file003.wav @0",
    ]
    assert len(items_of(folder, items=6).items) == 4


def test_a_validation_split_of_silence_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="all 6 validation crops of 64 samples are silent"):
        items_of(partly_silent(tmp_path, silent=set(range(6))))


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("s.parquet, row group 1", [("", "corrupt <x>"), ("voice", "no such")]),
        FileNotFoundError(2, "No such file", "/there"),
        OSError(110, "tried for 300 s", "s3://bucket/s"),
    ],
)
def test_an_error_of_a_unit_comes_out_of_ray_as_itself(error):
    def fails():
        raise error

    with pytest.raises(RuntimeError) as caught:
        carried.packed(fails)
    pages = f"ray::MapBatches (pid=1)\n  frames\nRuntimeError: {caught.value}\nand more"
    found = carried.unpacked(RuntimeError(pages))
    assert (type(found), str(found)) == (type(error), str(error))
    other = RuntimeError("an actor died")
    assert carried.unpacked(other) is other
    assert carried.packed(lambda: 3) == 3
