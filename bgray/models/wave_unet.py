"""Wave-U-Net, which log 000 tried before its WaveNet and found worse."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bgray.models.heads import Head, num_logits, output_range, separate
from bgray.models.unet import check_choices, check_least, check_odd
from bgray.problems import refuse

SLOPE = 0.2  # of LeakyReLU below zero


class WaveUNet(nn.Module):
    """(B, C, T) audio -> (B, S, C, T) audio; every channel passes alone, as a mono clip would.

    Stoller et al. 2018 (arXiv:1806.03185), table 1, with zero padding: `levels` times a
    convolution and every second sample, one convolution at the bottom, and back by linear
    interpolation, each time joined with what the way down had at that resolution; at the end
    joined with the input. T is padded to a multiple of 2**levels and cut again.

    `levels`: halvings. `step`: channels that each level adds. `kernel`, `up_kernel` (odd): on the
    way down and at the bottom, on the way up. Defaults: log 000's, 622,702 parameters for one
    source. `head`: see bgray.models.heads. Raises ValueError with all that `check` finds.
    """

    def __init__(
        self,
        *,
        num_sources: int,
        levels: int = 12,
        step: int = 4,
        kernel: int = 25,
        up_kernel: int = 15,
        head: Head = "none",
    ):
        options = {"levels": levels, "step": step, "kernel": kernel, "up_kernel": up_kernel}
        refuse(self.check(**options, head=head), "WaveUNet")
        logits = num_logits(head, num_sources)

        super().__init__()
        widths = [1, *(step * (i + 1) for i in range(levels + 1))]  # of the input, levels, bottom
        pad, up_pad = kernel // 2, up_kernel // 2
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.down = nn.ModuleList(nn.Conv1d(a, b, kernel, padding=pad) for a, b in pairs[:-1])
        self.bottom = nn.Conv1d(*pairs[-1], kernel, padding=pad)
        self.up = nn.ModuleList(
            nn.Conv1d(a + b, a, up_kernel, padding=up_pad) for a, b in reversed(pairs[1:])
        )
        self.out = nn.Conv1d(step + 1, logits, 1)
        self.head: Head = head
        self.num_sources, self.levels = num_sources, levels
        self.output_range = output_range(head)

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        problems = check_choices(options, head=Head)
        problems += check_least(options, levels=1, step=1, kernel=1, up_kernel=1)
        for name in ("kernel", "up_kernel"):
            problems += check_odd(name, [options[name]])
        return problems

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        b, c, t = audio.shape
        mixture = audio.reshape(b * c, 1, t)
        mixture = F.pad(mixture, (0, -t % 2**self.levels))
        x, skips = mixture, []
        for conv in self.down:
            x = F.leaky_relu(conv(x), SLOPE)
            skips.append(x)  # before every second sample is dropped
            x = x[..., ::2]
        x = F.leaky_relu(self.bottom(x), SLOPE)
        for conv in self.up:
            x = F.interpolate(x, scale_factor=2, mode="linear", align_corners=False)
            x = F.leaky_relu(conv(torch.cat([x, skips.pop()], dim=1)), SLOPE)
        logits = self.out(torch.cat([x, mixture], dim=1))[..., :t]  # (B*C, S or S-1, T)
        return separate(self.head, logits, audio)
