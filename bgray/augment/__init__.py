"""The table of augmentations: one small frozen class per file, with `draw` and `apply` kept apart.

`draw(rng)` makes the random choice, `apply(audio, draw, sample_rate)` carries it out on (C, T)
float32; so input and target can get the same draw.
"""

from bgray.augment.gain import Gain
from bgray.augment.polarity import Polarity

AUGMENTS = {
    "gain": Gain,
    "polarity": Polarity,
}
