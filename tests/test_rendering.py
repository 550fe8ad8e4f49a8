import dataclasses
import glob
import io
import os
import shutil
import sys

import mido
import numpy as np
import pytest
import soundfile

from bgray import rendering, shards, shards_command
from bgray.config import ConfigError
from bgray.shards import Options, prepare

RATE = 8000
STEMS = Options(sample_rate=RATE, stems=True, validation=0.5)

# Plays a quarter of a second: as loud as there are notes, on the left only.
FAKE = f"""#!{sys.executable}
import sys
import mido, numpy, soundfile
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
rate = int(value("-r"))
assert arguments[-2].endswith("font.sf2") and value("-O") == "float"
notes = sum(message.type == "note_on" for message in mido.MidiFile(arguments[-1]))
audio = numpy.zeros((rate // 4, 2), "float32")
audio[:, 0] = notes / 10
soundfile.write(value("-F"), audio, rate, format="WAV", subtype="FLOAT")
"""


def score(notes, seconds=1.0):
    """[(program, channel, how many notes)] -> a MIDI file that lasts `seconds`."""
    tracks = [mido.MidiTrack([mido.MetaMessage("time_signature", numerator=4, denominator=4)])]
    for program, channel, count in notes:
        track = mido.MidiTrack([mido.Message("program_change", program=program, channel=channel)])
        for _ in range(count):
            track.append(mido.Message("note_on", note=60, channel=channel))
            track.append(mido.Message("note_off", note=60, channel=channel, time=50))
        track.append(mido.MetaMessage("end_of_track", time=round(960 * seconds) - 50 * count))
        tracks.append(track)
    stream = io.BytesIO()
    mido.MidiFile(ticks_per_beat=480, tracks=tracks).save(file=stream)
    return stream.getvalue()


BAND = score([(33, 0, 1), (0, 9, 2), (25, 3, 3)])


@pytest.fixture
def font(tmp_path):
    (tmp_path / "font.sf2").write_bytes(b"RIFF")
    return str(tmp_path / "font.sf2")


def install(tmp_path, monkeypatch, program):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/fluidsynth").write_text(program)
    (tmp_path / "bin/fluidsynth").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, FAKE)


@pytest.mark.usefixtures("fake")
def test_each_instrument_is_played_alone_and_all_are_equally_long(font):
    stems = rendering.render(BAND, font, RATE)
    assert list(stems) == ["drums", "acoustic_guitar_steel", "bass"]
    length = round((1 + rendering.TAIL_SECONDS) * RATE)
    for name, notes in (("bass", 1), ("drums", 2), ("acoustic_guitar_steel", 3)):
        assert stems[name].shape == (2, length)
        assert stems[name].dtype == np.float32
        np.testing.assert_allclose(stems[name][0, : RATE // 4], notes / 10)
        assert not stems[name][0, RATE // 4 :].any()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("#!/bin/sh\necho loading >&2; echo bad font >&2; exit 3", "exit code 3: bad font"),
        ("#!/bin/sh\nexit 0", "exit code 0: it says nothing"),
        ('#!/bin/sh\nfor last; do :; done; echo x > "${last%/*}/sound.wav"', "Error opening"),
    ],
)
def test_a_program_that_fails_is_quoted_and_the_file_rejected(
    tmp_path, monkeypatch, folder, font, program, reason
):
    install(tmp_path, monkeypatch, program)
    with pytest.raises(ValueError, match=f"fluidsynth could not play it with .*{reason}"):
        rendering.render(BAND, font, RATE)
    options = dataclasses.replace(STEMS, soundfont=font)
    with pytest.raises(ConfigError, match=f"a.mid: fluidsynth could not play it with .*{reason}"):
        prepare(str(folder), str(tmp_path / "shards"), options, workers=0)


def test_a_program_that_does_not_start_stops_everything(tmp_path, monkeypatch, folder, font):
    install(tmp_path, monkeypatch, "no program at all")
    options = dataclasses.replace(STEMS, soundfont=font, max_rejected=0.9)
    with pytest.raises(ConfigError, match="cannot be started: .*Exec format error") as error:
        prepare(str(folder), str(tmp_path / "shards"), options, workers=0)
    assert len(error.value.problems) == 1


def test_all_that_is_missing_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(rendering, "USUAL_PLACES", (f"{tmp_path}/*.sf2",))
    with pytest.raises(ConfigError) as error:
        rendering.check("", 4000)
    problems = dict(error.value.problems)
    assert "apt-get install fluidsynth fluid-soundfont-gm" in problems["fluidsynth"]
    assert "give --soundfont FILE, or apt-get install" in problems["soundfont"]
    assert problems["sample_rate"] == "fluidsynth plays 8000 to 96000 Hz, not 4000"


@pytest.mark.usefixtures("fake")
def test_the_soundfont_is_the_one_given_or_the_first_in_the_usual_places(font, monkeypatch):
    monkeypatch.setattr(rendering, "USUAL_PLACES", (font.replace("font", "*"),))
    assert rendering.check("", RATE) == font
    with pytest.raises(ConfigError, match="soundfont: no such file: /nowhere/x.sf2"):
        rendering.check("/nowhere/x.sf2", RATE)


def test_more_than_an_hour_and_no_notes_are_refused(font):
    with pytest.raises(ValueError, match="lasts 75 minutes, more than an hour"):
        rendering.render(score([(0, 0, 1)], seconds=4500), font, RATE)
    with pytest.raises(ValueError, match="no notes"):
        rendering.instruments(score([]))


# --- through to the shards ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "midi").mkdir()
    (tmp_path / "midi/a.mid").write_bytes(BAND)
    (tmp_path / "midi/b.mid").write_bytes(score([(33, 0, 2)], seconds=3.0))
    return tmp_path / "midi"


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("channels", [1, 2])
def test_midi_files_become_stems_that_sum_to_the_audio(tmp_path, folder, font, channels):
    (folder / "broken.mid").write_bytes(BAND[:60])
    options = dataclasses.replace(STEMS, soundfont=font, channels=channels, max_rejected=0.4)
    manifest = prepare(str(folder), str(tmp_path / "shards"), options, workers=0)
    assert list(manifest.voices) == ["audio", "acoustic_guitar_steel", "bass", "drums"]
    assert {file["key"]: file["muted"] for file in manifest.files} == {
        "a.mid": [],
        "b.mid": ["acoustic_guitar_steel", "drums"],
    }
    assert [entry["path"] for entry in manifest.rejected] == ["broken.mid"]
    assert manifest.rejected[0]["reason"].startswith("no MIDI file")
    assert manifest.options["played_with"] == font
    for shard in manifest.shards:
        for row in shards.read_row_group(str(tmp_path / "shards"), shard.name, 0):
            voices = {v: shards.decode_voice(row, v).astype(int) for v in row.voices}
            assert row.frames == (3 if row.key == "a.mid" else 5) * RATE
            assert len(voices["audio"]) == channels
            assert np.abs(voices.pop("audio") - sum(voices.values())).max() <= 2
            loud = 0.1 * (1 if row.key == "a.mid" else 2) / (2 if channels == 1 else 1)
            assert voices["bass"][0, 5] == pytest.approx(32768 * loud, abs=1)


@pytest.mark.usefixtures("fake")
def test_the_same_soundfont_elsewhere_is_the_same_plan(tmp_path, folder, font):
    options = dataclasses.replace(STEMS, soundfont=font)
    first = prepare(str(folder), str(tmp_path / "shards"), options, workers=0)
    (tmp_path / "moved").mkdir()
    moved = shutil.move(font, tmp_path / "moved/font.sf2")
    options = dataclasses.replace(STEMS, soundfont=str(moved))
    assert prepare(str(folder), str(tmp_path / "shards"), options, workers=0) == first


def test_a_machine_that_cannot_play_says_so_before_it_writes(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        shards_command.main([str(folder), str(tmp_path / "shards"), "--stems", "--workers", "0"])
    assert "fluidsynth: not installed, and it plays the MIDI files" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_a_soundfont_without_midi_is_not_ignored(tmp_path, font):
    options = Options(sample_rate=16000, songs=2, seconds=1.0, stems=True, soundfont=font)
    with pytest.raises(ConfigError, match="nothing to play: it is for MIDI with --stems"):
        prepare("builtin", str(tmp_path / "shards"), options, workers=0)


def test_beside_audio_midi_files_are_not_played(tmp_path, folder):
    for i, name in enumerate(("one", "two")):
        (folder / name).mkdir()
        audio = np.random.default_rng(i).uniform(-0.1, 0.1, RATE)
        soundfile.write(folder / name / "bass.wav", audio, RATE)
    manifest = prepare(str(folder), str(tmp_path / "shards"), STEMS, workers=0)
    assert [file["key"] for file in manifest.files] == ["one", "two"]
    assert manifest.ignored == 2


# --- the real program -----------------------------------------------------------------------------

FONTS = [path for place in rendering.USUAL_PLACES for path in glob.glob(place)]
HERE = (shutil.which("fluidsynth") and FONTS) or os.environ.get("BGRAY_LAB_REQUIRED")
needs_fluidsynth = pytest.mark.skipif(not HERE, reason="needs fluidsynth and a soundfont")


@needs_fluidsynth
def test_what_fluidsynth_plays_alone_adds_up_to_what_it_plays_together():
    font = rendering.check("", 22050)
    stems = rendering.render(BAND, font, 22050)
    together = rendering._fluidsynth(BAND, font, 22050)
    length = min(together.shape[1], stems["bass"].shape[1])
    total = np.sum(list(stems.values()), axis=0)
    assert np.abs(together).max() > 0.01
    np.testing.assert_allclose(total[:, :length], together[:, :length], atol=1e-6)
    assert all(np.abs(stem).max() > 1e-3 for stem in stems.values())
    np.testing.assert_array_equal(rendering.render(BAND, font, 22050)["bass"], stems["bass"])
