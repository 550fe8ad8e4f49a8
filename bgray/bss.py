"""Scores of separated songs as papers print them: BSSEval v4 by frame (museval), uSDR, SI-SDR.

Audio here is (S, C, T). Medians go over a track's frames first, then over tracks, as in SiSEC 2018
(Stoter et al. 2018, arXiv:1804.06267) and Open-Unmix.
"""

import functools
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from bgray.metrics import si_sdr, usdr

FRAME_METRICS = ("SDR", "ISR", "SIR", "SAR")
METRICS = (*FRAME_METRICS, "uSDR", "SI-SDR")
"""In dB, higher is better. SDR to SAR are medians over frames, the others take the whole track."""


@dataclass(frozen=True, eq=False)
class Bss:
    """SDR, ISR, SIR and SAR of every source and frame in dB, and which sources had none to have."""

    frames: dict[str, np.ndarray]
    """Metric to (S, N) float64; NaN where a frame is not scored."""
    silent_references: tuple[int, ...]
    """Sources that do not play in this track: all their frames are NaN."""
    silent_estimates: tuple[int, ...]
    """Sources of which nothing was estimated: all their frames are NaN."""

    def medians(self) -> dict[str, np.ndarray]:
        """Metric to (S,): the median over the frames that are scored, NaN where none is."""
        return {name: np.array([median(row) for row in x]) for name, x in self.frames.items()}


def bss_eval(
    reference: np.ndarray,
    estimate: np.ndarray,
    sample_rate: int,
    *,
    window_seconds: float = 1.0,
    hop_seconds: float = 1.0,
) -> Bss:
    """BSSEval v4 of (S, C, T): museval's numbers, with filters of 512 taps fitted to whole tracks.

    As museval defines it, a frame in which any source, true or estimated, is silent (its channels
    add up to zeros) is NaN for all sources, and samples after the last whole window are not
    scored. Over a source that is silent throughout museval raises; here that source alone is NaN
    and is named, and the others get what they get without it: silence spans nothing.
    A window as long as the track, or longer, gives one frame. On one core a minute of 4 stereo
    sources at 44.1 kHz takes about half a minute.
    """
    if reference.shape != estimate.shape or reference.ndim != 3:
        raise ValueError(
            f"reference and estimate must both be (S, C, T), got {reference.shape} and "
            f"{estimate.shape}"
        )
    if not np.isfinite(estimate).all():
        raise ValueError("estimate: holds NaN or Inf")
    truth, guess = (np.moveaxis(x, 1, 2).astype(np.float64) for x in (reference, estimate))
    no_reference, no_estimate = _silent(truth), _silent(guess)
    if (truth == truth[:, :, :1]).all() and (guess == guess[:, :, :1]).all():
        # Mono written as stereo: the same scores, from equations that can be solved.
        truth, guess = truth[:, :, :1], guess[:, :, :1]
    playing = np.flatnonzero(~no_reference)
    window, hop = (round(s * sample_rate) for s in (window_seconds, hop_seconds))
    length = truth.shape[1]
    num_frames = 1 if window >= length else (length - window + hop) // hop
    frames = {name: np.full((len(truth), num_frames), np.nan) for name in FRAME_METRICS}
    if len(playing):
        # museval would refuse a silent estimate; in its place the truth, whose scores are dropped.
        guess = np.where(no_estimate[:, None, None], truth, guess)
        try:
            with np.errstate(divide="ignore"):  # -inf is a score
                *scores, _ = _museval().bss_eval(
                    truth[playing],
                    guess[playing],
                    window=window,
                    hop=hop,
                    compute_permutation=False,
                    framewise_filters=False,
                    bsseval_sources_version=False,
                )
        except AttributeError as error:
            # museval's way out of a singular system names np.linalg.linalg, gone since NumPy 2.4.
            if "linalg" not in str(error):
                raise
            raise ValueError(
                "reference: a source or channel is a filtered copy of others, so that "
                "interference cannot be told from the source"
            ) from None
        for name, values in zip(FRAME_METRICS, scores, strict=True):
            frames[name][playing] = values
            frames[name][no_estimate] = np.nan
    found = (tuple(int(i) for i in np.flatnonzero(x)) for x in (no_reference, no_estimate))
    return Bss(frames, *found)


@functools.cache
def _museval() -> ModuleType:
    """museval's metrics without the package around them, which reads compressed stems and so fails
    to import on a machine without ffmpeg."""
    package = importlib.util.find_spec("museval")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location(
        "museval_metrics", Path(package.origin).with_name("metrics.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _silent(audio: np.ndarray) -> np.ndarray:
    """(S, T, C) -> (S,) bool by museval's rule, which takes a signal against itself for silence."""
    return (audio.sum(axis=2) == 0).all(axis=1)


Scores = dict[str, dict[str, float | None]]
"""Source to metric to dB; None where there is no score, which JSON has no NaN for."""


def score_track(
    reference: np.ndarray,
    estimate: np.ndarray,
    sample_rate: int,
    sources: Sequence[str],
    *,
    window_seconds: float = 1.0,
    hop_seconds: float = 1.0,
) -> Scores:
    """All `METRICS` of one track, (S, C, T) each; `sources` names S.

    A source that does not play has no score at all. One that plays and was estimated as silence
    has uSDR 0 and SI-SDR -80 dB and no frame scores.
    """
    bss = bss_eval(
        reference,
        estimate,
        sample_rate,
        window_seconds=window_seconds,
        hop_seconds=hop_seconds,
    )
    truth, guess = torch.from_numpy(reference), torch.from_numpy(estimate)
    by_metric = {
        **bss.medians(),
        "uSDR": usdr(guess, truth).numpy(),
        "SI-SDR": si_sdr(guess.double(), truth.double()).mean(-1).numpy(),  # over channels
    }
    return {
        name: {
            metric: None if i in bss.silent_references else _number(values[i])
            for metric, values in by_metric.items()
        }
        for i, name in enumerate(sources)
    }


def over_tracks(tracks: Mapping[str, Scores]) -> Scores:
    """Source to metric to the median over tracks (track name to its scores) that have one."""
    sources = list(dict.fromkeys(source for scores in tracks.values() for source in scores))
    return {
        source: {metric: _number(median(values(tracks, source, metric))) for metric in METRICS}
        for source in sources
    }


def values(tracks: Mapping[str, Scores], source: str, metric: str) -> list[float]:
    """One value per track that has it, in the order of the tracks: what a box plot shows."""
    found = (scores.get(source, {}).get(metric) for scores in tracks.values())
    return [value for value in found if value is not None]


def median(x: Sequence[float] | np.ndarray) -> float:
    """The median without NaNs; NaN where nothing is left. Infinite scores count."""
    kept = np.asarray(x, np.float64)
    kept = np.sort(kept[~np.isnan(kept)])
    if not len(kept):
        return math.nan
    low, high = kept[(len(kept) - 1) // 2], kept[len(kept) // 2]
    return float(low if low == high else (low + high) / 2)  # equal infinities: no inf - inf


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
