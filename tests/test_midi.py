import contextlib
import io

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bgray import midi

SIGNATURE = mido.MetaMessage("time_signature", numerator=4, denominator=4)


def on(pitch, time=0, channel=0, velocity=64):
    return mido.Message("note_on", note=pitch, time=time, channel=channel, velocity=velocity)


def off(pitch, time=0, channel=0):
    return mido.Message("note_off", note=pitch, time=time, channel=channel)


def program(number, channel=0, time=0):
    return mido.Message("program_change", program=number, channel=channel, time=time)


def encode(*tracks, ticks_per_beat=480, kind=1):
    stream = io.BytesIO()
    tracks = [mido.MidiTrack(track) for track in tracks]
    mido.MidiFile(type=kind, ticks_per_beat=ticks_per_beat, tracks=tracks).save(file=stream)
    return stream.getvalue()


def spans(roll):
    """{MIDI pitch: [(first step, step after the last)]}."""
    found = {}
    for row in np.flatnonzero(roll.any(axis=1)):
        edges = np.flatnonzero(np.diff(roll[row].astype(int), prepend=0, append=0))
        found[int(row) + 21] = [tuple(int(e) for e in pair) for pair in edges.reshape(-1, 2)]
    return found


# --- reading --------------------------------------------------------------------------------------


def test_a_quarter_note_has_24_steps_and_the_rest_before_the_first_note_is_trimmed():
    track = [SIGNATURE, on(60, 960), off(60, 480), on(64, 240), off(64, 120)]
    roll = midi.read_roll(encode(track))
    assert roll.dtype == np.uint8
    assert roll.shape == (88, 24 + 12 + 6)
    assert spans(roll) == {60: [(0, 24)], 64: [(36, 42)]}


def test_a_beat_that_24_does_not_divide_is_cut_into_whole_ticks():
    track = [SIGNATURE, on(60), off(60, 1024)]
    assert spans(midi.read_roll(encode(track, ticks_per_beat=1024))) == {60: [(0, 1024 // 42)]}


def test_a_note_shorter_than_a_step_is_one_step():
    track = [SIGNATURE, on(60), off(60, 1), on(62, 99), off(62, 0)]
    assert spans(midi.read_roll(encode(track))) == {60: [(0, 1)], 62: [(5, 6)]}


def test_a_note_on_without_velocity_ends_the_note_and_a_held_one_ends_with_its_track():
    track = [SIGNATURE, on(60), on(60, 20, velocity=0), on(72, 20), on(64), off(64, 40)]
    assert spans(midi.read_roll(encode(track))) == {60: [(0, 1)], 64: [(2, 4)], 72: [(2, 4)]}


def test_drums_and_pitches_off_the_keyboard_are_left_out():
    track = [SIGNATURE, on(38, channel=9), off(38, 480, channel=9)]
    track += [on(20), on(21), on(108), on(109)]
    track += [off(20, 20), off(21), off(108), off(109)]
    assert spans(midi.read_roll(encode(track))) == {21: [(0, 1)], 108: [(0, 1)]}


def test_tracks_of_a_tenth_of_the_longest_or_less_are_left_out_and_others_merged():
    melody = [SIGNATURE, on(60), *[off(60, 10), on(60)] * 9, off(60, 110)]
    bass = [on(40), off(40, 200)]  # and the end of the track: 3 messages of 22
    ornament = [on(90, 200)]  # 2 messages of 22: held to the end, were it not left out
    roll = midi.read_roll(encode(melody, bass, ornament))
    assert spans(roll) == {60: [(0, 10)], 40: [(0, 10)]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no MIDI file: it ends too early"),
        (b"RIFF and no MIDI at all", "no MIDI file: MThd not found"),
        (encode([SIGNATURE, on(60), off(60, 9)])[:-7], "no MIDI file: "),
        (encode([on(60), off(60, 480)]), "0 time signatures; exactly one is needed"),
        (
            encode([SIGNATURE, on(60), off(60, 480)], [SIGNATURE]),
            "2 time signatures; exactly one is needed",
        ),
        (encode([SIGNATURE, on(60), off(60, 9)], ticks_per_beat=20), "20 ticks a beat; 24 or more"),
        (encode([SIGNATURE, on(60), off(60, 9)], kind=2), "MIDI of type 2"),
        (encode([SIGNATURE, on(60), off(60, 9)], ticks_per_beat=-7640), "film frames"),
        (encode([SIGNATURE, on(60, channel=9), off(60, 9, channel=9)]), "no notes from A0 to C8"),
        (encode([SIGNATURE, on(60), off(60, 2**27)]), "lasts 279620 beats; more than 20000"),
    ],
)
def test_a_file_without_a_roll_is_refused_with_the_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        midi.read_roll(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bytes_that_were_changed_make_a_roll_or_a_value_error(data):
    file = bytearray(encode([SIGNATURE, program(33), on(60), off(60, 480), on(64), off(64, 300)]))
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    file = file[: data.draw(st.integers(len(file) // 2, len(file)))]
    with contextlib.suppress(ValueError):
        roll = midi.read_roll(bytes(file))
        assert roll.any(axis=0)[[0, -1]].all()


# --- writing --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(np.uint8, st.tuples(st.just(88), st.integers(1, 60)), elements=st.integers(0, 1))
)
def test_a_roll_written_and_read_is_the_same_but_for_silence_around_it(roll):
    data = midi.write_midi(roll)
    if roll.any():
        np.testing.assert_array_equal(midi.read_roll(data), midi.trim(roll))
    else:
        with pytest.raises(ValueError, match="no notes"):
            midi.read_roll(data)


def test_a_written_file_is_loud_in_four_four_and_as_long_as_its_roll():
    roll = np.zeros((88, 48), bool)
    roll[39, 12:24] = True
    file = mido.MidiFile(file=io.BytesIO(midi.write_midi(roll, tempo_bpm=90)))
    assert file.ticks_per_beat == 480
    assert [message.type for message in file.tracks[0]] == [
        "set_tempo",
        "time_signature",
        "note_on",
        "note_off",
        "end_of_track",
    ]
    start, end = file.tracks[0][2:4]
    assert (start.note, start.velocity, start.time, end.time) == (60, 127, 240, 240)
    assert file.length == pytest.approx(2 * 60 / 90, abs=1e-4)


@pytest.mark.parametrize("roll", [np.zeros((48, 88)), np.zeros(88), np.full((88, 4), 0.7)])
def test_what_is_no_roll_is_not_written(roll):
    with pytest.raises(ValueError, match=r"a roll is \(88, T\) of 0 and 1, got shape"):
        midi.write_midi(roll)


# --- instruments ----------------------------------------------------------------------------------

BAND = encode(
    [SIGNATURE, mido.MetaMessage("set_tempo", tempo=400_000), program(33, 1, 480)],
    [on(60), off(60, 480), program(48), on(60), off(60, 480)],
    [on(36, 480, 9), off(36, 10, 9), on(36, 0, 9), on(40, 10, 1), off(40, 400, 1)],
)


def notes_of(data):
    return [
        (note.pitch, note.start, note.end)
        for note in midi._notes(mido.merge_tracks(midi.parse(data).tracks))
    ]


def test_a_program_that_changes_on_the_way_makes_two_instruments():
    assert midi.programs(midi.parse(BAND)) == (-1, 0, 33, 48)


def test_the_parts_of_a_file_are_its_notes_each_once_at_their_time():
    file = midi.parse(BAND)
    parts = {p: notes_of(midi.solo(file, p)) for p in midi.programs(file)}
    assert parts[0] == [(60, 0, 480)]
    assert parts[48] == [(60, 480, 960)]  # the same key at the moment when the first lets it go
    assert parts[33] == [(40, 500, 900)]
    assert sorted(note for part in parts.values() for note in part) == sorted(notes_of(BAND))
    for program_number in parts:
        alone = midi.parse(midi.solo(file, program_number))
        assert alone.length == pytest.approx(file.length)
