"""What the 1-d and the 2-d pitch U-Nets share: blocks, the way down and up, the options' checks."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bgray.models.depthwise import depthwise

Norm = Literal["layer", "none"]
Activation = Literal["gelu", "snake"]
Layout = Literal["v1", "v2"]

ENDLESS = 13
"""Depthwise kernels above it never end on a CPU if they are in bfloat16 and channels-last: oneDNN
of torch 2.14 with AVX-512. (The 1-d ones are never in bfloat16 on a CPU.)"""


class Snake(nn.Module):
    """(B, ..., C) -> (B, ..., C): x + sin^2(alpha x) / alpha, Ziyin et al. 2020, eq. 3."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sin(self.alpha * x).square() / (self.alpha + 1e-9)


class Squeeze(torch.autograd.Function):
    """(..., 4C), weight (C, 4C), bias (C,) -> (..., C): GELU, then the linear layer.

    Keeps the input only and computes the GELU again in the backward pass: of the two it would keep
    otherwise, which are most of what a block keeps, that is one.
    """

    @staticmethod
    def forward(wide: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(wide), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:  # pyright: ignore
        wide, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)  # (N, C)
        to_weight = flat.t() @ F.gelu(wide).flatten(0, -2)
        to_wide = torch.ops.aten.gelu_backward(grad @ weight, wide)
        return to_wide, to_weight, flat.sum(0)


class Block(nn.Module):
    """(B, C, T) -> (B, C, T): ConvNeXt block (Liu et al. 2022, fig. 4); (B, C, F, N) for dims 2.

    `gamma` starts at 1e-6, so a fresh block is the identity to about that. In memory the result is
    channels-last, and what comes in had better be, too: else it is copied.
    `recompute`: keep only the input for the backward pass.
    """

    recompute = False

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
        x = x.movedim(1, -1).contiguous()  # (B, T, C)
        if self.recompute and torch.is_grad_enabled():
            y = checkpoint(self.residual, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self.residual(x)
        return (x + y).movedim(-1, 1)  # (B, C, T)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C): what the block adds to its input."""
        if x.dim() == 3:
            y = depthwise(x, self.depthwise.weight, self.depthwise.bias)
        else:
            plane = x.movedim(-1, 1)  # (B, C, F, N)
            if x.device.type == "cpu" and self.depthwise.kernel_size[0] > ENDLESS:
                plane = plane.contiguous()
            y = self.depthwise(plane).movedim(1, -1)
        y = self.widen(self.norm(y))  # (B, T, 4C)
        # gamma on the weights rather than on the result, which need not be kept for it then.
        gamma = self.gamma
        weight, bias = gamma[:, None] * self.narrow.weight, gamma * self.narrow.bias
        if isinstance(self.activation, Snake):
            return F.linear(self.activation(y), weight, bias)
        return Squeeze.apply(y, weight.to(y.dtype), bias.to(y.dtype))


def recompute(model: nn.Module, on: bool = True) -> int:
    """Whether the model's blocks keep only their inputs for the backward pass and compute what is
    in them again, for less memory and more time; the gradients are the same. Returns how many
    blocks there are: none in models other than the U-Nets, where it changes nothing."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.recompute = on
    return len(blocks)


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
        x = join(net.joins[i], x, skips[i])
    return x


def join(conv: nn.Module, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """conv(cat([x, skip], dim=1)) of a convolution with kernel 1, without the copy; channels-last
    in memory."""
    assert isinstance(conv, nn.Conv1d | nn.Conv2d)
    c = x.shape[1]
    weight = conv.weight.flatten(1)  # (Co, C + C of the skip)
    y = F.linear(x.movedim(1, -1), weight[:, :c], conv.bias)
    return (y + F.linear(skip.movedim(1, -1), weight[:, c:])).movedim(-1, 1)


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
