"""What the audio tasks share: scores of restored audio, float audio as int16, clips as WAV."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from bgray.losses.mrstft import MultiResolutionStft
from bgray.metrics import si_sdr


def restoration_scorer(sample_rate: int) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """A function of one item, (1, S, C, T) estimate and target -> its scores as 0-d tensors: STFT
    distance (log 001's), SI-SDR in dB.

    Item by item, because spectral convergence over a batch would depend on who shares the batch.
    """
    distance = MultiResolutionStft(sample_rate=sample_rate)

    def score(estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {
                "val_stft": distance.to(estimate.device)(estimate, target),
                "val_si_sdr": si_sdr(estimate, target).mean(),
            }

    return score


def to_int16(audio: Any) -> np.ndarray:
    """Float audio, full scale 1, as int16; what is louder is clipped, not rescaled."""
    return np.clip(np.rint(audio * 32768), -32768, 32767).astype(np.int16)


def wav(audio: np.ndarray, sample_rate: int) -> bytes:
    """(C, T) float32 as a 16-bit WAV file, as it would be heard."""
    buffer = io.BytesIO()
    soundfile.write(buffer, to_int16(audio).T, sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()
