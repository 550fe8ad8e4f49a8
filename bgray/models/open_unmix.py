"""Open-Unmix and its multi-resolution variants of log 004: a recurrent net on magnitudes."""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bgray.models.inverse_stft import istft
from bgray.models.unet import check_choices, check_least
from bgray.problems import refuse

Order = Literal["bn_act", "act_bn"]
Rnn = Literal["lstm", "gru"]


def bins_below(bandwidth_hz: float | None, sample_rate: int, n_fft: int) -> int:
    """How many bins of an STFT are at or below a frequency; None counts all of them."""
    frequencies = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    if bandwidth_hz is None:
        return len(frequencies)
    return int((frequencies <= bandwidth_hz).sum())


class Resample(nn.Module):
    """(B, C, F', N') magnitudes of another resolution -> (B, C, F, N), those of the base.

    From a window and hop of `scale` times the base's (`finer` in frequency): F' = (F-1)*scale + 1
    bins become F by a convolution of that stride, N' frames become N = (N'-1)*scale + 1 by a
    transposed one. From windows and hops `scale` times shorter, the other way round. Kernels of
    scale + 1 with scale/2 of padding make both exact.
    """

    def __init__(self, channels: int, scale: int, *, finer: bool):
        super().__init__()
        bins: dict[str, Any] = {"stride": (scale, 1), "padding": (scale // 2, 0)}
        frames: dict[str, Any] = {"stride": (1, scale), "padding": (0, scale // 2)}
        k = scale + 1
        if finer:
            self.bins = nn.Conv2d(channels, channels, (k, 1), **bins)
            self.frames = nn.ConvTranspose2d(channels, channels, (1, k), **frames)
        else:
            self.bins = nn.ConvTranspose2d(channels, channels, (k, 1), **bins)
            self.frames = nn.Conv2d(channels, channels, (1, k), **frames)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frames(self.bins(x))


class Merge(nn.Module):
    """(B, C, F, N) of the base and a list of (B, C, F', N') -> (B, C, F, N): all resolutions as
    one.

    The others are resampled and cut to the base's size; a 1x1 convolution, ReLU and batch norm
    join them.
    """

    def __init__(self, channels: int, scales: tuple[int, ...]):
        super().__init__()
        self.resample = nn.ModuleList(
            Resample(channels, scale, finer=finer) for scale in scales for finer in (True, False)
        )
        self.join = nn.Conv2d((1 + 2 * len(scales)) * channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, base: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        f, n = base.shape[-2:]
        grids = [base]
        for resample, other in zip(self.resample, others, strict=True):
            grids.append(resample(other)[..., :f, :n])
        return self.norm(self.join(torch.cat(grids, dim=1)).relu())


class GainNet(nn.Module):
    """(B, C, F, N) magnitudes -> (B, C, F, N) gains from 0 up, of one target.

    Open-Unmix without the last product: `input_mean` is added to the lowest `max_bin` bins and
    `input_scale` multiplied (both learned, from what `OpenUnmix.observe` sets), then a layer to
    `hidden` features of each frame, a bidirectional RNN over frames joined with its input, and two
    layers back to all bins. `others`: magnitudes of the further resolutions, in the order of
    `scales`, longer windows first.
    """

    def __init__(
        self,
        channels: int,
        bins: int,
        max_bin: int,
        scales: tuple[int, ...],
        hidden: int,
        order: Order,
        out_bn: bool,
        output_mean_init: float,
        rnn: Rnn,
        layers: int,
        dropout: float,
    ):
        super().__init__()
        self.bins, self.max_bin, self.order = bins, max_bin, order
        self.merge = Merge(channels, scales) if scales else None
        self.input_mean = nn.Parameter(torch.zeros(max_bin))
        self.input_scale = nn.Parameter(torch.ones(max_bin))
        self.fc1 = nn.Linear(channels * max_bin, hidden, bias=False)
        self.bn1 = nn.BatchNorm1d(hidden)
        kind = nn.LSTM if rnn == "lstm" else nn.GRU
        self.rnn = kind(
            hidden,
            hidden // 2,
            layers,
            bidirectional=True,
            dropout=dropout if layers > 1 else 0.0,  # it stands between layers
        )
        self.fc2 = nn.Linear(2 * hidden, hidden, bias=False)
        self.bn2 = nn.BatchNorm1d(hidden)
        self.fc3 = nn.Linear(hidden, channels * bins, bias=False)
        self.bn3 = nn.BatchNorm1d(channels * bins) if out_bn else nn.Identity()
        self.output_scale = nn.Parameter(torch.ones(bins))
        self.output_mean = nn.Parameter(torch.full((bins,), output_mean_init))

    def forward(self, magnitude: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        b, c, _, n = magnitude.shape
        x = magnitude[:, :, : self.max_bin]  # (B, C, max_bin, N)
        x = (x + self.input_mean[:, None]) * self.input_scale[:, None]
        if self.merge is not None:
            x = self.merge(x, others)
        # A row is one frame of one item. The original's snapshot reshaped here without permuting,
        # so that rows mixed items and frames.
        x = self.fc1(x.permute(3, 0, 1, 2).reshape(n * b, -1))  # (N*B, hidden)
        x = torch.tanh(self.bn1(x)) if self.order == "bn_act" else self.bn1(torch.tanh(x))
        y, _ = self.rnn(x.reshape(n, b, -1))  # (N, B, hidden)
        x = self.fc2(torch.cat([x, y.reshape(n * b, -1)], dim=1))  # (N*B, hidden)
        x = torch.relu(self.bn2(x)) if self.order == "bn_act" else self.bn2(torch.relu(x))
        x = self.bn3(self.fc3(x)).reshape(n, b, c, self.bins)
        gain = torch.relu(x * self.output_scale + self.output_mean)  # (N, B, C, F)
        return gain.permute(1, 2, 3, 0)  # (B, C, F, N)


class GainNets(nn.Module):
    """(B, C, F, N) magnitudes and others -> (B, S, C, F, N) gains: one `GainNet` per target."""

    def __init__(self, nets: Iterable[GainNet]):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, magnitude: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([net(magnitude, others) for net in self.nets], dim=1)


class OpenUnmix(nn.Module):
    """(B, C, T) audio -> (B, S, C, T) audio and {"magnitude": (B, S, C, F, N)}.

    Stoeter et al. 2019, "Open-Unmix - A Reference Implementation for Music Source Separation",
    JOSS 4(41), 1667, "Technical Details", once per target: `core` makes gains of the magnitudes of
    the mixture's STFT. Gains times magnitudes are `magnitude`, which `umx_mse` compares; gains
    times the STFT, so with the mixture's phase, go back to audio. Channels are seen together
    (`channels_in`, 2 in the original). Any T will do. STFT and inverse lie outside `core`.

    The STFT (Hann window) is centred, reflected at the edges: N = T/hop + 1 frames, rounded down.
    The original trains with `center=False`, whose first and last n_fft/2 samples have no inverse,
    and separates with `center=True`; here both must be one, since the output is audio and as long
    as the input. For n_fft/2 a multiple of hop the frames that both have are the same.

    `bandwidth_hz`: the net looks at bins up to here (it writes all of them); None: at all.
    `hidden` (even): features of a frame. `layers`, `dropout`: of the RNN.
    `order`: bn_act normalises, then activates (the original); act_bn the other way round.
    `out_bn`: batch norm after the last layer. `output_mean_init`: what the gains start around.
    `extra_resolutions`: for each s (even) also STFTs with s times longer and s times shorter
    windows and hops, resampled to the base grid by convolutions with kernels of s + 1. The log says
    no more; that the base is normalised first, and the order of layers, is our choice.

    Log 004: mr-0 is the default. mr-1: `order=act_bn, out_bn=False, output_mean_init=0`. mr-2:
    mr-1 and `rnn=gru`. mr-4: mr-2 and `extra_resolutions=(2, 4)`. mr-5: mr-2 and
    `extra_resolutions=(4,), bandwidth_hz=None` (its scales and RNN; its layers are not known). mr-3
    is described nowhere, mr-6 is mr-2 on other data. "umxl": `hidden=1024`.
    Raises ValueError with all that `check` finds.
    """

    extras = ("magnitude",)

    def __init__(
        self,
        *,
        sample_rate: int,
        num_sources: int,
        channels_in: int,
        n_fft: int = 4096,
        hop: int = 1024,
        bandwidth_hz: float | None = 16000.0,
        hidden: int = 512,
        order: Order = "bn_act",
        out_bn: bool = True,
        output_mean_init: float = 1.0,
        rnn: Rnn = "lstm",
        layers: int = 3,
        dropout: float = 0.4,
        extra_resolutions: tuple[int, ...] = (),
    ):
        problems = self.check(
            n_fft=n_fft,
            hop=hop,
            bandwidth_hz=bandwidth_hz,
            hidden=hidden,
            order=order,
            rnn=rnn,
            layers=layers,
            dropout=dropout,
            extra_resolutions=extra_resolutions,
        )
        refuse(problems, "OpenUnmix")
        super().__init__()
        self.num_sources, self.n_fft, self.hop = num_sources, n_fft, hop
        self.sizes = [size for s in extra_resolutions for size in ((s, 1), (1, s))]
        self.longest = max((1, *extra_resolutions))
        self.core = GainNets(
            GainNet(
                channels_in,
                n_fft // 2 + 1,
                bins_below(bandwidth_hz, sample_rate, n_fft),
                extra_resolutions,
                hidden,
                order,
                out_bn,
                output_mean_init,
                rnn,
                layers,
                dropout,
            )
            for _ in range(num_sources)
        )

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        n_fft, hop, hidden = (options[k] for k in ("n_fft", "hop", "hidden"))
        scales, problems = (
            options["extra_resolutions"],
            check_choices(options, order=Order, rnn=Rnn),
        )
        problems += check_least(options, n_fft=4, hop=1, hidden=2, layers=1)
        if n_fft % 2:
            problems.append(("n_fft", f"{n_fft} is odd; use {n_fft - 1} or {n_fft + 1}"))
        if hop > n_fft // 4:
            text = f"{hop} is more than a quarter of n_fft = {n_fft}, which is hard to invert"
            problems.append(("hop", f"{text}; use at most {n_fft // 4}"))
        if options["bandwidth_hz"] is not None and options["bandwidth_hz"] <= 0:
            text = f"{options['bandwidth_hz']:g} leaves no bin; use null for all of them"
            problems.append(("bandwidth_hz", text))
        if hidden % 2:
            text = f"{hidden} is odd, and each direction gets half; use {hidden + 1}"
            problems.append(("hidden", text))
        if not 0 <= options["dropout"] < 1:
            problems.append(("dropout", f"{options['dropout']:g} must be at least 0 and below 1"))
        if len(set(scales)) < len(scales):
            problems.append(("extra_resolutions", f"{scales} says one twice"))
        for s in scales:
            if s < 2 or s % 2:
                problems.append(("extra_resolutions", f"{s} must be even, and at least 2"))
            elif n_fft % (2 * s) or hop % s:
                text = f"{s} must divide n_fft/2 = {n_fft // 2} and hop = {hop}"
                problems.append(("extra_resolutions", text))
        return problems

    def observe(self, inputs: Iterable[torch.Tensor]) -> None:
        """Set every target's input mean and scale from training mixtures, each (B, C, T).

        As Open-Unmix's `get_statistics`: per bin, mean and standard deviation over all frames of
        the magnitudes' mean over channels; no scale is below 1e-4 of the largest, and a bin that
        never moves has scale 1. In one pass, however the mixtures are batched (Chan, Golub and
        LeVeque 1979). ValueError without any mixture.
        """
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for audio in inputs:
            with torch.no_grad():
                x = self.stft(audio).abs().mean(1).double()  # (B, F, N)
            frames = x.shape[0] * x.shape[2]
            batch_mean = x.mean((0, 2))  # (F)
            batch_squares = (x - batch_mean[:, None]).square().sum((0, 2))
            off = batch_mean - mean.to(x)
            total = count + frames
            squares = squares.to(x) + batch_squares + off.square() * (count * frames / total)
            mean = mean.to(x) + off * (frames / total)
            count = total
        if count == 0:
            raise ValueError("input statistics need at least one mixture, got none")
        scale = (squares / count).sqrt()
        scale = torch.where(scale == 0, 1.0, scale)
        scale = scale.clamp(min=1e-4 * scale.max())
        for net in self.core.nets:
            assert isinstance(net, GainNet)
            with torch.no_grad():
                net.input_mean.copy_(-mean[: net.max_bin])
                net.input_scale.copy_(1 / scale[: net.max_bin])

    def stft(self, audio: torch.Tensor, longer: int = 1, shorter: int = 1) -> torch.Tensor:
        """(B, C, T) -> (B, C, F, N) complex; window and hop of the base, times and by these."""
        n_fft, hop = self.n_fft * longer // shorter, self.hop * longer // shorter
        x = audio.float().flatten(0, 1)
        x = F.pad(x, (0, max(0, n_fft // 2 + 1 - x.shape[-1])))  # what reflecting takes
        window = torch.hann_window(n_fft, device=x.device)
        spectrum = torch.stft(x, n_fft, hop, window=window, return_complex=True)
        return spectrum.unflatten(0, audio.shape[:2])

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        b, c, t = audio.shape
        spectrum = self.stft(audio)  # (B, C, F, N)
        magnitude = spectrum.abs()
        if audio.is_meta:
            # Shapes alone: torch's inverse STFT has none to give, and an RNN steps through all
            # frames for them, which takes half a minute.
            estimate = audio.new_empty(b, self.num_sources, c, t)
            return estimate, {
                "magnitude": magnitude[:, None].expand(-1, self.num_sources, -1, -1, -1)
            }
        # Zeros up to what the longest window reflects and to a whole hop of it, so that every grid
        # covers the base's.
        least = max(t, self.longest * self.n_fft // 2 + 1)
        unit = self.longest * self.hop
        padded = F.pad(audio, (0, -(-least // unit) * unit - t))
        others = [self.stft(padded, *size).abs() for size in self.sizes]
        gain = self.core(magnitude, others).float()  # (B, S, C, F, N)
        window = torch.hann_window(self.n_fft, device=audio.device)
        sources = (gain * spectrum[:, None]).flatten(0, 2)
        estimate = istft(sources, self.n_fft, self.hop, window, t)  # (B*S*C, T)
        estimate = estimate.reshape(b, self.num_sources, c, t)
        return estimate, {"magnitude": gain * magnitude[:, None]}
