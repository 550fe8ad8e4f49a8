"""What an agenda knows of one trial, from the records in its folder."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from bgray import storage
from bgray.records import evaluations, read_info
from bgray.search import Trial
from bgray.sweep_config import Sweep


@dataclasses.dataclass
class Known:
    """What is known of one trial."""

    state: str = "waiting"
    step: int = 0
    """Up to which it is evaluated and checkpointed."""
    scores: dict[int, float] = dataclasses.field(default_factory=dict)
    hours: float = 0.0
    """That it has held its machine, without the present start."""
    started: float | None = None
    """time.monotonic() of the present start; None: it is not running."""
    final: bool = False
    """Ended in this session in a way that is not to be tried again."""
    alone: bool = False
    """To be started without neighbours: it ran out of memory beside some."""
    packed: bool = False
    """It shared its GPU."""
    unpaid: bool = False
    """Stopped because the budget is spent."""


def read(trial: Trial, sweep: Sweep) -> Known:
    """As its folder says."""
    info = read_info(trial.url)
    if info is None:
        return Known()
    timing = info.get("timing") or {}
    seconds = sum(timing.get(f"{part}_seconds") or 0 for part in ("train", "warm_up", "other"))
    scores = {step: score_of(values, sweep) for step, values in evaluations(trial.url)}
    step = info.get("step") or 0
    packed = bool(info.get("packed"))
    return Known(info.get("state", "waiting"), step, scores, seconds / 3600, packed=packed)


def score_of(metrics: Mapping[str, Any], sweep: Sweep) -> float:
    """What the sweep compares by; the worst there is where it has no value or is not a number."""
    value = metrics.get(sweep.metric)
    worst = -math.inf if sweep.mode == "max" else math.inf
    return worst if value is None or math.isnan(value) else value


def elsewhere(folder: str, trials: Iterable[Trial], sweep: Sweep) -> list[tuple[Trial, Known]]:
    """Those of `trials` that a sweep in another folder than `folder`, beside it, has run."""
    results, by_id, found = folder.rsplit("/", 1)[0], {trial.id: trial for trial in trials}, []
    for name in storage.listdir(results) if by_id else []:
        other = storage.join(results, name)
        if other == folder:
            continue
        for run_id in sorted(by_id.keys() & set(storage.listdir(other))):
            trial = dataclasses.replace(by_id[run_id], url=storage.join(other, run_id))
            if (known := read(trial, sweep)).step:
                found.append((trial, known))
    return found
