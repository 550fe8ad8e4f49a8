"""The perceptual distance CDPAM as a loss; needs the optional package of that name."""

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bgray.losses.dac_features import resampler
from bgray.problems import refuse

CDPAM_RATE = 22_050


class Cdpam(nn.Module):
    """(B, S, C, T) estimate and target -> 0-d mean CDPAM over B, S and C, in float32.

    Manocha et al. 2021 (arXiv:2102.05109), trained on speech at 22.05 kHz with samples between
    -32768 and 32767. On audio in [-1, 1) all its distances are about 1e-5, and silence is nearer to
    a sound than the same sound with its sign turned. Log 001 found it "terrible", "super loud":
    it first had the wrong rate, and nowhere says that it scaled.

    resample: to 22.05 kHz first.
    int16_range: multiply by 32768 first, as the package's own `load_audio` does.
    """

    def __init__(self, *, sample_rate: int, resample: bool = True, int16_range: bool = True):
        refuse(self.check(resample=resample, int16_range=int16_range))
        super().__init__()
        with warnings.catch_warnings(), pickles_allowed():
            warnings.simplefilter("ignore")  # of numpy.matlib, imported in vain
            self.metric: Any = importlib.import_module("cdpam").CDPAM(dev="cpu")
        self.network: nn.Module = self.metric.model.requires_grad_(False).eval()
        self.resample = resampler(sample_rate, CDPAM_RATE) if resample else nn.Identity()
        self.scale = 32768.0 if int16_range else 1.0

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        if importlib.util.find_spec("cdpam") is None:
            return [("package", "cdpam is not installed; pip install 'bgray[cdpam]'")]
        return []

    def train(self, mode: bool = True) -> "Cdpam":
        """Stays in evaluation mode whatever is asked for: it has batch norm and dropout."""
        return super().train(False)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        self.metric.device = target.device  # where it moves its inputs
        with torch.autocast(target.device.type, enabled=False):
            estimate, target = (
                self.resample(self.scale * x.float().flatten(0, -2)) for x in (estimate, target)
            )  # (B*S*C, T)
            return self.metric.forward(target, estimate).mean()


@contextlib.contextmanager
def pickles_allowed() -> Iterator[None]:
    """torch.load as it was before 2.6: the weights that come with cdpam are a pickle of objects."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
