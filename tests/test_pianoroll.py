import io
import zlib

import numpy as np
import pytest
import soundfile
import torch

from bgray import shards
from bgray.config import digest, resolve_options
from bgray.data import Chunk, make_unit, training_recipe, validation_set
from bgray.midi import read_roll
from bgray.tasks import Pianoroll
from bgray.tasks.pianoroll import picture, play


def roll_of(*notes, steps=96):
    """(88, T) uint8; a note is (MIDI pitch, first step, step after the last)."""
    roll = np.zeros((88, steps), np.uint8)
    for pitch, start, end in notes:
        roll[pitch - 21, start:end] = 1
    return roll


def logits(roll, sure=9.0):
    return torch.from_numpy(np.where(roll, sure, -sure)).float()[None, None]


def levels(roll):
    return torch.from_numpy(np.asarray(roll)).float()[None, None]


def scores(output, target, **options):
    found = Pianoroll(**options).scorer(24)(output, levels(target))
    return {name: value.item() for name, value in found.items()}


CHORD = roll_of((60, 0, 24), (64, 0, 24), (67, 12, 36))  # 72 cells


@pytest.fixture(scope="module")
def rolls_url(tmp_path_factory):
    """Built-in music as pieces of 1920 steps."""
    url = str(tmp_path_factory.mktemp("rolls"))
    options = shards.Options(
        kind="roll", sample_rate=24, channels=88, songs=4, seconds=70.0, validation=0.25
    )
    shards.prepare("builtin", url, options, workers=0)
    return url


def test_an_example_is_a_roll_of_zeros_and_ones_and_its_own_target(rolls_url):
    recipe = training_recipe(
        shards.read_manifest(rolls_url),
        rolls_url,
        task=Pianoroll(),
        augment=(),
        segment=1920,
        batch_size=4,
        seed=0,
        groups_per_unit=1,
        batches_per_unit=2,
    )
    inputs, targets = make_unit(recipe, 0)
    assert inputs.shape == (2, 4, 88, 1920)
    assert inputs.dtype == np.int16
    assert set(np.unique(inputs)) == {0, 1}
    np.testing.assert_array_equal(targets[:, :, 0], inputs)
    ranks = [make_unit(recipe, 0, rank, 2)[0] for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(ranks, axis=1), inputs)


def test_validation_is_the_same_twice_and_a_shorter_segment_is_the_centre(rolls_url):
    manifest = shards.read_manifest(rolls_url)
    tasks = Pianoroll(), Pianoroll(estimate="level")  # what the model's output means is no matter
    sets = [validation_set(manifest, rolls_url, task, 480, 2) for task in tasks]
    assert digest(sets[0].listing) == digest(sets[1].listing)
    items = sets[0].load()
    assert items
    whole = validation_set(manifest, rolls_url, Pianoroll(), 1920, 2).load()
    for (_, x, _), (_, again, _), (_, piece, _) in zip(items, sets[1].load(), whole, strict=True):
        np.testing.assert_array_equal(x, again)
        np.testing.assert_array_equal(x, piece[:, 720:1200])


def test_a_crop_is_drawn_where_the_piece_is_longer():
    columns = np.zeros((88, 500), np.int16)
    columns[:] = np.arange(500)
    source = Chunk(shards.Row("a.mid", "g", 0, 500, {}), 24)
    source._decoded["roll"] = columns
    starts = {
        int(Pianoroll().example([source], 0, np.random.default_rng(i), 100)[0][0, 0])
        for i in range(60)
    }
    assert len(starts) > 40
    assert max(starts) <= 400


# --- scores


def test_precision_recall_and_f1_of_a_case_counted_by_hand():
    # 72 notes; 48 of them found, and 16 that are none.
    estimate = roll_of((60, 0, 24), (64, 0, 24), (70, 0, 16))
    found = scores(logits(estimate), CHORD)
    assert found["val_precision"] == pytest.approx(48 / 64)
    assert found["val_recall"] == pytest.approx(48 / 72)
    assert found["val_f1"] == pytest.approx(2 * 48 / (64 + 72))
    assert found["val_mse"] == pytest.approx((16 + 24) / (88 * 96), rel=1e-3)


def test_a_perfect_estimate_scores_1_and_no_error_whatever_the_output_means():
    perfect = pytest.approx({"val_f1": 1, "val_precision": 1, "val_recall": 1, "val_mse": 0})
    assert scores(levels(CHORD), CHORD, estimate="level") == perfect
    assert scores(logits(CHORD, 40), CHORD) == perfect


def test_silence_for_music_has_precision_1_recall_0_and_an_error_of_the_density():
    task = Pianoroll()
    for options in ({}, {"estimate": "level"}):
        task = Pianoroll(**options)
        silence = task.baseline(levels(CHORD)[:, 0])
        found = {n: v.item() for n, v in task.scorer(24)(silence, levels(CHORD)).items()}
        assert found == pytest.approx(
            {"val_f1": 0, "val_precision": 1, "val_recall": 0, "val_mse": 72 / (88 * 96)}
        )


def test_silence_for_silence_is_perfect_and_a_note_in_it_is_not():
    silence, note = roll_of(), roll_of((60, 0, 10))
    assert scores(logits(silence), silence)["val_f1"] == 1
    found = scores(logits(note), silence)
    assert (found["val_f1"], found["val_precision"], found["val_recall"]) == (0, 0, 1)


def test_the_error_is_of_the_level_and_the_threshold_says_what_a_note_is():
    third = torch.full((1, 1, 88, 96), 1 / 3)
    assert scores(third, CHORD, estimate="level")["val_recall"] == 0
    assert scores(third, CHORD, estimate="level", threshold=0.3)["val_recall"] == 1
    assert scores(third.logit(), CHORD, threshold=0.3)["val_recall"] == 1
    error = scores(third.logit(), CHORD)["val_mse"]
    density = 72 / (88 * 96)
    assert error == pytest.approx(density * (2 / 3) ** 2 + (1 - density) * (1 / 3) ** 2, rel=1e-4)
    # A level above 1 is not cut off before its error is taken.
    assert scores(levels(CHORD) * 3, CHORD, estimate="level")["val_mse"] == pytest.approx(
        4 * density
    )


# --- clips


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_a_clip_of_a_roll_and_of_sure_logits_of_it_is_the_same_music(threshold):
    task = Pianoroll(threshold=threshold)
    plain = task.clips(CHORD.astype(np.float32), 24)
    estimated = task.clips(logits(CHORD)[0, 0].numpy(), 24)
    assert list(plain) == [".mid", ".wav", ".png"]
    assert plain[".mid"] == estimated[".mid"]
    assert plain[".wav"] == estimated[".wav"]
    np.testing.assert_array_equal(read_roll(plain[".mid"]), CHORD[:, :36])


def test_a_clips_notes_are_those_above_the_threshold():
    level = 0.4 * CHORD.astype(np.float32)
    level[60 - 21] *= 2
    only_c = roll_of((60, 0, 24))
    found = Pianoroll(estimate="level").clips(level, 24)
    np.testing.assert_array_equal(read_roll(found[".mid"]), only_c[:, :24])


def test_a_played_roll_sounds_at_its_pitch_and_time_at_120_bpm():
    # 24 steps a beat, 2 beats a second: a4 from 1 s to 2 s.
    sound = play(roll_of((69, 48, 96), steps=144), 24)[0]
    assert len(sound) == 3 * 16_000
    assert np.abs(sound[:15_900]).max() == 0
    assert np.abs(sound[16_000:17_000]).max() > 0.01
    note = sound[17_000:31_000]
    peak = np.abs(np.fft.rfft(note * np.hanning(len(note)))).argmax() * 16_000 / len(note)
    assert peak == pytest.approx(440, abs=3)
    assert np.abs(sound[36_000:]).max() < 1e-3


def test_all_keys_at_once_do_not_clip_and_no_key_is_silence():
    sound = play(np.ones((88, 24), np.uint8), 24)
    assert 0.5 < np.abs(sound).max() <= 0.9
    clips = Pianoroll().clips(np.zeros((88, 24), np.float32), 24)
    samples, rate = soundfile.read(io.BytesIO(clips[".wav"]))
    assert rate == 16_000
    assert len(samples) == 8000
    assert not samples.any()


def test_a_picture_holds_every_level_as_gray_highest_key_on_top():
    level = np.zeros((88, 10), np.float32)
    level[87, 0], level[0, 9] = 1, 0.5
    content = Pianoroll(estimate="level").clips(level, 24)[".png"]
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    start = content.index(b"IDAT")
    size = int.from_bytes(content[start - 4 : start])
    rows = np.frombuffer(zlib.decompress(content[start + 4 : start + 4 + size]), np.uint8)
    rows = rows.reshape(88, 11)  # each begins with the number of its filter
    assert not rows[:, 0].any()
    assert rows[0, 1] == 0
    assert rows[87, 10] == 128
    assert (rows[:, 1:] == 255).sum() == 88 * 10 - 2
    checksum = int.from_bytes(content[start + 4 + size : start + 8 + size])
    assert checksum == zlib.crc32(content[start : start + 4 + size])
    assert picture(level * 2) == picture(level.clip(0, 0.5) * 2)  # above 1 is black


def test_a_threshold_that_nothing_or_all_exceeds_is_refused():
    for value in (0.0, 1.0):
        _, problems = resolve_options(Pianoroll, {"threshold": value}, "task")
        assert problems == [("task.threshold", f"must be between 0 and 1, got {value:g}")]
