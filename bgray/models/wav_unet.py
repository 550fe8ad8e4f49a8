"""The 1-d ConvNeXt U-Net that removes pitch-shift artefacts (v1) or undoes the shift (v2)."""

from math import prod
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm as add_weight_norm

FACTORS = (1, 2, 4, 8)
EDGE_KERNEL = 5  # v2's first and last convolution

Norm = Literal["layer", "none"]
Activation = Literal["gelu", "snake"]
Layout = Literal["v1", "v2"]


def unshuffle(x: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, C, T) -> (B, factor*C, T/factor) without losing a sample; output channel = phase*C + c.

    Phase-major, unlike `torch.nn.PixelUnshuffle` (c*factor^2 + phase): runs of adjacent channels
    are therefore different channels at the same instant. T must be a multiple of `factor`.
    """
    b, c, t = x.shape
    x = x.reshape(b, c, t // factor, factor)  # (B, C, T/f, f)
    return x.permute(0, 3, 1, 2).reshape(b, factor * c, t // factor)  # (B, f*C, T/f)


def shuffle(x: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, C, T) -> (B, C/factor, T*factor), the exact inverse of `unshuffle`."""
    b, c, t = x.shape
    x = x.reshape(b, factor, c // factor, t)  # (B, f, C/f, T)
    return x.permute(0, 2, 3, 1).reshape(b, c // factor, t * factor)  # (B, C/f, T*f)


def strided_kernel(factor: int) -> int:
    """Kernel of the resampling convolutions: twice the factor, but 1 for factor 1."""
    return 2 * factor if factor > 1 else 1


class Down(nn.Module):
    """(B, channels_in, T) -> (B, channels_out, T/factor): strided convolution plus a fixed skip.

    The skip is `unshuffle`, then the mean of each run of channels_in*factor/channels_out channels.
    """

    def __init__(self, channels_in: int, channels_out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.channels_out = channels_out
        k = strided_kernel(factor)
        self.conv = nn.Conv1d(channels_in, channels_out, k, stride=factor, padding=factor // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = unshuffle(x, self.factor)  # (B, f*Ci, T/f)
        skip = skip.unflatten(1, (self.channels_out, -1)).mean(2)  # (B, Co, T/f)
        return self.conv(x) + skip  # (B, Co, T/f)


class Up(nn.Module):
    """(B, channels_in, T) -> (B, channels_out, T*factor): transposed convolution plus a fixed skip.

    The skip is `shuffle`, then each channel channels_out*factor/channels_in times in a row.
    """

    def __init__(self, channels_in: int, channels_out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.repeats = channels_out * factor // channels_in
        k, pad = strided_kernel(factor), factor // 2
        self.conv = nn.ConvTranspose1d(channels_in, channels_out, k, stride=factor, padding=pad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = shuffle(x, self.factor)  # (B, Ci/f, T*f)
        skip = skip.repeat_interleave(self.repeats, dim=1)  # (B, Co, T*f)
        return self.conv(x) + skip  # (B, Co, T*f)


class Snake(nn.Module):
    """(B, T, C) -> (B, T, C): x + sin^2(alpha x) / alpha, Ziyin et al. 2020, eq. 3."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sin(self.alpha * x).square() / (self.alpha + 1e-9)


class Block(nn.Module):
    """(B, C, T) -> (B, C, T): ConvNeXt block (Liu et al. 2022, fig. 4) in one dimension.

    `gamma` starts at 1e-6, so a fresh block is the identity to about that.
    """

    def __init__(self, channels: int, kernel: int, norm: Norm, activation: Activation):
        super().__init__()
        wide = 4 * channels
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-5) if norm == "layer" else nn.Identity()
        self.widen = nn.Linear(channels, wide)
        self.activation = Snake(wide) if activation == "snake" else nn.GELU()
        self.narrow = nn.Linear(wide, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(x).transpose(1, 2)  # (B, T, C)
        y = self.activation(self.widen(self.norm(y)))  # (B, T, 4C)
        y = self.narrow(y) * self.gamma  # (B, T, C)
        return x + y.transpose(1, 2)  # (B, C, T)


class WavUNet(nn.Module):
    """(B, C, T) audio -> (B, 1, C, T) audio; every channel passes alone, as a mono clip would.

    T must be a multiple of `length_multiple` (patching times all factors), else ValueError.
    `receptive_field`: the most input samples, both sides together, that one output sample sees.

    `layout`: "v2" has a convolution at both ends, joins each skip by concatenation and a 1x1
    convolution after the level's blocks, and has blocks at the bottom. "v1" works on the raw
    waveform (channels[0] = 1) and adds the skips, the last of which is the input itself.
    `patching`: input samples that become the channels of one frame before the net (v2).
    `channels` has one entry more than `blocks`, `factors` and `scale_vs_channels`;
    channels[i] * factors[i] / scale_vs_channels[i] must be channels[i+1].
    `kernels` (odd): one entry for all blocks, or kernels[j] for the j-th block of every level.
    `bottleneck_kernel`: of all blocks at the bottom; None takes kernels[0].
    `weight_norm`: on every Conv1d and Linear, not on the transposed convolutions.
    Raises ValueError with all that `check` finds. Defaults: output 19 of the unshift log.
    """

    def __init__(
        self,
        *,
        channels: tuple[int, ...] = (32, 64, 128, 256, 512),
        blocks: tuple[int, ...] = (3, 3, 3, 3),
        factors: tuple[int, ...] = (2, 2, 4, 8),
        scale_vs_channels: tuple[int, ...] = (1, 1, 2, 4),
        bottleneck_blocks: int = 3,
        patching: int = 4,
        kernels: tuple[int, ...] = (7, 23, 41),
        bottleneck_kernel: int | None = None,
        norm: Norm = "none",
        weight_norm: bool = False,
        activation: Activation = "gelu",
        layout: Layout = "v2",
    ):
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        problems = self.check(**options)
        if problems:
            raise ValueError("\n".join(["WavUNet:", *(f"  {k}: {text}" for k, text in problems)]))

        super().__init__()
        self.layout = layout
        self.patching = patching
        self.length_multiple = patching * prod(factors)
        level_kernels = [kernels * n if len(kernels) == 1 else kernels[:n] for n in blocks]
        bottom_kernels = (bottleneck_kernel or kernels[0],) * bottleneck_blocks

        def stack(width: int, kernels: tuple[int, ...]) -> nn.Sequential:
            return nn.Sequential(*(Block(width, k, norm, activation) for k in kernels))

        # v1 runs a level's blocks at the deep end of its resampling, v2 at the shallow end.
        widths = channels[1:] if layout == "v1" else channels[:-1]
        levels = list(zip(widths, level_kernels, strict=True))
        pairs = list(zip(channels[:-1], channels[1:], factors, strict=True))
        self.encoder = nn.ModuleList(stack(c, k) for c, k in levels)
        self.downs = nn.ModuleList(Down(a, b, f) for a, b, f in pairs)
        self.bottom = stack(channels[-1], bottom_kernels)
        self.ups = nn.ModuleList(Up(b, a, f) for a, b, f in pairs)
        self.decoder = nn.ModuleList(stack(c, k) for c, k in levels)
        reach = [sum(k) - len(k) for k in level_kernels]
        bottom = sum(bottom_kernels) - len(bottom_kernels)
        if layout == "v1":
            bottom = 2 * reach[-1]  # the deepest level's blocks, on the way down and up again
            reach = [0, *reach[:-1]]
        else:
            reach[0] += EDGE_KERNEL - 1
            edge: dict[str, Any] = {"kernel_size": EDGE_KERNEL, "padding": EDGE_KERNEL // 2}
            self.conv_in = nn.Conv1d(patching, channels[0], **edge)
            self.conv_out = nn.Conv1d(channels[0], patching, **edge)
            self.joins = nn.ModuleList(nn.Conv1d(2 * c, c, 1) for c in channels[:-1])
        self.receptive_field = patching * receptive_frames(reach, factors, bottom)
        if weight_norm:
            for module in list(self.modules()):
                if isinstance(module, nn.Conv1d | nn.Linear):
                    add_weight_norm(module)

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the full options (none left out) as (option, value and the way out)."""
        channels, blocks, factors = (options[k] for k in ("channels", "blocks", "factors"))
        scales, kernels = options["scale_vs_channels"], options["kernels"]
        problems: list[tuple[str, str]] = []

        def bad(option: str, text: str) -> None:
            problems.append((option, text))

        for name, kind in {"norm": Norm, "activation": Activation, "layout": Layout}.items():
            if options[name] not in get_args(kind):
                bad(name, f"{options[name]!r} is not one of {', '.join(get_args(kind))}")
        for name in ("channels", "blocks", "factors", "scale_vs_channels", "kernels"):
            if not options[name]:
                bad(name, "is empty; give at least one number")
            for i, value in enumerate(options[name]):
                if value < 1:
                    bad(name, f"{name}[{i}] = {value} must be at least 1")
        for name, least in {"patching": 1, "bottleneck_blocks": 0, "bottleneck_kernel": 1}.items():
            if options[name] is not None and options[name] < least:
                bad(name, f"{options[name]} must be at least {least}")

        bottom = ("bottleneck_kernel", options["bottleneck_kernel"] or 1)
        for name, k in [*(("kernels", k) for k in kernels), bottom]:
            if k > 0 and k % 2 == 0:
                bad(name, f"{k} is even and would change the length; use {k - 1} or {k + 1}")
        most = max(blocks, default=0)
        if 1 < len(kernels) < most:
            bad("kernels", f"{len(kernels)} entries for {most} blocks; give 1 or at least {most}")
        for i, f in enumerate(factors):
            if f > 0 and f not in FACTORS:
                bad("factors", f"factors[{i}] = {f}; use one of {FACTORS}")
        length = len(factors)
        for name in ("channels", "blocks", "scale_vs_channels"):
            count = length + (name == "channels")
            if options[name] and len(options[name]) != count:
                bad(name, f"{len(options[name])} entries for {length} factors; give {count}")
        if options["layout"] == "v1":
            if channels and channels[0] != 1:
                bad("channels", f"layout v1 needs channels[0] = 1, not {channels[0]}")
            for name, value in {"bottleneck_blocks": 0, "patching": 1}.items():
                if options[name] != value:
                    bad(name, f"layout v1 needs {name} = {value}, not {options[name]}")
        if {name for name, _ in problems} & {"channels", "factors", "scale_vs_channels"}:
            return problems

        for i, (f, scale) in enumerate(zip(factors, scales, strict=True)):
            c, deep = channels[i], channels[i + 1]
            if c * f != scale * deep:
                outs = [str(c * f // deep)] if c * f % deep == 0 else []
                outs += [f"channels[{i + 1}] = {c * f // scale}"] if c * f % scale == 0 else []
                bad(
                    "scale_vs_channels",
                    f"level {i}: channels[{i}]*factors[{i}]/scale[{i}] = {c}*{f}/{scale} = "
                    f"{c * f / scale:g} but channels[{i + 1}] is {deep}; "
                    f"use {' or '.join(outs) or f'other channels[{i}] and channels[{i + 1}]'}",
                )
            elif deep % f:
                bad("channels", f"channels[{i + 1}] = {deep} is not a multiple of its factor {f}")
        return problems

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        b, c, t = audio.shape
        if t == 0 or t % self.length_multiple:
            below = max(1, t // self.length_multiple) * self.length_multiple
            raise ValueError(
                f"length {t} is not a multiple of {self.length_multiple}; "
                f"the nearest valid lengths are {below} and {below + self.length_multiple}"
            )
        x = audio.reshape(b * c, 1, t)  # (B*C, 1, T)
        x = self._v1(x) if self.layout == "v1" else self._v2(x)
        return x.reshape(b, 1, c, t)  # (B, S=1, C, T)

    def _v1(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for down, blocks in zip(self.downs, self.encoder, strict=True):
            skips.append(x)
            x = blocks(down(x))
        for i in reversed(range(len(self.ups))):
            x = self.ups[i](self.decoder[i](x)) + skips[i]
        return x

    def _v2(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(unshuffle(x, self.patching))  # (B*C, channels[0], T/p)
        skips = []
        for blocks, down in zip(self.encoder, self.downs, strict=True):
            skips.append(x)  # before the level's blocks
            x = down(blocks(x))
        x = self.bottom(x)
        for i in reversed(range(len(self.ups))):
            x = self.decoder[i](self.ups[i](x))
            x = self.joins[i](torch.cat([x, skips[i]], dim=1))  # after the level's blocks
        return shuffle(self.conv_out(x), self.patching)  # (B*C, 1, T)


def receptive_frames(reach: list[int], factors: tuple[int, ...], bottom: int) -> int:
    """Frames of the top level that the widest-looking output frame depends on, both sides together.

    reach[i], bottom: the sum of (kernel - 1) over what runs, in one direction, at the shallow end
    of level i and at the bottom. Skips never see further than what passes below them.
    """
    levels = list(zip(reach, factors, strict=True))
    width = 1
    for r, f in levels:
        width += r
        # w samples touch up to ceil((w-1)/f) + 2 frames through a transposed kernel of 2f.
        width = -(-(width - 1) // f) + 2 if f > 1 else width
    width += bottom
    for r, f in reversed(levels):
        width = r + ((width + 1) * f if f > 1 else width)
    return width
