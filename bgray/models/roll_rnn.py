"""The recurrent piano-roll autoencoders of log 003: experiments 02 to 05."""

from itertools import pairwise
from math import inf
from typing import Any, Literal

import torch
from torch import nn

from bgray.problems import refuse

Cell = Literal["rnn", "lstm"]
Bridge = Literal["none", "batch_norm"]
Head = Literal["linear", "legacy"]


class Stack(nn.Module):
    """(B, T, size_in) -> (B, T, size_out): recurrent layers over time, from a state of zeros."""

    def __init__(self, cell: Cell, size_in: int, size_out: int, layers: int):
        super().__init__()
        kind = nn.LSTM if cell == "lstm" else nn.RNN
        self.layers = kind(size_in, size_out, layers, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)[0]


class NormBridge(nn.Module):
    """(B, T, H) -> the same: batch norm with one mean and variance for all of it, then ReLU.

    The log's `BatchNorm2d(1)`: two parameters, however wide the layers between which it stands.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x[:, None])[:, 0].relu()


class RollRnn(nn.Module):
    """Roll (B, P, T) -> (B, 1, P, T): stacks of recurrent layers to a hidden sequence and back.

    Log 003's settings, all with `head: legacy`:

        02      cell rnn, encoder [64], layers 5, bridge none             119,344 parameters
        03, 04  cell lstm, encoder [128], layers 5, bridge none           967,360
        04.3    cell lstm, encoder [128], layers 5, bridge batch_norm     967,362
        05      cell lstm, encoder [128, 256], layers 3, bridge batch_norm  2,487,622

    encoder: hidden size of each encoder stack; the decoder mirrors them, ending at P.
    layers: in each stack.
    bridge: what stands between two stacks.
    head: `legacy` gives the last hidden state, which cannot leave (-1, 1), so that its sigmoid
      lies in (0.27, 0.73) and binary cross-entropy never falls below 0.3133: the log's "BCE still
      not converging". `linear` adds a layer P -> P, and the output is free.
    """

    def __init__(
        self,
        *,
        channels_in: int = 88,
        cell: Cell = "lstm",
        encoder: tuple[int, ...] = (128, 256),
        layers: int = 3,
        bridge: Bridge = "batch_norm",
        head: Head = "linear",
    ):
        refuse(self.check(encoder=encoder, layers=layers))
        super().__init__()
        up = pairwise((channels_in, *encoder))
        down = pairwise((*reversed(encoder), channels_in))
        self.encoder = nn.ModuleList([Stack(cell, *sizes, layers) for sizes in up])
        self.decoder = nn.ModuleList([Stack(cell, *sizes, layers) for sizes in down])
        # bridges[i] follows stack i, encoder and decoder counted on; none follows the last.
        between = range(2 * len(encoder) - 1)
        self.bridges = nn.ModuleList(
            [NormBridge() if bridge == "batch_norm" else nn.Identity() for _ in between]
        )
        self.head = nn.Linear(channels_in, channels_in) if head == "linear" else nn.Identity()
        self.output_range = (-inf, inf) if head == "linear" else (-1.0, 1.0)
        self.hidden = encoder[-1]

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        encoder, layers = options["encoder"], options["layers"]
        problems = [("encoder", f"{size} must be at least 1") for size in encoder if size < 1]
        if not encoder:
            problems.append(("encoder", "is empty; give at least one hidden size"))
        if layers < 1:
            problems.append(("layers", f"{layers} must be at least 1"))
        return problems

    def forward(self, roll: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(roll))

    def encode(self, roll: torch.Tensor) -> torch.Tensor:
        """(B, P, T) -> latent (B, T, encoder[-1]), the bridge after the encoder included."""
        x = roll.transpose(1, 2)  # (B, T, P)
        for stack, bridge in zip(self.encoder, self.bridges, strict=False):
            x = bridge(stack(x))
        return x

    def decode(self, latent: torch.Tensor, *, skip_bridges: bool = False) -> torch.Tensor:
        """Latent (B, T, encoder[-1]) -> (B, 1, P, T).

        skip_bridges: without what stands between the decoder's stacks, as the log's script for
        sampling, which was not the network that had been trained.
        """
        x = latent
        for i, stack in enumerate(self.decoder):
            if i > 0 and not skip_bridges:
                x = self.bridges[len(self.encoder) + i - 1](x)
            x = stack(x)
        return self.head(x).transpose(1, 2)[:, None]  # (B, 1, P, T)

    def draw(self, steps: int, generator: torch.Generator, count: int = 1) -> torch.Tensor:
        """A latent (count, steps, encoder[-1]) from U[0, 1), as the log drew it; on the CPU."""
        return torch.rand(count, steps, self.hidden, generator=generator)

    @torch.no_grad()
    def generate(
        self,
        steps: int,
        generator: torch.Generator,
        count: int = 1,
        *,
        skip_bridges: bool = False,
    ) -> torch.Tensor:
        """New music, (count, 1, P, steps), as values of the output; call `eval()` first."""
        device = next(self.parameters()).device
        latent = self.draw(steps, generator, count).to(device)
        return self.decode(latent, skip_bridges=skip_bridges)
