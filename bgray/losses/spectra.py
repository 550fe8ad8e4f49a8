"""Windowed spectra of audio and distances of their logarithms, with gradients that cost what the
values do."""
# pyright: reportPrivateImportUsage=false
# torch._foreach_: the kernels of torch.optim, which do lists of tensors at once.

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bgray.overlap import overlap_add


def reflected(audio: Tensor, fft_size: int) -> Tensor:
    """(R, T) -> (R, T + 2 * (fft_size // 2)), mirrored at both ends as `torch.stft` does it.

    The largest FFT's padding serves the smaller ones too: theirs is what is in the middle of it.
    """
    return F.pad(audio, (fft_size // 2, fft_size // 2), mode="reflect")


def magnitudes(
    padded: Tensor, num_samples: int, window: Tensor, fft_size: int, hop: int, floor: float
) -> Tensor:
    """|STFT| of the `num_samples` in the middle of `padded` (R, ...) -> (R, N, F), at least
    `floor`.

    `torch.stft(..., window, center=True).abs().clamp(min=floor)` with the last two axes swapped.
    Below the floor there is no gradient, so that zero, where a magnitude has none, does no harm;
    `floor` has to be above 0. The gradient is that of stft to rounding, but for one inverse real
    FFT and an overlap-add, where torch takes a complex FFT of twice the data and adds sample by
    sample through an index (on a GPU in any order).
    """
    assert floor > 0
    return _spectra(padded, num_samples, window, fft_size, hop, floor)


def powers(padded: Tensor, num_samples: int, window: Tensor, fft_size: int, hop: int) -> Tensor:
    """|STFT|^2, otherwise like `magnitudes`."""
    return _spectra(padded, num_samples, window, fft_size, hop, None)


def _spectra(
    padded: Tensor, num_samples: int, window: Tensor, fft_size: int, hop: int, floor: float | None
) -> Tensor:
    # A window shorter than the FFT sits in the middle of it; zeros beside it need no copy, and
    # where in the FFT its samples lie turns the phase alone.
    edge = fft_size // 2
    start = (padded.shape[-1] - num_samples) // 2 - edge + (fft_size - len(window)) // 2
    num_frames = 1 + (num_samples + 2 * edge - fft_size) // hop
    found: Any = _Spectra.apply(padded, start, num_frames, window, fft_size, hop, floor)
    return found


class _Spectra(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        padded: Tensor,
        start: int,
        num_frames: int,
        window: Tensor,
        fft_size: int,
        hop: int,
        floor: float | None,
    ) -> Tensor:
        frames = padded[:, start:].unfold(-1, len(window), hop)[:, :num_frames]  # (R, N, W), a view
        spectrum = torch.fft.rfft(frames * window, n=fft_size)  # (R, N, F) complex
        if floor is None:
            found, inverse = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag), 2.0
        else:
            found = _absolute(spectrum).clamp_(min=floor)
        if ctx.needs_input_grad[0]:
            if floor is not None:
                inverse = F.threshold(found, floor, torch.inf).reciprocal_()  # 0 at the floor
            ctx.save_for_backward(spectrum.mul_(inverse), window)
            ctx.sizes = padded.shape[-1], start, fft_size, hop
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        slope, window = ctx.saved_tensors
        num_samples, start, fft_size, hop = ctx.sizes
        spectrum = slope * gradients[0]  # (R, N, F) complex
        # The inverse counts each bin twice, for the conjugate that a real signal has; these two
        # bins it counts once.
        spectrum[..., 0] *= 2
        if fft_size % 2 == 0:
            spectrum[..., -1] *= 2
        frames = torch.fft.irfft(spectrum, n=fft_size, norm="forward")  # (R, N, fft_size)
        gradient = overlap_add(frames, window / 2, hop, num_samples, start)
        return gradient, None, None, None, None, None, None


def _absolute(spectrum: Tensor) -> Tensor:
    if spectrum.is_cuda:
        return spectrum.abs()  # one kernel
    # abs() guards against overflow, which audio does not need and a CPU pays for threefold.
    return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag).sqrt_()


def log_distance(estimates: Sequence[Tensor], targets: Sequence[Tensor], floor: float) -> Tensor:
    """Sum over the pairs of mean |log10 estimate - log10 target|, each at least `floor`; 0-d.

    In some twenty kernels for any number of tensors, where one by one they take that many each.
    Below the floor there is no gradient, and for the targets there is none at all.
    """
    found: Any = _LogDistance.apply(floor, [y.detach() for y in targets], *estimates)
    return found


class _LogDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, floor: float, targets: list[Tensor], *estimates: Tensor) -> Tensor:
        clamped = torch._foreach_clamp_min(estimates, floor)
        differences = torch._foreach_log10(clamped)
        wanted = torch._foreach_clamp_min(targets, floor)
        torch._foreach_log10_(wanted)
        torch._foreach_sub_(differences, wanted)
        # Not by _foreach_norm, which on a CPU adds up one by one: 1e-4 off over a million values.
        means = [x.mean() for x in torch._foreach_abs(differences)]
        if any(ctx.needs_input_grad[2:]):
            above = torch._foreach_sub(estimates, floor)
            torch._foreach_sign_(above)
            torch._foreach_clamp_min_(above, 0.0)  # 1 above the floor, 0 at it and below
            torch._foreach_sign_(differences)
            torch._foreach_mul_(differences, above)
            torch._foreach_div_(differences, clamped)
            torch._foreach_mul_(differences, [LOG10_E / x.numel() for x in estimates])
            ctx.save_for_backward(*differences)
        return torch.stack(means).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, *torch._foreach_mul(ctx.saved_tensors, gradients[0])


LOG10_E = 0.4342944819032518  # of d log10(x) / dx = LOG10_E / x
