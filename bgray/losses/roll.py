"""Losses on piano rolls: cross-entropy and Dice of the logits, and the VAE's Kullback-Leibler."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from bgray.problems import refuse

Estimates = Literal["audio", "logits", "level"]


class BceLogits(nn.Module):
    """(B, S, C, T) logits and target in [0, 1] -> 0-d mean binary cross-entropy in nats.

    pos_weight: factor for the cells that sound; (1 - density) / density weighs both alike.
    bounded_ok: allows a model whose output cannot be every logit. The log had a hidden state in
      (-1, 1) there, whose cross-entropy cannot fall below ln(1 + 1/e) = 0.3133.
    """

    estimates: Estimates = "logits"

    def __init__(self, *, pos_weight: float | None = None, bounded_ok: bool = False):
        refuse(self.check(pos_weight=pos_weight))
        super().__init__()
        self.pos_weight, self.bounded_ok = pos_weight, bounded_ok

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        weight = options["pos_weight"]
        if weight is not None and not 0 < weight < float("inf"):
            return [("pos_weight", f"must be above 0, or null for 1, got {weight:g}")]
        return []

    def forward(self, estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # weight * target * softplus(-x) + (1 - target) * softplus(x), stable for any logit.
        estimate, target = estimate.float(), target.float()
        weight = 1.0 if self.pos_weight is None else self.pos_weight
        return (
            weight * target * F.softplus(-estimate) + (1 - target) * F.softplus(estimate)
        ).mean()


class Dice(nn.Module):
    """(B, S, C, T) logits and target in [0, 1] -> 0-d 1 - Dice coefficient, in [0, 1).

    1 - (2 sum(p t) + 1) / (sum p + sum t + 1) for p = sigmoid(estimate): Milletari et al. 2016
    (V-Net, arXiv:1606.04797), section 3, without their squares and with 1 added, which makes
    silence taken for silence cost nothing. One ratio over the whole batch as in the log, so a
    batch's loss is not the mean of its clips' losses.

    bounded_ok: allows a model whose output cannot be every logit, as in `bce_logits`.
    """

    estimates: Estimates = "logits"

    def __init__(self, *, bounded_ok: bool = False):
        super().__init__()
        self.bounded_ok = bounded_ok

    def forward(self, estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        share, target = estimate.float().sigmoid(), target.float()
        both = 2 * (share * target).sum() + 1
        return 1 - both / (share.sum() + target.sum() + 1)


class Kl(nn.Module):
    """0-d Kullback-Leibler divergence of the model's latent Gaussian from N(0, 1), in nats.

    -1/2 sum(1 + log s^2 - m^2 - s^2), Kingma & Welling 2014 (arXiv:1312.6114), equation 10, summed
    over the latent and divided by the number of values in the target. `bce_logits` being a mean
    over these too, `bce_logits` + 1 * `kl` is the negative of equation 10 per value.

    forward: estimate and target are (B, S, C, T), of which only the size counts; `extras` has
    "mean" and "log_variance", of any one shape.
    """

    extras = ("mean", "log_variance")

    def forward(
        self, estimate: torch.Tensor, target: torch.Tensor, extras: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        mean, log_variance = extras["mean"].float(), extras["log_variance"].float()
        # expm1: near the prior 1 + log s^2 - s^2 is a difference of nearly equal numbers.
        divergence = 0.5 * (mean.square() + log_variance.expm1() - log_variance).sum()
        return divergence / target.numel()
