"""Which variants of a sweep may run on, and how far: successive halving judged on paired
differences, as a pure function of what has been recorded."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

CLOSE = 2.0
"""Within this many standard errors of the last one who goes on, one goes on too (about 95%)."""
SHARE = 0.45
"""... as long as all of it stays within this share of the whole grid's steps."""


@dataclass(frozen=True)
class Field:
    """The race as it stands."""

    variants: tuple[str, ...]
    """Ids, in the order of the YAML: of equals the earlier one goes on."""
    seeds: Mapping[str, tuple[int, ...]]
    baseline: str
    controls: frozenset[str]
    """Like the baseline never stopped."""
    rungs: tuple[int, ...]
    """Steps at which variants are judged, ascending, all below `last`; may be empty."""
    last: int
    mode: Literal["min", "max"]
    scores: Mapping[tuple[str, int], Mapping[int, float]]
    """(variant, seed) to {step: score}. A score that is not finite is a seed lost there."""
    lost: frozenset[tuple[str, int]]
    """Will report no more: diverged, or failed for good."""
    granted: Mapping[str, int] = field(default_factory=dict)
    """Variant to the step up to which it has been let run before. Which ones lead changes as more
    come in, so without this memory one that has been let go on, but has no score there yet, could
    be called back. Of what has been begun, a score beyond the rung says it as well."""


@dataclass(frozen=True)
class Standing:
    """One variant at one rung, for people."""

    variant: str
    rank: int | None
    """From 1; None for the exempt, and for those not judged (yet)."""
    difference: float | None
    """Score minus the baseline's, in the score's unit: the mean of the paired differences, fitted
    where pairs are missing. None without the baseline's score."""
    n: int
    """Seeds with a score at this rung."""
    promoted: bool
    text: str
    """Such as "rank 5 of 9: the first 3 go on"."""


@dataclass(frozen=True)
class Trust:
    """How well a rung's order foretold the final one."""

    rung: int
    correlation: float | None
    """Spearman's, -1 to 1; None below three variants or where all are equal."""
    n: int
    """Variants that were never judged (baseline and controls) and are complete at both steps."""


@dataclass(frozen=True)
class _Judged:
    """What became of one rung."""

    order: tuple[str, ...]
    """Those complete there, best first; those without any seed left at the end."""
    whole: bool
    """Nobody can join or change any more."""
    places: int
    close: frozenset[str]
    """Promoted although behind the places."""
    promoted: frozenset[str]


def rung_steps(grace_steps: int, reduction_factor: int, every: int, last: int) -> tuple[int, ...]:
    """Steps grace_steps * reduction_factor^k, each rounded up to an evaluation (a multiple of
    `every`), below `last`. All from whole numbers, so every variant has the same."""
    if grace_steps < 1 or reduction_factor < 2 or every < 1:
        raise ValueError(
            "expected grace_steps and every of at least 1 and reduction_factor of at least 2, got "
            f"{grace_steps}, {every} and {reduction_factor}"
        )
    found: list[int] = []
    step = grace_steps
    while (rounded := -(-step // every) * every) < last:
        if rounded not in found:
            found.append(rounded)
        step *= reduction_factor
    return tuple(found)


def choose_controls(
    variants: Sequence[str], baseline: str, share: float, key: str
) -> frozenset[str]:
    """floor(share * others) variants that will never be stopped, drawn by a hash of `key` and id.

    One is drawn of each stretch of 1/share variants in the YAML's order, as soon as the stretch is
    complete: so variants added at the end may add controls but never take one away, and how many
    there are is not left to chance.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"expected a share of controls from 0 to 1, got {share!r}")
    others = [variant for variant in variants if variant != baseline]
    chosen, start = [], 0
    for end in range(1, len(others) + 1):
        if math.floor(share * end + 1e-9) > len(chosen):
            drawn = {hashlib.sha256(f"{key}/{v}".encode()).digest(): v for v in others[start:end]}
            chosen.append(drawn[min(drawn)])
            start = end
    return frozenset(chosen)


def allowed(
    race: Field, reduction_factor: int, *, close: float = CLOSE, share: float = SHARE
) -> dict[str, int]:
    """Variant to the step up to which it may run now: a rung, or `last`.

    Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934, algorithm 2) of variants:
    one is complete at a rung when each of its seeds has a score there or is lost, and goes on when
    it is among the best floor(complete / reduction_factor). What differs from the paper:

    - The order is that of the effects in score = variant + seed, fitted by least squares over all
      scores at that step. With no score missing its differences are the mean paired ones; with
      some missing, no variant gains by having met only the easy seeds.
    - One with a larger share of lost seeds ranks behind: its mean over the survivors flatters it.
      One with none left is the last, and counts among the complete: it has been judged.
    - Baseline and controls always run to the end. They are neither counted nor given places, so
      the others' race is what it would be without them.
    - When a rung is whole (all who can be there are, the exempt too), one goes on at least. So do
      those within `close` standard errors of the last one who does, in order: at most until
      complete / sqrt(reduction_factor) go on (two at least), and while the steps run and those
      still to come, without more of this kind, stay within `share` of the grid's. `close = 0`
      is without.

    Never less than a variant has been granted before, or than its scores show it has been.
    """
    grades = (*race.rungs, race.last)
    steps = {v: race.last if _exempt(race, v) else grades[0] for v in race.variants}
    for k, judged in enumerate(_judge(race, reduction_factor, close, share)):
        steps.update(dict.fromkeys(judged.promoted, grades[k + 1]))
    return {v: max(step, _passed(race, v)) for v, step in steps.items()}


def settled(
    race: Field, reduction_factor: int, *, close: float = CLOSE, share: float = SHARE
) -> set[str]:
    """Variants that will not be promoted any more: their rung is whole and they do not go on, or
    they have no seed left. Only variants or seeds added to the sweep can change that."""
    found = {
        v
        for v in race.variants
        if not _exempt(race, v) and all((v, s) in race.lost for s in race.seeds[v])
    }
    for judged in _judge(race, reduction_factor, close, share):
        if judged.whole:
            found |= set(judged.order) - judged.promoted
    return found


def standing(
    race: Field,
    rung: int,
    reduction_factor: int | None = None,
    *,
    close: float = CLOSE,
    share: float = SHARE,
) -> list[Standing]:
    """Every variant that has a score at `rung` or has been judged there: the judged by rank, then
    the exempt, then those not complete yet. At `last` nobody is exempt, and no factor needed."""
    effects, _ = _fit(race, rung, race.variants)
    if rung == race.last:
        done = [v for v in race.variants if v in effects and _complete(race, v, rung)]
        judged = _Judged(tuple(_order(race, rung, done)), True, 0, frozenset(), frozenset(done))
    else:
        assert reduction_factor is not None, "below the last step it matters how many go on"
        judged = _judge(race, reduction_factor, close, share)[race.rungs.index(rung)]
    shown = []
    for v in (*judged.order, *(v for v in race.variants if v not in judged.order)):
        if v not in effects and v not in judged.order:
            continue
        n = sum(score is not None for score in _scores(race, v, rung))
        rank = judged.order.index(v) + 1 if v in judged.order and n else None
        pair = race.baseline in effects and v in effects
        difference = effects[v] - effects[race.baseline] if pair else None
        promoted = v in judged.promoted or _exempt(race, v)
        shown.append(Standing(v, rank, difference, n, promoted, _text(race, judged, v, rank, n)))
    return sorted(shown, key=lambda s: 0 if s.rank else 1 if _exempt(race, s.variant) else 2)


def _text(race: Field, judged: _Judged, variant: str, rank: int | None, n: int) -> str:
    if rank is None:
        if _exempt(race, variant):
            return ("baseline" if variant == race.baseline else "control") + ": never stopped"
        seeds = len(race.seeds[variant])
        return f"{n} of {seeds} seeds are there" if n else "all seeds lost"
    text = f"rank {rank} of {len(judged.order)}" + ("" if judged.whole else " so far")
    if n < len(race.seeds[variant]):
        text += f", {len(race.seeds[variant]) - n} of {len(race.seeds[variant])} seeds lost"
    if variant in judged.close:
        return f"{text}: goes on, for it cannot be told from rank {judged.places}"
    if variant in judged.promoted:
        return f"{text}: goes on" if judged.places else text
    going = judged.places + len(judged.close)
    some = {0: "none goes on yet", 1: "the first goes on"}
    return f"{text}: {some.get(going, f'the first {going} go on')}"


def trust(race: Field) -> list[Trust]:
    """Per rung the rank correlation of rung score and final score over baseline and controls: of
    the others only the good ones get to the end, and their correlation would say little."""
    found = []
    for rung in race.rungs:
        both = [
            v
            for v in race.variants
            if _exempt(race, v) and None not in _scores(race, v, rung) + _scores(race, v, race.last)
        ]
        early, final = (_fit(race, step, both)[0] for step in (rung, race.last))
        ranks = [_ranks([effects[v] for v in both]) for effects in (early, final)]
        flat = any(len(np.unique(r)) < 2 for r in ranks)
        correlation = None if len(both) < 3 or flat else float(np.corrcoef(ranks)[0, 1])
        found.append(Trust(rung, correlation, len(both)))
    return found


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Equal values share the mean of their ranks."""
    array = np.asarray(values)
    return (array[:, None] > array).sum(1) + 0.5 * (array[:, None] == array).sum(1)


# --- judging


def _judge(race: Field, factor: int, close: float, share: float) -> list[_Judged]:
    """What became of each rung, from the lowest up."""
    entrants = [v for v in race.variants if not _exempt(race, v)]
    exempt = [v for v in race.variants if _exempt(race, v)]
    floor = dict.fromkeys(entrants, race.rungs[0] if race.rungs else race.last)
    whole, found = True, []
    for k, rung in enumerate(race.rungs):
        order = _order(race, rung, [v for v in entrants if _complete(race, v, rung)])
        whole = (
            whole and len(order) == len(entrants) and all(_complete(race, v, rung) for v in exempt)
        )
        alive = [v for v in order if any(s is not None for s in _scores(race, v, rung))]
        places = min(len(alive), max(len(order) // factor, int(whole)))
        promoted = {v for v in entrants if _passed(race, v) > rung} | set(alive[:places])
        extra: list[str] = []
        if whole:
            most = max(2, math.floor(len(order) / math.sqrt(factor) + 1e-9))
            for v in _indistinguishable(race, rung, alive, places, most, close):
                going = [w for w in order if w in promoted or w == v]
                if _forecast(race, floor, going, k, factor) > share:
                    break
                promoted.add(v)
                extra.append(v)
        found.append(_Judged(tuple(order), whole, places, frozenset(extra), frozenset(promoted)))
        entrants = [v for v in race.variants if v in promoted]
        floor.update(dict.fromkeys(entrants, (*race.rungs, race.last)[k + 1]))
    return found


def _indistinguishable(
    race: Field, rung: int, alive: list[str], places: int, most: int, close: float
) -> list[str]:
    """Those just behind the places who are within `close` standard errors of the last place.

    The error is pooled over the baseline and the `most` best, whose scores are alike: one about to
    diverge, far behind, has a spread of its own, which would let everybody through.
    """
    near = alive[:most]
    if not 0 < places < len(near) or close <= 0:
        return []
    effects, sigma = _fit(race, rung, [*near, race.baseline])
    if sigma is None:
        return []  # a single seed: nothing says how much chance there is
    n = {v: sum(s is not None for s in _scores(race, v, rung)) for v in near}
    last = near[places - 1]
    found = []
    for v in near[places:]:
        error = sigma * math.sqrt(1 / n[v] + 1 / n[last])
        if n[v] != n[last] or abs(effects[v] - effects[last]) > close * error:
            break  # one with lost seeds was put behind for that, however good the rest
        found.append(v)
    return found


def _forecast(
    race: Field, floor: Mapping[str, int], going: list[str], k: int, factor: int
) -> float:
    """Share of the grid's steps that will have run in the end, if `going` (best first) go on from
    rung `k` and from then on only the best, one in `factor`, at each rung. What came later than
    this rung is left out, losses too: a decision once taken is taken again."""
    ends = {v: floor.get(v, race.last) for v in race.variants}
    num = len(going)
    for step in (*race.rungs, race.last)[k + 1 :]:
        ends.update(dict.fromkeys(going[:num], step))
        num = max(1, num // factor)
    steps = sum(len(race.seeds[v]) * end for v, end in ends.items())
    return steps / (race.last * sum(len(race.seeds[v]) for v in race.variants))


def _order(race: Field, rung: int, complete: list[str]) -> list[str]:
    """Best first: by share of seeds lost, then by effect, then as in the YAML."""
    effects, _ = _fit(race, rung, race.variants)
    sign = 1 if race.mode == "min" else -1

    def key(variant: str) -> tuple[float, float]:
        scores = _scores(race, variant, rung)
        return scores.count(None) / max(1, len(scores)), sign * effects.get(variant, 0.0)

    return sorted(complete, key=key)


def _exempt(race: Field, variant: str) -> bool:
    return variant == race.baseline or variant in race.controls


def _passed(race: Field, variant: str) -> int:
    """The step up to which it has been let run, by what was granted and by its scores."""
    step = race.granted.get(variant, 0)
    grades = (*race.rungs, race.last)
    for seed in race.seeds[variant]:
        seen = sorted(race.scores.get((variant, seed), {}))
        for rung, following in zip(grades, grades[1:], strict=False):
            if len(seen) > 1 and seen[-2] >= rung:  # the first such is the rung's own score
                step = max(step, following)
    return step


def _scores(race: Field, variant: str, step: int) -> list[float | None]:
    """Per seed the score of the first evaluation at or after `step`; None: none, or not finite."""
    found: list[float | None] = []
    for seed in race.seeds[variant]:
        seen = race.scores.get((variant, seed), {})
        score = seen.get(min((s for s in seen if s >= step), default=-1))
        found.append(score if score is not None and math.isfinite(score) else None)
    return found


def _complete(race: Field, variant: str, step: int) -> bool:
    """Whether each seed has been evaluated there or is lost."""
    return all(
        (variant, seed) in race.lost
        or max(race.scores.get((variant, seed), {}), default=-1) >= step
        for seed in race.seeds[variant]
    )


def _fit(
    race: Field, step: int, variants: Collection[str]
) -> tuple[dict[str, float], float | None]:
    """(variant to its effect in score = variant + seed, standard deviation of what is left over).

    Least squares over the scores there are. The deviation is None without degrees of freedom.
    """
    seeds = sorted({seed for v in variants for seed in race.seeds[v]})
    rows, table = [], []
    for v in variants:
        by_seed = dict(zip(race.seeds[v], _scores(race, v, step), strict=True))
        scores = [by_seed.get(seed) for seed in seeds]
        if any(score is not None for score in scores):
            rows.append(v)
            table.append([math.nan if score is None else score for score in scores])
    if not rows:
        return {}, None
    values = np.array(table, dtype=np.float64)  # (variants, seeds)
    there = np.isfinite(values)
    centre = values[there].mean()
    values = np.where(there, values - centre, 0.0)
    count = there.sum(1)
    # The variants are eliminated: what remains is one equation per seed. The small term fixes the
    # freedom of a constant; of groups that share no seed it compares the plain means.
    normal = np.diag(there.sum(0)) - there.T @ (there / count[:, None])
    rest = np.where(there, values - (values.sum(1) / count)[:, None], 0.0).sum(0)
    seed_effects = np.linalg.solve(normal + 1e-9 * np.eye(len(seeds)), rest)
    effects = np.where(there, values - seed_effects, 0.0).sum(1) / count
    residuals = np.where(there, values - seed_effects - effects[:, None], 0.0)
    freedom = int(there.sum() - len(rows) - there.any(0).sum() + 1)
    sigma = math.sqrt(float((residuals**2).sum()) / freedom) if freedom > 0 else None
    # Rounded, for what equals by hand must not be ordered by the last bit.
    digits = 9 - math.floor(math.log10(np.abs(values).max() or 1.0))
    return {
        v: round(float(e) + float(centre), digits) for v, e in zip(rows, effects, strict=True)
    }, sigma
