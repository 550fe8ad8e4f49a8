"""Losses on the waveform itself: mean absolute and mean squared error."""

import torch
from torch import nn


class L1(nn.Module):
    """(B, S, C, T) estimate and target -> 0-d mean |estimate - target|, in float32."""

    def forward(self, estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (estimate.float() - target.float()).abs().mean()


class Mse(nn.Module):
    """(B, S, C, T) estimate and target -> 0-d mean (estimate - target)^2, in float32."""

    def forward(self, estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (estimate.float() - target.float()).square().mean()
