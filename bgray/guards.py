"""Recognises training that goes wrong without an error: silence, collapse, stagnation, explosion,
no convergence.

Pure functions of what validation and the log measured anyway. Each returns what it saw in words,
or an empty text.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

SILENT, COLLAPSE, STAGNATION = "silent output", "collapse", "stagnation"
EXPLODING, FAR_APART = "exploding loss", "loss parts far apart"
NO_NUMBER, NO_CONVERGENCE = "score not a number", "no convergence"

SILENT_DB = -60.0
"""An output so far below its target's level is silence: a thousandth of its amplitude."""
AUDIBLE = 1e-6  # mean square of a target that counts: -60 dBFS
ALIKE, UNLIKE = 0.99, 0.9
"""Correlation from which two signals are the same, and below which they are not."""
LINES, HELD, TIMES = 50, 3, {"loss": 100.0, "grad_norm": 1000.0}
"""A value explodes when it is so many times above its running median (over LINES lines of the log)
for HELD lines on end. Gradient norms have heavy tails."""
EVALUATIONS = 6  # fewer say nothing about stagnation


def silent(grams: np.ndarray, names: Sequence[str]) -> str:
    """Which outputs are silent where their targets are not.

    grams: (N, 2S+1, 2S+1), for each of N items the mean products of its signals: S estimates, S
      targets, the input.
    """
    num, found = len(names), []
    for i, name in enumerate(names):
        energy, wanted = grams[:, i, i], grams[:, num + i, num + i]
        heard = (wanted > AUDIBLE) & np.isfinite(energy)
        if heard.any():
            ratio = np.maximum(energy[heard], 1e-20) / wanted[heard]
            level_db = float(np.median(10 * np.log10(ratio)))
            if level_db < SILENT_DB:
                found.append(f"{name} is {-level_db:.0f} dB below its target")
    return f"{', '.join(found)} (median of {len(grams)} items)" if found else ""


def collapsed(grams: np.ndarray, names: Sequence[str], *, mixture: bool) -> str:
    """Which outputs are nearly one signal, whatever their levels, though their targets are not.

    grams: as for `silent`. mixture: whether the input is the targets' sum, so that a single output
    that repeats it has separated nothing.
    """
    num = len(names)
    signals = [*names, *(f"the target of {name}" for name in names), "the input"]
    alike = correlations(grams)  # (2S+1, 2S+1)
    pairs = [(i, j) for i in range(num) for j in range(i)]
    for i, j in pairs:
        if alike[i, j] > ALIKE and alike[num + i, num + j] < UNLIKE:
            both = np.nan_to_num(alike[i, num:])
            follows = signals[num + int(np.argmax(both))]
            return (
                f"{names[j]} and {names[i]} are nearly the same signal (correlation "
                f"{alike[i, j]:.4f}, their targets {alike[num + i, num + j]:.2f}), most like "
                f"{follows} ({both.max():.2f})"
            )
    if mixture and num == 1 and alike[0, 2] > ALIKE and alike[1, 2] < UNLIKE:
        return (
            f"{names[0]} is nearly the whole mixture (correlation {alike[0, 2]:.4f}, its target "
            f"{alike[1, 2]:.2f})"
        )
    return ""


def correlations(grams: np.ndarray) -> np.ndarray:
    """(N, K, K) mean products -> (K, K): medians over items of the absolute correlation, NaN where
    no item has both signals."""
    whole = grams[np.isfinite(grams).all((1, 2))]
    energy = np.einsum("nii->ni", whole)  # (N, K)
    heard = energy > 1e-12
    norm = np.sqrt(np.where(heard, energy, 1.0))
    found = np.abs(whole) / (norm[:, :, None] * norm[:, None, :])
    both = heard[:, :, None] & heard[:, None, :]
    result = np.full(grams.shape[1:], np.nan)
    for i, j in np.argwhere(both.any(0)):
        result[i, j] = np.median(found[both[:, i, j], i, j])
    return result


def stagnation(scores: Sequence[float], baseline: float | None, mode: str) -> str:
    """Whether the last half of the evaluations brought nothing, and none so far beats the
    unprocessed input.

    An improvement counts where it is twice the evaluations' own unrest. mode: which way is better,
    min or max.
    """
    known = np.array([s for s in scores if math.isfinite(s)])
    if baseline is None or len(known) < EVALUATIONS:
        return ""
    gains = known if mode == "max" else -known
    half = len(gains) // 2
    early, late = gains[:half], gains[half:]
    unrest = 2 * float(np.std(np.diff(late))) / math.sqrt(2)
    beaten = gains.max() > (baseline if mode == "max" else -baseline)
    if beaten or late.max() > early.max() + max(unrest, 1e-6 * abs(early.max())):
        return ""
    best = gains.max() if mode == "max" else -gains.max()
    return (
        f"nothing gained in the last {len(late)} of {len(known)} evaluations, and none is better "
        f"than the unprocessed input (best {best:.4g}, input {baseline:.4g})"
    )


def exploding(name: str, values: Sequence[float]) -> str:
    """Whether the last lines of the log lie orders of magnitude above the running median.

    values: of `name`, a key of TIMES, oldest first. A loss may be negative (SI-SDR), so it is the
    rise that counts.
    """
    before, last = values[-LINES - HELD : -HELD], values[-HELD:]
    if len(before) < 2 * HELD or not all(map(math.isfinite, [*before, *last])):
        return ""
    middle, size = float(np.median(before)), float(np.median(np.abs(before)))
    rise = min(last) - middle
    if rise <= TIMES[name] * max(size, 1e-12):
        return ""
    text = f"{name} is {last[-1]:.3g}, its median over the {len(before)} lines before {middle:.3g}"
    return f"{text}; lower optim.lr, or clip harder with train.grad_clip"


def no_number(scores: Mapping[str, Sequence[float | None]]) -> str:
    """Which scores are NaN or infinite for how many items."""
    bad = {
        name: sum(v is not None and not math.isfinite(v) for v in values)
        for name, values in scores.items()
    }
    found = [
        f"{name} of {count} of {len(scores[name])} items" for name, count in bad.items() if count
    ]
    return ", ".join(found)


def unconverged(name: str, score: float | None, baseline: float | None, mode: str) -> str:
    """Whether the score at the end is no better than the unprocessed input's."""
    if score is None or baseline is None:
        return ""
    if not math.isfinite(score):
        return f"{name} is {score} at the end"
    if score > baseline if mode == "max" else score < baseline:
        return ""
    return (
        f"{name} is {score:.4g} at the end, no better than the unprocessed input's {baseline:.4g}"
    )
