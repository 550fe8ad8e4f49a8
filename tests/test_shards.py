import dataclasses
import errno
import hashlib
import os
import shutil
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bgray import ingest, layouts, midi, plan, shards, shards_command, storage
from bgray.augment.pitch_shift import pitch_shift
from bgray.band import song as play_song
from bgray.config import ConfigError
from bgray.shards import Options, prepare, read_manifest

RATE = 8000
SMALL = Options(sample_rate=RATE, validation=0.25)
ROLL = {"kind": "roll", "sample_rate": 24, "channels": 88}


def noise(seconds, seed=0, channels=1):
    """(T, C) int16, half of full scale."""
    rng = np.random.default_rng(seed)
    return rng.integers(-16384, 16384, (round(seconds * RATE), channels)).astype(np.int16)


def write(path, audio, rate=RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, **options)


@pytest.fixture
def source(tmp_path):
    """Eight files of 1 to 27 s at 8 kHz, in two folders."""
    for i, seconds in enumerate((1, 7, 12, 14.9, 15.1, 20, 24, 27)):
        write(tmp_path / f"source/{'ab'[i % 2]}/{i}.wav", noise(seconds, i))
    return tmp_path / "source"


def prepare_here(source, destination, options=SMALL):
    return prepare(str(source), str(destination), options, workers=0)


def all_rows(destination, manifest, split=None):
    for shard in manifest.shards:
        for index in range(shard.row_groups if split in (None, shard.split) else 0):
            yield from shards.read_row_group(str(destination), shard.name, index)


def contents(destination):
    files = Path(destination).glob("*")
    return {path.name: path.read_bytes() for path in files if path.is_file()}


def reject(tmp_path, name, options=SMALL, good=9):
    """The reason why `name`, already in tmp_path/source, is left out beside good files."""
    for i in range(good):
        audio = noise(options.sample_rate / RATE, 100 + i)
        write(tmp_path / f"source/good{i}.wav", audio, options.sample_rate)
    manifest = prepare_here(tmp_path / "source", tmp_path / "shards", options)
    assert len(manifest.files) == good
    (entry,) = manifest.rejected
    assert entry["path"] == name
    return entry["reason"]


# --- the format -----------------------------------------------------------------------------------


def test_chunks_in_order_are_the_source_sample_for_sample(source, tmp_path):
    manifest = prepare_here(source, tmp_path / "shards")
    pieces = {}
    for row in all_rows(tmp_path / "shards", manifest):
        pieces.setdefault(row.key, {})[row.start] = shards.decode_flac(row.voices["audio"])
    assert len(pieces) == 8
    for key, chunks in pieces.items():
        audio = np.concatenate([chunks[start] for start in sorted(chunks)], axis=1)
        np.testing.assert_array_equal(
            audio.T, soundfile.read(source / key, dtype="int16", always_2d=True)[0]
        )


@pytest.mark.parametrize(
    ("seconds", "lengths"),
    [(1, [1]), (10, [10]), (14.9, [14.9]), (15, [10, 5]), (24, [10, 14]), (25, [10, 10, 5])],
)
def test_a_tail_below_half_a_chunk_belongs_to_the_chunk_before_it(seconds, lengths):
    bounds = ingest.chunk_bounds(round(seconds * RATE), RATE)
    assert [(end - start) / RATE for start, end in bounds] == lengths
    assert bounds[0][0] == 0
    assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:], strict=False))


def test_the_manifest_counts_what_the_shards_hold(source, tmp_path):
    manifest = prepare_here(source, tmp_path / "shards")
    assert read_manifest(str(tmp_path / "shards")) == manifest
    for split in ("train", "validation"):
        rows = list(all_rows(tmp_path / "shards", manifest, split))
        assert len(rows) == manifest.rows(split) > 0
        assert sum(row.frames for row in rows) / RATE == pytest.approx(manifest.seconds(split))
        assert {row.key for row in rows} == {
            f["key"] for f in manifest.files if f["split"] == split
        }
    assert manifest.seconds("train") + manifest.seconds("validation") == pytest.approx(121)
    first = manifest.files[0]
    assert first["key"] == "a/0.wav"
    assert first["sha256"] == hashlib.sha256((source / "a/0.wav").read_bytes()).hexdigest()


def test_voices_can_be_selected_and_a_wrong_one_is_named(source, tmp_path):
    options = dataclasses.replace(SMALL, shifts=(12.0, -0.5))
    manifest = prepare_here(source, tmp_path / "shards", options)
    assert list(manifest.voices) == ["audio", "shift_12", "shift_-0.5"]
    assert manifest.variants["shift_-0.5"] == {"of": "audio", "semitones": -0.5}
    place = str(tmp_path / "shards"), manifest.shards[0].name, 0
    assert list(shards.read_row_group(*place, voices=("shift_-0.5",))[0].voices) == ["shift_-0.5"]
    assert shards.read_row_group(*place, voices=())[0].voices == {}
    with pytest.raises(ConfigError, match="shift_7: no such voice; there is audio, shift_12"):
        shards.read_row_group(*place, voices=("shift_7",))


def test_a_variant_is_shifted_before_it_is_cut(tmp_path):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(25 * RATE) / RATE)
    write(tmp_path / "source/a.wav", tone)
    write(tmp_path / "source/b.wav", tone[: 3 * RATE])
    options = dataclasses.replace(SMALL, shifts=(12.0,))
    manifest = prepare_here(tmp_path / "source", tmp_path / "shards", options)
    rows = [row for row in all_rows(tmp_path / "shards", manifest) if row.key == "a.wav"]
    middle = next(row for row in rows if row.start == 10 * RATE)
    shifted = shards.decode_flac(middle.voices["shift_12"])[0].astype(float)
    hz = np.abs(np.fft.rfft(shifted)).argmax() * RATE / len(shifted)
    assert hz == pytest.approx(880, abs=1)
    loudness = [
        np.std(part) for part in np.split(shifted, 20)
    ]  # the cut leaves no fade at its edges
    assert min(loudness) > 0.9 * max(loudness)


def test_a_round_trip_is_shifted_there_and_back_before_it_is_cut(tmp_path):
    for i, name in enumerate(("a.wav", "b.wav")):
        write(tmp_path / "source" / name, noise(12 + 5 * i, i) // 4)
    options = dataclasses.replace(SMALL, shifts=(7.0,), round_trips=(7.0, -12.0))
    manifest = prepare_here(tmp_path / "source", tmp_path / "shards", options)
    assert list(manifest.voices) == ["audio", "shift_7", "roundtrip_7", "roundtrip_-12"]
    assert manifest.variants["roundtrip_-12"] == {
        "of": "audio",
        "semitones": -12.0,
        "round_trip": True,
    }
    rows = [row for row in all_rows(tmp_path / "shards", manifest) if row.key == "b.wav"]
    rows.sort(key=lambda row: row.start)
    for by in (7, -12):
        whole = (noise(17, 1) // 4).T.astype(np.float32) / 32768
        expected = pitch_shift(pitch_shift(whole, by, RATE), -by, RATE)
        found = [shards.decode_voice(row, f"roundtrip_{by}") for row in rows]
        np.testing.assert_allclose(np.concatenate(found, axis=1), 32768 * expected, atol=0.51)


def test_every_row_group_holds_its_share_of_every_long_file(tmp_path):
    for i in range(6):
        write(tmp_path / f"source/{i}.wav", noise(40, i))
    manifest = prepare_here(tmp_path / "source", tmp_path / "shards")
    train = next(shard for shard in manifest.shards if shard.split == "train")
    assert train.row_groups == 2
    for index in range(2):
        rows = shards.read_row_group(str(tmp_path / "shards"), train.name, index)
        counts = Counter(row.key for row in rows)
        assert len(rows) == 8
        assert len(counts) == 4
        assert max(counts.values()) <= 3


def test_mono_is_the_mean_and_stereo_of_mono_is_twice_the_same(tmp_path):
    stereo = noise(1, 1, channels=2)
    write(tmp_path / "source/stereo.wav", stereo)
    write(tmp_path / "source/mono.wav", noise(2, 2))
    for channels in (1, 2):
        options = dataclasses.replace(SMALL, channels=channels)
        manifest = prepare_here(tmp_path / "source", tmp_path / f"{channels}", options)
        rows = {row.key: row for row in all_rows(tmp_path / f"{channels}", manifest)}
        found = shards.decode_flac(rows["stereo.wav"].voices["audio"])
        expected = stereo.T if channels == 2 else np.rint(stereo.mean(axis=1))[None]
        np.testing.assert_array_equal(found, expected)
        found = shards.decode_flac(rows["mono.wav"].voices["audio"])
        np.testing.assert_array_equal(found, np.repeat(noise(2, 2).T, channels, axis=0))


def test_other_rates_are_resampled_and_counted(tmp_path, capsys):
    seconds = np.arange(2 * 11025) / 11025
    write(tmp_path / "source/a.wav", 0.3 * np.sin(2 * np.pi * 440 * seconds), 11025)
    write(tmp_path / "source/b.wav", noise(1))
    folder = str(tmp_path / "shards")
    shards_command.main(
        [str(tmp_path / "source"), folder, "--sample-rate", "8000", "--workers", "0"]
    )
    assert "1 of 2 files resampled to 8000 Hz" in capsys.readouterr().out
    manifest = read_manifest(folder)
    audio = next(row for row in all_rows(folder, manifest) if row.key == "a.wav").voices["audio"]
    spectrum = np.abs(np.fft.rfft(shards.decode_flac(audio)[0]))
    assert spectrum.argmax() / 2 == pytest.approx(440)
    assert len(spectrum) == RATE + 1


# --- the same bytes -------------------------------------------------------------------------------


@pytest.fixture
def many_shards(monkeypatch):
    monkeypatch.setattr(plan, "LARGEST_SHARD", 250_000)


@pytest.mark.usefixtures("many_shards")
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(source, tmp_path, monkeypatch):
    unbroken = prepare_here(source, tmp_path / "unbroken")
    assert len(unbroken.shards) >= 4
    count, real = [0], ingest.write_shard

    def break_at_the_third(job):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(ingest, "write_shard", break_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_here(source, tmp_path / "broken")
    with pytest.raises(
        ConfigError, match="these shards are unfinished; run the same command again"
    ):
        read_manifest(str(tmp_path / "broken"))
    written = []
    monkeypatch.setattr(ingest, "write_shard", lambda job: written.append(job.name) or real(job))
    resumed = prepare_here(source, tmp_path / "broken")
    assert written == [shard.name for shard in unbroken.shards[2:]]
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")
    assert resumed.hash == unbroken.hash


@pytest.mark.usefixtures("many_shards")
def test_a_lost_shard_is_written_again_and_the_others_are_kept(source, tmp_path, monkeypatch):
    manifest = prepare_here(source, tmp_path / "shards")
    before = contents(tmp_path / "shards")
    (tmp_path / "shards/manifest.json").unlink()
    (tmp_path / "shards" / manifest.shards[1].name).unlink()
    written, real = [], ingest.write_shard
    monkeypatch.setattr(ingest, "write_shard", lambda job: written.append(job.name) or real(job))
    prepare_here(source, tmp_path / "shards")
    assert written == [manifest.shards[1].name]
    assert contents(tmp_path / "shards") == before


def test_shards_that_a_repaired_file_does_not_touch_are_kept(source, tmp_path, monkeypatch):
    silent, real, written = source / "silent.wav", ingest.write_shard, []
    write(silent, np.zeros(RATE))
    monkeypatch.setattr(ingest, "write_shard", lambda job: written.append(job.name) or real(job))
    options = dataclasses.replace(SMALL, validation_groups=("b/7.wav",))
    with pytest.raises(ConfigError, match="silent.wav: silent"):
        prepare_here(source, tmp_path / "shards", options)
    assert written == ["train-00000.parquet", "validation-00000.parquet"]
    written.clear()
    silent.unlink()
    prepare_here(source, tmp_path / "shards", options)
    assert written == ["train-00000.parquet"]
    prepare_here(source, tmp_path / "fresh", options)
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")
    assert len(list((tmp_path / "shards/.plan").iterdir())) == 3  # the plan and two reports


@pytest.mark.usefixtures("many_shards")
def test_an_unfinished_run_with_other_options_leaves_nothing_behind(source, tmp_path):
    prepare_here(source, tmp_path / "shards")
    (tmp_path / "shards/manifest.json").unlink()
    (tmp_path / "shards/train-00099.parquet").write_bytes(b"of an earlier plan")
    options = dataclasses.replace(SMALL, channels=2)
    prepare_here(source, tmp_path / "shards", options)
    prepare_here(source, tmp_path / "fresh", options)
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")


def test_the_data_hash_does_not_depend_on_where_it_lies(source, tmp_path):
    shutil.copytree(source, tmp_path / "elsewhere")
    here, there = (
        prepare_here(tmp_path / s, tmp_path / f"{s}-shards") for s in ("source", "elsewhere")
    )
    assert here.hash == there.hash
    other = prepare_here(source, tmp_path / "other", dataclasses.replace(SMALL, channels=2))
    assert here.hash != other.hash


@pytest.mark.ray
@pytest.mark.usefixtures("many_shards")
def test_ray_data_writes_the_same_bytes_as_this_process(source, tmp_path):
    (source / "broken.wav").write_bytes(b"RIFF")
    options = dataclasses.replace(SMALL, shifts=(7.0,), max_rejected=0.2)
    moved = []
    here = prepare_here(source, tmp_path / "here", options)
    ray = prepare(
        str(source), str(tmp_path / "ray"), options, progress=lambda *done: moved.append(done)
    )
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    assert ray == here
    assert moved == [(i, len(here.shards)) for i in range(len(here.shards) + 1)]


def test_a_second_run_is_already_complete(source, tmp_path, monkeypatch, capsys):
    first = prepare_here(source, tmp_path / "shards")
    monkeypatch.setattr(ingest, "make_plan", None)  # not even planned
    assert prepare_here(source, tmp_path / "shards") == first
    arguments = [
        str(source),
        str(tmp_path / "shards"),
        "--sample-rate",
        "8000",
        "--validation",
        "0.25",
    ]
    shards_command.main(arguments)
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dataclasses.replace(SMALL, channels=2), "channels: there 1, now 2"),
        (dataclasses.replace(SMALL, shifts=(12.0,)), r"shifts: there \[\], now \[12.0\]"),
    ],
)
def test_other_options_for_finished_shards_are_refused(source, tmp_path, options, message):
    prepare_here(source, tmp_path / "shards")
    with pytest.raises(ConfigError, match=message):
        prepare_here(source, tmp_path / "shards", options)


def test_other_sources_for_finished_shards_are_refused(source, tmp_path):
    prepare_here(source, tmp_path / "shards")
    write(source / "new.wav", noise(1, 77))
    with pytest.raises(ConfigError, match="1 files new since then, such as new.wav"):
        prepare_here(source, tmp_path / "shards")
    (source / "new.wav").unlink()
    os.utime(source / "a/0.wav", (1, 1))
    with pytest.raises(ConfigError, match="files changed since then"):
        prepare_here(source, tmp_path / "shards")


# --- the split ------------------------------------------------------------------------------------


def test_the_split_is_the_same_everywhere_and_no_group_is_in_both(tmp_path):
    groups = [f"speaker{i}" for i in range(20)]
    chosen = plan.validation_groups(groups, Options(validation=0.1))
    assert chosen == plan.validation_groups(groups[::-1], Options(validation=0.1))
    assert len(chosen) == 2
    assert len(plan.validation_groups(groups, Options(validation=0.11))) == 3
    assert chosen < plan.validation_groups(groups, Options(validation=0.5))
    for i in range(12):
        write(tmp_path / f"source/speaker{i % 3}/{i}.wav", noise(1, i))
    options = dataclasses.replace(SMALL, group="folder")
    manifest = prepare_here(tmp_path / "source", tmp_path / "shards", options)
    splits = {}
    for file in manifest.files:
        splits.setdefault(file["group"], set()).add(file["split"])
    assert sorted(splits) == ["speaker0", "speaker1", "speaker2"]
    assert sorted(split for (split,) in splits.values()) == ["train", "train", "validation"]


def test_named_validation_groups_are_taken_and_typing_errors_corrected(source, tmp_path):
    options = dataclasses.replace(SMALL, group="folder", validation_groups=("b",))
    manifest = prepare_here(source, tmp_path / "shards", options)
    assert {f["group"] for f in manifest.files if f["split"] == "validation"} == {"b"}
    with pytest.raises(ConfigError, match="speakr1: unknown group, did you mean 'speaker1'?"):
        plan.validation_groups(["speaker1", "x"], Options(validation_groups=("speakr1",)))
    with pytest.raises(ConfigError, match="zero train files"):
        plan.validation_groups(["a", "b"], Options(validation_groups=("a", "b")))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_zero_validation_files_is_an_error(tmp_path, share):
    write(tmp_path / "source/a/1.wav", noise(1, 1))
    write(tmp_path / "source/a/2.wav", noise(1, 2))
    options = dataclasses.replace(SMALL, validation=share, group="folder")
    with pytest.raises(ConfigError, match=r"only one group \(a\); add files or use --group file$"):
        prepare_here(tmp_path / "source", tmp_path / "shards", options)
    assert not (tmp_path / "shards").exists()


def test_a_share_of_zero_says_which_option_and_a_lone_file_only_asks_for_more(tmp_path):
    write(tmp_path / "source/1.wav", noise(1, 1))
    with pytest.raises(ConfigError, match=r"only one group \(1.wav\); add files$"):
        prepare_here(tmp_path / "source", tmp_path / "shards")
    write(tmp_path / "source/2.wav", noise(1, 2))
    options = dataclasses.replace(SMALL, validation=0.0)
    with pytest.raises(ConfigError, match="--validation 0; give --validation or"):
        prepare_here(tmp_path / "source", tmp_path / "shards", options)


def test_shards_have_96_mb_but_there_are_16_of_at_least_a_row_group():
    items = [layouts.Item(f"{i}", f"{i}", (), i) for i in range(1000)]

    def largest(**options):
        jobs = plan.make_plan(items, {}, "", Options(**options)).jobs
        return max(len(job.items) for job in jobs), len(jobs)

    assert largest(seconds=200.0)[0] == 10  # 9.6 MB each
    assert largest(seconds=4.0)[1] in (16, 17, 18)  # 192 MB in all
    assert largest(seconds=0.5)[0] == 333  # 24 kB each: 8 MB
    songs = Options(seconds=2.0, shifts=tuple(range(1, 13)))  # 13 voices: 8 chunks have 50 MB
    jobs = plan.make_plan(items[:48], {}, "", songs).jobs
    assert max(len(job.items) for job in jobs) == 40
    assert sorted(item.song for job in jobs for item in job.items) == list(range(48))


# --- what is left out -----------------------------------------------------------------------------


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("name", ["bad.wav", "bad.flac", "bad.mp3", "bad.ogg", "bad.aiff"])
def test_a_truncated_file_is_named_and_not_half_written(tmp_path, name):
    write(tmp_path / "source" / name, noise(6))
    cut(tmp_path / "source" / name, 0.6)
    assert reject(tmp_path, name).startswith(("truncated", "unreadable"))


@pytest.mark.parametrize("data", [b"RIFF garbage", bytes(range(256)) * 20])
@pytest.mark.parametrize("name", ["bad.wav", "bad.mp3", "folder/bad.flac"])
def test_garbage_is_named(tmp_path, name, data):
    (tmp_path / "source" / name).parent.mkdir(parents=True)
    (tmp_path / "source" / name).write_bytes(data)
    assert reject(tmp_path, name).startswith("unreadable: ")


def test_an_mp3_with_a_hole_is_named(tmp_path):
    write(tmp_path / "source/bad.mp3", noise(8), compression_level=0.5)
    data = bytearray((tmp_path / "source/bad.mp3").read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(range(1, 201)) * (third // 200) + bytes(third % 200)
    (tmp_path / "source/bad.mp3").write_bytes(data)
    assert reject(tmp_path, "bad.mp3").startswith(("unreadable", "truncated"))


def test_an_mp3_that_does_not_tell_its_length_is_not_cut_in_silence(tmp_path):
    quiet_then_loud = np.concatenate([noise(10) // 4096, noise(10)])
    write(
        tmp_path / "source/bad.mp3", quiet_then_loud, bitrate_mode="VARIABLE", compression_level=0.1
    )
    data = (tmp_path / "source/bad.mp3").read_bytes()
    first = data.find(
        data[:2], 4
    )  # the frame that holds the Xing header ends where the next begins
    (tmp_path / "source/bad.mp3").write_bytes(data[first:])
    reason = reject(tmp_path, "bad.mp3")
    assert reason.startswith(("MP3 without its length", "truncated"))


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (noise(0.3), "0.30 s, shorter than --min-seconds 0.5"),
        (noise(0), "empty"),
        (np.zeros((RATE, 1)), "silent (peak below -80 dB of full scale)"),
        (np.full((RATE, 1), np.nan), "holds NaN or Inf"),
        (np.where(np.arange(RATE) == 5, np.inf, 0.1), "holds NaN or Inf"),
    ],
)
def test_unusable_sound_is_named(tmp_path, audio, reason):
    write(tmp_path / "source/bad.wav", audio, subtype="FLOAT" if audio.dtype == float else "PCM_16")
    assert reject(tmp_path, "bad.wav") == reason


def test_a_file_of_no_bytes_is_named(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/bad.wav").touch()
    assert reject(tmp_path, "bad.wav") == "empty (0 bytes)"


def test_8_khz_cannot_fill_48_khz_unless_asked_to(tmp_path):
    write(tmp_path / "source/bad.wav", noise(1))
    options = dataclasses.replace(SMALL, sample_rate=48000)
    reason = reject(tmp_path, "bad.wav", options)
    assert reason == "8000 Hz cannot fill 48000 Hz; use --sample-rate 8000 or --upsample"
    options = dataclasses.replace(options, upsample=True)
    manifest = prepare_here(tmp_path / "source", tmp_path / "upsampled", options)
    assert manifest.rejected == []
    assert next(f for f in manifest.files if f["key"] == "bad.wav")["seconds"] == 1


def test_too_many_rejected_files_stop_before_a_shard_is_written(tmp_path):
    for i in range(8):
        write(tmp_path / f"source/good{i}.wav", noise(1, i))
    for i in range(12):
        (tmp_path / f"source/bad{i:02}.wav").write_bytes(b"no sound")
    with pytest.raises(
        ConfigError, match=r"12 of 20 rejected \(60%\), above --max-rejected"
    ) as error:
        prepare_here(tmp_path / "source", tmp_path / "shards")
    assert "bad09.wav: unreadable: Format not recognised" in str(error.value)
    assert "bad10.wav" not in str(error.value)
    assert "... and 2 more" in str(error.value)
    assert not (tmp_path / "shards").exists()
    options = dataclasses.replace(SMALL, max_rejected=0.6)
    assert len(prepare_here(tmp_path / "source", tmp_path / "shards", options).rejected) == 12


def test_too_many_files_rejected_while_decoding_publish_nothing(tmp_path):
    write(tmp_path / "source/good0.wav", noise(1))
    write(tmp_path / "source/good1.wav", noise(2))
    write(tmp_path / "source/silent.wav", np.zeros(RATE))
    with pytest.raises(ConfigError, match=r"silent.wav: silent(.|\n)*1 of 3 rejected \(33%\)"):
        prepare_here(tmp_path / "source", tmp_path / "shards")
    assert not (tmp_path / "shards/manifest.json").exists()


def test_a_split_whose_files_are_all_rejected_is_an_error(tmp_path):
    for i in range(3):
        write(tmp_path / f"source/good{i}.wav", noise(1, i))
    write(tmp_path / "source/silent.wav", np.zeros(RATE))
    options = dataclasses.replace(SMALL, validation_groups=("silent.wav",), max_rejected=0.5)
    with pytest.raises(
        ConfigError, match="zero validation files: all that were chosen are rejected"
    ):
        prepare_here(tmp_path / "source", tmp_path / "shards", options)


def test_duplicates_are_kept_once_and_are_not_bad(tmp_path):
    for name, seed in (("a.wav", 1), ("b.wav", 2), ("copy of a.wav", 1)):
        write(tmp_path / "source" / name, noise(1, seed))
    options = dataclasses.replace(SMALL, max_rejected=0.0)
    manifest = prepare_here(tmp_path / "source", tmp_path / "shards", options)
    assert [file["key"] for file in manifest.files] == ["a.wav", "b.wav"]
    assert manifest.duplicates == [{"path": "copy of a.wav", "reason": "same content as a.wav"}]
    assert manifest.rejected == []


def test_a_folder_without_audio_says_what_is_there_instead(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(
        ConfigError, match=r"no audio found \(looked for .wav, .*\); there: nothing"
    ):
        prepare_here(tmp_path / "source", tmp_path / "shards")
    for name in ("a.mid", "b.mid", "README", "._mac.wav"):
        (tmp_path / "source" / name).touch()
    with pytest.raises(ConfigError, match="there: 2 .mid, 1 without suffix"):
        prepare_here(tmp_path / "source", tmp_path / "shards")
    with pytest.raises(ConfigError, match=f"no such folder; did you mean {tmp_path}/source"):
        prepare_here(tmp_path / "sorce", tmp_path / "shards")


def test_files_that_are_not_audio_are_counted(source, tmp_path):
    (source / "cover.jpg").touch()
    (source / "a/notes.txt").touch()
    assert prepare_here(source, tmp_path / "shards").ignored == 2


@pytest.mark.parametrize(
    ("options", "name", "text"),
    [
        ({"round_trips": (0.0,)}, "round trip", "must be -24 to 24, not 0, each once, got (0.0,)"),
        ({"round_trips": (5.0, 5.0)}, "round trip", "must be -24 to 24, not 0, each once"),
        ({"kind": "rolls"}, "kind", "must be audio or roll, got 'rolls'"),
        ({"kind": "roll", "channels": 88}, "sample_rate", "must be 24 to 24, got 48000"),
        ({"kind": "roll", "sample_rate": 24}, "channels", "must be 88 to 88, got 1"),
        ({**ROLL, "shifts": (12.0,)}, "shifts", "is about sound; piano rolls have none"),
        ({**ROLL, "stems": True}, "stems", "is about sound; piano rolls have none"),
        ({"sample_rate": 24}, "sample_rate", "must be 1000 to 655350, got 24"),
    ],
)
def test_an_option_that_does_not_fit_its_kind_is_named(options, name, text):
    with pytest.raises(ConfigError) as error:
        Options(**options)
    ((path, found),) = error.value.problems
    assert path == name
    assert found.startswith(text)


def test_bad_options_are_all_named_at_once():
    with pytest.raises(ConfigError, match="channels: must be 1 to 8, got 0") as error:
        Options(channels=0, validation=2.0, shifts=(0.0,))
    assert [path for path, _ in error.value.problems] == ["channels", "validation", "shift"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"shifts": (float("nan"),)}, "shift"),
        ({"shifts": (24.5,)}, "shift"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_number_out_of_range_is_named(options, name):
    with pytest.raises(ConfigError) as error:
        Options(**options)
    assert [path for path, _ in error.value.problems] == [name]


def test_fewer_workers_than_none_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        shards_command.main([str(tmp_path), str(tmp_path / "shards"), "--workers", "-1"])
    assert stop.value.code == 2
    assert "--workers: must be 0 or more, got -1" in capsys.readouterr().err


# --- full scale -----------------------------------------------------------------------------------


def test_a_file_whose_shift_would_clip_is_scaled_down_as_a_whole(tmp_path, capsys):
    loud = noise(12, 1) / 16384  # up to full scale; its shift goes beyond it
    write(tmp_path / "source/loud.wav", loud, subtype="FLOAT")
    write(tmp_path / "source/quiet.wav", loud[: 5 * RATE] / 4, subtype="FLOAT")
    arguments = [str(tmp_path / "source"), str(tmp_path / "shards"), "--sample-rate", str(RATE)]
    shards_command.main([*arguments, "--shift", "12", "--workers", "0"])
    assert "1 files scaled down to avoid clipping" in capsys.readouterr().out
    manifest = read_manifest(str(tmp_path / "shards"))
    gains = {file["key"]: file["gain_db"] for file in manifest.files}
    assert gains["quiet.wav"] == 0
    assert -20 < gains["loud.wav"] < -0.5
    peaks = {}
    for row in all_rows(tmp_path / "shards", manifest):
        decoded = {voice: shards.decode_voice(row, voice).astype(int) for voice in row.voices}
        for voice, audio in decoded.items():
            place = row.key, voice
            peaks[place] = max(peaks.get(place, 0), np.abs(audio).max())
            assert (np.abs(audio) >= 32767).sum() <= 1  # the one peak, no flat tops
        if row.key == "loud.wav":
            whole = loud[row.start : row.start + row.frames, 0] * 32768
            expected = whole * 10 ** (gains["loud.wav"] / 20)
            np.testing.assert_allclose(decoded["audio"][0], expected, atol=3)
    assert peaks["loud.wav", "shift_12"] >= 32766
    assert peaks["quiet.wav", "audio"] < 8200


def test_a_stem_above_full_scale_takes_the_others_with_it(tmp_path):
    tracks(tmp_path / "source")
    bass = noise(12, 5) / 16384 * 1.9
    write(tmp_path / "source/one/bass.wav", bass, subtype="FLOAT")
    write(tmp_path / "source/one/drums.wav", -bass / 2, subtype="FLOAT")  # the sum is quieter
    write(tmp_path / "source/one/vocals.wav", -bass / 3, subtype="FLOAT")
    manifest = prepare_here(tmp_path / "source", tmp_path / "shards", STEMS)
    gains = {file["key"]: file["gain_db"] for file in manifest.files}
    assert gains["one"] == pytest.approx(-20 * np.log10(1.9), abs=0.01)
    for row in all_rows(tmp_path / "shards", manifest):
        voices = {name: shards.decode_voice(row, name).astype(int) for name in row.voices}
        assert np.abs(voices.pop("audio") - sum(voices.values())).max() <= 3


def test_floats_that_are_not_on_a_full_scale_of_one_are_named(tmp_path):
    audio = noise(1).astype(np.float32)
    audio[5] = 32768
    write(tmp_path / "source/bad.wav", audio, subtype="FLOAT")
    assert reject(tmp_path, "bad.wav") == "peak 32768: not on a full scale of 1.0"


# --- other people's files -------------------------------------------------------------------------


def test_parquet_files_of_others_are_neither_overwritten_nor_deleted(source, tmp_path):
    there = tmp_path / "shards"
    there.mkdir()
    (there / "train-00000.parquet").write_bytes(b"mine")
    message = "holds train-00000.parquet, which bgray did not write here; give another folder"
    with pytest.raises(ConfigError, match=message):
        prepare_here(source, there)
    assert contents(there) == {"train-00000.parquet": b"mine"}
    assert not (there / ".plan").exists()
    (there / "train-00000.parquet").unlink()
    others = ("train.parquet", "training.parquet", "validation-labels.parquet", "train-1.parquet")
    for name in others:
        (there / name).write_bytes(b"mine")
    prepare_here(source, there)
    assert {name: (there / name).read_bytes() for name in others} == dict.fromkeys(others, b"mine")


def test_what_a_killed_write_left_is_removed(source, tmp_path, monkeypatch):
    there, real = tmp_path / "shards", ingest.write_shard
    there.mkdir()
    (there / ".train-00000.parquet.ab_12xyz").write_bytes(b"half")
    (there / ".train-notes.parquet.ab_12xyz").write_bytes(b"mine")
    (there / ".validation-00000.parquet.writing0").write_bytes(b"of another process")

    def meanwhile(job):
        os.utime(there / ".validation-00000.parquet.writing0", (2e9, 2e9))
        (there / ".train-00001.parquet.started0").touch()
        return real(job)

    monkeypatch.setattr(ingest, "write_shard", meanwhile)
    prepare_here(source, there)
    hidden = {path.name for path in there.glob(".*")}
    assert hidden == {
        ".plan",
        ".train-notes.parquet.ab_12xyz",
        ".validation-00000.parquet.writing0",
        ".train-00001.parquet.started0",
    }


@pytest.mark.parametrize("good", [True, False])
def test_a_name_that_is_not_utf8_is_read_or_rejected(source, tmp_path, good):
    audio = source / os.fsdecode(b"caf\xe9.wav")
    (shutil.copy(source / "a/4.wav", audio), (source / "a/4.wav").unlink())
    if not good:
        audio.write_bytes(b"RIFF")
    options = dataclasses.replace(SMALL, max_rejected=0.2)
    manifest = prepare_here(source, tmp_path / "shards", options)
    there = manifest.files if good else manifest.rejected
    assert "caf\N{REPLACEMENT CHARACTER}.wav" in {e["key" if good else "path"] for e in there}
    assert len(manifest.files) == (8 if good else 7)
    assert shards.verify(str(tmp_path / "shards")) == []


# --- stems ----------------------------------------------------------------------------------------

STEMS = dataclasses.replace(SMALL, stems=True)


def tracks(folder, **more):
    """Two tracks of three stems each, one of them without vocals."""
    for track in ("one", "two"):
        for i, stem in enumerate(("drums", "bass", "vocals")):
            if (track, stem) != ("two", "vocals"):
                write(folder / track / f"{stem}.wav", noise(12, hash_of(track, i)))
    return folder


def hash_of(*parts):
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16)


def test_stems_add_up_to_audio_and_a_missing_one_is_silence(tmp_path):
    tracks(tmp_path / "source")
    write(tmp_path / "source/one/mixture.wav", noise(3))
    manifest = prepare_here(tmp_path / "source", tmp_path / "shards", STEMS)
    assert list(manifest.voices) == ["audio", "bass", "drums", "vocals"]
    assert {file["key"]: file["muted"] for file in manifest.files} == {"one": [], "two": ["vocals"]}
    for row in all_rows(tmp_path / "shards", manifest):
        voices = {name: shards.decode_flac(flac).astype(int) for name, flac in row.voices.items()}
        total = voices.pop("audio")
        assert (
            np.abs(total - sum(voices.values())).max() <= 2
        )  # half a step each, and one for full scale
        # Their sum is above full scale, which takes one common factor; a file would have clipped.
        assert np.abs(total).max() > 16384
        if row.key == "two":
            assert not voices["vocals"].any()
        elif row.start == 0:
            drums = soundfile.read(tmp_path / "source/one/drums.wav", dtype="int16")[0][
                : row.frames
            ]
            factor = (
                voices["drums"][0] @ drums.astype(int) / (drums.astype(int) @ drums.astype(int))
            )
            assert 0.5 < factor < 1
            np.testing.assert_allclose(voices["drums"][0], factor * drums, atol=1)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda track: write(track / "bass.wav", noise(11, 9)),
            "its stems differ in length: bass 11.00 s, vocals 12.00 s",
        ),
        (
            lambda track: write(track / "bass.wav", noise(12, 9), 16000),
            "its stems differ in sample rate: 8000, 16000 Hz",
        ),
        (lambda track: write(track / "bass.flac", noise(12, 9)), "two files are stem 'bass'"),
        (
            lambda track: write(track / "audio.wav", noise(12, 9)),
            "a stem cannot be called 'audio'; rename the file",
        ),
        (lambda track: (track / "bass.wav").write_bytes(b"x"), "unreadable: Format not recognised"),
    ],
)
def test_a_track_whose_stems_do_not_fit_is_rejected(tmp_path, spoil, reason):
    tracks(tmp_path / "source")
    for i in range(9):
        write(tmp_path / f"source/more{i}/drums.wav", noise(1, i))
    spoil(tmp_path / "source/one")
    manifest = prepare_here(tmp_path / "source", tmp_path / "shards", STEMS)
    assert manifest.rejected == [{"path": "one", "reason": reason}]


def test_stems_of_slightly_different_length_are_padded(tmp_path):
    tracks(tmp_path / "source")
    write(tmp_path / "source/one/bass.wav", noise(12.05, 9))
    manifest = prepare_here(tmp_path / "source", tmp_path / "shards", STEMS)
    assert [file["seconds"] for file in manifest.files] == [12.05, 12.0]


# --- piano rolls ----------------------------------------------------------------------------------

ROLLS = Options(**ROLL, validation=0.34, max_rejected=0.5, seconds=96.0, songs=6)


def roll(steps, seed):
    """(88, T) that begins and ends with a note."""
    rng = np.random.default_rng(seed)
    notes = (rng.random((88, steps)) < 0.03).astype(np.uint8)
    notes[40, [0, -1]] = 1
    return notes


@pytest.fixture
def scores(tmp_path):
    """Three MIDI files of 1, 2 and 3 pieces and a rest each."""
    rolls = {f"{i}.mid": roll(1920 * i + 100, i) for i in (1, 2, 3)}
    (tmp_path / "scores").mkdir()
    for name, notes in rolls.items():
        (tmp_path / "scores" / name).write_bytes(midi.write_midi(notes))
    return rolls


def test_a_file_becomes_its_whole_pieces_in_order_and_the_rest_is_dropped(scores, tmp_path):
    manifest = prepare_here(tmp_path / "scores", tmp_path / "shards", ROLLS)
    assert manifest.voices == {"roll": "packed-bits"}
    assert (manifest.kind, manifest.sample_rate, manifest.channels) == ("roll", 24, 88)
    assert manifest.chunk_seconds * manifest.sample_rate == 1920
    rows = {(row.key, row.start): row for row in all_rows(tmp_path / "shards", manifest)}
    assert sorted(rows) == [(f"{i}.mid", 1920 * j) for i in (1, 2, 3) for j in range(i)]
    for (key, start), row in rows.items():
        found = shards.decode_voice(row, "roll")
        assert (found.dtype, found.shape, row.frames) == (np.int16, (88, 1920), 1920)
        np.testing.assert_array_equal(found, scores[key][:, start : start + 1920])
    assert shards.verify(str(tmp_path / "shards")) == []


def test_the_density_is_the_error_of_predicting_silence(scores, tmp_path):
    manifest = prepare_here(tmp_path / "scores", tmp_path / "shards", ROLLS)
    for split in ("train", "validation"):
        pieces = [
            shards.decode_voice(row, "roll")
            for row in all_rows(tmp_path / "shards", manifest, split)
        ]
        assert manifest.density(split) == pytest.approx(np.mean(np.square(pieces)))


@pytest.mark.usefixtures("scores")
def test_what_makes_no_roll_is_named_and_a_copy_is_kept_once(tmp_path):
    there = tmp_path / "scores"
    (there / "broken.mid").write_bytes((there / "1.mid").read_bytes()[:400])
    (there / "copy.MIDI").write_bytes((there / "2.mid").read_bytes())
    (there / "empty.mid").touch()
    (there / "short.mid").write_bytes(midi.write_midi(roll(1919, 9)))
    (there / "notes.txt").touch()
    manifest = prepare_here(there, tmp_path / "shards", ROLLS)
    assert [file["key"] for file in manifest.files] == ["1.mid", "2.mid", "3.mid"]
    assert {row.key for row in all_rows(tmp_path / "shards", manifest)} == {
        "1.mid",
        "2.mid",
        "3.mid",
    }
    assert manifest.rejected == [
        {"path": "broken.mid", "reason": "no MIDI file: it ends too early"},
        {"path": "empty.mid", "reason": "empty (0 bytes)"},
        {"path": "short.mid", "reason": "1919 steps, shorter than a piece of 1920"},
    ]
    assert manifest.duplicates == [{"path": "copy.MIDI", "reason": "same content as 2.mid"}]
    assert manifest.ignored == 1


def test_a_folder_without_midi_says_what_is_there_instead(source, tmp_path):
    with pytest.raises(
        ConfigError, match=r"no MIDI found \(looked for .mid, .midi\); there: 8 .wav"
    ):
        prepare_here(source, tmp_path / "shards", ROLLS)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/a.mid").touch()
    with pytest.raises(ConfigError, match="for MIDI files give --rolls or --stems"):
        prepare_here(tmp_path / "scores", tmp_path / "shards")


def test_built_in_rolls_are_the_notes_of_the_built_in_songs(tmp_path):
    manifest = prepare("builtin", str(tmp_path / "shards"), ROLLS, workers=0)
    rows = list(all_rows(tmp_path / "shards", manifest))
    assert len(rows) > len(manifest.files) == 6
    first = [row for row in rows if row.key == "song-00002"]
    played = midi.trim(play_song(0, 2, seconds=96.0, sample_rate=16000).roll.T)
    assert len(first) == played.shape[1] // 1920
    for row in first:
        expected = played[:, row.start : row.start + 1920]
        np.testing.assert_array_equal(shards.decode_voice(row, "roll"), expected)


def test_songs_too_short_for_a_piece_say_so(tmp_path):
    options = dataclasses.replace(ROLLS, seconds=20.0)
    with pytest.raises(ConfigError, match="steps, shorter than a piece of 1920; give more --seco"):
        prepare("builtin", str(tmp_path / "shards"), options, workers=0)


@pytest.mark.usefixtures("scores")
def test_the_command_line_writes_rolls_and_counts_beats(tmp_path, capsys):
    folder = str(tmp_path / "shards")
    arguments = [str(tmp_path / "scores"), folder, "--rolls", "--validation", "0.34"]
    shards_command.main([*arguments, "--workers", "0"])
    out = capsys.readouterr().out
    manifest = read_manifest(folder)
    assert "split\tfiles\tgroups\tbeats\tchunks" in out
    beats = [line.split("\t")[3] for line in out.splitlines()[1:3]]
    assert [float(b) for b in beats] == [80 * manifest.rows(s) for s in ("train", "validation")]
    assert f"predicting silence): train {manifest.density('train'):.4f}, validation" in out
    assert "resampled" not in out


@pytest.mark.usefixtures("scores")
def test_a_corrupt_roll_names_shard_row_group_and_chunk(tmp_path):
    manifest = prepare_here(tmp_path / "scores", tmp_path / "shards", ROLLS)
    path = tmp_path / "shards" / manifest.shards[0].name
    first = shards.read_row_group(str(tmp_path / "shards"), path.name, 0)[0]
    spoil(path, path.read_bytes().find(first.voices["roll"]) + 500, 20)
    row = shards.read_row_group(str(tmp_path / "shards"), path.name, 0)[0]
    with pytest.raises(ConfigError, match=f"chunk {row.key} @{row.start}, voice roll: corrupt"):
        shards.decode_voice(row, "roll")
    assert shards.verify(str(tmp_path / "shards")) != []


# --- built-in music -------------------------------------------------------------------------------


@pytest.fixture
def band(monkeypatch):
    """A stand-in for bgray.band: noise for two instruments, the first of them silent in song 0."""

    def song(seed, index, *, seconds, sample_rate):
        if sample_rate < 4000:
            raise ValueError(f"sample_rate={sample_rate}: too low")
        rng = np.random.default_rng([seed, index])
        stems = {p: 0.2 * rng.uniform(-1, 1, (1, round(seconds * sample_rate))) for p in (-1, 0)}
        stems = {
            p: (audio * (index > 0 or p == 0)).astype(np.float32) for p, audio in stems.items()
        }
        return types.SimpleNamespace(stems=stems, mixture=stems[-1] + stems[0], silent=())

    module = types.SimpleNamespace(song=song, PROGRAMS={-1: "drums", 0: "piano"})
    monkeypatch.setattr("bgray.band", module, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "bgray.band", module)


@pytest.mark.usefixtures("band")
@pytest.mark.parametrize("stems", [False, True])
def test_built_in_songs_become_shards(tmp_path, stems):
    options = dataclasses.replace(SMALL, songs=8, seconds=3.0, stems=stems, channels=2)
    manifest = prepare("builtin", str(tmp_path / "shards"), options, workers=0)
    assert list(manifest.voices) == (["audio", "drums", "piano"] if stems else ["audio"])
    assert [file["key"] for file in manifest.files] == [f"song-{i:05}" for i in range(8)]
    assert manifest.rows("validation") == 2
    assert [f.get("muted") for f in manifest.files[:2]] == (
        [["drums"], []] if stems else [None, None]
    )
    for row in all_rows(tmp_path / "shards", manifest):
        voices = {name: shards.decode_flac(flac).astype(int) for name, flac in row.voices.items()}
        assert voices["audio"].shape == (2, 3 * RATE)
        if stems:
            assert np.abs(voices["audio"] - voices["drums"] - voices["piano"]).max() <= 2


@pytest.mark.usefixtures("band")
def test_what_the_band_cannot_play_is_a_config_error(tmp_path):
    options = dataclasses.replace(SMALL, sample_rate=2000)
    with pytest.raises(ConfigError, match="sample_rate=2000: too low"):
        prepare("builtin", str(tmp_path / "shards"), options, workers=0)


def test_the_real_band_plays_its_stems_into_shards(tmp_path):
    options = Options(sample_rate=16000, songs=2, seconds=4.0, stems=True)
    manifest = prepare("builtin", str(tmp_path / "shards"), options, workers=0)
    assert set(manifest.voices) == {"audio", "drums", "piano", "bass", "strings"}
    for row in all_rows(tmp_path / "shards", manifest):
        voices = {name: shards.decode_flac(flac).astype(int) for name, flac in row.voices.items()}
        assert np.abs(voices.pop("audio") - sum(voices.values())).max() <= 3
    for file in manifest.files:
        assert len(file["muted"]) < 4


# --- S3 -------------------------------------------------------------------------------------------


def test_s3_source_and_destination_give_the_same_data_as_local_ones(source, tmp_path, s3):
    (source / "cover.jpg").touch()
    fs, root = storage.filesystem(f"{s3}/source")
    fs.put(str(source), root, recursive=True)
    local = prepare_here(source, tmp_path / "shards")
    remote = prepare_here(f"{s3}/source", f"{s3}/shards")
    assert remote.hash == local.hash
    assert remote.files == local.files
    assert remote.ignored == 1
    assert prepare_here(f"{s3}/source", f"{s3}/shards") == remote
    place = local.shards[0].name, 0
    there = shards.read_row_group(f"{s3}/shards", *place, voices=("audio",))
    assert there == shards.read_row_group(str(tmp_path / "shards"), *place)
    assert shards.verify(f"{s3}/shards") == []
    with pytest.raises(ConfigError, match="no shards here"):
        read_manifest(f"{s3}/nothing")


def test_a_broken_file_and_a_copy_on_s3_are_named(source, tmp_path, s3):
    (source / "broken.wav").write_bytes(b"RIFF")
    shutil.copy(source / "a/0.wav", source / "copy.wav")
    fs, root = storage.filesystem(f"{s3}/spoilt")
    fs.put(str(source), root, recursive=True)
    options = dataclasses.replace(SMALL, max_rejected=0.2)
    manifest = prepare_here(f"{s3}/spoilt", tmp_path / "shards", options)
    assert [entry["path"] for entry in manifest.rejected] == ["broken.wav"]
    assert [entry["path"] for entry in manifest.duplicates] == ["copy.wav"]


def test_an_s3_prefix_without_audio_says_so(tmp_path, s3):
    with pytest.raises(ConfigError, match="no audio found .* there: nothing"):
        prepare_here(f"{s3}/empty", tmp_path / "shards")
    with pytest.raises(ConfigError, match="no audio found|cannot list it"):
        prepare_here("s3://no-such-bucket/x", tmp_path / "shards")
    write(tmp_path / "source/a.wav", noise(1, 1))
    write(tmp_path / "source/b.wav", noise(1, 2))
    with pytest.raises(ConfigError, match="cannot write shards: .*bucket"):
        prepare_here(tmp_path / "source", "s3://no-such-bucket/x")


# --- verify, list, the disk -----------------------------------------------------------------------


@pytest.mark.usefixtures("many_shards")
def test_verify_names_the_shards_with_a_flipped_byte_or_none_at_all(source, tmp_path, capsys):
    manifest = prepare_here(source, tmp_path / "shards")
    assert shards.verify(str(tmp_path / "shards")) == []
    flipped, missing = manifest.shards[0].name, manifest.shards[2].name
    data = bytearray((tmp_path / "shards" / flipped).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "shards" / flipped).write_bytes(data)
    (tmp_path / "shards" / missing).unlink()
    with pytest.raises(SystemExit) as stop:
        shards_command.main(["--verify", str(tmp_path / "shards")])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert f"{flipped}: corrupt: sha256 is " in error
    assert f"{missing}: missing" in error
    assert len(error.splitlines()) == 3


def spoil(path, at, length=30):
    data = bytearray(path.read_bytes())
    data[at : at + length] = b"\xff" * length
    path.write_bytes(data)


def test_a_corrupt_voice_names_shard_row_group_and_chunk(source, tmp_path):
    manifest = prepare_here(source, tmp_path / "shards")
    path = tmp_path / "shards" / manifest.shards[0].name
    first = shards.read_row_group(str(tmp_path / "shards"), path.name, 0)[0]
    spoil(path, path.read_bytes().find(first.voices["audio"]) + 5000, 2000)
    row = shards.read_row_group(str(tmp_path / "shards"), path.name, 0)[0]
    with pytest.raises(ConfigError) as error:
        shards.decode_voice(row, "audio")
    assert f"{path}, row group 0:" in str(error.value)
    assert f"chunk {row.key} @{row.start}, voice audio: corrupt (" in str(error.value)
    assert f"check with python -m bgray.shards --verify {tmp_path}/shards" in str(error.value)


@pytest.mark.parametrize("how", ["cut", "footer", "page", "missing", "no such row group"])
def test_a_shard_that_cannot_be_read_is_named(source, tmp_path, how):
    manifest = prepare_here(source, tmp_path / "shards")
    path = tmp_path / "shards" / manifest.shards[0].name
    if how == "cut":
        cut(path, 0.5)
    elif how == "footer":
        spoil(path, path.stat().st_size - 40, 20)
    elif how == "page":
        spoil(path, 4)
    elif how == "missing":
        path.unlink()
    index = 99 if how.startswith("no") else 0
    with pytest.raises(ConfigError, match=f"{path}:\n  cannot be read \\(.*--verify"):
        shards.read_row_group(str(tmp_path / "shards"), path.name, index)


@pytest.mark.parametrize(
    "failure",
    [
        TimeoutError(errno.ETIMEDOUT, "timed out"),
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "no"),
        OSError("Connection lost"),
    ],
)
def test_a_network_error_is_not_a_corrupt_shard(source, tmp_path, s3, monkeypatch, failure):
    manifest = prepare_here(source, f"{s3}/timed")
    fs, _ = storage.filesystem(s3)
    monkeypatch.setattr("bgray.retries.RETRY_SECONDS", 0.1)
    monkeypatch.setattr("bgray.retries._given_up", {})

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(type(fs), "_cat_file", fail)
    monkeypatch.setattr("s3fs.core._fetch_range", fail)
    with pytest.raises(type(failure)) as error:
        shards.read_row_group(f"{s3}/timed", manifest.shards[0].name, 0)
    assert not isinstance(error.value, ConfigError)


def test_a_corrupt_shard_on_s3_is_named(source, tmp_path, s3):
    manifest = prepare_here(source, f"{s3}/spoilt")
    place = f"{s3}/spoilt/{manifest.shards[0].name}"
    storage.write_bytes(place, storage.read_bytes(place)[:-500])
    with pytest.raises(ConfigError, match="cannot be read"):
        shards.read_row_group(f"{s3}/spoilt", manifest.shards[0].name, 0)
    storage.remove(place)
    with pytest.raises(ConfigError, match=r"cannot be read \(missing\)"):
        shards.read_row_group(f"{s3}/spoilt", manifest.shards[0].name, 0)


def test_no_credentials_end_the_command_in_one_line(source, capsys, monkeypatch):
    from botocore.exceptions import NoCredentialsError

    def fail(*_, **__):
        raise NoCredentialsError

    monkeypatch.setattr("s3fs.S3FileSystem._exists", fail)
    for arguments in ([str(source), "s3://bucket/shards"], ["--list", "s3://bucket/shards"]):
        monkeypatch.setattr("s3fs.S3FileSystem._cat_file", fail)
        with pytest.raises(SystemExit) as stop:
            shards_command.main(arguments)
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert error == "s3://bucket/shards/manifest.json: Unable to locate credentials\n"


def test_verify_decodes_every_row(source, tmp_path):
    manifest = prepare_here(source, tmp_path / "shards")
    rows = list(all_rows(tmp_path / "shards", manifest, "train"))
    rows[3] = dataclasses.replace(rows[3], frames=rows[3].frames + 1)
    data = shards.encode_shard(rows, ["audio"])
    (tmp_path / "shards/train-00000.parquet").write_bytes(data)
    first = dataclasses.replace(manifest.shards[0], sha256=hashlib.sha256(data).hexdigest())
    spoilt = dataclasses.replace(manifest, shards=(first, *manifest.shards[1:]))
    (tmp_path / "shards/manifest.json").write_bytes(spoilt.to_json())
    (problem,) = shards.verify(str(tmp_path / "shards"))
    assert problem.startswith(f"train-00000.parquet: {rows[3].key} at {rows[3].start}, audio: ")


def test_the_command_line_sums_up_and_lists(source, tmp_path, capsys):
    (source / "broken.wav").write_bytes(b"RIFF")
    arguments = [
        str(source),
        str(tmp_path / "shards"),
        "--sample-rate",
        "8000",
        "--shift",
        "12",
        "-5",
    ]
    shards_command.main([*arguments, "--max-rejected", "0.2", "--workers", "0"])
    out = capsys.readouterr().out
    assert "rejected: broken.wav: unreadable: " in out
    assert "train\t7\t7\t" in out
    assert "voices: audio, shift_12, shift_-5" in out
    assert f"manifest: {tmp_path}/shards/manifest.json" in out
    shards_command.main(["--list", str(tmp_path / "shards")])
    out = capsys.readouterr().out.splitlines()
    manifest = read_manifest(str(tmp_path / "shards"))
    assert out[1].startswith(f"train-00000.parquet\ttrain\t{manifest.rows('train')}\t")
    assert out[-1].split("\t")[2] == str(manifest.rows("train") + manifest.rows("validation"))
    with pytest.raises(SystemExit):
        shards_command.main(["--list", str(tmp_path)])
    assert f"make them with: python -m bgray.shards SOURCE {tmp_path}" in capsys.readouterr().err


def test_shifts_and_round_trips_may_be_given_together_or_one_by_one(source, tmp_path, capsys):
    arguments = [str(source), str(tmp_path / "shards"), "--sample-rate", "8000", "--workers", "0"]
    arguments += ["--round-trip", "12", "--shift", "7", "-5", "--round-trip", "-3"]
    shards_command.main(arguments)
    assert "voices: audio, shift_7, shift_-5, roundtrip_12, roundtrip_-3" in capsys.readouterr().out


def test_an_interrupted_command_says_how_to_go_on(source, tmp_path, monkeypatch, capsys):
    def interrupt(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest, "write_shard", interrupt)
    arguments = [str(source), str(tmp_path / "shards"), "--sample-rate", "8000", "--workers", "0"]
    with pytest.raises(SystemExit) as stop:
        shards_command.main(arguments)
    assert stop.value.code == 130
    assert "run the same command again to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on .* free some and run the same command again: finished"),
        (errno.EACCES, "cannot write shards: .* run the same command again"),
    ],
)
def test_a_disk_that_takes_no_more_ends_in_one_line(source, tmp_path, monkeypatch, number, message):
    real = os.replace

    def fail(old, new):
        if str(new).endswith("validation-00000.parquet"):
            raise OSError(number, os.strerror(number), str(new))
        real(old, new)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match=message) as error:
        prepare_here(source, tmp_path / "shards")
    assert len(error.value.problems) == 1
    assert sorted(contents(tmp_path / "shards")) == ["train-00000.parquet"]  # and no temporary file
    monkeypatch.setattr(os, "replace", real)
    written, write_shard = [], ingest.write_shard
    monkeypatch.setattr(
        ingest, "write_shard", lambda job: written.append(job.name) or write_shard(job)
    )
    prepare_here(source, tmp_path / "shards")
    assert written == ["validation-00000.parquet"]


def test_a_manifest_of_another_version_or_a_broken_one_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(ConfigError, match="format version 99, this bgray reads 1"):
        read_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a manifest"):
        read_manifest(str(tmp_path))


def test_midi_files_that_make_no_roll_cannot_leave_a_split_without_files(tmp_path):
    folder = tmp_path / "scores"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.mid").write_bytes(midi.write_midi(roll(2000, i)))
    for i in range(9):
        (folder / f"bad{i}.mid").write_bytes(b"no MIDI " + bytes([i]))
    options = Options(**ROLL, validation=0.34, max_rejected=1.0)
    manifest = prepare(str(folder), str(tmp_path / "out"), options, workers=0)
    rows = manifest.rows("train"), manifest.rows("validation")
    assert min(rows) >= 1
    assert sum(rows) == 3
    assert len(manifest.rejected) == 9
