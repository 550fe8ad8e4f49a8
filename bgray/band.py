"""Built-in music: scores played by simple instruments -> stems, mixture, piano roll, by seed.

A song is composed (notes in seconds, no audio), then played at any sample rate from 16 kHz. Both
draw from `np.random.default_rng([seed, index])` alone: song 7 is the same in whatever order.
T samples, N steps of the roll, P 88 pitches, K partials."""

import math
from collections import defaultdict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import fft, signal

# General MIDI program numbers counted from 0; -1, which MIDI lacks, is its drum channel.
PROGRAMS = {-1: "drums", 0: "piano", 33: "bass", 48: "strings"}
STEPS_PER_BEAT = 24  # holds sixteenths and triplets
LOWEST_SAMPLE_RATE = 16_000  # Hz; below it there is no room for hi-hats
# Raised whenever a song would sound different: it stands for the music in an experiment's id.
VERSION = 1


@dataclass(frozen=True)
class Note:
    program: int
    pitch: int  # MIDI, 69 = 440 Hz; for drums the percussion key (36 kick, 38 snare, ...)
    start_seconds: float
    duration_seconds: float  # until the key is let go; it rings on a little. Drums ignore it
    velocity: int  # 1 to 127


@dataclass(frozen=True)
class Score:
    seconds: float
    tempo_bpm: float
    programs: tuple[int, ...]  # ascending; the silent ones too
    notes: tuple[Note, ...]  # by start; every one starts and ends within `seconds`
    timbre: int  # seed of how the instruments, the room and the faders are set


@dataclass(frozen=True, eq=False)  # no ==: arrays have no single truth value
class Song:
    sample_rate: int
    tempo_bpm: float
    stems: dict[int, np.ndarray]  # program, ascending -> (1, T) float32; a silent one is all zeros
    mixture: np.ndarray  # (1, T) float32, bit for bit sum(stems.values()), peak at most 0.9
    roll: np.ndarray  # (N, P) uint8, see piano_roll
    notes: tuple[Note, ...]
    silent: tuple[int, ...]  # programs that were asked for and do not play


def song(
    seed: int,
    index: int,
    *,
    seconds: float = 20.0,
    sample_rate: int = 48_000,
    programs: tuple[int, ...] = (-1, 0, 33, 48),
) -> Song:
    """Song number `index` of the endless album `seed`; the same arguments give the same bits."""
    return play(compose(np.random.default_rng([seed, index]), seconds, programs), sample_rate)


def piano_roll(notes: tuple[Note, ...], tempo_bpm: float, seconds: float) -> np.ndarray:
    """Pitches held at each step: (N, P) uint8 of 0 and 1, 24 steps a beat, drums left out.

    Column p is MIDI pitch 21 + p. A note takes its nearest steps, at least one.
    """
    steps = STEPS_PER_BEAT * tempo_bpm / 60  # per second
    roll = np.zeros((math.ceil(seconds * steps), 88), np.uint8)  # (N, P)
    for note in notes:
        if note.program != -1 and 21 <= note.pitch <= 108:
            start = min(round(note.start_seconds * steps), len(roll) - 1)
            end = round((note.start_seconds + note.duration_seconds) * steps)
            roll[start : max(end, start + 1), note.pitch - 21] = 1
    return roll


# A pattern is one bar in sixteenths; "." lets the last stroke sound.
MODES = {  # semitones above the tonic; progressions, one scale degree a bar
    "major": ((0, 2, 4, 5, 7, 9, 11), ((0, 4, 5, 3), (0, 5, 3, 4), (3, 4, 0, 5), (0, 2, 3, 4))),
    "minor": ((0, 2, 3, 5, 7, 8, 10), ((0, 5, 2, 6), (0, 3, 6, 2), (0, 6, 5, 6), (5, 6, 0, 0))),
    "dorian": ((0, 2, 3, 5, 7, 9, 10), ((0, 3, 0, 3), (0, 6, 3, 0), (0, 2, 3, 6))),
    "mixolydian": ((0, 2, 4, 5, 7, 9, 10), ((0, 6, 3, 0), (0, 4, 6, 3), (0, 3, 6, 4))),
}
COMPING = """x.......x....... x.....x...x..... x.x...x...x...x. x...x...x...x... 1.2.3.2.1.2.3.2.
    1.3.2.3.4.3.2.3. 1234321234321234 1..2..3.4..3..2.""".split()  # x chord, 1 to 4 its tones
TUNES = """c...e.d.c.....b. c..e..g.f....... c.d.e...g.e.d... c.....bab...c... g...f.e.d.c.....
    c.c.d.e.c...a... e.......d...c... c...b...a.....b.""".split()  # scale steps; c from the chord
BASS_LINES = """r.......r....... r...r...r...r... r.r.r.r.r.r.r.r. r.....r.5...8... r..r..r...r.5.a.
    r...3...5...a... r.8.r.8.r.8.5.a.""".split()  # root, third, fifth, octave, approach to the next
PADS = "x............... x............... x.......x....... x.x.x.x.x.x.x.x.".split()
GROOVES = (  # kick, snare, hi-hat; o soft, O open hat
    ("x.......x.......", "....x.......x...", "x.x.x.x.x.x.x.x."),
    ("x......xx.......", "....x..o....x..o", "xoxoxoxoxoxoxoxo"),
    ("x...x...x...x...", "....x.......x...", "o.O.o.O.o.O.o.O."),
    ("x..x..x...x.....", "....x..o.o..x...", "x.o.x.o.x.o.x.O."),
)
FILLS = "ss.sss.shhshhlll s.hhs.lls.hhhhll s..sh..hh.s.l.l.".split()  # snare, high and low tom
# Start, length in beats; pitch classes from the root up; all MIDI pitches of the key; sections of
# one label share their patterns; first, last of the section; the ending is one long chord.
Bar = namedtuple("Bar", "start beats chord scale section label first last ending")


def compose(rng: np.random.Generator, seconds: float, programs: tuple[int, ...]) -> Score:
    """Key, form, chords, parts. A program rests all song with a chance of 1/4, never all of them.

    Some also sit out a section, and on some beats all stop: models must meet silence.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds={seconds!r}: allowed are finite numbers above 0")
    if not programs or len(set(programs)) < len(programs) or not set(programs) <= set(PROGRAMS):
        raise ValueError(f"programs={programs!r}: allowed are some, each once, of {PROGRAMS}")
    programs = tuple(sorted(programs))
    tempo = round(rng.uniform(70, 150), 1)
    swing = rng.choice((0, 0, 0, 0.1, 1 / 6))  # beats that off-beat eighths come late
    bars = draw_bars(rng, seconds * tempo / 60)
    playing = [p for p in programs if rng.random() >= 1 / 4] or [int(rng.choice(programs))]
    stops = [bar.start + bar.beats - 1 for bar in bars if bar.last and rng.random() < 0.3]
    swell = rng.uniform(80, 120, len(bars))  # velocity, by section
    notes = []
    for program in playing:
        rests = [False, *(rng.random(len(bars)) < 0.2)]  # by section; all play in the first
        for bar, start, length, pitch, loudness in PARTS[program](rng, bars):
            if rests[bar.section] or math.floor(start) in stops:
                continue
            length = min([length, *(stop - start for stop in stops if stop > start)])
            late = np.interp(start % 1, (0, 0.5, 1), (0, swing, 0)) * 60 / tempo
            begin = max(0.0, float(start * 60 / tempo + late + rng.normal(0, 0.005)))
            duration = float(min(length * 60 / tempo, seconds - begin))
            velocity = min(
                max(round(float(loudness * swell[bar.section] + rng.normal(0, 4))), 1), 127
            )
            if duration > 0.02 or begin == 0:
                notes.append(Note(program, int(pitch), begin, duration, velocity))
    notes.sort(key=lambda note: (note.start_seconds, note.program, note.pitch))
    return Score(seconds, tempo, programs, tuple(notes), int(rng.integers(2**32)))


def draw_bars(rng: np.random.Generator, beats: float) -> list[Bar]:
    meter = 3 if rng.random() < 0.15 else 4
    intervals, progressions = MODES[rng.choice(list(MODES))]
    key = (rng.integers(12) + np.array(intervals)) % 12  # pitch classes
    scale = np.array([pitch for pitch in range(21, 109) if pitch % 12 in key])
    chords = draw_by_label(rng, progressions)
    thirds = np.array((0, 2, 4, 6) if rng.random() < 0.4 else (0, 2, 4))
    form, per_section = rng.choice(("AABA", "ABAB", "ABAC")), rng.choice((2, 4, 4))
    num_bars = math.ceil(beats / meter)
    end = int(beats - 3) // meter if beats > 20 else num_bars  # a last chord of three beats or more
    bars = []
    for i in range(min(num_bars, end + 1)):
        section, place = divmod(i, per_section)
        root = chords[form[section % 4]][place % 4] if i < end else 0
        chord, length = key[(root + thirds) % 7], meter if i < end else beats - i * meter
        flags = (place == 0, place == per_section - 1 and i < end, i == end)
        bars.append(Bar(i * meter, length, chord, scale, section, form[section % 4], *flags))
    return bars


def draw_by_label(rng: np.random.Generator, options: Any) -> dict:
    return {label: options[rng.integers(len(options))] for label in "ABC"}


def above(lowest: int | np.integer, chord: np.ndarray) -> list[int]:
    return [int(lowest + (tone - lowest) % 12) for tone in chord]  # in one octave: smooth voices


Events = Iterator[tuple[Bar, float, float, int, float]]  # start, length (beats), pitch, loudness


def strike(bar: Bar, pattern: str, pitches: dict, loudness: float, legato: float = 0.95) -> Events:
    """The pattern's strokes, each `legato` of the way to the next; `pitches` of each letter."""
    pattern = pattern[: 1 if bar.ending else 4 * bar.beats]
    steps = [i for i, letter in enumerate(pattern) if letter != "."]
    for i, after in zip(steps, [*steps[1:], 4 * bar.beats], strict=False):
        accent = 0.45 if pattern[i] == "o" else 0.8 if i % 4 else 1
        for pitch in pitches.get(pattern[i], ()):
            yield bar, bar.start + i / 4, (after - i) / 4 * legato, pitch, loudness * accent


def drum_part(rng: np.random.Generator, bars: list[Bar]) -> Events:
    grooves, fills = draw_by_label(rng, GROOVES), draw_by_label(rng, FILLS)
    keys = (36, 38, rng.choice((42, 42, 51)))
    for bar in bars:
        fill = int(4 * (bar.beats - rng.integers(1, 3) * bar.last))
        if bar.ending or bar.first and rng.random() < 0.7:
            yield bar, bar.start, 1, 49, 0.9
        for key, pattern in zip(keys, grooves[bar.label], strict=True):
            yield from strike(bar, pattern[:fill], {"x": [key], "o": [key], "O": [46]}, 0.95)
        rest = "." * fill + fills[bar.label][fill:]
        yield from strike(bar, rest, {"s": [38], "h": [50], "l": [45]}, 0.85)


def piano_part(rng: np.random.Generator, bars: list[Bar]) -> Events:
    comping, legato = draw_by_label(rng, COMPING), rng.uniform(0.5, 0.98)
    tunes = [draw_by_label(rng, TUNES) for _ in range(2)]  # one bar asks, the next answers
    sings = draw_by_label(rng, (True, True, True, False))
    low, high = rng.integers(50, 59), rng.integers(70, 80)
    for i, bar in enumerate(bars):
        chord = sorted(above(low, bar.chord))
        tones = {str(j + 1): chord if bar.ending else [chord[j % len(chord)]] for j in range(4)}
        yield from strike(bar, comping[bar.label], {"x": chord, **tones}, 0.7, legato)
        yield from strike(bar, "x", {"x": above(low - 14, bar.chord)[:1]}, 0.7, legato)
        if sings[bar.label]:  # each bar from a tone of its chord
            home = np.searchsorted(bar.scale, min(above(high, bar.chord)))
            pitches = {letter: [bar.scale[home + j]] for j, letter in enumerate("abcdefg", -2)}
            yield from strike(bar, tunes[i % 2][bar.label], pitches, 1)


def bass_part(rng: np.random.Generator, bars: list[Bar]) -> Events:
    lines, legato = draw_by_label(rng, BASS_LINES), rng.uniform(0.6, 0.97)
    low = rng.integers(28, 34)
    for bar, after in zip(bars, bars[1:] + bars[:1], strict=True):
        root, third, fifth = above(low, bar.chord[:3])
        step = above(low, after.chord)[0] + rng.choice((-1, 2))
        pitches = {"r": [root], "3": [third], "5": [fifth], "8": [root + 12], "a": [step]}
        yield from strike(bar, lines[bar.label], pitches, 0.9, legato)


def string_part(rng: np.random.Generator, bars: list[Bar]) -> Events:
    pads, lowest, high = draw_by_label(rng, PADS), rng.integers(55, 63), rng.random() < 0.5
    for bar in bars:
        tones = [above(lowest - 12, bar.chord)[0], *sorted(above(lowest, bar.chord[:3]))]
        tones += [tones[-1] + 12] * high
        yield from strike(bar, pads[bar.label], {"x": tones}, 0.75)


PARTS = {-1: drum_part, 0: piano_part, 33: bass_part, 48: string_part}
# Level (average stems within some dB of each other), share of the room, seconds of release.
MIX = {-1: (1, 0.3, 0), 0: (0.11, 0.7, 0.12), 33: (0.2, 0.05, 0.06), 48: (0.08, 1, 0.25)}


def play(score: Score, sample_rate: int) -> Song:
    """The score as audio at `sample_rate` Hz, T = round(seconds * sample_rate)."""
    if sample_rate != int(sample_rate) or sample_rate < LOWEST_SAMPLE_RATE:
        raise ValueError(
            f"sample_rate={sample_rate!r}: allowed are whole Hz from {LOWEST_SAMPLE_RATE}"
        )
    num_samples = max(1, round(score.seconds * sample_rate))
    rng = np.random.default_rng([score.timbre, 0])
    peak, wet, faders = rng.uniform(0.5, 0.89), rng.uniform(0.02, 0.12), rng.uniform(-3, 3, 50)
    delays = np.geomspace(0.011, 0.23, 14) * rng.uniform(0.93, 1.07, 14)  # seconds
    taps = wet * rng.choice((-1, 1), 14) * np.exp(-delays / 0.12)
    delays = (delays * sample_rate).astype(int)
    fade = np.minimum(1, np.arange(num_samples)[::-1] / (0.08 * sample_rate)).astype(np.float32)
    stems = {}
    for program in score.programs:
        dry = perform(score, program, num_samples, sample_rate)
        stem = stems[program] = dry.copy()
        for delay, tap in zip(delays, MIX[program][1] * taps, strict=True):
            stem[:, delay:] += np.float32(tap) * dry[:, : max(0, num_samples - delay)]
        stem *= np.float32(10 ** (faders[program] / 20)) * fade
    gain = np.float32(peak / max(1e-9, np.abs(sum(stems.values())).max()))
    stems = {program: gain * stem for program, stem in stems.items()}
    roll = piano_roll(score.notes, score.tempo_bpm, score.seconds)
    silent = tuple(program for program, stem in stems.items() if not stem.any())
    mix = np.asarray(sum(stems.values()))
    return Song(sample_rate, score.tempo_bpm, stems, mix, roll, score.notes, silent)


def perform(score: Score, program: int, num_samples: int, sample_rate: int) -> np.ndarray:
    """One program's notes -> (1, T) float32. A pitch and hardness has one sound, cut to length."""
    level, _, release_seconds = MIX[program]
    num_release = round(release_seconds * sample_rate)
    release = (np.cos(np.linspace(0, np.pi, num_release)) / 2 + 0.5).astype(np.float32)
    no_dc: Any = signal.butter(1, 15, "highpass", fs=sample_rate)
    groups = defaultdict(list)
    for note in score.notes:
        if note.program == program:
            groups[note.pitch, math.ceil(note.velocity / 32) / 4].append(note)
    stem = np.zeros((1, num_samples), np.float32)
    for (pitch, hardness), group in groups.items():
        hertz = 440 * 2 ** ((pitch - 69) / 12) if program >= 0 else pitch  # a drum has a number
        timbre = np.random.default_rng([score.timbre, 2 + program])
        holds = [math.ceil(note.duration_seconds * sample_rate) for note in group]
        sound = INSTRUMENTS[program](timbre, hertz, hardness, max(holds) + num_release, sample_rate)
        sound = np.asarray(signal.lfilter(no_dc[0], no_dc[1], sound))
        rms = sound[: sample_rate // 4].std() if program >= 0 else 1
        sound = (level / max(rms, 1e-9) * sound).astype(np.float32)
        for note, hold in zip(group, holds, strict=True):
            hold = len(sound) if program == -1 else hold
            held = np.float32((note.velocity / 100) ** 1.5) * sound[: hold + num_release]
            held[hold:] *= release
            start = round(note.start_seconds * sample_rate)
            stem[0, start : start + len(held)] += held[: max(0, num_samples - start)]
    return stem


def hiss(rng: np.random.Generator, high_pass_hz: float, num: int, sample_rate: int) -> np.ndarray:
    cut: Any = signal.butter(2, min(high_pass_hz, 0.35 * sample_rate), "highpass", fs=sample_rate)
    noise = signal.lfilter(cut[0], cut[1], rng.standard_normal(num, np.float32))
    return np.asarray(noise, np.float32)


def ring(f, decay, amplitude, num: int, sample_rate: int) -> np.ndarray:
    """Sum over k of amplitude_k exp(-decay_k t) sin(2 pi f_k t): (K,) each -> (num,) float32.

    Sample 512 i + j of an oscillation z is z**(512 i) z**j, so the sum is a fast matrix product.
    """
    log_z = (2j * np.pi * f - decay) / sample_rate  # (K,)
    coarse = amplitude * np.exp(np.outer(np.arange(0, num, 512), log_z))  # (T / 512, K)
    fine = np.exp(np.outer(log_z, np.arange(512)))  # (K, 512)
    left = np.hstack([coarse.real, coarse.imag]).astype(np.float32)
    return (left @ np.vstack([fine.imag, fine.real]).astype(np.float32)).ravel()[:num]


def piano(rng, hertz: float, hardness: float, num: int, sample_rate: int) -> np.ndarray:
    """Stiff strings, f_k = k f sqrt(1 + B k^2) (Fletcher 1964), and the knock of the hammer."""
    brightness, strike, beating = rng.uniform((0.7, 0.1, 0.2), (1.4, 0.15, 0.8))
    k = np.arange(1, 33)  # (K,)
    f = k * hertz * np.sqrt(1 + 1e-4 * (hertz / 130) ** 0.8 * k**2)
    amplitude = np.exp(-f / (brightness * (500 + 2000 * hardness))) + 0.08 / k
    amplitude *= np.abs(np.sin(np.pi * k * strike)) / np.sqrt(k)  # 0 with a node at the hammer
    amplitude[f > 0.48 * sample_rate] = 0
    decay = 0.3 + hertz / 400 + f / 1500  # 1/s
    # The lowest partials come from two strings, some cents apart: the beating and the long tail.
    f, decay = np.append(f, f[:6] * 2 ** (beating / 1200)), np.append(decay, 0.4 * decay[:6])
    amplitude = np.append(amplitude, 0.5 * amplitude[:6])
    heard = amplitude > 1e-3 * amplitude.max()
    tone = ring(f[heard], decay[heard], amplitude[heard], num, sample_rate)
    knock = hiss(rng, 300, min(num, sample_rate // 20), sample_rate)
    knock *= np.exp(-np.arange(len(knock)) / (0.006 * sample_rate))
    tone[: len(knock)] += 0.3 * hardness * np.linalg.norm(amplitude) * knock
    return tone


def bass(rng, hertz: float, hardness: float, num: int, sample_rate: int) -> np.ndarray:
    """Karplus-Strong string tuned by an allpass in its loop (Jaffe & Smith 1983).

    The loop is solved as a transfer function on a circle |z| > 1, where it dies by 1e-6 within the
    FFT, so nothing wraps around; lfilter would multiply by every zero of the delay line.
    """
    t60_seconds, position, cutoff_hz = rng.uniform((2.5, 0.08, 5e3), (5, 0.3, 1.2e4))
    size = int(fft.next_fast_len(num, real=True) or num)
    weight = np.exp(-math.log(1e6) / size * np.arange(size))  # |z|**-n
    z1 = weight[1] * np.exp(-2j * np.pi / size * np.arange(size // 2 + 1))  # one sample of delay
    period, omega = sample_rate / hertz, 2 * np.pi * hertz / sample_rate

    def low_pass(cutoff_hz: float, z1: np.ndarray) -> np.ndarray:
        pole = math.exp(-2 * np.pi * cutoff_hz / sample_rate)
        return (1 - pole) / (1 - pole * z1)

    delay = period + np.angle(low_pass(cutoff_hz, np.exp(-1j * omega))) / omega
    whole, rest = math.floor(delay - 0.3), (delay - 0.3) % 1 + 0.3  # rest is for the allpass
    c = np.sin((1 - rest) * omega / 2) / np.sin((1 + rest) * omega / 2)
    loop = low_pass(cutoff_hz, z1) * (c + z1) / (1 + c * z1) * z1**whole
    pluck = 1 - z1 ** round(position * period)  # 0 with a node at the finger
    pluck = pluck * low_pass(hertz, z1) * low_pass(500 + 2500 * hardness, z1)
    string = pluck / (1 - 10 ** (-3 / (hertz * t60_seconds)) * loop)
    return fft.irfft(string, size)[:num] / weight[:num]


def strings(rng, hertz: float, hardness: float, num: int, sample_rate: int) -> np.ndarray:
    """Three bows: band-limited saws a few cents apart, each with its own vibrato, slow to start."""
    rise, brightness, cents, depth = rng.uniform((0.05, 0.7, 2, 0.0035), (0.16, 1.4, 4.5, 0.008))
    rates, phases = rng.uniform(4.8, 6.2, 3), rng.uniform(0, 2 * np.pi, 3)
    k = np.arange(1, int(min(12_000, 0.48 * sample_rate) / hertz) + 1)  # (K,)
    spectrum = np.zeros(2**15 + 1, complex)
    spectrum[k] = -1j / k / (1 + (k * hertz / (brightness * (800 + 2400 * hardness))) ** 2)
    # One period, so fine that it needs no interpolation.
    table = np.asarray(fft.irfft(spectrum / np.linalg.norm(spectrum), norm="forward"), np.float32)
    t = np.arange(num) / sample_rate
    total = 0.04 * hiss(rng, 2500, num, sample_rate)
    for i, gain in enumerate((0.6, 1, 0.6)):
        sway = depth / (2 * np.pi * rates[i]) * np.exp(1j * phases[i])  # seconds
        sway = ring(rates[i : i + 1], np.zeros(1), np.array([sway]), num, sample_rate)
        place = (t + sway) * (2**16 * hertz * 2 ** ((i - 1) * cents / 1200))
        total += np.float32(gain) * table[place.astype(np.int64) & 0xFFFF]
    return total * (1 - np.exp(-2 * (t / rise) ** 1.5))


KIT = {  # tone Hz, sweep from (times Hz), decay s; noise share, high-pass Hz, decay s; peak
    36: (48, 4.0, 0.13, 0.10, 1500, 0.005, 1.00),  # kick
    38: (185, 1.4, 0.06, 0.70, 1200, 0.090, 0.75),  # snare
    42: (0, 1.0, 0.01, 1.00, 7000, 0.030, 0.28),  # closed hi-hat
    45: (85, 1.7, 0.20, 0.12, 800, 0.020, 0.75),  # low tom
    46: (0, 1.0, 0.01, 1.00, 6500, 0.180, 0.28),  # open hi-hat
    49: (0, 1.0, 0.01, 1.00, 3500, 0.550, 0.45),  # crash
    50: (165, 1.7, 0.15, 0.12, 800, 0.020, 0.70),  # high tom
    51: (3300, 1.0, 0.25, 0.70, 5500, 0.250, 0.22),  # ride
}


def drum_kit(rng, key: int, hardness: float, num: int, sample_rate: int) -> np.ndarray:
    """A swept sine and a burst of high-passed noise, as long as they ring whatever `num` says."""
    tone_hz, sweep, tone_decay, noise_share, cutoff_hz, noise_decay, peak = KIT[key]
    tuning, damping = 2 ** rng.uniform(-0.3, 0.3), rng.uniform(0.75, 1.3)
    t = np.arange(round(6 * damping * max(tone_decay, noise_decay) * sample_rate)) / sample_rate
    turns = tuning * tone_hz * (t + 0.035 * (sweep - 1) * (1 - np.exp(-t / 0.035)))
    tone = np.sin(2 * np.pi * turns) * np.exp(-t / (damping * tone_decay))
    noise = hiss(rng, cutoff_hz, len(t), sample_rate) * np.exp(-t / (damping * noise_decay))
    noise *= noise_share * (0.5 + 0.5 * hardness) / np.abs(noise).max()
    drum = (1 - noise_share) * tone + noise
    return peak * drum / np.abs(drum).max() * np.minimum(1, 4 * (1 - t / t[-1]))


# An instrument maps (rng, pitch in Hz, hardness, T, sample_rate) to (T,) float, hardness 1/4 to 1.
# All sounds of a song get an equal rng: what is drawn is the song's timbre, not the note's.
INSTRUMENTS = {-1: drum_kit, 0: piano, 33: bass, 48: strings}
