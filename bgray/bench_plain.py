"""Nets, losses and optimizers as one writes them first, with the same weights and the same values:
what `bench step` calls the plainest loop."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgray.losses.mrstft import MultiResolutionStft
from bgray.losses.multi_mel import MultiScaleMel
from bgray.models import unet, wav_unet


@contextlib.contextmanager
def first_written() -> Iterator[None]:
    """While it lasts, in this process. What is not here is written plainly already."""
    classes: tuple[tuple[Any, Any], ...] = (
        (unet.Block, _block),
        (wav_unet.Down, _down),
        (wav_unet.Up, _up),
        (wav_unet.WavUNet, _wav_unet),
        (MultiScaleMel, _multi_mel),
        (MultiResolutionStft, _mrstft),
    )
    ours, join = [kind.forward for kind, _ in classes], unet.join
    _put([kind for kind, _ in classes], [forward for _, forward in classes], _join)
    try:
        yield
    finally:
        _put([kind for kind, _ in classes], ours, join)


def _put(kinds: list[Any], forwards: list[Any], join: Any) -> None:
    for kind, forward in zip(kinds, forwards, strict=True):
        kind.forward = forward
    unet.join = join


def one_by_one(optimizer: torch.optim.Optimizer) -> None:
    """Each tensor is a group of its own, so that none is updated together with another."""
    optimizer.param_groups = [
        {**group, **({"fused": False} if "fused" in group else {}), "params": [param]}
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def _block(self: Any, x: Tensor) -> Tensor:
    y = self.depthwise(x).movedim(1, -1)  # (B, T, C)
    y = self.activation(self.widen(self.norm(y)))  # (B, T, 4C)
    y = self.narrow(y) * self.gamma  # (B, T, C)
    return x + y.movedim(-1, 1)  # (B, C, T)


def _join(conv: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    return conv(torch.cat([x, skip], dim=1))


def _down(self: Any, x: Tensor) -> Tensor:
    skip = wav_unet.unshuffle(x, self.factor)  # (B, f*Ci, T/f)
    return self.conv(x) + skip.unflatten(1, (self.channels_out, -1)).mean(2)  # (B, Co, T/f)


def _up(self: Any, x: Tensor) -> Tensor:
    skip = wav_unet.shuffle(x, self.factor).repeat_interleave(self.repeats, dim=1)
    return self.conv(x) + skip  # (B, Co, T*f)


def _wav_unet(self: Any, audio: Tensor) -> Tensor:
    b, c, t = audio.shape
    x = audio.reshape(b * c, 1, t)  # (B*C, 1, T)
    if self.layout == "v1":
        y = unet.run_v1(self, x)
    else:
        y = unet.run_v2(self, self.conv_in(wav_unet.unshuffle(x, self.patching)))
        y = wav_unet.shuffle(self.conv_out(y), self.patching)  # (B*C, 1, T)
    y = {"direct": y, "difference": x + y, "product": x * y}[self.output]
    return y.reshape(b, 1, c, t)  # (B, S=1, C, T)


def _spectrum(audio: Tensor, size: int, hop: int, length: int, window: Tensor) -> Tensor:
    return torch.stft(audio, size, hop, length, window, return_complex=True)


def _multi_mel(self: Any, estimate: Tensor, target: Tensor) -> Tensor:
    estimate, target = estimate.float().flatten(0, -2), target.float().flatten(0, -2)
    total = estimate.new_zeros(())
    for i, length in enumerate(self.window_lengths):
        window, mel = getattr(self, f"window{i}"), getattr(self, f"mel{i}")
        x, y = (
            (mel @ _spectrum(audio, length, length // 4, length, window).abs())
            .clamp(min=self.clamp)
            .log10()
            for audio in (estimate, target)
        )
        total = total + (x - y).abs().mean()
    return total


def _mrstft(self: Any, estimate: Tensor, target: Tensor) -> Tensor:
    estimate, target = estimate.float().flatten(0, -2), target.float().flatten(0, -2)
    if self.taps is not None:
        taps = self.taps[None]
        estimate, target = (
            F.conv1d(x[:, None], taps, padding=taps.shape[-1] // 2)[:, 0]
            for x in (estimate, target)
        )
    total = estimate.new_zeros(())
    for i, (size, hop, length) in enumerate(self.resolutions):
        window, mel = getattr(self, f"window{i}"), getattr(self, f"mel{i}")
        x, y = (
            _spectrum(audio, size, hop, length, window).abs().square().clamp(min=1e-8)
            for audio in (estimate, target)
        )
        x, y = x.sqrt(), y.sqrt()
        if mel is not None:
            x, y = mel @ x, mel @ y
        total = total + torch.linalg.vector_norm(y - x) / torch.linalg.vector_norm(y)
        total = total + (x.log() - y.log()).abs().mean()
    return total / len(self.resolutions)
