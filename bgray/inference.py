"""A trained run used on sound: load it, and pass audio of any length, rate and channel count
through it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from bgray import checkpoint, storage
from bgray.build import build_model, build_task, validation_segment
from bgray.config import ConfigError, Experiment
from bgray.experiment import resolve
from bgray.step import split_extras


@dataclass(frozen=True)
class Trained:
    """A run's model with the weights of its latest checkpoint, or of its best."""

    url: str
    experiment: Experiment
    task: Any
    model: nn.Module
    step: int
    """Steps that these weights have been trained for."""
    device: torch.device

    def __call__(self, audio: np.ndarray, overlap: float = 0.25) -> np.ndarray:
        """(C, T) float32 at the run's rate -> (S, C, T) float32, in chunks as long as those it
        was validated on. Channels that the net cannot take together pass one by one."""
        net_channels = self.experiment.data.channels
        together = audio.shape[0] == net_channels
        # (N, net channels, T): N = 1, or every channel of the file alone.
        batch = audio[None] if together else audio[:, None].repeat(net_channels, axis=1)
        segment = validation_segment(self.experiment)
        outputs = [
            process(self.model, torch.from_numpy(x), segment, overlap, self.device).numpy()
            for x in batch
        ]  # each (S, net channels, T)
        if together:
            return outputs[0]
        return np.concatenate([output.mean(axis=1, keepdims=True) for output in outputs], axis=1)


def load(url: str, device: torch.device, which: str = "latest") -> Trained:
    """The run in a folder `<results>/<name>/<id>`; ConfigError where there is none, or no such
    checkpoint yet.

    which: `latest`, or `best`, by the task's first score on the run's own validation items: a
      choice that flatters, so runs are never compared by it.
    """
    try:
        raw = yaml.safe_load(storage.read_bytes(storage.join(url, "experiment.yaml")))
    except (FileNotFoundError, NotADirectoryError):
        text = "holds no run (no experiment.yaml); give a folder <results>/<name>/<id>"
        raise ConfigError(url, [("", text)]) from None
    experiment = resolve(raw, storage.join(url, "experiment.yaml"))
    saved = checkpoint.load(url, which=which)
    if saved is None:
        kind = "best checkpoint" if which == checkpoint.BEST else "checkpoint"
        raise ConfigError(url, [("", f"has no {kind} yet; let it reach its first evaluation")])
    model = build_model(experiment)
    model.load_state_dict(saved["model"])
    model.to(device).eval()
    return Trained(url, experiment, build_task(experiment), model, saved["step"], device)


def process(
    model: nn.Module,
    audio: Tensor,
    segment: int,
    overlap: float = 0.25,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Tensor:
    """(C, T) float32 -> (S, C, T) float32 on the CPU, in overlapping chunks of `segment` samples.

    Neighbouring chunks share `overlap` (0 to 0.5) of their length. The outer quarters of what they
    share are context only; in the middle half one fades linearly into the other, so that a net
    that sees no further than that context gives what it would give for the whole at once.
    """
    if not 0 <= overlap <= 0.5:
        raise ValueError(f"overlap: must be 0 to 0.5, got {overlap:g}")
    multiple = getattr(model, "length_multiple", 1)
    length = audio.shape[-1]
    if length <= segment:
        segment = -(-max(length, 1) // multiple) * multiple
        shared = 0
    else:
        shared = int(overlap * segment) // multiple * multiple
    hop = segment - shared
    count = 1 + max(0, -(-(length - segment) // hop))
    padded = nn.functional.pad(audio, (0, (count - 1) * hop + segment - length))
    result, weights = None, torch.zeros(padded.shape[-1])
    for i in range(count):
        start = i * hop
        with torch.no_grad():
            chunk = padded[None, :, start : start + segment].to(device)  # (1, C, segment)
            output = split_extras(model(chunk))[0][0].float().cpu()  # (S, C, segment)
        weight = fades(segment, shared, first=i == 0, last=i == count - 1)
        if result is None:
            result = torch.zeros(*output.shape[:2], padded.shape[-1])
        result[..., start : start + segment] += weight * output
        weights[start : start + segment] += weight
    assert result is not None
    return (result / weights)[..., :length]


def fades(segment: int, shared: int, *, first: bool, last: bool) -> Tensor:
    """Weights (segment,) of a chunk that shares `shared` samples with each neighbour; the weights
    of both add up to 1 there. The file's own ends are not faded."""
    context = shared // 4
    middle = shared - 2 * context
    up = torch.cat(
        [
            torch.zeros(context),
            (torch.arange(middle) + 0.5) / max(1, middle),
            torch.ones(context),
        ]
    )  # (shared,)
    weight = torch.ones(segment)
    if shared and not first:
        weight[:shared] = up
    if shared and not last:
        weight[segment - shared :] = 1 - up
    return weight


def resample(audio: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """(C, T) at `rate` Hz -> (C, T') at `wanted` Hz."""
    if rate == wanted:
        return audio
    import soxr

    return np.ascontiguousarray(soxr.resample(audio.T, rate, wanted, quality="HQ").T)
