"""The multi-resolution STFT loss: trains the deartifact task, validates both pitch tasks."""

from typing import Any

import numpy as np
import scipy.signal
import torch
import torchaudio
from torch import nn

from bgray.losses.multi_mel import mel_matrix


def a_weighting_taps(sample_rate: int, num_taps: int = 101) -> torch.Tensor:
    """(num_taps) float32: linear-phase FIR filter with the A-weighting magnitude of IEC 61672-1.

    The analogue curve through the bilinear transform, then least squares over the magnitude,
    as auraloss does it after Wright and Valimaki 2020 (arXiv:1911.08922).
    """
    low_hz, second_hz, third_hz, high_hz = 20.598997, 107.65265, 737.86223, 12194.217
    gain_db = 1.9997  # makes the gain 0 dB at 1 kHz
    low, second, third, high = 2 * np.pi * np.array([low_hz, second_hz, third_hz, high_hz])
    numerator = [high**2 * 10 ** (gain_db / 20), 0, 0, 0, 0]
    denominator = np.poly([-high, -high, -low, -low, -third, -second])
    b, a = scipy.signal.bilinear(numerator, denominator, fs=sample_rate)
    frequencies, response = scipy.signal.freqz(b, a, worN=512, fs=sample_rate)  # pyright: ignore
    taps = scipy.signal.firls(num_taps, frequencies, np.abs(response), fs=sample_rate)
    return torch.from_numpy(taps.astype(np.float32))


class MultiResolutionStft(nn.Module):
    """Mean over resolutions of spectral convergence plus log magnitude distance; blind to sign.

    Yamamoto et al. 2020 (Parallel WaveGAN, arXiv:1910.11480), equations 3 to 6; equal to auraloss's
    `MultiResolutionSTFTLoss` on A-weighted audio and mel magnitudes. |STFT| is clamped below at
    1e-4, so an exactly silent estimate gets no gradient. Spectral convergence is one ratio of
    norms over the whole batch, so a batch's loss is not the mean of its clips' losses.

    `n_bins`: mel bins; None for linear frequency. `perceptual_weighting`: A-weight both first.
    forward: (B, S, C, T) estimate and target -> 0-d float32. T must exceed half the largest FFT.
    """

    power_floor = 1e-8
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
        if problems:
            raise ValueError("\n".join(f"{name}: {text}" for name, text in problems))
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
                # By FFT, because cuDNN's convolution rounds to tf32, which drowns what A-weighting
                # attenuates. The taps are symmetric: convolution and correlation agree.
                estimate, target = (
                    torchaudio.functional.fftconvolve(x, self.taps, mode="same")
                    for x in (estimate, target)
                )
            total = estimate.new_zeros(())
            for i in range(len(self.resolutions)):
                x, y = self.magnitude(estimate, i), self.magnitude(target, i)
                convergence = torch.linalg.vector_norm(y - x) / torch.linalg.vector_norm(y)
                total = total + convergence + (x.log() - y.log()).abs().mean()
        return total / len(self.resolutions)

    def magnitude(self, audio: torch.Tensor, resolution: int) -> torch.Tensor:
        """(B*S*C, T) -> (B*S*C, n_bins or fft_size/2 + 1, N), clamped before the mel matrix."""
        fft_size, hop, length = self.resolutions[resolution]
        window, mel = getattr(self, f"window{resolution}"), getattr(self, f"mel{resolution}")
        spectrum = torch.stft(audio, fft_size, hop, length, window, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()  # (B*S*C, F, N)
        magnitude = power.clamp(min=self.power_floor).sqrt()
        return magnitude if mel is None else mel @ magnitude
