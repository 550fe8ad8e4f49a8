"""The log-spectrogram loss of log 000, as it was and repaired, and its sum with the MAE."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bgray.losses.spectra import powers, reflected
from bgray.problems import refuse

Version = Literal["fixed", "original"]


class Spectrogram(nn.Module):
    """Mean squared difference of two power spectrograms in dB, 80 dB deep; blind to sign.

    `original` is log 000's: estimate and target are each divided by their own maximum over the
    whole batch, then clamped at -80 dB. So it is blind to gain (loss(0.01x, x) = 1e-10), couples
    batch items and sources, and is NaN for a prediction that is exactly zero. Use it only to see
    what the log saw.

    `fixed` divides both by one reference for each item and source: the largest power of the
    target, at least that of a full-scale sine less 20 dB. Amplitude counts, nobody depends on a
    neighbour, and a silent target has a floor at -100 dBFS: what log 000 calls silence
    (|y| < 1e-4) costs next to nothing there. The floor is added, not clamped at: an estimate
    below it still has a gradient. At exactly zero that is zero, as for every loss that is blind
    to sign.

    fft_size, hop_size, win_length: samples; by default 50 ms and 12.5 ms at 44.1 kHz.
    forward: (B, S, C, T) estimate and target -> 0-d float32. T must exceed half the FFT.
    """

    depth_db = 80.0
    quietest_reference_db = -20.0  # re full-scale sine
    window: Tensor

    def __init__(
        self,
        *,
        version: Version = "fixed",
        fft_size: int = 2205,
        hop_size: int = 551,
        win_length: int = 2205,
    ):
        problems = self.check(
            version=version, fft_size=fft_size, hop_size=hop_size, win_length=win_length
        )
        refuse(problems)
        super().__init__()
        self.version = version
        self.fft_size, self.hop_size, self.win_length = fft_size, hop_size, win_length
        window = torch.hann_window(win_length)
        self.register_buffer("window", window, persistent=False)

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        sizes = {name: options[name] for name in ("fft_size", "hop_size", "win_length")}
        if problems := [(k, f"{v} must be at least 1") for k, v in sizes.items() if v < 1]:
            return problems
        fft_size, hop, length = sizes.values()
        if length > fft_size:
            problems.append(("win_length", f"{length} exceeds fft_size = {fft_size}"))
        if hop > length:
            text = f"{hop} skips samples between windows of {length}; use at most {length}"
            problems.append(("hop_size", text))
        return problems

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        shortest = self.fft_size // 2 + 1
        if target.shape[-1] < shortest:
            raise ValueError(
                f"the spectrogram loss needs {shortest} samples or more, got {target.shape[-1]}"
            )
        with torch.autocast(target.device.type, enabled=False):
            estimate, target = self.power(estimate.float()), self.power(target.float())
            if self.version == "original":
                return (self.own_db(estimate) - self.own_db(target)).square().mean()
            reference = self.reference(target)
            difference = self.db(estimate, reference) - self.db(target, reference)
            return difference.square().mean()

    def power(self, audio: Tensor) -> Tensor:
        """(B, S, C, T) -> (B, S, C, F, N), squared magnitudes, not normalised."""
        padded = reflected(audio.flatten(0, -2), self.fft_size)
        sizes = self.fft_size, self.hop_size
        power = powers(padded, audio.shape[-1], self.window, *sizes)  # (B*S*C, N, F)
        return power.mT.unflatten(0, audio.shape[:-1])

    def reference(self, power: Tensor) -> Tensor:
        """(B, S, C, F, N) of the target -> (B, S, 1, 1, 1), what 0 dB is for both."""
        full_scale = (self.window.sum() / 2).square()  # power of a sine of amplitude 1 in its bin
        quietest = full_scale * 10 ** (self.quietest_reference_db / 10)
        return torch.maximum(power.amax((-3, -2, -1), keepdim=True), quietest)

    def db(self, power: Tensor, reference: Tensor) -> Tensor:
        return 10 * (power / reference + 10 ** (-self.depth_db / 10)).log10()

    def own_db(self, power: Tensor) -> Tensor:
        """Re the maximum of this very tensor: 0 / 0 for silence, as in the log's code."""
        db = 10 * (power / power.max()).clamp(min=1e-10).log10()
        return torch.maximum(db, db.max() - self.depth_db)


class SpecMae(nn.Module):
    """spectrogram + beta * mean |estimate - target|, with a beta that may change in training.

    Log 000's rule: this converges when beta makes the two terms about equal at first; later
    beta * mae may be one order of magnitude above the spectrogram, and beyond that the estimates
    collapse to zero. With `version: original` only the MAE knows about amplitude.

    mode: `fixed` keeps `beta`; `step` puts `raised_beta` in its place after step `raise_step`;
      `balance` chooses beta itself: from the first 10 steps (in which each batch has its own) so
      that beta * mae = ratio * spectrogram, and once more so that it is `raised_ratio` times it.
    raise_at: when balance does so: after step `raise_step`, or at a plateau, which is `patience`
      steps in which the loss, averaged over about `smoothing` steps, did not fall by 1%.
    version, fft_size, hop_size, win_length: see `spectrogram`.

    Between those changes beta is a constant, and no gradient goes through it. It is part of the
    loss, so compare runs and steps by the logged `spec` and `mae`, not by their sum.
    forward: (B, S, C, T) estimate and target -> 0-d float32.
    """

    settling = 10  # steps whose mean chooses the first beta: one batch may be nearly silent
    least_fall = 0.01  # of the smoothed loss; less in `patience` steps is a plateau
    beta: Tensor
    raised: Tensor
    mean_parts: Tensor
    mean_weight: Tensor
    lowest: Tensor
    since_lowest: Tensor

    def __init__(
        self,
        *,
        mode: Literal["fixed", "step", "balance"] = "fixed",
        beta: float = 500.0,
        raised_beta: float = 5000.0,
        raise_step: int = 100,
        raise_at: Literal["plateau", "step"] = "plateau",
        ratio: float = 1.0,
        raised_ratio: float = 10.0,
        patience: int = 200,
        smoothing: int = 50,
        version: Version = "fixed",
        fft_size: int = 2205,
        hop_size: int = 551,
        win_length: int = 2205,
    ):
        sizes = {"fft_size": fft_size, "hop_size": hop_size, "win_length": win_length}
        numbers = {"beta": beta, "raised_beta": raised_beta, "raise_step": raise_step}
        numbers |= {"ratio": ratio, "raised_ratio": raised_ratio}
        numbers |= {"patience": patience, "smoothing": smoothing}
        refuse(self.check(**numbers, version=version, **sizes))
        super().__init__()
        self.spectrogram = Spectrogram(version=version, **sizes)
        self.mode, self.raise_at, self.raise_step = mode, raise_at, raise_step
        self.raised_beta, self.ratio, self.raised_ratio = raised_beta, ratio, raised_ratio
        self.patience, self.smoothing = patience, smoothing
        self.logged: dict[str, Tensor] = {}  # spec, mae, beta of the last forward, detached
        # 0 means that balance has not chosen yet.
        self.register_buffer("beta", torch.tensor(0.0 if mode == "balance" else beta))
        self.register_buffer("raised", torch.tensor(False))
        self.register_buffer("mean_parts", torch.zeros(2))  # sum of weighted (spec, mae)
        self.register_buffer("mean_weight", torch.tensor(0.0))
        self.register_buffer("lowest", torch.tensor(torch.inf))
        self.register_buffer("since_lowest", torch.tensor(0))

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        problems = Spectrogram.check(**options)
        for name in ("beta", "raised_beta", "ratio", "raised_ratio"):
            if not options[name] > 0:
                problems.append((name, f"{options[name]:g} must be above 0"))
        for name in ("raise_step", "patience", "smoothing"):
            if options[name] < 1:
                problems.append((name, f"{options[name]} must be at least 1"))
        return problems

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        spec = self.spectrogram(estimate, target)
        mae = (estimate.float() - target.float()).abs().mean()
        parts, beta = torch.stack([spec, mae]).detach(), self.beta
        if self.mode == "balance":  # each batch has its own balance until one is chosen
            beta = torch.where(beta > 0, beta, balanced(parts, self.ratio))
        self.logged = {"spec": parts[0], "mae": parts[1], "beta": beta.clone()}
        return spec + beta * mae

    @torch.no_grad()
    def advance(self, step: int, average: Callable[[Tensor], Tensor]) -> None:
        if self.mode == "step" and step >= self.raise_step:
            self.beta.fill_(self.raised_beta)
        if self.mode != "balance":
            return
        parts = average(torch.stack([self.logged["spec"], self.logged["mae"]]))
        # Both from 0, so that their quotient is a mean from the first step on.
        self.mean_parts.lerp_(parts, 1 / self.smoothing)
        self.mean_weight.lerp_(torch.ones_like(self.mean_weight), 1 / self.smoothing)
        mean = self.mean_parts / self.mean_weight

        chosen = self.beta > 0
        first = balanced(mean, self.ratio) if step >= self.settling else self.beta
        beta = torch.where(chosen, self.beta, first)
        loss = mean[0] + beta * mean[1]
        fell = ~chosen | (loss < self.lowest * (1 - self.least_fall))
        loss = torch.where(chosen, loss, torch.inf)  # of another beta, so not to be compared
        self.lowest.copy_(torch.where(fell, loss, self.lowest))
        self.since_lowest.copy_(torch.where(fell, 0, self.since_lowest + 1))

        due = chosen & ~self.raised
        if self.raise_at == "plateau":
            due = due & (self.since_lowest >= self.patience)
        elif step < self.raise_step:
            due = torch.zeros_like(due)
        self.beta.copy_(torch.where(due, balanced(mean, self.raised_ratio), beta))
        self.raised |= due


def balanced(parts: Tensor, ratio: float) -> Tensor:
    """The beta that makes beta * mae `ratio` times spec, of (spec, mae); 0 where both are 0."""
    return ratio * parts[0] / parts[1].clamp(min=1e-8)
