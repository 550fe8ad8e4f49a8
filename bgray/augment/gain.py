"""Gain: another loudness, uniform in dB."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gain:
    low_db: float = -6.0
    high_db: float = 6.0

    @staticmethod
    def check(low_db: float, high_db: float) -> Iterator[tuple[str, str]]:
        """What the types cannot say, as (option, what is wrong)."""
        if low_db > high_db:
            yield "low_db", f"must not be above high_db ({high_db:g}), got {low_db:g}"

    def draw(self, rng: np.random.Generator) -> float:
        """A gain in dB."""
        return float(rng.uniform(self.low_db, self.high_db))

    def apply(self, audio: np.ndarray, draw: float, sample_rate: int) -> np.ndarray:
        """(C, T) -> (C, T) float32, `draw` dB louder. Not clipped: float audio may go above 1."""
        return audio * np.float32(10 ** (draw / 20))
