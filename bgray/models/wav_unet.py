"""The 1-d ConvNeXt U-Net that removes pitch-shift artefacts (v1) or undoes the shift (v2)."""

from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm as add_weight_norm

from bgray.models.unet import (
    Activation,
    Block,
    Layout,
    Norm,
    check_choices,
    check_least,
    check_levels,
    check_odd,
    receptive_frames,
    run_v1,
    run_v2,
)
from bgray.problems import refuse

FACTORS = (1, 2, 4, 8)
EDGE_KERNEL = 5  # v2's first and last convolution
LARGE = 8
"""Factors from here on: their kernels have so many weights and meet so few frames that the
library's channels-last convolutions are twice as slow on a CPU as what stands here instead."""

Output = Literal["direct", "difference", "product"]


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
        f, co = self.factor, self.channels_out
        x = x.mT.contiguous()  # (B, T, Ci)
        b, t, ci = x.shape
        # Channels-last, unshuffling is another look at the same memory.
        skip = x.reshape(b, t // f, co, f * ci // co)
        skip = skip.mean(-1) if ci * f > co else skip.squeeze(-1)  # (B, T/f, Co)
        if f >= LARGE:
            frames = F.pad(x, (0, 0, f // 2, f // 2)).reshape(b, t // f + 1, f * ci)
            windows = torch.cat([frames[:, :-1], frames[:, 1:]], -1)  # (B, T/f, 2f*Ci)
            weight = self.conv.weight.mT.reshape(co, 2 * f * ci)
            y = F.linear(windows, weight, self.conv.bias)  # (B, T/f, Co)
        else:
            y = channels_last(self.conv, x)
        return (y + skip).mT  # (B, Co, T/f)


def channels_last(conv: nn.Conv1d | nn.ConvTranspose1d, x: torch.Tensor) -> torch.Tensor:
    """(B, T, Ci) -> (B, T', Co), contiguous: `conv`, as a convolution of a plane one sample high,
    for the library would copy features of this layout to another before a 1-d convolution."""
    plane, weight = x.mT.unsqueeze(2), conv.weight.unsqueeze(2)  # (B, Ci, 1, T)
    assert not isinstance(conv.padding, str)
    stride, padding = (1, *conv.stride), (0, *conv.padding)
    function = F.conv2d if isinstance(conv, nn.Conv1d) else F.conv_transpose2d
    return function(plane, weight, conv.bias, stride, padding).squeeze(2).mT.contiguous()


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
        x = x.mT.contiguous()  # (B, T, Ci)
        b, t, ci = x.shape
        y = self.conv(x.mT).mT if self.factor >= LARGE else channels_last(self.conv, x)
        # Channels-last, shuffling is another look at the same memory.
        skip = x.reshape(b, t * self.factor, ci // self.factor, 1)
        y = y.reshape(b, t * self.factor, ci // self.factor, self.repeats)
        return (y + skip).flatten(2).mT  # (B, Co, T*f)


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
    `output`: what the net gives is the estimate itself (direct), what is added to the input
    (difference; v1 refuses it, since its last skip adds the input already) or what multiplies the
    input (product).
    `skip_conv`: each skip of v1 passes a 1x1 convolution before it is added.
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
        output: Output = "direct",
        skip_conv: bool = False,
    ):
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        problems = self.check(**options)
        refuse(problems, "WavUNet")

        super().__init__()
        self.layout, self.output = layout, output
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
            skips = (nn.Conv1d(c, c, 1) if skip_conv else nn.Identity() for c in channels[:-1])
            self.joins = nn.ModuleList(skips)
        else:
            reach[0] += EDGE_KERNEL - 1
            edge: dict[str, Any] = {"kernel_size": EDGE_KERNEL, "padding": EDGE_KERNEL // 2}
            self.conv_in = nn.Conv1d(patching, channels[0], **edge)
            self.conv_out = nn.Conv1d(channels[0], patching, **edge)
            self.joins = nn.ModuleList(nn.Conv1d(2 * c, c, 1) for c in channels[:-1])
        spans = [strided_kernel(f) for f in factors]
        self.receptive_field = patching * receptive_frames(reach, factors, spans, bottom)
        if weight_norm:
            for module in list(self.modules()):
                if isinstance(module, nn.Conv1d | nn.Linear):
                    add_weight_norm(module)

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the full options (none left out) as (option, value and the way out)."""
        kernels, most = options["kernels"], max(options["blocks"], default=0)
        problems = check_choices(
            options, norm=Norm, activation=Activation, layout=Layout, output=Output
        )
        problems += check_least(options, patching=1, bottleneck_blocks=0, bottleneck_kernel=1)
        problems += check_odd("kernels", kernels)
        problems += check_odd("bottleneck_kernel", [options["bottleneck_kernel"] or 1])
        if not kernels:
            problems.append(("kernels", "is empty; give at least one number"))
        for i, k in enumerate(kernels):
            if k < 1:
                problems.append(("kernels", f"kernels[{i}] = {k} must be at least 1"))
        if 1 < len(kernels) < most:
            text = f"{len(kernels)} entries for {most} blocks; give 1 or at least {most}"
            problems.append(("kernels", text))
        if options["layout"] == "v1":
            if options["patching"] != 1:
                text = f"layout v1 needs patching = 1, not {options['patching']}"
                problems.append(("patching", text))
            if options["output"] == "difference":
                text = "difference is what layout v1 does by its last skip; use direct"
                problems.append(("output", text))
        elif options["skip_conv"]:
            problems.append(("skip_conv", "only layout v1 has it; v2 joins by a convolution"))
        return problems + check_levels(options, allowed=FACTORS, dims=1, raw_channels=1)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        b, c, t = audio.shape
        if t == 0 or t % self.length_multiple:
            below = max(1, t // self.length_multiple) * self.length_multiple
            raise ValueError(
                f"length {t} is not a multiple of {self.length_multiple}; "
                f"the nearest valid lengths are {below} and {below + self.length_multiple}"
            )
        x = audio.reshape(b * c, 1, t)  # (B*C, 1, T)
        if self.layout == "v1":
            y = run_v1(self, x)
        else:
            frames = x.reshape(b * c, t // self.patching, self.patching)
            y = channels_last(self.conv_in, frames)  # (B*C, T/p, channels[0])
            y = run_v2(self, y.mT)  # (B*C, channels[0], T/p)
            y = channels_last(self.conv_out, y.mT).reshape(b * c, 1, t)
        if self.output == "difference":
            y = x + y
        elif self.output == "product":
            y = x * y
        return y.reshape(b, 1, c, t)  # (B, S=1, C, T)
