"""Which candidates are best over several tracks, and which are as good: ranges with their noise.

Scores are (K, W, S): tracks, candidates (ascending), sources; NaN where a source rests in a track.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLED = 1000  # times, the tracks with replacement
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Best:
    """The best candidate, and the range around it that is as good."""

    index: int
    score: float
    low: int
    high: int
    """Indices: every candidate from `low` to `high` is within the tolerance of the best one, or
    cannot be told from it by these tracks."""
    track_low: float
    track_high: float
    """The worst and the best track's score with this candidate."""


def summarize(
    rows: Sequence[Sequence[Mapping[str, float | None]]],
    candidates: Sequence[int],
    controls: Sequence[int],
    searches: Mapping[int, Sequence[int]],
    tolerance: float,
) -> dict[str, Any]:
    """What scores say, as plain data: the best candidate for all sources and for each, what the
    second gains, the controls, and what each search (seed to its candidates) would have found.

    rows[track][candidate] is source to dB, None where it rests. Sources that rest in every track
    are left out. Candidates ascend; controls and searches are among them.
    """
    names = list(rows[0][0])
    scores = np.array([[[row[s] for s in names] for row in track] for track in rows], float)
    kept = [i for i in range(len(names)) if not np.isnan(scores[:, :, i]).all()]
    names, scores = [names[i] for i in kept], scores[:, :, kept]  # (K, W, S)
    columns = {name: scores[:, :, i : i + 1] for i, name in enumerate(names)}
    single = best(scores, tolerance)
    each = {name: best(column, tolerance) for name, column in columns.items()}
    chosen = [found.index for found in each.values()]

    def facts(found: Best) -> dict[str, Any]:
        return {
            "window": candidates[found.index],
            "sdr_db": found.score,
            "as_good": [candidates[found.low], candidates[found.high]],
            "tracks_db": [found.track_low, found.track_high],
        }

    def one_for_all(index: int) -> dict[str, float]:
        by_name = dict(zip(names, means(scores)[index].tolist(), strict=True))
        return {**by_name, "mean": float(totals(scores)[index])}

    def gain(base: int) -> dict[str, Any]:
        by_source, mean, interval = mean_gain(scores, chosen, base)
        by_name = dict(zip(names, by_source, strict=True))
        return {**by_name, "mean": mean, "mean_interval": list(interval)}

    def searched(seen: Sequence[int]) -> dict[str, Any]:
        there = sorted({candidates.index(candidate) for candidate in seen})
        by_name = {n: totals(x[:, there]) for n, x in {**columns, "mean": scores}.items()}
        return {
            name: {"window": candidates[there[int(x.argmax())]], "sdr_db": float(x.max())}
            for name, x in by_name.items()
        }

    places = {control: candidates.index(control) for control in controls}
    return {
        "single": {**facts(single), "by_target": one_for_all(single.index)},
        "per_target": {name: facts(found) for name, found in each.items()},
        "gain_over_single": gain(single.index),
        "controls": {str(control): one_for_all(i) for control, i in places.items()},
        "gain_over_controls": {str(control): gain(i) for control, i in places.items()},
        "seeds": {str(seed): searched(seen) for seed, seen in searches.items()},
    }


def means(scores: np.ndarray) -> np.ndarray:
    """(K, W, S) -> (W, S) means over the tracks in which a source plays; NaN where in none."""
    return _means(scores, np.ones((1, len(scores))))[0]


def totals(scores: np.ndarray) -> np.ndarray:
    """(K, W, S) -> (W,): the mean over sources of their means over tracks."""
    return _totals(scores, np.ones((1, len(scores))))[0]


def best(scores: np.ndarray, tolerance: float, seed: int = 0) -> Best:
    """The candidate with the highest total, and its plateau.

    A candidate is as good when its total is at most `tolerance` lower, or when 2.5% or more of
    1000 resamplings of the tracks have it level or ahead. The plateau ends, on either side of the
    best, at the first candidate that is not.
    """
    total = totals(scores)
    index = int(np.nanargmax(total))
    resampled = _totals(scores, draw_weights(len(scores), seed))  # (resamplings, W)
    lead = np.nanquantile(resampled[:, index, None] - resampled, INTERVAL[0], axis=0)  # (W,)
    as_good = (total[index] - total <= tolerance) | (lead <= 0)
    low = high = index
    while low > 0 and as_good[low - 1]:
        low -= 1
    while high + 1 < len(total) and as_good[high + 1]:
        high += 1
    by_track = [totals(scores[k : k + 1, index : index + 1])[0] for k in range(len(scores))]
    return Best(
        index,
        float(total[index]),
        low,
        high,
        float(np.nanmin(by_track)),
        float(np.nanmax(by_track)),
    )


def mean_gain(
    scores: np.ndarray, chosen: list[int], base: int, seed: int = 0
) -> tuple[list[float], float, tuple[float, float]]:
    """What a candidate per source gains over one for all: per source, their mean, its interval.

    The interval holds 95% of the means over resampled tracks. It does not hold the optimism of
    choosing and scoring on the same tracks.
    """
    columns = [scores[:, index, s] - scores[:, base, s] for s, index in enumerate(chosen)]
    gains = np.stack(columns, axis=-1)[:, None]  # (K, 1, S)
    resampled = _totals(gains, draw_weights(len(scores), seed))
    low, high = np.nanquantile(resampled, INTERVAL)
    return means(gains)[0].tolist(), float(totals(gains)[0]), (float(low), float(high))


def draw_weights(num_tracks: int, seed: int) -> np.ndarray:
    """(resamplings, K): how often each track is drawn."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_tracks, np.full(num_tracks, 1 / num_tracks), RESAMPLED).astype(float)


def _means(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    there = ~np.isnan(scores)
    flat = np.where(there, scores, 0).reshape(len(scores), -1)  # (K, W*S)
    total, count = weights @ flat, weights @ there.reshape(len(scores), -1)
    out = np.full_like(total, np.nan)
    np.divide(total, count, out=out, where=count > 0)
    return out.reshape(-1, *scores.shape[1:])  # (weightings, W, S)


def _totals(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    per_source = _means(scores, weights)
    # A source that rests in all tracks drawn counts for nothing, for all candidates alike.
    there = ~np.isnan(per_source)
    count = there.sum(-1)
    out = np.full(count.shape, np.nan)  # (weightings, W)
    np.divide(np.where(there, per_source, 0).sum(-1), count, out=out, where=count > 0)
    return out
