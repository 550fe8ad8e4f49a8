"""Scores of an estimate against its target in dB, higher is better; over the last axis, or two."""

import torch


def si_sdr(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Scale-invariant SDR of (..., T) in dB -> (...); Le Roux et al. 2019, arXiv:1811.02508.

    Means over T are removed first. The constants (1e-8) are auraloss's, whose `SISDRLoss` is this
    negated; they bound the score below at -80 dB, which is what a silent estimate and a silent
    target both give.
    """
    eps = 1e-8
    estimate, target = _centred(estimate), _centred(target)
    scale = (estimate * target).sum(-1) / (target.square().sum(-1) + eps)  # (...)
    reference = scale[..., None] * target  # (..., T)
    signal, noise = reference.square().sum(-1), (estimate - reference).square().sum(-1)
    return 10 * torch.log10(signal / (noise + eps) + eps)


def sdr(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """SDR of (..., T) in dB -> (...): energy of the target over that of the error, plus 1e-10 each.

    The score of the Music Demixing Challenge 2021 (Mitsufuji et al. 2022, arXiv:2108.13559), which
    takes all channels and samples of a song together: flatten them into T first. A silent
    estimate scores 0 dB. For a silent target, a silent estimate scores 0 dB and any other
    -100 dB minus the energy of the estimate in dB.
    """
    target = _float(target)
    signal, noise = target.square().sum(-1), (_float(estimate) - target).square().sum(-1)
    return _challenge_db(signal, noise)


def usdr(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`sdr` over all channels and samples of (..., C, T) together -> (...) float64.

    What the Music Demixing Challenge 2021 ranked by; also called global or utterance SDR. Sums are
    float64, because a song has 20 million samples.
    """

    def energy(x: torch.Tensor) -> torch.Tensor:
        # Half the time of x.double().square().sum(), which writes the song twice more.
        norm = torch.linalg.vector_norm(x.flatten(-2), dim=-1, dtype=torch.float64)
        return norm.square()

    target = _float(target)
    return _challenge_db(energy(target), energy(_float(estimate) - target))


def _challenge_db(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    eps = 1e-10
    return 10 * torch.log10((signal + eps) / (noise + eps))


def _centred(x: torch.Tensor) -> torch.Tensor:
    x = _float(x)
    return x - x.mean(-1, keepdim=True)


def _float(x: torch.Tensor) -> torch.Tensor:
    """float32, unless it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()
