"""How the learning rate moves with the step, or with the validation score."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal

import torch

from bgray.problems import refuse

Ranges = dict[str, tuple[Callable[[Any], bool], set[str]]]
"""What a number may be, in words, and as (the test, the options it is for)."""


def out_of_range(ranges: Ranges, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(option, value and the way out) of each number, or tuple with one, that fails its test."""
    problems = []
    for name, value in options.items():
        values = value if isinstance(value, tuple | list) else () if value is None else (value,)
        for allowed, (inside, names) in ranges.items():
            if name in names and not all(map(inside, values)):
                problems.append((name, f"must be {allowed}, got {value!r}"))
    return problems


RANGES: Ranges = {
    "at least 0": (lambda v: 0 <= v < inf, {"warmup_steps", "patience", "cooldown"}),
    "in [0, 1]": (lambda v: 0 <= v <= 1, {"decay_share", "final"}),
    "in (0, 1)": (lambda v: 0 < v < 1, {"factor"}),
    "in [0, 1)": (lambda v: 0 <= v < 1, {"threshold"}),
}


def check(**options: Any) -> list[tuple[str, str]]:
    """All problems that the types do not show, as (option, value and the way out)."""
    return out_of_range(RANGES, options)


@dataclass(frozen=True)
class Constant:
    """The full rate from step `warmup_steps` - 1 on; before it, linear from 1 / warmup_steps."""

    warmup_steps: int = 0

    check = staticmethod(check)

    def __post_init__(self):
        refuse(check(**asdict(self)), "constant")

    def scale(self, step: int, steps: int) -> float:
        """Factor for the rate at `step`, from 0, of `steps` steps."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


@dataclass(frozen=True)
class WarmupStableDecay:
    """Warm-up as in `Constant`, the full rate, and linear to `final` in the last `decay_share`."""

    warmup_steps: int = 0
    decay_share: float = 0.2
    final: float = 0.0

    check = staticmethod(check)

    def __post_init__(self):
        refuse(check(**asdict(self)), "wsd")

    def scale(self, step: int, steps: int) -> float:
        """Factor for the rate at `step`, from 0; `final` is for step `steps`, one past the last."""
        decay_steps = round(self.decay_share * steps)
        if self.warmup_steps + decay_steps > steps:
            parts = f"warmup_steps {self.warmup_steps} and decay_share {self.decay_share:g}"
            raise ValueError(f"wsd: {parts} (= {decay_steps} steps) must fit into {steps} steps")
        left = min(1.0, max(0, steps - step) / max(1, decay_steps))  # 1 to 0 during the decay
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * (left + (1 - left) * self.final)


@dataclass
class Plateau:
    """The rate falls by `factor` when a validation score has not improved for long enough.

    torch's `ReduceLROnPlateau` with `eps=0`, counted in evaluations where Open-Unmix (log 004, the
    defaults here) counts epochs: more than `patience` in a row without a new best lower the rate,
    and the next `cooldown` are not counted. A new best beats the old one by the share `threshold`
    of it; below zero, as with torch, that lets a score pass that is worse by as much.

    metric: name of the score to watch; None is the task's first one.

    The scores come through `observe`. A resumed run replays the earlier ones, so nothing of this
    is in a checkpoint.
    """

    metric: str | None = None
    factor: float = 0.3
    patience: int = 80
    cooldown: int = 10
    threshold: float = 1e-4
    reductions: int = field(default=0, init=False)
    best: float | None = field(default=None, init=False)
    num_bad: int = field(default=0, init=False)
    cooling: int = field(default=0, init=False)

    check = staticmethod(check)

    def __post_init__(self):
        refuse(check(**asdict(self)), "plateau")

    def scale(self, step: int, steps: int) -> float:
        """Factor for the rate after what has been observed; the step itself does not matter."""
        return self.factor**self.reductions

    def observe(self, score: float, mode: Literal["min", "max"]) -> None:
        """One evaluation's score, in order; `mode` says which way is better. NaN is no new best."""
        if mode == "min":
            better = score < (inf if self.best is None else self.best * (1 - self.threshold))
        else:
            better = score > (-inf if self.best is None else self.best * (1 + self.threshold))
        if better:
            self.best, self.num_bad = score, 0
        else:
            self.num_bad += 1
        if self.cooling:
            self.cooling -= 1
            self.num_bad = 0
        if self.num_bad > self.patience:
            self.reductions += 1
            self.cooling, self.num_bad = self.cooldown, 0


SCHEDULES = {"constant": Constant, "wsd": WarmupStableDecay, "plateau": Plateau}


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Every group's rate is `scale` times the one it was built with, kept as `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale
