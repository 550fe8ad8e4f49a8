"""The waveform sum constraint: the estimates must add up to what the targets add up to."""

from torch import Tensor, nn


class SumConstraint(nn.Module):
    """(B, S, C, T) estimate and target -> 0-d mean |sum_s estimate - sum_s target|, in float32.

    Log 000's constraint as a loss beside others: alone it does not care which source a sound is
    in. ValueError for one source, where it would be `l1` under another name.
    """

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        if target.shape[1] < 2:
            raise ValueError("sum_constraint needs two sources or more, got 1; use l1 instead")
        return (estimate.float().sum(1) - target.float().sum(1)).abs().mean()
