"""The table of losses, each (B, S, C, T) estimate and target to a scalar; their weighted sum."""

from collections.abc import Mapping

import torch
from torch import nn

from bgray.losses.mrstft import MultiResolutionStft
from bgray.losses.multi_mel import MultiScaleMel
from bgray.losses.waveform import L1, Mse

LOSSES = {
    "l1": L1,
    "mse": Mse,
    "mrstft": MultiResolutionStft,
    "multi_mel": MultiScaleMel,
}


class LossSum(nn.Module):
    """The weighted sum of `terms`, a map from name to (loss module, weight)."""

    def __init__(self, terms: Mapping[str, tuple[nn.Module, float]]):
        super().__init__()
        if not terms:
            raise ValueError("a loss needs at least one term")
        self.losses = nn.ModuleDict({name: loss for name, (loss, _) in terms.items()})
        self.weights = {name: weight for name, (_, weight) in terms.items()}

    def forward(
        self, estimate: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(total, parts): 0-d tensors; the parts are unweighted and detached, for the log.

        Both inputs are (B, S, C, T). ValueError if their shapes differ: broadcasting would
        hide a missing dimension.
        """
        if estimate.shape != target.shape:
            shapes = f"{tuple(estimate.shape)} and {tuple(target.shape)}"
            raise ValueError(f"estimate and target differ in shape: {shapes}")
        parts = {name: loss(estimate, target) for name, loss in self.losses.items()}
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}
