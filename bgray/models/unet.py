"""What the 1-d and the 2-d pitch U-Nets share: blocks, the way down and up, the options' checks."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn

Norm = Literal["layer", "none"]
Activation = Literal["gelu", "snake"]
Layout = Literal["v1", "v2"]


class Snake(nn.Module):
    """(B, ..., C) -> (B, ..., C): x + sin^2(alpha x) / alpha, Ziyin et al. 2020, eq. 3."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sin(self.alpha * x).square() / (self.alpha + 1e-9)


class Block(nn.Module):
    """(B, C, T) -> (B, C, T): ConvNeXt block (Liu et al. 2022, fig. 4); (B, C, F, N) for dims 2.

    `gamma` starts at 1e-6, so a fresh block is the identity to about that.
    """

    def __init__(
        self,
        channels: int,
        kernel: int,
        norm: Norm = "layer",
        activation: Activation = "gelu",
        dims: Literal[1, 2] = 1,
    ):
        super().__init__()
        wide = 4 * channels
        conv = nn.Conv1d if dims == 1 else nn.Conv2d
        self.depthwise = conv(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-5) if norm == "layer" else nn.Identity()
        self.widen = nn.Linear(channels, wide)
        self.activation = Snake(wide) if activation == "snake" else nn.GELU()
        self.narrow = nn.Linear(wide, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(x).movedim(1, -1)  # (B, T, C)
        y = self.activation(self.widen(self.norm(y)))  # (B, T, 4C)
        y = self.narrow(y) * self.gamma  # (B, T, C)
        return x + y.movedim(-1, 1)  # (B, C, T)


class UNet(Protocol):
    """One entry of each list per level, from the full rate down; `bottom` only runs in v2.

    `joins`: v1, what a skip passes before it is added; v2, from both on top of each other to one.
    """

    downs: nn.ModuleList
    encoder: nn.ModuleList
    bottom: nn.Sequential
    decoder: nn.ModuleList
    ups: nn.ModuleList
    joins: nn.ModuleList


def run_v1(net: UNet, x: torch.Tensor) -> torch.Tensor:
    """Blocks at the deep end of each resampling; the last of the added skips is `x` itself."""
    skips = []
    for down, blocks in zip(net.downs, net.encoder, strict=True):
        skips.append(x)
        x = blocks(down(x))
    for i in reversed(range(len(skips))):
        x = net.ups[i](net.decoder[i](x)) + net.joins[i](skips[i])
    return x


def run_v2(net: UNet, x: torch.Tensor) -> torch.Tensor:
    """Blocks at the shallow end of each resampling; skips leave before and enter after them."""
    skips = []
    for blocks, down in zip(net.encoder, net.downs, strict=True):
        skips.append(x)
        x = down(blocks(x))
    x = net.bottom(x)
    for i in reversed(range(len(skips))):
        x = net.decoder[i](net.ups[i](x))
        x = net.joins[i](torch.cat([x, skips[i]], dim=1))
    return x


def receptive_frames(
    reach: Sequence[int],
    factors: Sequence[int],
    down_spans: Sequence[int],
    bottom: int,
    width: int = 1,
) -> int:
    """Frames of the top level that the worst-placed `width` output frames depend on.

    reach[i], bottom: the sum of (kernel - 1) over what runs, in one direction, at the shallow end
    of level i and at the bottom. down_spans[i]: frames that one frame of the strided convolution
    and its skip takes together. Other skips never see further than what passes below them.
    """
    for r, f in zip(reach, factors, strict=True):
        width += r
        # w samples touch up to ceil((w-1)/f) + 2 frames through a transposed kernel of 2f.
        width = -(-(width - 1) // f) + 2 if f > 1 else width
    width += bottom
    for r, f, span in reversed(list(zip(reach, factors, down_spans, strict=True))):
        width = r + (width - 1) * f + span
    return width


def check_choices(options: Mapping[str, Any], **kinds: Any) -> list[tuple[str, str]]:
    """Problems of options that must be one of a Literal's values."""
    return [
        (name, f"{options[name]!r} is not one of {', '.join(get_args(kind))}")
        for name, kind in kinds.items()
        if options[name] not in get_args(kind)
    ]


def check_least(options: Mapping[str, Any], **least: int) -> list[tuple[str, str]]:
    """Problems of options that are below their least value; None passes."""
    return [
        (name, f"{options[name]} must be at least {low}")
        for name, low in least.items()
        if options[name] is not None and options[name] < low
    ]


def check_odd(name: str, kernels: Sequence[int]) -> list[tuple[str, str]]:
    """Problems of kernels that would shorten what they pass over."""
    return [
        (name, f"{k} is even and would change the length; use {k - 1} or {k + 1}")
        for k in kernels
        if k > 0 and k % 2 == 0
    ]


def check_levels(
    options: Mapping[str, Any],
    *,
    allowed: tuple[int, ...],
    dims: Literal[1, 2],
    raw_channels: int,
) -> list[tuple[str, str]]:
    """Problems of the lists that describe the levels, as (option, value and the way out).

    allowed: the factors; raw_channels: of what v1 works on, where v2 has a first convolution.
    """
    channels, blocks, factors = (options[k] for k in ("channels", "blocks", "factors"))
    scales, problems = options["scale_vs_channels"], []

    def bad(option: str, text: str) -> None:
        problems.append((option, text))

    for name in ("channels", "blocks", "factors", "scale_vs_channels"):
        if not options[name]:
            bad(name, "is empty; give at least one number")
        for i, value in enumerate(options[name]):
            if value < 1:
                bad(name, f"{name}[{i}] = {value} must be at least 1")
    for i, f in enumerate(factors):
        if f > 0 and f not in allowed:
            bad("factors", f"factors[{i}] = {f}; use one of {allowed}")
    for name, values in {
        "channels": channels,
        "blocks": blocks,
        "scale_vs_channels": scales,
    }.items():
        count = len(factors) + (name == "channels")
        if values and len(values) != count:
            bad(name, f"{len(values)} entries for {len(factors)} factors; give {count}")
    if options["layout"] == "v1":
        if channels and channels[0] != raw_channels:
            bad("channels", f"layout v1 needs channels[0] = {raw_channels}, not {channels[0]}")
        if options["bottleneck_blocks"] != 0:
            given = options["bottleneck_blocks"]
            bad("bottleneck_blocks", f"layout v1 needs bottleneck_blocks = 0, not {given}")
    if {name for name, _ in problems} & {"channels", "factors", "scale_vs_channels"}:
        return problems

    power = "" if dims == 1 else "^2"
    for i, (f, scale) in enumerate(zip(factors, scales, strict=True)):
        c, deep, gain = channels[i], channels[i + 1], f**dims
        if c * gain != scale * deep:
            outs = [str(c * gain // deep)] if c * gain % deep == 0 else []
            outs += [f"channels[{i + 1}] = {c * gain // scale}"] if c * gain % scale == 0 else []
            bad(
                "scale_vs_channels",
                f"level {i}: channels[{i}]*factors[{i}]{power}/scale[{i}] = {c}*{f}{power}/{scale} "
                f"= {c * gain / scale:g} but channels[{i + 1}] is {deep}; "
                f"use {' or '.join(outs) or f'other channels[{i}] and channels[{i + 1}]'}",
            )
        elif deep % gain:
            what = f"its factor {f}" if dims == 1 else f"the square of its factor {f}"
            bad("channels", f"channels[{i + 1}] = {deep} is not a multiple of {what}")
    return problems
