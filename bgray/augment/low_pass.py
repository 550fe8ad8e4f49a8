"""Low-pass filters: biquads as log 001 used them, and a steep one that delays nothing."""

import functools

import numpy as np

# scipy.signal takes most of a second to import: only where something is filtered.

Q = 0.707
"""Of every biquad; torchaudio's default, a Butterworth filter of second order."""
TRANSITION = 0.04
"""Of the steep filter, as a share of its cutoff: down by 80 dB from the cutoff on, flat below
0.96 times it."""


def low_pass(audio: np.ndarray, cutoff_hz: float, sample_rate: int, passes: int = 1) -> np.ndarray:
    """(C, T) float32 -> (C, T) float32 through equal biquads, each 3 dB down at the cutoff.

    The coefficients of torchaudio's `lowpass_biquad` (Bristow-Johnson's Audio EQ Cookbook), without
    its clamp between passes. It starts from silence and delays low frequencies, by 7 samples in 10
    passes at half of Nyquist: filter alike what belongs together. A cutoff at Nyquist or above
    returns `audio` itself.
    """
    if 2 * cutoff_hz >= sample_rate:
        return audio
    import scipy.signal

    omega = 2 * np.pi * cutoff_hz / sample_rate
    alpha, cosine = np.sin(omega) / (2 * Q), np.cos(omega)
    numerator = np.array([(1 - cosine) / 2, 1 - cosine, (1 - cosine) / 2])
    denominator = np.array([1 + alpha, -2 * cosine, 1 - alpha])
    section = np.concatenate([numerator, denominator]) / (1 + alpha)
    filtered = scipy.signal.sosfilt(np.tile(section, (passes, 1)), audio, axis=-1)
    return np.asarray(filtered, np.float32)


def band_limit(audio: np.ndarray, cutoff_hz: float, sample_rate: int) -> np.ndarray:
    """(C, T) float32 -> (C, T) float32 with nothing left above the cutoff and nothing delayed.

    A windowed sinc (Kaiser, 80 dB, TRANSITION) with zeros before and after the audio; it reaches
    `reach` samples to both sides. A cutoff at Nyquist or above returns `audio` itself.
    """
    if 2 * cutoff_hz >= sample_rate:
        return audio
    import scipy.signal

    taps = _taps(cutoff_hz / sample_rate)
    filtered = scipy.signal.oaconvolve(audio, taps[None], mode="full", axes=-1)
    half = len(taps) // 2
    return np.ascontiguousarray(filtered[:, half : half + audio.shape[-1]], np.float32)


def reach(cutoff_hz: float, sample_rate: int) -> int:
    """Samples to each side that one sample of `band_limit` depends on."""
    return 0 if 2 * cutoff_hz >= sample_rate else len(_taps(cutoff_hz / sample_rate)) // 2


@functools.lru_cache(maxsize=8)
def _taps(cutoff: float) -> np.ndarray:
    """Odd number of float32 taps; `cutoff` in cycles per sample."""
    import scipy.signal

    num_taps, beta = scipy.signal.kaiserord(80, 2 * cutoff * TRANSITION)  # its unit is Nyquist
    half = num_taps // 2
    middle = 2 * cutoff * (1 - TRANSITION / 2)  # of the transition
    taps = np.sinc(middle * np.arange(-half, half + 1)) * np.kaiser(2 * half + 1, beta)
    return (taps / taps.sum()).astype(np.float32)
