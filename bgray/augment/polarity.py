"""Polarity: the same sound upside down, all channels together."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field


@dataclass(frozen=True)
class Polarity:
    probability: Annotated[float, Field(ge=0, le=1)] = 0.5

    def draw(self, rng: np.random.Generator) -> bool:
        """Whether to flip."""
        # Draws one number whatever the probability, so changing it leaves the draws after it alone.
        return bool(rng.random() < self.probability)

    def apply(self, audio: np.ndarray, draw: bool, sample_rate: int) -> np.ndarray:
        """(C, T) -> (C, T) float32."""
        return -audio if draw else audio
