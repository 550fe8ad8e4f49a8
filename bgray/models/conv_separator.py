"""Log 000's first nets: two to four convolutions on the waveform, the first one long."""

from typing import Any, Literal

import scipy.fft
import torch
from torch import nn

from bgray.models.heads import Head, num_logits, output_range, separate
from bgray.models.unet import check_choices, check_least, check_odd
from bgray.problems import refuse

Activation = Literal["relu", "none"]

# Where FFTs overtake the direct sum over one channel of 5 s on one CPU core: 54 ms against 450 ms
# at 141 taps, 16 ms against 8 s at 551, 64 ms against 23 s at 2205; at 63 taps they are even.
FFT_TAPS = 128


def convolve(conv: nn.Conv1d, audio: torch.Tensor) -> torch.Tensor:
    """(B, 1, T) -> (B, C, T) float32: what conv(audio) is to about 1e-6, by FFT for long kernels.

    conv: one input channel, an odd kernel and half of it as padding.
    """
    taps = conv.kernel_size[0]
    if taps < FFT_TAPS:
        return conv(audio).float()
    assert conv.bias is not None
    t = audio.shape[-1]
    n = scipy.fft.next_fast_len(t + taps - 1, real=True)
    # Flipped, because a convolution layer correlates.
    response = torch.fft.rfft(conv.weight.float().flip(-1), n)  # (C, 1, F) complex
    spectrum = torch.fft.rfft(audio.float(), n)  # (B, 1, F) complex
    y = torch.fft.irfft(spectrum * response.transpose(0, 1), n)  # (B, C, n)
    return y[..., taps // 2 : taps // 2 + t] + conv.bias[:, None]


class Rest(nn.Module):
    """(B, C0, T) first features, (B, 1, T) mixture -> (B, num_logits, T): all later layers."""

    def __init__(
        self,
        widths: tuple[int, ...],
        kernels: tuple[int, ...],
        logits: int,
        activation: Activation,
        residual: bool,
        present_input: bool,
    ):
        super().__init__()
        self.residual, self.present_input = residual, present_input
        self.activation = nn.ReLU() if activation == "relu" else nn.Identity()
        self.convs = nn.ModuleList(
            nn.Conv1d(c_in, c_out, k, padding=k // 2)
            for c_in, c_out, k in zip(widths[:-1], widths[1:], kernels[:-1], strict=True)
        )
        k, c_last = kernels[-1], widths[-1] + present_input
        self.last = nn.Conv1d(c_last, logits, k, padding=k // 2)

    def forward(self, features: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
        y = self.activate(features, mixture)
        for conv in self.convs:
            y = self.activate(conv(y), y)
        if self.present_input:
            y = torch.cat([y, mixture], dim=1)  # (B, C+1, T)
        return self.last(y)

    def activate(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The layer's output y after activation, with its input x added if `residual`."""
        y = self.activation(y)
        return y + x if self.residual else y


class ConvSeparator(nn.Module):
    """(B, C, T) audio -> (B, S, C, T) audio; every channel passes alone, as a mono clip would.

    The nets of log 000 (instrument separation): `4_convs` is the default, and
    `kernels=(2205, 1), inner_channels=10` is "conv1 1x10x2205, conv2 10x1x1" (50 ms at 44.1 kHz).
    Any T will do. The first convolution lies outside `core`: on long kernels it goes by FFT.
    `receptive_field`: input samples that one output sample sees, both sides together.

    `kernels` (odd): of the layers from the input to the output, two or more.
    `inner_channels`: features between the layers, one fewer than kernels; a single number is for
    all.
    `activation`: after every layer but the last.
    `residual`: each of those layers' input is added to what it gives after activation; the first
    one's input is the mixture, added to all channels.
    `present_input`: the last layer also sees the mixture, as one more channel.
    `head`: see bgray.models.heads; softmax and complementary need two sources or more.
    Raises ValueError with all that `check` finds.
    """

    def __init__(
        self,
        *,
        num_sources: int,
        kernels: tuple[int, ...] = (551, 141, 37, 11),
        inner_channels: int | tuple[int, ...] = 15,
        activation: Activation = "relu",
        residual: bool = False,
        present_input: bool = False,
        head: Head = "none",
    ):
        problems = self.check(
            kernels=kernels,
            inner_channels=inner_channels,
            activation=activation,
            residual=residual,
            head=head,
        )
        refuse(problems, "ConvSeparator")
        logits = num_logits(head, num_sources)

        super().__init__()
        widths = _widths(inner_channels, len(kernels) - 1)
        self.first = nn.Conv1d(1, widths[0], kernels[0], padding=kernels[0] // 2)
        self.core = Rest(widths, kernels[1:], logits, activation, residual, present_input)
        self.head: Head = head
        self.num_sources = num_sources
        self.output_range = output_range(head)
        self.receptive_field = sum(kernels) - len(kernels) + 1

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        kernels, inner = options["kernels"], options["inner_channels"]
        problems = check_choices(options, activation=Activation, head=Head)
        if len(kernels) < 2:
            problems.append(("kernels", f"{len(kernels)} entries; give two layers or more"))
        for k in kernels:
            problems += check_least({"kernels": k}, kernels=1)
        problems += check_odd("kernels", kernels)
        if isinstance(inner, int):
            return problems + check_least(options, inner_channels=1)
        for width in inner:
            problems += check_least({"inner_channels": width}, inner_channels=1)
        if len(kernels) > 1 and len(inner) != len(kernels) - 1:
            text = f"{len(inner)} entries for {len(kernels)} kernels; give {len(kernels) - 1} or 1"
            problems.append(("inner_channels", f"{text} number for all"))
        if options["residual"] and len(set(inner)) > 1:
            text = f"{inner} differ, so a layer's input cannot be added to its output"
            problems.append(("residual", f"needs equal inner_channels; {text}"))
        return problems

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        b, c, t = audio.shape
        mixture = audio.reshape(b * c, 1, t)  # (B*C, 1, T)
        logits = self.core(convolve(self.first, mixture), mixture)  # (B*C, S or S-1, T)
        return separate(self.head, logits, audio)


def _widths(inner_channels: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return (inner_channels,) * count if isinstance(inner_channels, int) else inner_channels
