"""Tracks are what was stored, whole and in order, wherever they are stored."""

import dataclasses
import pickle

import numpy as np
import pytest
import soundfile

from bgray import band, shards, tracks
from bgray.config import ConfigError
from bgray.shards import Options, prepare

RATE = 8000


def write_stems(folder, seconds=1.0, rate=RATE, channels=2, names=("bass", "drums"), seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    stems = {}
    for name in names:
        audio = np.rint(3000 * rng.standard_normal((round(seconds * rate), channels)))
        stems[name] = (np.clip(audio, -16000, 16000) / 32768).astype(np.float32)
        soundfile.write(folder / f"{name}.wav", stems[name], rate, subtype="PCM_16")
    return {name: audio.T for name, audio in stems.items()}  # (C, T)


def test_a_musdb_folder_gives_its_stems_and_their_sum_and_never_reads_the_mixture(tmp_path):
    first = write_stems(tmp_path / "train" / "A - One", seed=1)
    write_stems(tmp_path / "train" / "B - Two", seconds=0.5, seed=2)
    soundfile.write(tmp_path / "train" / "A - One" / "mixture.wav", np.zeros((8000, 2)), RATE)
    found = tracks.find(str(tmp_path))
    assert [t.name for t in found] == ["train/A - One", "train/B - Two"]
    one, two = found
    assert (one.frames, two.frames, one.channels, one.sample_rate) == (8000, 4000, 2, RATE)
    assert one.voices == ("audio", "bass", "drums")
    assert one.stems == ("bass", "drums")
    loaded = one.load(("drums", "audio", "bass"))  # (V, C, T)
    np.testing.assert_array_equal(loaded[0], first["drums"])
    np.testing.assert_array_equal(loaded[2], first["bass"])
    np.testing.assert_array_equal(loaded[1], first["bass"] + first["drums"])


def test_shards_give_back_the_validation_files_sample_by_sample(tmp_path):
    written = {
        f"song{i}": write_stems(tmp_path / "in" / f"song{i}", seconds=25 + i, seed=i)
        for i in range(3)
    }
    options = Options(
        sample_rate=RATE, channels=2, stems=True, validation_groups=("song0", "song2")
    )
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), options, workers=0)
    found = tracks.find(str(tmp_path / "out"))
    assert [t.name for t in found] == ["song0", "song2"]
    for track in found:
        assert len(track.place.chunks) > 1  # there is something to join
        assert track.frames == written[track.name]["bass"].shape[1]
        stems = track.load(track.stems)
        for audio, stem in zip(stems, track.stems, strict=True):
            np.testing.assert_array_equal(audio, written[track.name][stem])
        np.testing.assert_allclose(track.load(("audio",))[0], stems.sum(0), atol=1 / 32768)
    assert [t.name for t in tracks.from_shards(str(tmp_path / "out"), "train")] == ["song1"]


def test_head_is_the_beginning_of_the_whole(tmp_path):
    write_stems(tmp_path / "a", seconds=2)
    (track,) = tracks.find(str(tmp_path))
    song = tracks.builtin(1, seconds=1, sample_rate=16000)[0]
    for whole in (track, song):
        cut = whole.head(0.25)
        assert cut.frames == whole.sample_rate // 4
        np.testing.assert_array_equal(
            cut.load(cut.voices), whole.load(whole.voices)[:, :, : cut.frames]
        )
        assert whole.head(None) is whole
        assert whole.head(1e6).frames == whole.frames


def test_builtin_tracks_are_the_bands_songs():
    track = tracks.builtin(3, seconds=1.5, sample_rate=16000)[2]
    song = band.song(0, 2, seconds=1.5, sample_rate=16000)
    assert track.stems == ("drums", "piano", "bass", "strings")
    np.testing.assert_array_equal(track.load(("audio",))[0], song.mixture)
    np.testing.assert_array_equal(track.load(("strings", "bass"))[1], song.stems[33])


def test_a_track_travels_without_its_sound():
    track = tracks.builtin(1, seconds=300)[0]
    packed = pickle.dumps(track)
    assert len(packed) < 2000
    assert pickle.loads(packed) == track


def test_a_track_found_by_a_relative_path_is_read_from_any_folder(tmp_path, monkeypatch):
    write_stems(tmp_path / "in" / "a")
    monkeypatch.chdir(tmp_path)
    (track,) = tracks.find("in")
    there = track.load(("bass",))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(track.load(("bass",)), there)


def test_the_content_changes_with_the_files(tmp_path):
    write_stems(tmp_path / "a", seed=1)
    before = tracks.find(str(tmp_path))[0].content
    assert tracks.find(str(tmp_path))[0].content == before
    write_stems(tmp_path / "a", seconds=0.5, seed=1)
    assert tracks.find(str(tmp_path))[0].content != before
    assert len({t.content for t in tracks.builtin(4)}) == 4


def test_mono_stems_are_spread_over_the_others_channels_and_short_ones_end_in_silence(tmp_path):
    write_stems(tmp_path / "a", names=("bass",), seconds=1)
    mono = write_stems(tmp_path / "a", names=("drums",), seconds=0.95, channels=1)["drums"]
    (track,) = tracks.find(str(tmp_path))
    (drums,) = track.load(("drums",))
    assert drums.shape == (2, 8000)
    np.testing.assert_array_equal(drums[:, :7600], np.repeat(mono, 2, axis=0))
    assert not drums[:, 7600:].any()


def test_every_folder_that_is_no_track_is_named_at_once(tmp_path):
    write_stems(tmp_path / "good")
    write_stems(tmp_path / "long", names=("bass",), seconds=1)
    write_stems(tmp_path / "long", names=("drums",), seconds=2)
    write_stems(tmp_path / "rates", names=("bass",))
    write_stems(tmp_path / "rates", names=("drums",), rate=16000)
    write_stems(tmp_path / "wide", names=("bass",), channels=3)
    write_stems(tmp_path / "wide", names=("drums",), channels=2)
    write_stems(tmp_path / "broken")
    (tmp_path / "broken" / "bass.wav").write_bytes(b"not sound")
    with pytest.raises(ConfigError) as error:
        tracks.find(str(tmp_path))
    text = str(error.value)
    assert "long: its stems differ in length: [8000, 16000] samples" in text
    assert "rates: its stems differ in sample rate: [8000, 16000] Hz" in text
    assert "wide: its stems differ in channels: [2, 3]" in text
    assert "broken/bass.wav: unreadable" in text
    assert "good" not in text


def test_a_voice_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match="vocals: no such voice; there is audio, drums, piano"):
        tracks.builtin(1)[0].load(("vocals",))


def test_a_chunk_that_is_missing_is_not_silence(shards_url, monkeypatch):
    read = shards.read_row_group

    def without_starts(url, name, index, voices=None):
        return [dataclasses.replace(r, start=r.start + 7) for r in read(url, name, index, voices)]

    monkeypatch.setattr(shards, "read_row_group", without_starts)
    with pytest.raises(ConfigError, match="samples 0 to 7 are missing"):
        tracks.from_shards(shards_url)


def test_a_split_without_chunks_is_an_error(shards_url):
    with pytest.raises(ConfigError, match="no test chunks"):
        tracks.find(shards_url, split="test")


def test_a_folder_of_midi_is_refused_in_one_line(tmp_path):
    from bgray.midi import write_midi

    for i in range(3):
        (tmp_path / f"{i}.mid").write_bytes(write_midi(np.eye(88, 100, dtype=np.uint8)))
    with pytest.raises(ConfigError, match="holds MIDI, not sound; render it first"):
        tracks.find(str(tmp_path))
