"""One entry of a search: a list, or a range and how to draw from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Entry:
    """What the YAML says after one dotted path."""

    kind: str
    """grid, choice, uniform, loguniform or randint."""
    values: list[Any]
    """Of grid and choice all of them; otherwise [low, high], of randint without high itself."""

    @property
    def listed(self) -> bool:
        return self.kind in ("grid", "choice")

    def draw(self, rng: np.random.Generator) -> Any:
        return DRAWS[self.kind](rng, *self.values)

    def fitted(self, value: float) -> float:
        """A number rounded as draws are, and within the range."""
        low, high = self.values
        return min(max(rounded(value), float(low)), float(high))

    def has(self, value: Any) -> bool:
        """Whether it could have been drawn here."""
        if self.listed:
            return value in self.values
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.values
        whole = isinstance(value, int) and value < high
        return low <= value <= high and (whole or self.kind != "randint")


def entry(spec: dict[str, Any] | list[Any]) -> Entry:
    """An entry as written; ValueError with the way out."""
    if isinstance(spec, list):
        kind, values = "grid", spec
    else:
        if len(spec) != 1:
            there = f"got {sorted(spec)}" if spec else "it is empty"
            raise ValueError(f"expected one of {', '.join(DRAWS)} or grid, {there}")
        kind, values = next(iter(spec.items()))
    if not isinstance(values, list) or not values:
        raise ValueError(f"expected a list with values after '{kind}', got {values!r}")
    if kind not in ("grid", *DRAWS):
        raise ValueError(f"unknown kind '{kind}'; there is grid, {', '.join(DRAWS)}")
    if kind not in ("grid", "choice"):
        _check_range(kind, values)
    return Entry(kind, values)


def _check_range(kind: str, values: list[Any]) -> None:
    if len(values) != 2 or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    ):
        raise ValueError(
            f"expected two numbers [low, high], got {values!r} (write 1.0e-4: YAML reads 1e-4 "
            "as text)"
        )
    low, high = values
    if not all(math.isfinite(v) and abs(v) < 2**63 for v in values):
        raise ValueError(f"expected finite numbers, got {values!r}")
    if kind == "randint" and not all(isinstance(v, int) for v in values):
        raise ValueError(f"expected two whole numbers, got {values!r}")
    if low >= high or (kind == "loguniform" and low <= 0):
        raise ValueError(
            f"expected {'0 < ' if kind == 'loguniform' else ''}low < high, got {values!r}"
        )


def rounded(value: float) -> float:
    """To six digits, so that what is written is what ran."""
    return float(f"{value:.6g}")


Drawer = Callable[[np.random.Generator, Any, Any], Any]
DRAWS: dict[str, Drawer] = {
    "choice": lambda rng, *values: values[int(rng.integers(len(values)))],
    "uniform": lambda rng, low, high: rounded(rng.uniform(low, high)),
    "loguniform": lambda rng, low, high: rounded(
        math.exp(rng.uniform(math.log(low), math.log(high)))
    ),
    "randint": lambda rng, low, high: int(rng.integers(low, high)),
}
"""Kinds of random entries."""
