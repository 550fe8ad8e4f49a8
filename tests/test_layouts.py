"""Tracks as MUSDB18-HQ and Slakh lay them out, through to the shards."""

import dataclasses

import numpy as np
import pytest
import soundfile
import yaml

from bgray import layouts, shards, storage
from bgray.config import ConfigError
from bgray.shards import Options, prepare

RATE = 8000
STEMS = Options(sample_rate=RATE, stems=True, validation=0.5)


def noise(seed, seconds=2.0):
    rng = np.random.default_rng(seed)
    return rng.integers(-4000, 4000, round(seconds * RATE)).astype(np.int16)


def write(path, seed, seconds=2.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seed, seconds), RATE)


def voices_of(destination, manifest, key):
    """{voice: (T,) int} of the one row of a track."""
    for shard in manifest.shards:
        for row in shards.read_row_group(str(destination), shard.name, 0):
            if row.key == key:
                return {v: shards.decode_voice(row, v)[0].astype(int) for v in row.voices}
    raise AssertionError(f"no row of {key}")


# --- MUSDB18-HQ -----------------------------------------------------------------------------------

TITLES = {
    "train": ["A Classic Education - NightOwl", "ANiMAL - Rockshow", "Meaxic - Take A Step"],
    "test": ["AM Contra - Heart Peripheral"],
}


@pytest.fixture
def musdb(tmp_path):
    for split, titles in TITLES.items():
        for i, title in enumerate(titles):
            for j, stem in enumerate(("mixture", "drums", "bass", "other", "vocals")):
                write(tmp_path / "musdb" / split / title / f"{stem}.wav", 100 * i + j + len(split))
    return tmp_path / "musdb"


def test_the_validation_tracks_of_musdb_can_be_named(musdb, tmp_path):
    chosen = ("ANiMAL - Rockshow", "Meaxic - Take A Step")
    options = dataclasses.replace(STEMS, validation_groups=chosen)
    manifest = prepare(str(musdb / "train"), str(tmp_path / "shards"), options, workers=0)
    splits = {file["key"]: file["split"] for file in manifest.files}
    assert splits == {
        "A Classic Education - NightOwl": "train",
        "ANiMAL - Rockshow": "validation",
        "Meaxic - Take A Step": "validation",
    }
    assert list(manifest.voices) == ["audio", "bass", "drums", "other", "vocals"]


def test_a_root_of_train_and_test_keeps_them_in_the_names(musdb, tmp_path):
    items, rejected, _ = layouts.list_items(str(musdb), STEMS)
    assert rejected == {}
    assert sorted(item.key for item in items) == sorted(
        f"{split}/{title}" for split, titles in TITLES.items() for title in titles
    )
    options = dataclasses.replace(STEMS, group="folder", validation_groups=("test",))
    manifest = prepare(str(musdb), str(tmp_path / "shards"), options, workers=0)
    assert {file["key"].split("/")[0]: file["split"] for file in manifest.files} == {
        "train": "train",
        "test": "validation",
    }


# --- Slakh ----------------------------------------------------------------------------------------

METADATA = {
    "S00": {"program_num": 33, "is_drum": False, "audio_rendered": True},
    "S01": {"program_num": 25, "is_drum": False, "audio_rendered": True},
    "S02": {"program_num": 128, "is_drum": True, "audio_rendered": True},
    "S03": {"program_num": 33, "is_drum": False},
    "S04": {"program_num": 4, "is_drum": False, "audio_rendered": False},
}


def write_track(folder, seed, metadata=METADATA):
    for i, (stem, about) in enumerate(metadata.items()):
        if about.get("audio_rendered", True):
            write(folder / f"stems/{stem}.wav", seed + i)
    write(folder / "mix.wav", seed + 90)
    (folder / "metadata.yaml").write_text(yaml.safe_dump({"UUID": "x", "stems": metadata}))
    (folder / "all_src.mid").write_bytes(b"MThd")


@pytest.fixture
def slakh(tmp_path):
    for i in (1, 2):
        write_track(tmp_path / f"slakh/Track{i:05}", 1000 * i)
    return tmp_path / "slakh"


def test_slakh_stems_are_added_up_by_instrument(slakh, tmp_path):
    manifest = prepare(str(slakh), str(tmp_path / "shards"), STEMS, workers=0)
    assert list(manifest.voices) == ["audio", "acoustic_guitar_steel", "bass", "drums"]
    assert [file["key"] for file in manifest.files] == ["Track00001", "Track00002"]
    assert manifest.rejected == []
    voices = voices_of(tmp_path / "shards", manifest, "Track00001")
    np.testing.assert_array_equal(voices["bass"], noise(1000).astype(int) + noise(1003))
    np.testing.assert_array_equal(voices["acoustic_guitar_steel"], noise(1001))
    np.testing.assert_array_equal(voices["drums"], noise(1002))
    assert np.abs(voices.pop("audio") - sum(voices.values())).max() == 0


def test_stems_that_were_never_rendered_are_listed_with_their_track(slakh, tmp_path):
    manifest = prepare(str(slakh), str(tmp_path / "shards"), STEMS, workers=0)
    assert [file["left_out"] for file in manifest.files] == [["S04"], ["S04"]]


def write_metadata(track, text):
    (track / "metadata.yaml").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda track: (track / "stems/S01.wav").unlink(),
            "metadata.yaml lists S01, but stems/S01.* is missing",
        ),
        (lambda track: write(track / "stems/S77.wav", 7), "stems/S77.* is not in metadata.yaml"),
        (
            lambda track: write_metadata(track, "stems: {S00: {program_num: 200}}"),
            "metadata.yaml: not that of a Slakh track (instrument 200: programs are 0 to 127, "
            "and -1 is drums)",
        ),
        (
            lambda track: write_metadata(track, "stems: [S00"),
            "metadata.yaml: not that of a Slakh track (",
        ),
        (
            lambda track: write_metadata(track, "title: no stems"),
            "metadata.yaml: not that of a Slakh track ('stems')",
        ),
        (
            lambda track: (track / "stems").rename(track.parent.parent / "elsewhere"),
            "a mixture without stems",
        ),
    ],
)
def test_a_slakh_track_that_is_not_as_its_metadata_says_is_named(slakh, spoil, reason):
    spoil(slakh / "Track00002")
    items, rejected, _ = layouts.list_items(str(slakh), STEMS)
    assert [item.key for item in items] == ["Track00001"]
    assert list(rejected) == ["Track00002"]
    assert rejected["Track00002"].startswith(reason)


def test_other_metadata_makes_other_shards(slakh, tmp_path):
    prepare(str(slakh), str(tmp_path / "shards"), STEMS, workers=0)
    changed = METADATA | {"S01": {"program_num": 26, "is_drum": False}}
    (slakh / "Track00001/metadata.yaml").write_text(yaml.safe_dump({"stems": changed}))
    with pytest.raises(ConfigError, match="files changed since then"):
        prepare(str(slakh), str(tmp_path / "shards"), STEMS, workers=0)


def test_two_files_of_one_stem_without_metadata_stay_an_error(tmp_path):
    write(tmp_path / "source/one/bass.wav", 1)
    write(tmp_path / "source/one/bass.flac", 2)
    _, rejected, _ = layouts.list_items(str(tmp_path / "source"), STEMS)
    assert rejected == {"one": "two files are stem 'bass'"}


@pytest.mark.parametrize("stem", ["audio", "roll", "key", "shift_3", "roundtrip_12"])
def test_a_stem_that_would_hide_another_column_is_refused(tmp_path, stem):
    write(tmp_path / f"source/one/{stem}.wav", 1)
    _, rejected, _ = layouts.list_items(str(tmp_path / "source"), STEMS)
    assert rejected == {"one": f"a stem cannot be called '{stem}'; rename the file"}


def test_a_slakh_track_on_s3_is_the_same_as_here(slakh, tmp_path, s3):
    fs, root = storage.filesystem(f"{s3}/slakh")
    fs.put(str(slakh), root, recursive=True)
    here = prepare(str(slakh), str(tmp_path / "here"), STEMS, workers=0)
    there = prepare(f"{s3}/slakh", str(tmp_path / "there"), STEMS, workers=0)
    assert there.hash == here.hash
