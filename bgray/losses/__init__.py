"""The table of losses, each (B, S, C, T) estimate and target to a scalar; their weighted sum."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bgray.losses.cdpam import Cdpam
from bgray.losses.dac_features import DacFeatures
from bgray.losses.mrstft import MultiResolutionStft
from bgray.losses.multi_mel import MultiScaleMel
from bgray.losses.roll import BceLogits, Dice, Kl
from bgray.losses.si_sdr import SiSdr
from bgray.losses.spectrogram import SpecMae, Spectrogram
from bgray.losses.sum_constraint import SumConstraint
from bgray.losses.umx_mse import UmxMse
from bgray.losses.waveform import L1, Mse

LOSSES = {
    "l1": L1,
    "mse": Mse,
    "mrstft": MultiResolutionStft,
    "multi_mel": MultiScaleMel,
    "spectrogram": Spectrogram,
    "spec_mae": SpecMae,
    "sum_constraint": SumConstraint,
    "dac_features": DacFeatures,
    "cdpam": Cdpam,
    "si_sdr": SiSdr,
    "umx_mse": UmxMse,
    "bce_logits": BceLogits,
    "dice": Dice,
    "kl": Kl,
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
        self,
        estimate: torch.Tensor,
        target: torch.Tensor,
        extras: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(total, parts): 0-d tensors; the parts are unweighted and detached, for the log.

        Both inputs are (B, S, C, T); `extras` is what the model returned beside its estimate.
        ValueError if their shapes differ: broadcasting would hide a missing dimension.
        """
        if estimate.shape != target.shape:
            shapes = f"{tuple(estimate.shape)} and {tuple(target.shape)}"
            raise ValueError(f"estimate and target differ in shape: {shapes}")
        terms, parts = [], {}
        for name, loss in self.losses.items():
            more = (extras or {},) if needed(loss) else ()
            part = loss(estimate, target, *more)
            terms.append(self.weights[name] * part)
            parts[name] = part.detach()
            logged: Mapping[str, torch.Tensor] = getattr(loss, "logged", {})
            parts |= {f"{name}_{key}": value for key, value in logged.items()}
        return torch.stack(terms).sum(), parts

    def advance(self, step: int, average: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """After each step, counted from 1: moves the losses on that change with the training.

        average: mean of a small tensor over the DDP ranks.
        """
        for loss in self._moving().values():
            loss.advance(step, average)

    def progress(self) -> dict[str, dict[str, torch.Tensor]]:
        """Where the losses that change have got to, for the checkpoint; frozen networks stay
        out."""
        return {name: loss.state_dict() for name, loss in self._moving().items()}

    def restore(self, progress: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for name, loss in self._moving().items():
            loss.load_state_dict(progress[name])

    def _moving(self) -> dict[str, Any]:
        return {name: loss for name, loss in self.losses.items() if hasattr(loss, "advance")}


def needed(loss: nn.Module) -> tuple[str, ...]:
    """Names of what a loss wants from the model beside the estimate."""
    extras: Any = getattr(loss, "extras", ())
    return extras


FAR_APART = 30
"""Times that one weighted part of the loss may outweigh another without a warning."""


def far_apart(parts: Mapping[str, float]) -> str:
    """In words, when one weighted part of a loss outweighs another so far that the small one hardly
    trains; empty when none does."""
    large, small = max(parts, key=parts.__getitem__), min(parts, key=parts.__getitem__)
    if parts[large] <= FAR_APART * parts[small]:
        return ""
    text = f"{large} is {parts[large]:.3g}, {small} {parts[small]:.3g} (weighted)"
    return f"{text}: the smaller one hardly counts"
