"""The feature-matching loss on the encoder of the Descript Audio Codec, kept frozen."""

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torchaudio
from torch import Tensor, nn

from bgray.problems import refuse

CODEC_RATE = 44_100


class DacFeatures(nn.Module):
    """Sum over feature maps of DAC's encoder of the mean |estimate's - target's|.

    Kumar et al. 2023 (arXiv:2306.06546), figure 1 and appendix A: a convolution to 64 channels,
    then four blocks that downsample by 2, 4, 8, 8, each of three residual units and a strided
    convolution. Only the part that is used is built. Memory is what hurts, for the first block
    works at the full rate on 64 channels; all four blocks took log 001 out of memory.

    layers: compare after each encoder `block`, or after each of the three residual units in it.
    blocks: how many encoder blocks, 1 (133,120 parameters) to 4 (19,159,168).
    weights: `download` (the package's own, about 300 MB, kept under ~/.cache/descript), the path of
      such a file, or `random` (the same each time; for tests and for trying shapes: training
      with them warns).
    resample: to the codec's 44.1 kHz first. Log 001 did not, and fed it 48 kHz as if it were 44.1.

    forward: (B, S, C, T) estimate and target -> 0-d float32; channels are compared one by one.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        layers: Literal["blocks", "residual_units"] = "blocks",
        blocks: int = 1,
        weights: str = "download",
        resample: bool = True,
    ):
        problems = self.check(layers=layers, blocks=blocks, weights=weights, resample=resample)
        refuse(problems)
        super().__init__()
        encoder = build_encoder(weights, blocks)
        self.random = weights == "random"
        cut = encoder_blocks if layers == "blocks" else residual_units
        self.stages = nn.ModuleList(cut(encoder, blocks)).requires_grad_(False).eval()
        self.resample = resampler(sample_rate, CODEC_RATE) if resample else nn.Identity()

    @staticmethod
    def check(**options: Any) -> list[tuple[str, str]]:
        """All problems of the options as (option, value and the way out)."""
        problems, weights = [], options["weights"]
        if not 1 <= options["blocks"] <= 4:
            problems.append(("blocks", f"{options['blocks']} must be 1 to 4: DAC's encoder has 4"))
        if weights not in ("download", "random") and not Path(weights).is_file():
            text = f"there is no file {weights!r}; give a path, 'download' or 'random'"
            problems.append(("weights", text))
        return problems

    def train(self, mode: bool = True) -> "DacFeatures":
        """Stays in evaluation mode whatever is asked for."""
        return super().train(False)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        if self.random and estimate.requires_grad:
            warnings.warn(
                "dac_features has random weights, which say nothing about how audio sounds",
                stacklevel=2,
            )
        with torch.autocast(target.device.type, enabled=False):
            # In float32: the difference of two bfloat16 features is mostly their rounding.
            estimate, target = (
                self.resample(x.float().flatten(0, -2))[:, None] for x in (estimate, target)
            )  # (B*S*C, 1, T)
            return feature_distance(self.stages, estimate, target)


def feature_distance(stages: Iterable[nn.Module], estimate: Tensor, target: Tensor) -> Tensor:
    """Sum over the stages of the mean absolute difference after each, 0-d.

    Each stage takes what the one before it gave; the first takes `estimate` and `target`.
    """
    total = estimate.new_zeros(())
    for stage in stages:
        estimate = stage(estimate)
        with torch.no_grad():
            target = stage(target)
        total = total + (estimate - target).abs().mean()
    return total


def encoder_blocks(encoder: nn.Sequential, blocks: int) -> list[nn.Module]:
    """Stages that end with each of the first encoder blocks."""
    first, *rest = encoder[1 : blocks + 1]
    return [nn.Sequential(encoder[0], first), *rest]


def residual_units(encoder: nn.Sequential, blocks: int) -> list[nn.Module]:
    """Stages that end with each residual unit of the first encoder blocks, three in each."""
    stages, before = [], [encoder[0]]
    for block in encoder[1 : blocks + 1]:
        first, second, third, *downsample = cast(nn.Sequential, block.block)
        stages += [nn.Sequential(*before, first), second, third]
        before = downsample
    return stages


def build_encoder(weights: str, blocks: int) -> nn.Sequential:
    """DAC's first convolution and `blocks` encoder blocks, with `weights` as in `DacFeatures`."""
    with warnings.catch_warnings():  # audiotools is full of old syntax, dac of the old weight norm
        warnings.simplefilter("ignore")
        from dac.model.dac import Encoder

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too
            block: Any = Encoder().block
    encoder: nn.Sequential = block[: blocks + 1]
    if weights == "random":
        return encoder
    path = downloaded() if weights == "download" else Path(weights)
    state = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "encoder.block."
    state = {k.removeprefix(prefix): v for k, v in state.get("state_dict", state).items()}
    wanted = encoder.state_dict()
    if missing := [key for key in wanted if key not in state]:
        raise ValueError(
            f"weights: {path} has no {prefix}{missing[0]}: it is not a file of DAC weights "
            "such as weights_44khz_8kbps_0.0.1.pth"
        )
    encoder.load_state_dict({key: state[key] for key in wanted})
    return encoder


def downloaded() -> Path:
    """The package's 44.1 kHz weights, from its cache or the network."""
    import fcntl

    from dac.utils import download

    cache = Path.home() / ".cache" / "descript"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "lock", "w") as lock:
            # The package writes the file in place: another rank here must not read half of it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            return download(model_type="44khz")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise ValueError(
            f"weights: the download failed ({type(error).__name__}: {str(error)[:200]}); get "
            "weights_44khz_8kbps_0.0.1.pth from the releases of descriptinc/descript-audio-codec "
            "where there is a network, and give its path"
        ) from error


def resampler(from_rate: int, to_rate: int) -> nn.Module:
    """A module that resamples (..., T) on its device; ValueError where that would be a monster."""
    step = math.gcd(from_rate, to_rate)
    # torchaudio's filter bank has a row for each phase, so memory grows with the reduced rates.
    if max(from_rate, to_rate) // step > 2000:
        raise ValueError(
            f"resample: {from_rate} Hz and {to_rate} Hz have no common divisor above {step}; "
            "use a data.sample_rate such as 44100, 48000, 32000 or 16000, or resample: false"
        )
    return torchaudio.transforms.Resample(from_rate, to_rate)
