"""Pitch shift by Signalsmith Stretch: another pitch in the same time."""

import numpy as np

CONTEXT_SECONDS = 0.25
"""Real signal that a crop should bring along on both sides, so that its edges sound like the
middle: Signalsmith's longest analysis window at 48 kHz is 120 ms."""


def pitch_shift(audio: np.ndarray, semitones: float, sample_rate: int) -> np.ndarray:
    """(C, T) float32 -> (C, T) float32, `semitones` higher (12: an octave), aligned with the input.

    The same input gives the same bits. 0 semitones returns `audio` itself. The result may peak
    above the input's peak. Holds the interpreter lock: run it in processes, not threads.
    """
    if semitones == 0 or audio.shape[-1] == 0:
        return audio
    # Imported and built here: a Stretch object cannot be pickled.
    from python_stretch import Signalsmith

    stretch = Signalsmith.Stretch(0)  # seeded: it draws random phases for large factors
    stretch.preset(audio.shape[0], sample_rate)
    stretch.setTransposeSemitones(semitones)
    # Without more input after it the last block fades out: 2048 samples at 48 kHz lose up to 9 dB.
    context = np.zeros((audio.shape[0], stretch.blockSamples()), np.float32)
    padded = np.concatenate([audio, context], axis=1, dtype=np.float32)  # (C, T + context)
    shifted = np.asarray(stretch.process(padded))
    return np.ascontiguousarray(shifted[:, : audio.shape[1]])
