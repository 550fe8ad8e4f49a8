"""The second round of a screening: who gets fresh seeds, how many, and when to choose again."""

import math
from collections.abc import Sequence
from typing import Any

from bgray.sweep_config import Budget, Screening


def choose(
    screening: Screening,
    ranked: Sequence[str],
    first_seed: int,
    budget: Budget | None,
    runs: float = math.inf,
) -> dict[str, Any]:
    """What `sweep.json` keeps as `confirmation`.

    ranked: variants that came to the end of the first round with a score, best first, without the
    baseline. first_seed: the first round's. runs: how many runs the budget pays for.
    """
    wanted = min(screening.shortlist, len(ranked))
    variants, seeds = affordable(wanted, screening.seeds, runs) if wanted else (0, 0)
    return {
        "variants": list(ranked[:variants]),
        "seeds": [first_seed + 1 + i for i in range(seeds)],
        "asked": [screening.shortlist, screening.seeds],
        "cut": bool(wanted) and (variants, seeds) != (wanted, screening.seeds),
        "budget": budget and budget.gpu_hours,
    }


def holds(chosen: dict[str, Any], screening: Screening, budget: Budget | None) -> bool:
    """Whether an earlier choice is what would be chosen now: the question is the same, and where
    the budget had cut it there is no more of it."""
    if chosen["asked"] != [screening.shortlist, screening.seeds]:
        return False
    before = math.inf if chosen["budget"] is None else chosen["budget"]
    return not (chosen["cut"] and (budget is None or budget.gpu_hours > before))


def affordable(shortlist: int, seeds: int, runs: float) -> tuple[int, int]:
    """(variants, seeds) of a shortlist that `runs` runs pay for, the baseline's included: fewer
    seeds first, but two at least, for one says nothing; then fewer variants; (0, 0) for none."""
    if seeds * (shortlist + 1) <= runs:
        return shortlist, seeds
    for variants in range(shortlist, 0, -1):
        if (fit := int(runs // (variants + 1))) >= 2:
            return variants, min(seeds, fit)
    return 0, 0
