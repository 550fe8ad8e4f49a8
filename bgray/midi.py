"""MIDI files <-> piano rolls, and one instrument's part out of a whole file.

A roll is (P, T) uint8 of 0 and 1: row p is MIDI pitch 21 + p, 24 steps a beat, so that it travels
as audio with 88 channels does. P 88 pitches, T steps.
"""

import io
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import mido
import numpy as np

from bgray.instruments import DRUMS

STEPS_PER_BEAT = 24
"""Holds sixteenths and triplets."""
LOWEST_PITCH, NUM_PITCHES = 21, 88  # the keys of a piano, to 108
DRUM_CHANNEL = 9  # counted from 0: people call it channel 10
SMALLEST_TRACK_SHARE = 0.1  # of the longest track's messages; what is below is ornament
LONGEST_BEATS = 20_000  # hours of music; a corrupt delta time asks for gigabytes
CONTROLS = ("program_change", "control_change", "pitchwheel", "aftertouch", "polytouch")
TICKS_PER_STEP = 20  # of files written here: 480 ticks a beat


@dataclass(frozen=True)
class Note:
    program: int
    """What its channel plays when it begins; -1 on the drum channel."""
    pitch: int
    start: int
    """Ticks from the beginning of the file."""
    end: int
    messages: tuple[int, ...]
    """Places in its track of what begins it and, unless nothing does, what ends it."""


def parse(data: bytes) -> mido.MidiFile:
    """ValueError, with the reason, where `data` is no MIDI file that can be played."""
    try:
        file = mido.MidiFile(file=io.BytesIO(data))
    # mido raises whatever its parser trips over: EOFError, OSError, IndexError, its own, ...
    except Exception as error:
        raise ValueError(f"no MIDI file: {str(error) or 'it ends too early'}") from error
    if file.type == 2:
        raise ValueError("MIDI of type 2: its tracks are separate songs")
    if file.ticks_per_beat <= 0:
        raise ValueError("counts time in film frames (SMPTE), not in beats")
    beats = max((_ticks(track) for track in file.tracks), default=0) / file.ticks_per_beat
    if beats > LONGEST_BEATS:
        raise ValueError(f"lasts {beats:.0f} beats; more than {LONGEST_BEATS} cannot be music")
    return file


def read_roll(data: bytes) -> np.ndarray:
    """A MIDI file -> (88, T) uint8, silence before and after it trimmed.

    Tracks with more than a tenth of the longest one's messages are merged by maximum; a note lasts
    at least one step. Channel 10 is left out: its numbers are drums, which have no pitch.
    ValueError with a reason for people where this makes no roll; there must be exactly one time
    signature, because where it changes the pieces that a roll is cut into lose their bar lines.
    """
    file = parse(data)
    signatures = sum(message.type == "time_signature" for t in file.tracks for message in t)
    if signatures != 1:
        raise ValueError(f"{signatures} time signatures; exactly one is needed")
    ticks_per_step = file.ticks_per_beat // STEPS_PER_BEAT
    if not ticks_per_step:
        raise ValueError(f"{file.ticks_per_beat} ticks a beat; {STEPS_PER_BEAT} or more are needed")
    most = max(len(track) for track in file.tracks)
    kept = [track for track in file.tracks if len(track) > SMALLEST_TRACK_SHARE * most]
    notes = [note for track in kept for note in _notes(track) if note.program != DRUMS]
    spans = [
        (note.pitch - LOWEST_PITCH, note.start // ticks_per_step, note.end // ticks_per_step)
        for note in notes
        if 0 <= note.pitch - LOWEST_PITCH < NUM_PITCHES
    ]
    if not spans:
        raise ValueError("no notes from A0 to C8 (drums on channel 10 do not count)")
    roll = np.zeros((NUM_PITCHES, 1 + max(max(start, end) for _, start, end in spans)), np.uint8)
    for row, start, end in spans:
        roll[row, start : max(end, start + 1)] = 1
    return trim(roll)


def trim(roll: np.ndarray) -> np.ndarray:
    """(88, T) without the silence before the first and after the last note."""
    sounding = np.flatnonzero(roll.any(axis=0))
    return roll[:, sounding[0] : sounding[-1] + 1] if len(sounding) else roll[:, :0]


def write_midi(roll: np.ndarray, tempo_bpm: float = 120) -> bytes:
    """(88, T) of 0 and 1 -> a MIDI file of one piano, all notes as loud as they can be.

    Steps that follow each other at one pitch are one held note; the file lasts T steps.
    """
    roll = np.asarray(roll)
    if roll.ndim != 2 or len(roll) != NUM_PITCHES or not np.isin(roll, (0, 1)).all():
        raise ValueError(f"a roll is (88, T) of 0 and 1, got shape {roll.shape}")
    edges = np.diff(roll.astype(np.int8), axis=1, prepend=0, append=0)  # (88, T + 1)
    steps, rows = np.nonzero(edges.T)
    # At one step what ends comes first, or a player would cut the note that begins.
    order = np.lexsort((rows, edges[rows, steps], steps))
    track = mido.MidiTrack()
    track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(tempo_bpm)))
    track.append(mido.MetaMessage("time_signature", numerator=4, denominator=4))
    now = 0
    for step, row in zip(steps[order], rows[order], strict=True):
        kind = "note_on" if edges[row, step] > 0 else "note_off"
        ticks, now = int(step - now) * TICKS_PER_STEP, step
        pitch = int(row) + LOWEST_PITCH
        track.append(mido.Message(kind, note=pitch, velocity=127, time=ticks))
    rest = int(roll.shape[1] - now) * TICKS_PER_STEP
    track.append(mido.MetaMessage("end_of_track", time=rest))
    return _to_bytes(track, TICKS_PER_STEP * STEPS_PER_BEAT)


def programs(file: mido.MidiFile) -> tuple[int, ...]:
    """The instruments that play: General MIDI programs, ascending; -1 for drums."""
    return tuple(sorted({note.program for note in _notes(mido.merge_tracks(file.tracks))}))


def solo(file: mido.MidiFile, program: int) -> bytes:
    """A file of the same length and tempo in which only the notes of one program are left.

    System exclusive messages go: some make drums of another channel.
    """
    merged = mido.merge_tracks(file.tracks)
    notes = {i for note in _notes(merged) if note.program == program for i in note.messages}
    track, now, written = mido.MidiTrack(), 0, 0
    for i, message in enumerate(merged):
        now += message.time
        if i in notes or message.type in ("set_tempo", "end_of_track", *CONTROLS):
            track.append(message.copy(time=now - written))
            written = now
    return _to_bytes(track, file.ticks_per_beat)


def _notes(track: mido.MidiTrack) -> Iterator[Note]:
    """In the order of their ends; what is never let go ends with the track."""
    now, program = 0, [0] * 16
    held: dict[tuple[int, int], deque[tuple[int, int, int]]] = defaultdict(deque)
    program[DRUM_CHANNEL] = DRUMS
    for i, message in enumerate(track):
        now += message.time
        if message.type == "program_change" and message.channel != DRUM_CHANNEL:
            program[message.channel] = message.program
        elif message.type == "note_on" and message.velocity:
            held[message.channel, message.note].append((program[message.channel], now, i))
        elif message.type in ("note_on", "note_off") and held[message.channel, message.note]:
            played, start, first = held[message.channel, message.note].popleft()
            yield Note(played, message.note, start, now, (first, i))
    for (_, pitch), begun in held.items():
        for played, start, first in begun:
            yield Note(played, pitch, start, now, (first,))


def _ticks(track: mido.MidiTrack) -> int:
    return sum(message.time for message in track)


def _to_bytes(track: mido.MidiTrack, ticks_per_beat: int) -> bytes:
    stream = io.BytesIO()
    mido.MidiFile(type=0, ticks_per_beat=ticks_per_beat, tracks=[track]).save(file=stream)
    return stream.getvalue()
