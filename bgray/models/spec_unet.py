"""The 2-d ConvNeXt U-Net on the complex STFT that removes pitch-shift artefacts or a shift."""

from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from bgray.models.inverse_stft import istft
from bgray.models.unet import (
    Block,
    Layout,
    check_choices,
    check_least,
    check_levels,
    check_odd,
    receptive_frames,
    run_v1,
    run_v2,
)
from bgray.problems import refuse

FACTORS = (1, 2, 4)
EDGE_KERNEL = 3  # v2's first and last convolution
PARTS = 2  # real and imaginary

Output = Literal["direct", "difference"]


def down_kernel(factor: int) -> int:
    """Kernel of the strided convolutions: the factor and one more, but 1 for factor 1."""
    return factor + 1 if factor > 1 else 1


class Down2d(nn.Module):
    """(B, channels_in, F, N) -> (B, channels_out, F/factor, N/factor): strided convolution + skip.

    The skip is torch's PixelUnshuffle (channel-major: c*factor^2 + phase), then the mean of each
    run of channels_in*factor^2/channels_out channels: phases of one channel, unlike in `wav_unet`.
    """

    def __init__(self, channels_in: int, channels_out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.channels_out = channels_out
        k, pad = down_kernel(factor), factor // 2
        self.conv = nn.Conv2d(channels_in, channels_out, k, stride=factor, padding=pad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = F.pixel_unshuffle(x, self.factor)  # (B, Ci*f^2, F/f, N/f)
        skip = skip.unflatten(1, (self.channels_out, -1)).mean(2)  # (B, Co, F/f, N/f)
        return self.conv(x) + skip  # (B, Co, F/f, N/f)


class Up2d(nn.Module):
    """(B, channels_in, F, N) -> (B, channels_out, F*factor, N*factor): transposed conv + skip.

    The skip is torch's PixelShuffle, then each channel channels_out*factor^2/channels_in times.
    """

    def __init__(self, channels_in: int, channels_out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.repeats = channels_out * factor**2 // channels_in
        k, pad = 2 * factor if factor > 1 else 1, factor // 2
        self.conv = nn.ConvTranspose2d(channels_in, channels_out, k, stride=factor, padding=pad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = F.pixel_shuffle(x, self.factor)  # (B, Ci/f^2, F*f, N*f)
        skip = skip.repeat_interleave(self.repeats, dim=1)  # (B, Co, F*f, N*f)
        return self.conv(x) + skip  # (B, Co, F*f, N*f)


class PlaneUNet(nn.Module):
    """(B, 2, F, N) -> (B, 2, F, N), real-valued; F and N are multiples of all factors' product.

    `reach_frames(n)`: the most input frames, both sides together, that n output frames see.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        blocks: tuple[int, ...],
        factors: tuple[int, ...],
        bottleneck_blocks: int,
        kernel: int,
        layout: Layout,
    ):
        super().__init__()
        self.layout = layout

        def stack(width: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(Block(width, kernel, dims=2) for _ in range(count)))

        # v1 runs a level's blocks at the deep end of its resampling, v2 at the shallow end.
        widths = channels[1:] if layout == "v1" else channels[:-1]
        levels = list(zip(widths, blocks, strict=True))
        pairs = list(zip(channels[:-1], channels[1:], factors, strict=True))
        self.encoder = nn.ModuleList(stack(c, n) for c, n in levels)
        self.downs = nn.ModuleList(Down2d(a, b, f) for a, b, f in pairs)
        self.bottom = stack(channels[-1], bottleneck_blocks)
        self.ups = nn.ModuleList(Up2d(b, a, f) for a, b, f in pairs)
        self.decoder = nn.ModuleList(stack(c, n) for c, n in levels)
        reach = [n * (kernel - 1) for n in blocks]
        if layout == "v1":
            bottom, reach = 2 * reach[-1], [0, *reach[:-1]]
            self.joins = nn.ModuleList(nn.Identity() for _ in factors)
        else:
            bottom = bottleneck_blocks * (kernel - 1)
            reach[0] += EDGE_KERNEL - 1
            edge: dict[str, Any] = {"kernel_size": EDGE_KERNEL, "padding": EDGE_KERNEL // 2}
            self.conv_in = nn.Conv2d(PARTS, channels[0], **edge)
            self.conv_out = nn.Conv2d(channels[0], PARTS, **edge)
            self.joins = nn.ModuleList(nn.Conv2d(2 * c, c, 1) for c in channels[:-1])
        # A strided convolution starts f//2 before the f frames of its skip, and ends no later.
        self.reach = (reach, factors, [f + f // 2 for f in factors], bottom)

    def reach_frames(self, width: int) -> int:
        return receptive_frames(*self.reach, width=width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "v1":
            return run_v1(self, x)
        return self.conv_out(run_v2(self, self.conv_in(x)))


class SpecUNet(nn.Module):
    """(B, C, T) audio -> (B, 1, C, T) audio; every channel passes alone, as a mono clip would.

    `core` maps the real and imaginary parts of the STFT (Hann window of `n_fft` samples, centred,
    reflected at the edges) to those of the estimate; only it is to be compiled. Any T will do: the
    input gets zeros at its end until the number of frames is a multiple of the factors' product
    (and there is enough to reflect), and the estimate is cut to T. STFT and inverse are float32
    under autocast, too.
    `receptive_field`: the most input samples, both sides together, that one output sample sees.

    `layout`: "v1" works on the STFT itself (channels[0] = 2) and adds the skips, the last of which
    is the input; "v2" has a convolution at both ends, joins each skip by concatenation and a 1x1
    convolution after the level's blocks, and has blocks at the bottom.
    `channels` has one entry more than `blocks`, `factors` and `scale_vs_channels`;
    channels[i] * factors[i]^2 / scale_vs_channels[i] must be channels[i+1].
    `kernel` (odd): of the depthwise convolutions, over bins and frames.
    `output`: what the net gives is the estimate (direct) or is added to the input (difference:
    output 21 of the deartifact log, there with layout v1, whose last skip adds the input as well).
    Raises ValueError with all that `check` finds. Defaults: outputs 16 to 22 of the deartifact log.
    """

    window: torch.Tensor

    def __init__(
        self,
        *,
        channels: tuple[int, ...] = (2, 32, 128, 256, 512),
        blocks: tuple[int, ...] = (2, 2, 3, 4),
        factors: tuple[int, ...] = (4, 2, 2, 2),
        scale_vs_channels: tuple[int, ...] = (1, 1, 2, 2),
        bottleneck_blocks: int = 0,
        kernel: int = 7,
        n_fft: int = 2046,
        hop: int = 512,
        layout: Layout = "v1",
        output: Output = "direct",
    ):
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        problems = self.check(**options)
        refuse(problems, "SpecUNet")

        super().__init__()
        self.n_fft, self.hop, self.output = n_fft, hop, output
        self.frame_multiple = prod(factors)
        self.core = PlaneUNet(channels, blocks, factors, bottleneck_blocks, kernel, layout)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        # The periodic Hann window's first value is 0: n_fft - 1 samples count.
        overlapping = -(-(n_fft - 1) // hop)
        self.receptive_field = (self.core.reach_frames(overlapping) - 1) * hop + n_fft - 1

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the full options (none left out) as (option, value and the way out)."""
        n_fft, hop, factors = (options[k] for k in ("n_fft", "hop", "factors"))
        problems = check_choices(options, layout=Layout, output=Output)
        problems += check_least(options, bottleneck_blocks=0, kernel=1, n_fft=2, hop=1)
        problems += check_odd("kernel", [options["kernel"]])
        problems += check_levels(options, allowed=FACTORS, dims=2, raw_channels=PARTS)
        if problems:
            return problems
        bins, multiple = n_fft // 2 + 1, prod(factors)
        if n_fft % 2:
            text = f"{n_fft} is odd; use {n_fft - 1} or {n_fft + 1}"
            problems.append(("n_fft", text))
        elif bins % multiple:
            below = max(1, bins // multiple) * multiple
            around = f"{2 * below - 2} or {2 * (below + multiple) - 2}"
            text = f"{n_fft} has {bins} bins, not a multiple of all factors' product {multiple}"
            problems.append(("n_fft", f"{text}; use {around}"))
        if hop > n_fft // 2:
            text = f"{hop} is more than half of n_fft = {n_fft}, so the windows barely overlap"
            problems.append(("hop", f"{text}; use at most {n_fft // 2}"))
        return problems

    def padded_length(self, samples: int) -> int:
        """The least length from `samples` on whose frames are a multiple of `frame_multiple`.

        There is a frame every `hop` samples, the first at 0 and the last at the end, so that
        (length + hop) is a multiple of hop * frame_multiple. Reflecting takes n_fft/2 + 1 samples.
        """
        least = max(samples, self.n_fft // 2 + 1)
        unit = self.hop * self.frame_multiple
        return -(-(least + self.hop) // unit) * unit - self.hop

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        b, c, t = audio.shape
        x = audio.reshape(b * c, t)  # (B*C, T)
        with torch.autocast(audio.device.type, enabled=False):
            padded = F.pad(x.float(), (0, self.padded_length(t) - t))
            spectrum = torch.stft(
                padded, self.n_fft, self.hop, window=self.window, return_complex=True
            )  # (B*C, F, N) complex
            parts = torch.stack([spectrum.real, spectrum.imag], dim=1)  # (B*C, 2, F, N)
        parts = self.core(parts)
        with torch.autocast(audio.device.type, enabled=False):
            real, imag = parts.float().unbind(1)
            spectrum = torch.complex(real, imag)  # (B*C, F, N)
            y = istft(spectrum, self.n_fft, self.hop, self.window, t)  # (B*C, T)
            if self.output == "difference":
                y = x + y
        return y.reshape(b, 1, c, t)  # (B, S=1, C, T)
