"""What the tasks that restore audio share: their scores.

As all of this folder it imports torch where it is used only: processes that make batches import the
folder, never use torch, and start in half the time without it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def restoration_scorer(sample_rate: int) -> "Callable[[Tensor, Tensor], dict[str, Tensor]]":
    """A function of one item, (1, S, C, T) estimate and target -> its scores as 0-d tensors: STFT
    distance (log 001's), SI-SDR in dB.

    Item by item, because spectral convergence over a batch would depend on who shares the batch.
    """
    import torch

    from bgray.losses.mrstft import MultiResolutionStft
    from bgray.metrics import si_sdr

    distance = MultiResolutionStft(sample_rate=sample_rate)

    def score(estimate: "Tensor", target: "Tensor") -> "dict[str, Tensor]":
        with torch.no_grad():
            return {
                "val_stft": distance.to(estimate.device)(estimate, target),
                "val_si_sdr": si_sdr(estimate, target).mean(),
            }

    return score
