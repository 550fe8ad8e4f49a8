"""Separating instruments: the input is the sum of stems, the targets are the stems (logs 000 and
004)."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from bgray.data import SILENCE_DBFS, audible
from bgray.encoding import to_int16, wav
from bgray.instruments import column

if TYPE_CHECKING:
    from torch import Tensor

    from bgray.data import Chunk
    from bgray.losses.mrstft import MultiResolutionStft

DRAWS = 16
"""Crops that are tried before the most active of them is taken."""
DRAWS_PER_CHUNK = 4
AUDIBLE = 1e-4
"""Of full scale: a sample from here on counts as active (log 000's)."""

Scorer = Callable[["Tensor", "Tensor"], "dict[str, Tensor]"]


class Separation:
    """Input (C, T): the sum of the instruments; targets (S, C, T): some or all of them, I in all.

    The input is summed from the int16 sources, so they add up to it exactly; where the sum would
    clip, all of them are turned down by one factor first. An instrument that does not play is kept
    as a target of zeros (log 000's muted instruments): silence has to be learned too.

    instruments: General MIDI programs (-1: drums) or names of stem columns.
    targets: those of the instruments that are asked for, in this order; null: all.
    mix: `song` leaves the instruments of a song together; `random` takes each from another chunk of
      the work unit, at its own place (Open-Unmix's random track mixing).
    gain: each instrument is multiplied by its own uniform draw between these, log 004's upstream:
      [0.25, 1.25].
    swap_channels: each instrument's left and right are swapped in half of the examples.
    min_activity: drops crops whose sum over instruments of the share of samples at or above 1e-4
      of full scale is not above this; the number of instruments means that all play all the time.
      Log 000: 0.8; 0 keeps every crop. A dropped crop is drawn again, after 4 from the next chunk;
      of 16 dropped ones the most active is taken. It looks at the stems before `gain`.

    `mix`, `gain`, `swap_channels` and `min_activity` are for training. Validation takes the centre
    crop of the song as it is.
    """

    default_loss: ClassVar[Mapping[str, float]] = {"l1": 1.0}
    data_defaults: ClassVar[Mapping[str, Any]] = {"sample_rate": 44100}
    kind: ClassVar[Literal["audio", "roll"]] = "audio"
    full_scale: ClassVar[float] = 32768.0
    stems: ClassVar[bool] = True
    shifts: ClassVar[tuple[float, ...]] = ()
    round_trips: ClassVar[tuple[float, ...]] = ()

    def __init__(
        self,
        *,
        instruments: tuple[int | str, ...] = ("drums", "bass", "other", "vocals"),
        targets: tuple[int | str, ...] | None = None,
        mix: Literal["song", "random"] = "song",
        gain: tuple[float, float] | None = None,
        swap_channels: bool = False,
        min_activity: float = 0.0,
    ):
        self.voices = tuple(map(column, instruments))
        """Shard columns this task reads, one per instrument."""
        self.sources = self.voices if targets is None else tuple(map(column, targets))
        # Underscored: of training alone, no part of what validation compares.
        self._mix, self._gain, self._swap_channels = mix, gain, swap_channels
        self._min_activity = min_activity

    @staticmethod
    def check(
        *,
        instruments: tuple[int | str, ...],
        targets: tuple[int | str, ...] | None,
        mix: str,
        gain: tuple[float, float] | None,
        swap_channels: bool,
        min_activity: float,
    ) -> Iterator[tuple[str, str]]:
        columns = {}
        for option, chosen in (("instruments", instruments), ("targets", targets)):
            try:
                columns[option] = found = [column(i) for i in chosen or ()]
            except ValueError as error:
                yield option, str(error)
                continue
            if chosen is not None and not found:
                yield option, "is empty; give at least one"
            if len(set(found)) < len(found):
                yield option, f"names one twice: {', '.join(found)}"
        known = columns.get("instruments", ())
        for name in columns.get("targets", ()):
            if name not in known:
                yield "targets", f"'{name}' is not one of the instruments {', '.join(known)}"
        if gain is not None and not 0 < gain[0] <= gain[1]:
            yield "gain", f"must be [low, high] with 0 < low <= high, got {list(gain)}"
        if not 0 <= min_activity < len(instruments):
            yield (
                "min_activity",
                f"must be at least 0 and below the number of instruments ({len(instruments)}), "
                f"got {min_activity:g}",
            )

    @property
    def additive(self) -> bool:
        """Whether the targets add up to the input."""
        return set(self.sources) == set(self.voices)

    @property
    def scores(self) -> dict[str, Literal["min", "max"]]:
        """Per-item validation metrics and which way is better, see `scorer`."""
        several = self.sources if len(self.sources) > 1 else ()
        return {
            "val_si_sdr": "max",
            "val_usdr": "max",
            "val_stft": "min",
            **{f"val_si_sdr_{name}": "max" for name in several},
            "val_leak_db": "min",
        }

    def example(
        self, chunks: "list[Chunk]", index: int, rng: np.random.Generator | None, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Input (C, T) and targets (S, C, T) from chunk `index` on, int16; without `rng` the centre
        crop."""
        if rng is None:
            stems = self._song(chunks[index], rng, length).astype(np.float32)
        else:
            stems = self._draw(chunks, index, rng, length).astype(np.float32)
            if self._swap_channels and stems.shape[1] == 2:
                swapped = rng.random(len(stems)) < 0.5
                stems[swapped] = stems[swapped, ::-1]
            if self._gain is not None:
                stems *= rng.uniform(*self._gain, (len(stems), 1, 1)).astype(np.float32)
        mixture, stems = add_up(stems)
        return mixture, stems[[self.voices.index(name) for name in self.sources]]

    def _draw(
        self, chunks: "list[Chunk]", index: int, rng: np.random.Generator, length: int
    ) -> np.ndarray:
        """(I, C, T) int16: the first crop that is active enough, or the most active of all."""
        most, best = -1.0, np.empty(0)
        for draw in range(DRAWS):
            if self._mix == "random":
                stems = self._strangers(chunks, rng, length)
            else:
                here = (index + draw // DRAWS_PER_CHUNK) % len(chunks)
                stems = self._song(chunks[here], rng, length)
            if not self._min_activity or (active := activity(stems)) > self._min_activity:
                return stems
            if active > most:
                most, best = active, stems
        return best

    def _song(self, chunk: "Chunk", rng: np.random.Generator | None, length: int) -> np.ndarray:
        start = chunk.crop_start(length, rng)
        return np.stack([chunk.crop(voice, start, length) for voice in self.voices])

    def _strangers(
        self, chunks: "list[Chunk]", rng: np.random.Generator, length: int
    ) -> np.ndarray:
        num = len(self.voices)
        # Different chunks, as long as there are enough of them.
        places = rng.choice(len(chunks), size=num, replace=num > len(chunks))
        drawn = [(chunks[place], voice) for place, voice in zip(places, self.voices, strict=True)]
        return np.stack([c.crop(voice, c.crop_start(length, rng), length) for c, voice in drawn])

    def baseline(self, inputs: "Tensor") -> "Tensor":
        """The mixture as the estimate of every source: (B, C, T) -> (B, S, C, T)."""
        return inputs[:, None].expand(-1, len(self.sources), -1, -1)

    def scorable(self, mixture: np.ndarray, targets: np.ndarray) -> bool:
        """Whether a validation crop, (C, T) and (S, C, T) int16, can be scored: something plays
        beside each target that plays. An instrument alone is its own mixture, and copying it would
        count as perfect separation."""
        heard = [target for target in targets / 32768 if audible(target)]
        return bool(heard) and all(audible(mixture / 32768 - target) for target in heard)

    def scorer(self, sample_rate: int) -> Scorer:
        """A function of one item, (1, S, C, T) estimate and target -> its scores as 0-d tensors.

        Channels of a source are taken together. A target below -60 dBFS (RMS) is silent: relative
        distances to it have no meaning, so a score that has nothing to compare is left out.
        val_si_sdr, val_usdr (the Music Demixing Challenge's SDR), both in dB, val_stft: means over
          the targets that are not silent.
        val_leak_db: RMS of what is estimated for the silent ones, in dBFS, -100 at least.
        val_si_sdr_<source>: of one target that is not silent; where the task has several.
        """
        import torch

        from bgray.losses.mrstft import MultiResolutionStft

        distance = MultiResolutionStft(sample_rate=sample_rate)

        def score(estimate: "Tensor", target: "Tensor") -> "dict[str, Tensor]":
            with torch.no_grad():
                return self._score(distance.to(estimate.device), estimate.float(), target.float())

        return score

    def _score(
        self, distance: "MultiResolutionStft", estimate: "Tensor", target: "Tensor"
    ) -> "dict[str, Tensor]":
        import torch

        from bgray.metrics import sdr, si_sdr

        x, y = estimate[0].flatten(1), target[0].flatten(1)  # (S, C*T)
        silent = y.square().mean(-1) < 10 ** (SILENCE_DBFS / 10)  # (S)
        heard = [i for i, quiet in enumerate(silent.tolist()) if not quiet]
        scores = {}
        if heard:
            ratios = si_sdr(x[heard], y[heard])
            distances = [distance(estimate[:, [i]], target[:, [i]]) for i in heard]
            scores["val_si_sdr"] = ratios.mean()
            scores["val_usdr"] = sdr(x[heard], y[heard]).mean()
            scores["val_stft"] = torch.stack(distances).mean()
            if len(self.sources) > 1:
                names = [f"val_si_sdr_{self.sources[i]}" for i in heard]
                scores |= dict(zip(names, ratios, strict=True))
        if len(heard) < len(y):
            scores["val_leak_db"] = 10 * torch.log10(x[silent].square().mean() + 1e-10)
        return scores

    def clips(self, audio: np.ndarray, sample_rate: int) -> dict[str, bytes]:
        """(C, T) float32 as files for people, by suffix."""
        return {".wav": wav(to_int16(audio), sample_rate)}


def activity(stems: np.ndarray) -> float:
    """(I, C, T) int16 -> the sum over instruments of the share of samples that are audible."""
    return float((np.abs(stems.astype(np.int32)) >= AUDIBLE * 32768).mean((1, 2)).sum())


def add_up(sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(I, C, T) float in int16's range or beyond -> their sum (C, T) and they (I, C, T) as int16.

    The sum is exact. Where anything would clip, all are scaled by one factor before rounding.
    """
    rounded = np.rint(sources)
    peak = max(np.abs(rounded).max(), np.abs(rounded.sum(0)).max())
    if peak > 32767:
        room = 32767 - len(sources)  # each source's rounding may add a half, before and after
        rounded = np.rint(sources * (room / peak))
    whole = rounded.astype(np.int16)
    return whole.sum(0, dtype=np.int16), whole
