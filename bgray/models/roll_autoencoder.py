"""The convolutional piano-roll autoencoder of log 003, experiment 01, and the VAE it was named."""

from itertools import pairwise
from math import inf
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from bgray.problems import refuse

Head = Literal["linear", "legacy"]


class DoubleConv(nn.Sequential):
    """(B, channels_in, T, P) -> (B, channels_out, T, P): twice 3x3 convolution, batch norm, ReLU.

    transposed: with transposed convolutions, of the same size at stride 1. bare: the second
    convolution is the end, without norm and ReLU.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, transposed: bool = False, bare: bool = False
    ):
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        layers: list[nn.Module] = []
        for channels in (channels_in, channels_out):
            layers += [kind(channels, channels_out, 3, padding=1)]
            layers += [nn.BatchNorm2d(channels_out), nn.ReLU()]
        super().__init__(*(layers[:-2] if bare else layers))


class RollAutoencoder(nn.Module):
    """Roll (B, P, T) -> (B, 1, P, T): a convolutional autoencoder over time and pitch.

    The encoder's blocks halve time and pitch by 2x2 maxima, save the first and the last; the
    decoder's are their mirror and double, bilinearly. With `head: legacy` and the other defaults
    it has experiment 01's 7,068,879 parameters, with `linear` two fewer.

    The latent, (B, widths[-2], T/8, P/8), is what leaves the decoder's first block: there the log
    put its random numbers. T and P are filled up with silence to multiples of 8, or of what
    the number of blocks makes of it, and the output is cut to T and P again.

    widths: channels of the encoder's blocks.
    variational: a 1x1 convolution turns the latent into mean and log-variance of a Gaussian
      (Kingma & Welling 2014, arXiv:1312.6114, section 3). Training decodes a draw from it and
      evaluation its mean; both are returned beside the estimate, for the loss `kl`.
    head: `legacy` ends in batch norm and ReLU, so that no logit is below 0 and no silent cell gets
      a probability below 0.5: why the log saw "almost no notes". `linear` leaves these two off.
    """

    def __init__(
        self,
        *,
        channels_in: int = 88,
        widths: tuple[int, ...] = (32, 64, 128, 256, 512),
        variational: bool = False,
        head: Head = "linear",
    ):
        refuse(self.check(widths=widths))
        super().__init__()
        self.channels_in = channels_in
        self.encoder = nn.ModuleList([DoubleConv(a, b) for a, b in pairwise((1, *widths))])
        sizes = list(pairwise((*reversed(widths), 1)))
        self.decoder = nn.ModuleList(
            [DoubleConv(a, b, transposed=True, bare=head == "linear" and b == 1) for a, b in sizes]
        )
        self.latent_channels = widths[-2]
        self.moments = nn.Conv2d(widths[-2], 2 * widths[-2], 1) if variational else None
        self.extras = ("mean", "log_variance") if variational else ()
        self.output_range = (-inf, inf) if head == "linear" else (0.0, inf)
        self.grid = 2 ** (len(widths) - 2)  # one latent cell is grid x grid of the roll's

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        widths = options["widths"]
        problems = [("widths", f"{width} must be at least 1") for width in widths if width < 1]
        if len(widths) < 2:
            problems.append(("widths", f"{len(widths)} entries; give at least 2"))
        return problems

    def forward(self, roll: torch.Tensor) -> Any:
        _, pitches, steps = roll.shape
        latent, extras = self.encode(roll)
        estimate = self.decode(latent)[..., :pitches, :steps]
        return (estimate, extras) if self.extras else estimate

    def encode(self, roll: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(B, P, T) -> latent (B, widths[-2], T/8, P/8), rounded up, and the extras.

        The latent of a variational net is a draw while training, otherwise the mean.
        """
        _, pitches, steps = roll.shape
        x = F.pad(roll, (0, -steps % self.grid, 0, -pitches % self.grid))
        x = x.transpose(1, 2)[:, None]  # (B, 1, T, P): the log's orientation
        for i, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if 0 < i < len(self.encoder) - 1 else x)
        x = self.decoder[0](x)
        if self.moments is None:
            return x, {}
        mean, log_variance = self.moments(x).chunk(2, dim=1)
        latent = mean
        if self.training:
            latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return latent, {"mean": mean, "log_variance": log_variance}

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Latent (B, widths[-2], T/8, P/8) -> (B, 1, P, T)."""
        x = latent
        for i, block in enumerate(self.decoder[1:]):
            x = block(double(x) if i < len(self.decoder) - 2 else x)
        return x.transpose(2, 3)  # (B, 1, P, T)

    def draw(self, steps: int, generator: torch.Generator, count: int = 1) -> torch.Tensor:
        """A latent for `steps`, on the CPU: from N(0, 1), the prior, if variational. Otherwise
        from U[0, 1) as in the log, though nothing makes the latents of music look like that."""
        cells = (-(-steps // self.grid), -(-self.channels_in // self.grid))
        draw = torch.rand if self.moments is None else torch.randn
        return draw(count, self.latent_channels, *cells, generator=generator)

    @torch.no_grad()
    def generate(self, steps: int, generator: torch.Generator, count: int = 1) -> torch.Tensor:
        """New music, (count, 1, P, steps), as values of the output; call `eval()` first."""
        device = next(self.parameters()).device
        roll = self.decode(self.draw(steps, generator, count).to(device))
        return roll[..., : self.channels_in, :steps]


def double(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, P) -> (B, C, 2T, 2P). Corners not aligned: else a note would move with T."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
