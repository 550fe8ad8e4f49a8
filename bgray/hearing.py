"""What is computed about listening: loudness and the gains that match it, what a blind test shows,
and how far ears and scores agree."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special  # scipy.stats takes a second to import

Mode = Literal["min", "max"]

BLOCK_SECONDS = 0.4
"""BS.1770's gating block; what is shorter cannot be gated."""
ABSOLUTE_GATE = -70.0
"""LUFS. BS.1770 counts nothing below it, and here it is silence."""
FEWEST_ROUNDS = 5
"""Of a ranking: with fewer, no interval of an agreement is worth printing."""
LOWER_IS_BETTER = ("stft", "mse", "mae", "l1", "leak", "loss", "distance", "error", "bce", "mel")


# --- loudness


@dataclass(frozen=True)
class Level:
    """How loud a clip is."""

    lufs: float
    """Integrated loudness; -inf for digital silence."""
    peak: float
    """Largest absolute sample, full scale 1."""

    @property
    def silent(self) -> bool:
        return self.peak == 0 or not self.lufs >= ABSOLUTE_GATE


def level_of(audio: np.ndarray, sample_rate: int) -> Level:
    """Of (T, C) or (T,) float, full scale 1: integrated loudness by ITU-R BS.1770-4; under 0.4 s
    the ungated mean square of the K-weighted samples (eq. 2 without the gate)."""
    samples = np.asarray(audio, np.float64).reshape(len(audio), -1)  # (T, C)
    peak = float(np.abs(samples).max(initial=0.0))
    if peak == 0 or not math.isfinite(peak):
        return Level(-math.inf, peak if math.isfinite(peak) else 0.0)
    import pyloudnorm  # its scipy.signal takes a second, which a report need not wait for

    # "DeMan" has the standard's own coefficients; pyloudnorm's "K-weighting" only resembles them.
    meter = pyloudnorm.Meter(sample_rate, filter_class="DeMan", block_size=BLOCK_SECONDS)
    if len(samples) >= BLOCK_SECONDS * sample_rate and samples.shape[1] <= 5:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # log of a silent block
            loudness = float(meter.integrated_loudness(samples))
        return Level(loudness if math.isfinite(loudness) else -math.inf, peak)
    for stage in meter._filters.values():
        samples = stage.apply_filter(samples.T).T
    power = float(np.square(samples).mean(0).sum())
    return Level(-0.691 + 10 * math.log10(power) if power > 0 else -math.inf, peak)


@dataclass(frozen=True)
class Matched:
    """Gains that make clips equally loud."""

    gains_db: tuple[float, ...]
    """One per clip; 0 for a silent one, which is left alone."""
    goal_lufs: float | None
    """What all are brought to, trim included; None where all are silent."""
    trim_db: float
    """By how much all lie below the reference, so that nothing exceeds full scale; at most 0."""
    cause: int | None = None
    """The clip that would exceed it furthest; None without a trim."""


def matched(levels: Sequence[Level], reference: int | None) -> Matched:
    """Every clip to the loudness of clip `reference` (None, or a silent one: the quietest), all
    lowered by one trim where one of them would exceed full scale."""
    heard = [level for level in levels if not level.silent]
    if not heard:
        return Matched((0.0,) * len(levels), None, 0.0)
    chosen = None if reference is None else levels[reference]
    goal = min(level.lufs for level in heard)
    if chosen is not None and not chosen.silent:
        goal = chosen.lufs
    over = [-math.inf if x.silent else 20 * math.log10(x.peak) + goal - x.lufs for x in levels]
    trim = min(0.0, -max(over))
    gains = tuple(0.0 if x.silent else goal - x.lufs + trim for x in levels)
    return Matched(gains, goal + trim, trim, over.index(max(over)) if trim else None)


# --- ABX


def guessing(right: int, trials: int) -> float:
    """Probability of at least so many right answers by tossing a coin: the exact one-sided
    binomial p-value."""
    if not 0 <= right <= trials:
        raise ValueError(f"right: must be from 0 to {trials}, got {right}")
    return _at_least(right, trials, 0.5)


def needed(trials: int, level: float = 0.05) -> int | None:
    """The fewest right answers whose p-value is at most `level`; None where even all are not."""
    return next((k for k in range(trials + 1) if guessing(k, trials) <= level), None)


def power(trials: int, share: float, level: float = 0.05) -> float:
    """Probability that somebody who is right in `share` of trials gets as many as are needed."""
    least = needed(trials, level)
    return 0.0 if least is None else _at_least(least, trials, share)


def _at_least(count: int, trials: int, share: float) -> float:
    return float(special.bdtrc(count - 1, trials, share)) if count else 1.0


def in_words(right: int, trials: int) -> str:
    """What the result of an ABX test means, and what it does not."""
    p = guessing(right, trials)
    count = f"{right} of {trials} right, p = {p:.2g}"
    if p <= 0.05:
        return (
            f"{count}: a difference was heard, by this listener on this clip. Guessing does as "
            f"well once in {round(1 / p):,} times. It does not say which one is better."
        )
    wrong = guessing(trials - right, trials)
    if wrong <= 0.05:
        return (
            f"{count}: by guessing so few are right once in {round(1 / wrong):,} times, as seldom "
            "as so many would be. Perhaps a difference was heard and A and B were mixed up; this "
            "test shows none. Try another one."
        )
    chance = power(trials, 0.75)
    return (
        f"{count}: no difference was shown. That is not proof that there is none: somebody who "
        f"is right three times in four would show it in {chance:.0%} of tests of {trials} trials."
    )


# --- ranks


def average_ranks(ranks: Sequence[float]) -> list[float]:
    """Places such as 1, 1, 3 or 2, 2, 7 (lower is better) as average ranks: 1.5, 1.5, 3."""
    found = np.asarray(ranks, float)
    below = (found[:, None] > found[None, :]).sum(1)
    same = (found[:, None] == found[None, :]).sum(1)
    return [float(rank) for rank in below + (same + 1) / 2]


def normalised(ranks: Sequence[float]) -> list[float]:
    """Average ranks on a scale from 0, best of all, to 1, worst of all; 0.5 where all are tied."""
    places = average_ranks(ranks)
    return [(place - 1) / (len(places) - 1) if len(places) > 1 else 0.5 for place in places]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties averaged; None where a or b is all ties or under two."""
    x, y = (np.array(average_ranks(v)) - (len(v) + 1) / 2 for v in (a, b))
    size = math.sqrt(float((x**2).sum() * (y**2).sum()))
    return None if len(x) < 2 or size == 0 else float((x * y).sum() / size)


def better_way(score: str, metric: str | None = None, mode: Mode | None = None) -> Mode:
    """Which way a score is better: `mode` for the sweep's own metric, otherwise by its name."""
    if mode is not None and score == metric:
        return mode
    return "min" if set(score.lower().split("_")) & set(LOWER_IS_BETTER) else "max"


@dataclass(frozen=True)
class Agreement:
    """How far ears agree with one score."""

    metric: str
    mode: Mode
    rho: float | None
    """Mean of Spearman's rho over rounds, +1: ears and score order every round alike."""
    interval: tuple[float, float] | None
    rounds: int
    """Rankings of one clip by one listener that say something: neither all tied nor unscored."""
    text: str


Round = tuple[Sequence[str], Sequence[float], Sequence[float | None]]
"""(variants; ranks, lower is better; scores, None where there is none), one of each per lane."""


def agreement(metric: str, mode: Mode, rounds: Sequence[Round], where: str = "") -> Agreement:
    """How far ranks and scores agree over rounds; `where` says of what ("at step 100").

    Rounds are no independent draws: they rank the same few variants, of which ears and score may
    each have one steady order that have nothing to do with each other, but agree by chance in
    every round. So 95% are 1.96 errors, with error² = (variance over rounds) / rounds + (variance
    of the mean rho of two unrelated steady orders). For one set of k variants the latter is
    1 / (k - 1), however often it is ranked; further sets lower it by as much as they differ
    (`shared`). It holds for these listeners, not for people at large.
    """
    found: list[float] = []
    sets: list[frozenset[str]] = []
    for variants, ranks, scores in rounds:
        seen: Counter[str] = Counter()
        pairs = []
        for variant, rank, score in zip(variants, ranks, scores, strict=True):
            seen[variant] += 1  # two seeds of one variant are two lanes
            if score is not None:
                pairs.append((f"{variant} {seen[variant]}", rank, score))
        sign = 1 if mode == "min" else -1
        rho = spearman([rank for _, rank, _ in pairs], [sign * score for _, _, score in pairs])
        if rho is not None:
            found.append(rho)
            sets.append(frozenset(name for name, _, _ in pairs))
    n = len(found)
    if not n:
        return Agreement(metric, mode, None, None, 0, "no ranking that says anything")
    mean, where = float(np.mean(found)), f" {where}" if where else ""
    if n < FEWEST_ROUNDS:
        text = f"{mean:+.2f}{where}, too few rankings to tell ({n} of at least {FEWEST_ROUNDS})"
        return Agreement(metric, mode, mean, None, n, text)
    chance = _chance(sets)
    half = 1.96 * math.sqrt(float(np.var(found, ddof=1)) / n + chance)
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    told = "agrees" if low > 0 else "disagrees" if high < 0 else "can't tell"
    if told == "can't tell" and 1.96 * math.sqrt(chance) >= 1:
        told += ", with so few variants however often they are ranked"
    text = f"{mean:+.2f} ({low:+.2f} to {high:+.2f}, {n} rankings{where}): {told}"
    return Agreement(metric, mode, mean, (low, high), n, text)


def _chance(sets: Sequence[frozenset[str]]) -> float:
    """Variance of the mean of Spearman's rho over these sets of variants, one per round, when ears
    and score each have a random order of all variants."""
    parts = [(one, count / len(sets)) for one, count in Counter(sets).items()]
    return sum(p * q * shared(a, b) for a, p in parts for b, q in parts)


def shared(a: frozenset[str], b: frozenset[str]) -> float:
    """Covariance of Spearman's rho over the variants `a` with that over `b`, when ears and score
    each have one random order of all: 1 / (k - 1) for the same k, 0 for sets with none in common.

    rho is 12 / (k (k² - 1)) times the sum of products of centred ranks, and those of ears have
    nothing to do with the score's: so it is the sum of squares of the ranks' covariances. A
    centred rank is the sum over the others of ±1/2, who comes first; two such have covariance 1/4
    for the same two variants, 1/12 where they share one, 0 where none.
    """
    k, n, both = len(a), len(b), len(a & b)
    total = 0.0
    for one in a:
        for other in b:
            if one == other:
                covariance = (both - 1) / 4 + ((k - 1) * (n - 1) - (both - 1)) / 12
            else:
                i, j = one in b, other in a
                covariance = (both - i - j - j * (n - 1 - i) - i * (k - 1 - j)) / 12 - i * j / 4
            total += covariance**2
    return 144 * total / (k * (k**2 - 1) * n * (n**2 - 1))
