"""Fewer points of a curve that look the same when drawn: extremes, ends and gaps stay."""

import numpy as np


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Indices (M,), rising, M <= max(most, 8), of the values (N,) that are to be drawn.

    Kept are the first and the last one, and of each of a number of equal stretches the least and
    the greatest one; so every extreme, however short, is there. Between two that are kept is a
    value that is no number (NaN, infinite) exactly where there was one between them: a gap in the
    curve stays a gap, and none is made.
    """
    number = len(values)
    if number <= most:
        return np.arange(number)
    finite = np.isfinite(values)
    whole = bool(finite.all())
    # A gap may take one index more for each that is kept.
    buckets = max(1, (most - 2) // 2 if whole else (most - 4) // 4)
    each = -(-number // buckets)
    padded = np.full((-(-number // each), each), np.nan)
    padded.flat[:number] = np.where(finite, values, np.nan)
    starts = np.arange(len(padded)) * each
    some = np.isfinite(padded).any(1)
    low = starts + np.where(np.isnan(padded), np.inf, padded).argmin(1)
    high = starts + np.where(np.isnan(padded), -np.inf, padded).argmax(1)
    kept = np.unique(np.r_[0, low[some], high[some], number - 1])
    if whole:
        return kept
    holes = np.flatnonzero(~finite)
    after = np.searchsorted(holes, kept[:-1], side="right")
    after = after[after < len(holes)]
    return np.unique(np.r_[kept, holes[after]])
