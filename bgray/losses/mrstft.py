"""The multi-resolution STFT loss: trains the deartifact task, validates both pitch tasks."""

import math
from typing import Any

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from bgray.losses.multi_mel import mel_matrix
from bgray.losses.spectra import log_distance, magnitudes, reflected
from bgray.problems import refuse


def a_weighting_taps(sample_rate: int, num_taps: int = 101) -> torch.Tensor:
    """(num_taps) float32: linear-phase FIR filter with the A-weighting magnitude of IEC 61672-1.

    The analogue curve through the bilinear transform, then least squares over the magnitude,
    as auraloss does it after Wright and Valimaki 2020 (arXiv:1911.08922).
    """
    import scipy.signal  # a second, which those who only read a sweep need not wait for

    low_hz, second_hz, third_hz, high_hz = 20.598997, 107.65265, 737.86223, 12194.217
    gain_db = 1.9997  # makes the gain 0 dB at 1 kHz
    low, second, third, high = 2 * np.pi * np.array([low_hz, second_hz, third_hz, high_hz])
    numerator = [high**2 * 10 ** (gain_db / 20), 0, 0, 0, 0]
    denominator = np.poly([-high, -high, -low, -low, -third, -second])
    b, a = scipy.signal.bilinear(numerator, denominator, fs=sample_rate)
    frequencies, response = scipy.signal.freqz(b, a, worN=512, fs=sample_rate)  # pyright: ignore
    taps = scipy.signal.firls(num_taps, frequencies, np.abs(response), fs=sample_rate)
    return torch.from_numpy(taps.astype(np.float32))


def _filtered(audio: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """(R, T) through symmetric (1, odd number of) taps -> (R, T), silence beyond both ends.

    By FFT, because cuDNN's convolution rounds to tf32, which drowns what A-weighting attenuates.
    """
    num_samples, delay = audio.shape[-1], taps.shape[-1] // 2
    size = scipy.fft.next_fast_len(num_samples + 2 * delay, real=True)  # not one with large primes
    spectrum = torch.fft.rfft(audio, size) * torch.fft.rfft(taps, size)
    return torch.fft.irfft(spectrum, size)[:, delay : delay + num_samples]


class _Filtered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, audio: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(taps)
        return _filtered(audio, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _filtered(gradients[0], *ctx.saved_tensors), None  # symmetric: its own transpose


class MultiResolutionStft(nn.Module):
    """Mean over resolutions of spectral convergence plus log magnitude distance; blind to sign.

    Yamamoto et al. 2020 (Parallel WaveGAN, arXiv:1910.11480), equations 3 to 6; equal to auraloss's
    `MultiResolutionSTFTLoss` on A-weighted audio and mel magnitudes. |STFT| is clamped below at
    1e-4, so an exactly silent estimate gets no gradient. Spectral convergence is one ratio of
    norms over the whole batch, so a batch's loss is not the mean of its clips' losses.

    `n_bins`: mel bins; None for linear frequency. `perceptual_weighting`: A-weight both first.
    forward: (B, S, C, T) estimate and target -> 0-d float32. T must exceed half the largest FFT.
    """

    floor = 1e-4
    taps: torch.Tensor | None

    def __init__(
        self,
        *,
        sample_rate: int,
        fft_sizes: tuple[int, ...] = (4096, 2048, 1024),
        hop_sizes: tuple[int, ...] = (480, 240, 120),
        win_lengths: tuple[int, ...] = (2400, 1200, 600),
        n_bins: int | None = 128,
        perceptual_weighting: bool = True,
    ):
        problems = self.check(
            fft_sizes=fft_sizes, hop_sizes=hop_sizes, win_lengths=win_lengths, n_bins=n_bins
        )
        refuse(problems)
        super().__init__()
        self.resolutions = list(zip(fft_sizes, hop_sizes, win_lengths, strict=True))
        for i, (fft_size, _, length) in enumerate(self.resolutions):
            self.register_buffer(f"window{i}", torch.hann_window(length), persistent=False)
            mel = None if n_bins is None else mel_matrix(sample_rate, fft_size, n_bins)
            if mel is not None and (empty := int((mel.sum(1) == 0).sum())):
                raise ValueError(
                    f"n_bins: {n_bins} mel bins at {sample_rate} Hz and FFT size {fft_size} leave "
                    f"{empty} empty, whose logarithm is -inf; use fewer bins or larger FFTs"
                )
            self.register_buffer(f"mel{i}", mel, persistent=False)
        taps = a_weighting_taps(sample_rate)[None] if perceptual_weighting else None  # (1, 101)
        self.register_buffer("taps", taps, persistent=False)

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        fft_sizes, problems = options["fft_sizes"], []
        if not fft_sizes:
            problems.append(("fft_sizes", "is empty; give at least one"))
        if options["n_bins"] is not None and options["n_bins"] < 1:
            text = f"{options['n_bins']} must be at least 1, or null for linear frequency"
            problems.append(("n_bins", text))
        for name in ("fft_sizes", "hop_sizes", "win_lengths"):
            values = options[name]
            if len(values) != len(fft_sizes):
                text = f"{len(values)} entries for {len(fft_sizes)} fft_sizes"
                problems.append((name, f"{text}; give {len(fft_sizes)}"))
            problems += [(name, f"{v} must be at least 1") for v in values if v < 1]
        if problems:
            return problems
        for i, (fft_size, hop, length) in enumerate(
            zip(fft_sizes, options["hop_sizes"], options["win_lengths"], strict=True)
        ):
            if length > fft_size:
                text = f"win_lengths[{i}] = {length} exceeds fft_sizes[{i}] = {fft_size}"
                problems.append(("win_lengths", f"{text}; use at most {fft_size}"))
            if hop > length:
                text = f"hop_sizes[{i}] = {hop} skips samples between windows of {length}"
                problems.append(("hop_sizes", f"{text}; use at most {length}"))
        return problems

    def forward(self, estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        shortest = max(fft_size for fft_size, _, _ in self.resolutions) // 2 + 1
        if target.shape[-1] < shortest:
            raise ValueError(f"mrstft needs {shortest} samples or more, got {target.shape[-1]}")
        with torch.autocast(target.device.type, enabled=False):
            estimate, target = estimate.float().flatten(0, -2), target.float().flatten(0, -2)
            if self.taps is not None:
                estimate, target = (_Filtered.apply(x, self.taps) for x in (estimate, target))
            largest = max(fft_size for fft_size, _, _ in self.resolutions)
            padded = [reflected(x, largest) for x in (estimate, target)]
            xs, ys = (
                [self.magnitude(audio, target.shape[-1], i) for i in range(len(self.resolutions))]
                for audio in padded
            )
            convergence = [
                torch.linalg.vector_norm(y - x) / torch.linalg.vector_norm(y)
                for x, y in zip(xs, ys, strict=True)
            ]
            # The floor is far below what the clamp lets through, so nothing is at it.
            distance = math.log(10) * log_distance(xs, ys, floor=1e-30)
            return (torch.stack(convergence).sum() + distance) / len(self.resolutions)

    def magnitude(self, padded: torch.Tensor, num_samples: int, resolution: int) -> torch.Tensor:
        """What `reflected` gave -> (B*S*C, N, n_bins or fft_size/2 + 1), clamped before the mel
        matrix."""
        fft_size, hop, _ = self.resolutions[resolution]
        window, mel = getattr(self, f"window{resolution}"), getattr(self, f"mel{resolution}")
        magnitude = magnitudes(padded, num_samples, window, fft_size, hop, self.floor)
        return magnitude if mel is None else F.linear(magnitude, mel)
