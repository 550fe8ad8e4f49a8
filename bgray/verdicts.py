"""Is a variant better than its baseline, or luck: intervals and verdicts from scores by seed and
item.

Scores of a variant and of its baseline at one step are arrays (N seeds, M items), paired by seed
(common random numbers: the same data at the same step) and by item. Of their differences d[s, i]:

estimate       their mean.
seed part      s2 / N, where s2 is the variance over seeds of the mean over items; N - 1 degrees of
               freedom. With three seeds that is a poor estimate (t = 4.3, with seven comparisons
               11.8), so it borrows from the others: s2 is the larger of the comparison's own and
               of the mean over all comparisons with this baseline at this step (`pooled`).
item part      (MS_item - MS_rest) / (N M), at least 0, M - 1 degrees of freedom: the crossed
               layout's mean squares. It is what more seeds do not remove, and 0 on average where
               variants differ in nothing.
interval       mean +- sqrt(t_seed^2 * seed part + t_item^2 * item part), each part with Student's
               t for its degrees of freedom (Zou and Donner 2008, Stat. Med. 27(10)), at 1 -
               w (1 - level) / (2 K): Bonferroni over the sweep's K comparisons, so all intervals
               hold at once with probability `level`, and verdict <=> 0 lies outside. Look i has
               w = 6 / (pi i)^2, which adds up to 1: whoever looks after 3 seeds, 6 and 12 and
               believes the first look that says something is not fooled more often for that
               (without it 12% instead of 5% with one comparison).

Chosen by simulation (tests/test_verdicts.py), of sweeps of 2 to 19 variants that differ in nothing
from their baseline, with 2 to 5 seeds, normal and t3 noise: at level 0.95 at most 5% of them have
any wrong interval, and half as many a false "better", with equal noise (where it is 1%) and with
one variant, half of them or the baseline three times as noisy. One comparison by itself: 95 to 99%
of intervals cover the truth, for 2 to 8 seeds and 8 to 64 items. Found wanting: the percentile
bootstrap (of one comparison it covers 62% with 2 seeds, 73% with 3, 82% with 5); each comparison's
variance by itself (valid, but with seven variants and 3 seeds, looks not counted, it sees a
difference of four standard deviations of a seed 17% of the time, this rule 64%); the residual of
the layout variants x seeds (up to 14% false "better" with a noisy baseline; Dunnett's quantiles
make it more); moderated variances (Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3(1): up to 6%).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

SHARED = 0.25
"""Correlation of the variances of two comparisons with one baseline, if all are equally noisy: the
square of the differences' correlation, 1/2."""
OUTLIER = 10.0
"""A comparison this many times as noisy as the median one counts as no more than that when others
borrow from it: a variant that all but diverges must not hide what the others show."""
MOST_SEEDS = 50
POWER = 0.8

Mode = Literal["min", "max"]
"""Which way a score is better."""
Kind = Literal["better", "worse", "same", "open", "unstable", "none"]


@dataclass(frozen=True)
class Parts:
    """What a comparison's scores say, before a level is chosen."""

    mean: float
    """Mean of variant - baseline, in the score's unit."""
    seeds: int
    """Of the variant; the baseline has the same ones, or `other_seeds` where unpaired."""
    items: int
    seed_variance: float | None
    """Of the mean over items of the difference, from seed to seed; None for one seed, and where
    unpaired."""
    item_part: float
    """What items add to the variance of the mean, and no seed removes."""
    bootstrap_variance: float | None
    """Of the mean, over infinitely many resamples of seeds x items; None where unpaired."""
    variances: tuple[float, float] | None
    """Of variant and baseline over seeds, each by itself; None for one seed."""
    equal: bool = False
    """Every score is that of the baseline, to the last bit."""
    other_seeds: int | None = None
    """Of the baseline, where the two have no seed in common."""


@dataclass(frozen=True)
class Verdict:
    """One comparison's interval and what follows from it."""

    kind: Kind
    text: str
    interval: tuple[float, float] | None = None
    standard_error: float | None = None
    df: float | None = None
    more_seeds: int | None = None
    """About so many more for a verdict; None where none are needed or none would do."""


@dataclass(frozen=True)
class Pool:
    """Seed variance of a sweep's comparisons together."""

    variance: float
    df: float
    comparisons: int


# --- parts


def parts(variant: np.ndarray, baseline: np.ndarray, *, paired: bool = True) -> Parts | None:
    """Of scores (N, M) and (N, M), NaN where a score has no meaning; None if no item is left.

    paired: row s of both is one seed. If not, the numbers of rows may differ (Welch).
    """
    known = np.isfinite(variant).all(0) & np.isfinite(baseline).all(0)  # (M,)
    a, b = variant[:, known].astype(float), baseline[:, known].astype(float)
    if not known.any() or not len(a) or not len(b):
        return None
    if not paired:
        return _unpaired(a, b)
    d = a - b
    n, m = d.shape
    seed, item, rest = mean_squares(d)
    several = n > 1
    return Parts(
        mean=float(d.mean()),
        seeds=n,
        items=m,
        seed_variance=seed / m if several else None,
        item_part=max(0.0, item - rest) / (n * m) if several else 0.0,
        bootstrap_variance=bootstrap_variance(d) if several else None,
        variances=(_over_seeds(a), _over_seeds(b)) if several else None,
        equal=not d.any(),
    )


def _unpaired(a: np.ndarray, b: np.ndarray) -> Parts:
    (n, m), k = a.shape, len(b)
    variances, item_part = None, 0.0
    if n > 1 and k > 1:
        variances = (_over_seeds(a), _over_seeds(b))
        items = float((a.mean(0) - b.mean(0)).var(ddof=1)) if m > 1 else 0.0
        rest = mean_squares(a)[2] / n + mean_squares(b)[2] / k
        item_part = max(0.0, items - rest) / m
    mean = float(a.mean() - b.mean())
    return Parts(mean, n, m, None, item_part, None, variances, False, k)


def _over_seeds(scores: np.ndarray) -> float:
    return float(scores.mean(1).var(ddof=1))


def mean_squares(d: np.ndarray) -> tuple[float, float, float]:
    """MS_seed, MS_item, MS_rest of (N, M): the two-way layout with one value per cell; 0 where
    there are no degrees of freedom. Their expectations are m A + E, n B + E and E, for variances A
    of seeds, B of items and E of what is left."""
    n, m = d.shape
    seed, item = d.mean(1) - d.mean(), d.mean(0) - d.mean()
    rest = d - d.mean() - seed[:, None] - item[None, :]
    return (
        float(m * (seed**2).sum() / max(1, n - 1)),
        float(n * (item**2).sum() / max(1, m - 1)),
        float((rest**2).sum() / max(1, (n - 1) * (m - 1))),
    )


def bootstrap_variance(d: np.ndarray) -> float:
    """Variance of the mean of (N, M) when seeds and items are resampled, each with replacement and
    independently of each other ("pigeonhole", Owen 2007, Ann. Appl. Stat. 1(2), section 3), over
    infinitely many resamples.

    With how often each seed and item is drawn as weights w_s and v_i (multinomial: mean 1,
    E[w_s w_t] = [s = t] + 1 - 1/N) the resampled mean is that of d plus sum w_s a_s / N + sum v_i
    b_i / M + sum w_s v_i e_si / (N M), where a, b and e are d's row, column and interaction
    effects. Each sums to 0 over its indices, so only the [s = t] terms are left, and no mixed ones:
    sum a^2 / N^2 + sum b^2 / M^2 + sum e^2 / (N M)^2.
    """
    n, m = d.shape
    seed, item, rest = mean_squares(d)
    seed, item = seed * (n - 1) / n, item * (m - 1) / m
    return (seed + item + rest * (n - 1) * (m - 1) / (n * m)) / (n * m)


def pooled(comparisons: Sequence[Parts]) -> Pool | None:
    """The seed variance of comparisons with one baseline, at one step; None if none has two seeds.

    They share the baseline's noise, so K of them with N - 1 degrees of freedom have together not
    K (N - 1), but (N - 1) K / (1 + (K - 1) / 4): no more than 4 (N - 1). That is also what keeps
    the level when the baseline itself is the noisy one.
    """
    found = [
        (p.seed_variance, p.seeds - 1)
        for p in comparisons
        if p.seed_variance is not None and not p.equal
    ]
    if not found:
        return None
    variances, dfs = (np.array(values) for values in zip(*found, strict=True))
    weights = dfs / dfs.sum()
    correlation = np.where(np.eye(len(dfs), dtype=bool), 1.0, SHARED)
    spread = weights[:, None] * weights[None, :] * correlation / np.maximum.outer(dfs, dfs)
    capped = np.minimum(variances, OUTLIER * np.median(variances))
    return Pool(float((weights * capped).sum()), float(1 / spread.sum()), len(dfs))


def removed_by_pairing(comparisons: Sequence[Parts]) -> float | None:
    """Share of the variance of a difference that common random numbers remove: 1 - var(a - b) /
    (var(a) + var(b)) over seeds, all comparisons together; below 0 where they add some. None
    without a comparison of two seeds."""
    found = [
        (p.seeds - 1, p.seed_variance, sum(p.variances))
        for p in comparisons
        if p.seed_variance is not None and p.variances and not p.equal
    ]
    alone = sum(df * both for df, _, both in found)
    return 1 - sum(df * paired for df, paired, _ in found) / alone if alone else None


# --- verdict


def judge(
    found: Parts | None,
    *,
    mode: Mode,
    pool: Pool | None = None,
    comparisons: int = 1,
    look: int = 1,
    level: float = 0.95,
    lost: tuple[int, int] = (0, 0),
    baseline_lost: tuple[int, int] = (0, 0),
) -> Verdict:
    """The verdict on one of the `comparisons` that are made with a baseline.

    look: the how-manieth time that it is asked, each time with more seeds.
    lost: (k, n), k of n seeds of the variant diverged. The others flatter it, so it is
    never "better", nor "worse" than a baseline that lost some.
    """
    unstable = f"unstable: {lost[0]} of {lost[1]} seeds diverged"
    baseline_unstable = "baseline " + unstable.replace(
        f"{lost[0]} of {lost[1]}", f"{baseline_lost[0]} of {baseline_lost[1]}"
    )
    if found is None:
        if lost[0] or baseline_lost[0]:
            return Verdict("unstable", unstable if lost[0] else baseline_unstable)
        return Verdict("none", "no common score yet")
    interval, error, df = None, None, None
    if found.equal:
        interval, error = (0.0, 0.0), 0.0
        verdict: tuple[Kind, str] = ("same", "no difference: all scores are equal")
    elif found.variances is None:
        verdict = ("open", "")
    else:
        components = _components(found, pool, 0)
        error, df = math.sqrt(sum(variance for variance, _ in components)), components[0][1]
        half = _half_width(components, _share(level, comparisons, look))
        interval = (found.mean - half, found.mean + half)
        above, below = interval[0] > 0, interval[1] < 0
        good, bad = (above, below) if mode == "max" else (below, above)
        verdict = ("better", "better") if good else ("worse", "worse") if bad else ("open", "")
    more = None
    if lost[0] and verdict[0] != "worse":
        verdict = ("unstable", unstable)
    elif baseline_lost[0] and verdict[0] != "better":
        verdict = ("unstable", baseline_unstable)
    elif verdict[0] == "open":
        more, text = _more(found, pool, comparisons, level, look)
        verdict = ("open", text)
    return Verdict(*verdict, interval, error, df, more)


def _components(found: Parts, pool: Pool | None, more: int) -> list[tuple[float, float]]:
    """(variance, degrees of freedom) of what makes up the variance of the mean, with so many more
    seeds on both sides; seeds first, items last."""
    n = found.seeds + more
    items = (found.item_part, float(max(1, found.items - 1)))
    if found.other_seeds is not None and found.variances:
        k = found.other_seeds + more
        of_a, of_b = found.variances
        return [(of_a / n, n - 1.0), (of_b / k, k - 1.0), items]
    own, df = found.seed_variance or 0.0, n - 1.0
    if pool is not None:
        own = max(own, pool.variance)
        shared = (n - 1) * pool.comparisons / (1 + SHARED * (pool.comparisons - 1))
        df = max(df, shared if more else pool.df)
    return [(own / n, df), items]


def _half_width(components: list[tuple[float, float]], share: float) -> float:
    """Such that Student's t lies below it with probability `share`."""
    return math.sqrt(sum(v * _quantile(share, df) ** 2 for v, df in components if v))


def _share(level: float, comparisons: int, look: int) -> float:
    """The quantile. Look i gets 6 / (pi^2 i^2) of what is allowed to go wrong, which over any
    number of looks adds up to all of it."""
    return 1 - (1 - level) * 6 / (math.pi * look) ** 2 / (2 * comparisons)


def _quantile(share: float, df: float) -> float:
    """Of Student's t. Not scipy.stats.t.ppf, which takes a hundred times as long for one number."""
    return float(special.ndtri(share) if math.isinf(df) else special.stdtrit(df, share))


def _more(
    found: Parts, pool: Pool | None, comparisons: int, level: float, look: int
) -> tuple[int | None, str]:
    """(seeds still wanting for 80% power, if the difference is what it looks like; in words)."""
    least = min(found.seeds, found.other_seeds or found.seeds)
    begin = "one seed: " if least == 1 else "can't tell yet: "
    if found.variances is None and (pool is None or found.other_seeds is not None):
        return 2, begin + "about 2 more"
    for more in range(1, MOST_SEEDS + 1):
        components = _components(found, pool, more)
        # With more seeds it is the next look.
        needed = _half_width(components, _share(level, comparisons, look + 1))
        if abs(found.mean) >= needed + _half_width(components, POWER):
            seeds = "" if least == 1 else f" seed{'s' * (more > 1)}"
            return more, f"{begin}about {more} more{seeds}"
    *of_seeds, of_items = _components(found, pool, 0)
    if found.item_part > sum(variance for variance, _ in of_seeds):
        return None, f"{begin}more validation items, not seeds"
    return None, f"{begin}more than {MOST_SEEDS} more seeds, so no difference worth it"
