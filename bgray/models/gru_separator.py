"""Log 000's recurrent net: one long convolution, then a GRU that steps through every sample."""

from typing import Any

import torch
from torch import nn

from bgray.models.conv_separator import convolve
from bgray.models.heads import Head, num_logits, output_range, separate
from bgray.models.unet import check_choices, check_least, check_odd
from bgray.problems import refuse


class Recurrent(nn.Module):
    """(B, channels, T) -> (B, num_logits, T): ReLU, GRU over T from a state of zeros, ReLU, 1x1."""

    def __init__(self, channels: int, hidden: int, logits: int):
        super().__init__()
        self.gru = nn.GRU(channels, hidden, batch_first=True)
        self.out = nn.Conv1d(hidden, logits, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        y, _ = self.gru(features.relu().transpose(1, 2))  # (B, T, hidden)
        return self.out(y.transpose(1, 2).relu())  # (B, num_logits, T)


class GruSeparator(nn.Module):
    """(B, C, T) audio -> (B, S, C, T) audio; every channel passes alone, as a mono clip would.

    Log 000's "conv1 1x10x551, relu, gru1 10x3x1, relu, conv2 3x1x1", which is the default. Any T
    will do, but each sample waits for the one before: 5 s at 44.1 kHz are 220,500 steps. The
    convolution lies outside `core`: on long kernels it goes by FFT. An output sample sees all of
    the past and half a kernel of the future.

    `kernel` (odd): of the convolution. `channels`: its features. `hidden`: the GRU's state.
    `head`: see bgray.models.heads; softmax and complementary need two sources or more.
    Raises ValueError with all that `check` finds.
    """

    def __init__(
        self,
        *,
        num_sources: int,
        kernel: int = 551,
        channels: int = 10,
        hidden: int = 3,
        head: Head = "none",
    ):
        problems = self.check(kernel=kernel, channels=channels, hidden=hidden, head=head)
        refuse(problems, "GruSeparator")
        logits = num_logits(head, num_sources)

        super().__init__()
        self.first = nn.Conv1d(1, channels, kernel, padding=kernel // 2)
        self.core = Recurrent(channels, hidden, logits)
        self.head: Head = head
        self.num_sources = num_sources
        self.output_range = output_range(head)

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        problems = check_choices(options, head=Head)
        problems += check_least(options, kernel=1, channels=1, hidden=1)
        return problems + check_odd("kernel", [options["kernel"]])

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        b, c, t = audio.shape
        mixture = audio.reshape(b * c, 1, t)  # (B*C, 1, T)
        logits = self.core(convolve(self.first, mixture))  # (B*C, S or S-1, T)
        return separate(self.head, logits, audio)
