"""The WaveNet without causality that separates instruments on the waveform: log 000's best net."""

from typing import Any

import torch
from torch import nn

from bgray.models.heads import Head, num_logits, output_range, separate
from bgray.models.unet import check_choices, check_least, check_odd
from bgray.problems import refuse

KERNEL = 3  # of the dilated convolutions


class Gated(nn.Module):
    """(B, channels_in, T) -> two of (B, channels, T): the next block's input, and the skip's part.

    z = tanh(W x) * sigmoid(V x), van den Oord et al. 2016 (arXiv:1609.03499), eq. 2, then a 1x1
    convolution for the residual sum and one for the skip (fig. 4). A single input channel is added
    to all channels.

    `shared`: W is V, and residual and skip are the same convolution: what `ModuleList([conv] * 2)`
    made of the original. tanh(a) * sigmoid(a) of one a cannot shut a gate that its signal opens.
    """

    def __init__(self, channels_in: int, channels: int, dilation: int, shared: bool):
        super().__init__()

        def dilated() -> nn.Conv1d:
            padding = dilation * (KERNEL - 1) // 2
            return nn.Conv1d(channels_in, channels, KERNEL, padding=padding, dilation=dilation)

        def pointwise() -> nn.Conv1d:
            return nn.Conv1d(channels, channels, 1)

        self.signal, self.residual = dilated(), pointwise()
        self.gate = self.signal if shared else dilated()
        self.skip = self.residual if shared else pointwise()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.signal(x).tanh() * self.gate(x).sigmoid()  # (B, channels, T)
        return x + self.residual(z), self.skip(z)


class WaveNet(nn.Module):
    """(B, C, T) audio -> (B, S, C, T) audio; every channel passes alone, as a mono clip would.

    Stacks of gated convolutions with dilations 1, 2, 4, ..., as long as before in both directions
    (Rethage et al. 2018, arXiv:1706.07162, sec. 3), skips summed; ReLU before every layer of the
    tail. Any T will do. Defaults: the final net of log 000's report (5.76M). The log's prototype is
    `channels=16, stacks=1, tail_channels=(16, 16)`, with `shared_convolutions=True` as it was run.
    `receptive_field`: input samples that one output sample sees, both sides together.

    `layers`: blocks of a stack, the i-th with dilation 2^i, so that a stack sees 2^(layers+1) - 1.
    `tail_channels`: features of the layers after the skips' sum. `tail_kernels` (odd): theirs and,
    at the end, that of the layer that gives the sources.
    `shared_convolutions`: each block's two dilated convolutions are one, and its two 1x1, too. A
    bug of the prototype, for reproduction only.
    `head`: see bgray.models.heads; softmax and complementary need two sources or more.
    Raises ValueError with all that `check` finds.
    """

    def __init__(
        self,
        *,
        num_sources: int,
        channels: int = 128,
        stacks: int = 4,
        layers: int = 10,
        tail_channels: tuple[int, ...] = (512, 256),
        tail_kernels: tuple[int, ...] = (3, 3, 1),
        shared_convolutions: bool = False,
        head: Head = "none",
    ):
        problems = self.check(
            channels=channels,
            stacks=stacks,
            layers=layers,
            tail_channels=tail_channels,
            tail_kernels=tail_kernels,
            head=head,
        )
        refuse(problems, "WaveNet")

        super().__init__()
        dilations = [2**i for i in range(layers)] * stacks
        self.blocks = nn.ModuleList(
            Gated(1 if i == 0 else channels, channels, dilation, shared_convolutions)
            for i, dilation in enumerate(dilations)
        )
        widths = (channels, *tail_channels, num_logits(head, num_sources))
        self.tail = nn.Sequential()
        for c_in, c_out, k in zip(widths[:-1], widths[1:], tail_kernels, strict=True):
            self.tail.extend([nn.ReLU(), nn.Conv1d(c_in, c_out, k, padding=k // 2)])
        self.head: Head = head
        self.num_sources = num_sources
        self.output_range = output_range(head)
        tail_reach = sum(tail_kernels) - len(tail_kernels)
        self.receptive_field = (KERNEL - 1) * sum(dilations) + tail_reach + 1

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        kernels, widths = options["tail_kernels"], options["tail_channels"]
        problems = check_choices(options, head=Head)
        problems += check_least(options, channels=1, stacks=1, layers=1)
        for name in ("tail_channels", "tail_kernels"):
            for value in options[name]:
                problems += check_least({name: value}, **{name: 1})
        problems += check_odd("tail_kernels", kernels)
        if len(kernels) != len(widths) + 1:
            text = f"{len(kernels)} entries for {len(widths)} tail_channels and the sources"
            problems.append(("tail_kernels", f"{text}; give {len(widths) + 1}"))
        return problems

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        b, c, t = audio.shape
        x = audio.reshape(b * c, 1, t)  # (B*C, 1, T)
        total = torch.zeros_like(x)
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip  # (B*C, channels, T)
        # Nothing follows the last block's residual sum. Times zero it keeps its convolution, which
        # the original has and counts, in the graph: DDP waits for the gradient of every parameter.
        logits = self.tail(total + 0 * x)  # (B*C, S or S-1, T)
        return separate(self.head, logits, audio)
