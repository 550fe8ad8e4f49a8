"""MIDI files as sound, one stem an instrument, played by fluidsynth with a soundfont.

The program `fluidsynth` is run, not linked. Each instrument (a General MIDI program, or the drums
of channel 10) is played alone, dry, from a copy of the file without the others' notes; so stems
have one length, and their sum is what the whole file sounds like.
"""

import glob
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from bgray import midi
from bgray.config import ConfigError
from bgray.instruments import column

PROGRAM = "fluidsynth"
INSTALL = "apt-get install fluidsynth fluid-soundfont-gm (macOS: brew install fluid-synth)"
USUAL_PLACES = ("/usr/share/sounds/sf2/*.sf2", "/usr/share/soundfonts/*.sf[23]")
TAIL_SECONDS = 2.0  # what rings on after the last note
GAIN = 0.5  # fluidsynth's own 0.2 leaves a band at -20 dB; floats do not clip
SAMPLE_RATES = (8000, 96_000)  # Hz, that fluidsynth can
LONGEST_SECONDS = 3600.0
PROGRAM_SECONDS = 600  # after which a rendering hangs


def check(soundfont: str, sample_rate: int) -> str:
    """The soundfont that will be used; ConfigError where MIDI cannot be played here."""
    problems, fonts = [], [soundfont]
    if not soundfont:
        fonts = sorted(path for place in USUAL_PLACES for path in glob.glob(place))
    if not shutil.which(PROGRAM):
        problems.append((PROGRAM, f"not installed, and it plays the MIDI files: {INSTALL}"))
    if not fonts:
        text = f"none in {' or '.join(USUAL_PLACES)}; give --soundfont FILE, or {INSTALL}"
        problems.append(("soundfont", text))
    elif not Path(fonts[0]).is_file():
        problems.append(("soundfont", f"no such file: {fonts[0]}"))
    low, high = SAMPLE_RATES
    if not low <= sample_rate <= high:
        problems.append(("sample_rate", f"{PROGRAM} plays {low} to {high} Hz, not {sample_rate}"))
    if problems:
        raise ConfigError("MIDI files with --stems", problems)
    return str(Path(fonts[0]).absolute())


def instruments(data: bytes) -> tuple[str, ...]:
    """The stems that a MIDI file makes, by column; ValueError where it has none."""
    programs = midi.programs(midi.parse(data))
    if not programs:
        raise ValueError("no notes")
    return tuple(column(program) for program in programs)


def render(data: bytes, soundfont: str, sample_rate: int) -> dict[str, np.ndarray]:
    """A MIDI file -> each of its instruments, (2, T) float32, all as long as the file and its tail.

    ValueError where it is no music or fluidsynth fails on it; ConfigError where that cannot start.
    """
    file = midi.parse(data)
    if file.length > LONGEST_SECONDS:
        raise ValueError(f"lasts {file.length / 60:.0f} minutes, more than an hour")
    length = round((file.length + TAIL_SECONDS) * sample_rate)
    return {
        column(program): _fit(_fluidsynth(midi.solo(file, program), soundfont, sample_rate), length)
        for program in midi.programs(file)
    }


def _fluidsynth(data: bytes, soundfont: str, sample_rate: int) -> np.ndarray:
    """(2, T) float32; what it says goes into the ValueError, since the next file may be fine."""
    with tempfile.TemporaryDirectory(prefix="bgray-") as folder:
        score, sound = Path(folder, "score.mid"), Path(folder, "sound.wav")
        score.write_bytes(data)
        # Reverb and chorus off: alone they would be one room for each instrument.
        options = ["-ni", "-q", "-R", "0", "-C", "0", "-g", f"{GAIN:g}", "-r", f"{sample_rate}"]
        options += ["-T", "wav", "-O", "float", "-F", str(sound)]
        try:
            done = subprocess.run(
                [PROGRAM, *options, soundfont, str(score)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROGRAM_SECONDS,
            )
            if done.returncode == 0 and sound.is_file():
                audio, _ = soundfile.read(sound, dtype="float32", always_2d=True)
                return audio.T
            said = (done.stderr or done.stdout).strip().splitlines()
            reason = f"exit code {done.returncode}: {said[-1] if said else 'it says nothing'}"
        except (subprocess.TimeoutExpired, soundfile.SoundFileError) as error:
            reason = str(error)
        except OSError as error:
            raise ConfigError(PROGRAM, [("", f"cannot be started: {error}")]) from error
    raise ValueError(f"{PROGRAM} could not play it with {soundfont} ({reason})")


def _fit(audio: np.ndarray, length: int) -> np.ndarray:
    audio = audio[:, :length]
    return np.pad(audio, ((0, 0), (0, length - audio.shape[1])))
