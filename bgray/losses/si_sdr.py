"""Scale-invariant SDR as a loss."""

import torch
from torch import Tensor, nn

from bgray.metrics import si_sdr


class SiSdr(nn.Module):
    """(B, S, C, T) estimate and target -> 0-d mean of -SI-SDR in dB over B, S and C, in float32.

    auraloss's `SISDRLoss` on targets that sound. A row whose target is exactly constant (muted)
    would add +80 dB and no gradient whatever its estimate does, so it is left out; without any
    other the loss is 0. Blind to gain and to sign, hence to be used beside a loss that is not. A
    perfect estimate is bounded by the constants at -10 log10(energy of the target / 1e-8) dB; a
    silent one scores +80 dB and gets no gradient.
    """

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(target.device.type, enabled=False):
            target = target.float()
            sounds = target.amax(-1) > target.amin(-1)  # (B, S, C)
            scores = torch.where(sounds, si_sdr(estimate, target), 0.0)
            return -scores.sum() / sounds.sum().clamp(min=1)
