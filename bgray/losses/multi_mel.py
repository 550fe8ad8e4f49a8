"""The multi-scale mel loss that DAC and the unshift log train with, and the mel matrix itself."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bgray.losses.spectra import log_distance, magnitudes, reflected
from bgray.problems import refuse


def mel_matrix(sample_rate: int, fft_size: int, num_mels: int) -> torch.Tensor:
    """(num_mels, fft_size/2 + 1) float32: triangles of unit area in Hz, from 0 Hz to sample_rate/2.

    The scale of Slaney's Auditory Toolbox (1998), linear below 1 kHz and logarithmic above, which
    is librosa's default. A triangle narrower than the distance of two bins can be an empty row.
    """
    low_step, knee_hz, log_step = 200 / 3, 1000.0, np.log(6.4) / 27
    knee_mel = knee_hz / low_step
    top_hz = sample_rate / 2
    top_mel = top_hz / low_step
    if top_hz > knee_hz:
        top_mel = knee_mel + np.log(top_hz / knee_hz) / log_step
    mels = np.linspace(0, top_mel, num_mels + 2)
    above = knee_hz * np.exp(log_step * (mels - knee_mel))
    edges = np.where(mels < knee_mel, low_step * mels, above)  # (M + 2) Hz
    bins = np.linspace(0, top_hz, fft_size // 2 + 1)  # (F) Hz
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]  # (M, 1) each
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)  # (M, F)
    triangles = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)  # (M, F)
    return torch.from_numpy(triangles.astype(np.float32))


class MultiScaleMel(nn.Module):
    """Sum over scales of mean |log10 mel(estimate) - log10 mel(target)|, blind to phase and sign.

    Kumar et al. 2023 (DAC, arXiv:2306.06546), section 3.5; equal to audiotools'
    `MelSpectrogramLoss` with DAC's settings. Hann windows, hop of a quarter window, magnitudes
    clamped below at 1e-5. At 48 kHz the two shortest scales each have one empty mel row, which
    adds nothing but counts in the mean. Below the clamp, as in exact silence, there is no gradient.

    forward: (B, S, C, T) estimate and target -> 0-d float32. T must exceed half the longest window.
    """

    clamp = 1e-5
    tiniest = 1e-12
    """Of a single magnitude: nothing beside `clamp`."""

    def __init__(
        self,
        *,
        sample_rate: int,
        num_mels: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320),
        window_lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048),
    ):
        problems = self.check(num_mels=num_mels, window_lengths=window_lengths)
        refuse(problems)
        super().__init__()
        self.window_lengths = tuple(window_lengths)
        for i, (count, length) in enumerate(zip(num_mels, window_lengths, strict=True)):
            window = torch.hann_window(length, dtype=torch.float64).float()
            self.register_buffer(f"window{i}", window, persistent=False)
            mel = mel_matrix(sample_rate, length, count)
            self.register_buffer(f"mel{i}", mel, persistent=False)

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        mels, lengths = options["num_mels"], options["window_lengths"]
        problems = []
        if not lengths:
            problems.append(("window_lengths", "is empty; give at least one"))
        if len(mels) != len(lengths):
            text = f"{len(mels)} entries for {len(lengths)} window_lengths; give {len(lengths)}"
            problems.append(("num_mels", text))
        problems += [("num_mels", f"{m} must be at least 1") for m in mels if m < 1]
        for length in lengths:
            if length < 4 or length % 4:
                text = f"{length} must be a positive multiple of 4, as the hop is a quarter of it"
                problems.append(("window_lengths", text))
        return problems

    def forward(self, estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        shortest = max(self.window_lengths) // 2 + 1
        if target.shape[-1] < shortest:
            raise ValueError(f"multi_mel needs {shortest} samples or more, got {target.shape[-1]}")
        # Two passes, not one over both: nothing is then kept for the gradient of the target.
        with torch.autocast(target.device.type, enabled=False):
            x, y = (
                reflected(audio.float().flatten(0, -2), max(self.window_lengths))
                for audio in (estimate, target)
            )  # (B*S*C, T + longest window)
            mels = [
                [self.mel(audio, target.shape[-1], i) for i in range(len(self.window_lengths))]
                for audio in (x, y)
            ]
            return log_distance(*mels, floor=self.clamp)

    def mel(self, padded: torch.Tensor, num_samples: int, scale: int) -> torch.Tensor:
        """What `reflected` gave -> (B*S*C, N, num_mels[scale])."""
        length = self.window_lengths[scale]
        window, mel = getattr(self, f"window{scale}"), getattr(self, f"mel{scale}")
        magnitude = magnitudes(padded, num_samples, window, length, length // 4, self.tiniest)
        return F.linear(magnitude, mel)
