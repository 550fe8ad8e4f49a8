"""The inverse short-time Fourier transform, as torch's but without asking the device anything."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bgray.overlap import overlap_add


def istft(spectrum: Tensor, n_fft: int, hop: int, window: Tensor, length: int) -> Tensor:
    """(M, F, N) complex of a centred STFT -> (M, length) by least squares (Griffin and Lim 1984,
    eq. 6).

    `torch.istft` looks on the host whether the windows leave a gap, so that a GPU's step waits for
    it and cannot be recorded as a CUDA graph. Here no gap is a condition: 2 * hop <= n_fft with a
    Hann window, and `length` at most (N - 1) * hop, plus what is less than a hop.
    """
    frames = torch.fft.irfft(spectrum.transpose(1, 2), n_fft)  # (M, N, n_fft)
    first, end = n_fft // 2, n_fft // 2 + length
    added: Any = _OverlapAdd.apply(frames, window, hop, end)
    ones = window.new_ones(1, 1, 1).expand(1, frames.shape[1], n_fft)
    weight = overlap_add(ones, window.square(), hop, end)
    return added[:, first:] / weight[:, first:]


class _OverlapAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frames: Tensor, window: Tensor, hop: int, num_samples: int) -> Tensor:
        ctx.save_for_backward(window)
        ctx.sizes = frames.shape[1], hop
        return overlap_add(frames, window, hop, num_samples)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        (window,), (num_frames, hop) = ctx.saved_tensors, ctx.sizes
        beyond = (num_frames - 1) * hop + len(window) - gradients[0].shape[-1]
        spread = F.pad(gradients[0], (0, beyond))  # what was cut off has no gradient
        return spread.unfold(-1, len(window), hop)[:, :num_frames] * window, None, None, None
