"""Open-Unmix's loss: mean squared error of magnitudes, before there is any waveform."""

from typing import Any

import torch
from torch import Tensor, nn

from bgray.problems import refuse


class UmxMse(nn.Module):
    """Mean (magnitude - |STFT(target)|)^2 of the magnitudes that the model itself returns.

    The loss of Open-Unmix (Stoeter et al. 2019), which log 004 trains with. It does not look at the
    estimated waveform: `open_unmix` gives it `magnitude`, (B, S, C, F, N), and it makes that of the
    target with the same STFT (Hann window, centred, not normalised). `n_fft` and `hop` have to be
    the model's.

    forward: estimate and target (B, S, C, T), extras -> 0-d float32. T must exceed half of `n_fft`.
    """

    extras = ("magnitude",)
    window: Tensor

    def __init__(self, *, n_fft: int = 4096, hop: int = 1024):
        refuse(self.check(n_fft=n_fft, hop=hop))
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        n_fft, hop = options["n_fft"], options["hop"]
        if n_fft < 2 or n_fft % 2:
            return [("n_fft", f"{n_fft} must be even and at least 2")]
        if not 1 <= hop <= n_fft:
            return [("hop", f"{hop} must be 1 to n_fft = {n_fft}")]
        return []

    def forward(self, estimate: Tensor, target: Tensor, extras: dict[str, Tensor]) -> Tensor:
        shortest = self.n_fft // 2 + 1
        if target.shape[-1] < shortest:
            raise ValueError(f"umx_mse needs {shortest} samples or more, got {target.shape[-1]}")
        with torch.autocast(target.device.type, enabled=False):
            magnitude, wanted = extras["magnitude"].float(), self.magnitude(target.float())
            if magnitude.shape != wanted.shape:
                raise ValueError(
                    f"the model's magnitude is {tuple(magnitude.shape)} (B, S, C, F, N), so its "
                    f"n_fft is {2 * (magnitude.shape[-2] - 1)}; umx_mse has n_fft = {self.n_fft}, "
                    f"hop = {self.hop}, which give {tuple(wanted.shape)}: set loss.umx_mse to the "
                    "model's"
                )
            return (magnitude - wanted).square().mean()

    def magnitude(self, audio: Tensor) -> Tensor:
        """(B, S, C, T) -> (B, S, C, F, N)."""
        x = audio.flatten(0, -2)
        spectrum = torch.stft(x, self.n_fft, self.hop, window=self.window, return_complex=True)
        return spectrum.abs().unflatten(0, audio.shape[:-1])
