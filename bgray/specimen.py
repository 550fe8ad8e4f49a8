"""A made-up sweep's folder: what benchmarks and tests of pages and reports look at."""

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soundfile
import yaml

from bgray import storage
from bgray.config import digest
from bgray.lines import as_text
from bgray.records import ITEMS, METRICS, TIMING
from bgray.variants import MANIFEST

SCORES = {"val_stft": "min", "val_si_sdr": "max"}
UNPROCESSED = {"val_stft": 2.0, "val_si_sdr": -30.0}


@dataclass(frozen=True)
class Made:
    """One variant to make up."""

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted path to value, over the base config."""
    gain: float = 0.0
    """How much lower its STFT distance ends than the baseline's."""
    state: str = "finished"
    """Of its first seed; the others have finished. `waiting` makes none begin."""
    reason: str | None = None
    until: int | None = None
    """The first seed's last step; None: all of them."""
    minutes_to_10k: float = 40.0
    vram_gib: float | None = 6.7
    parameters: int = 15_670_000


def config(label: str, settings: Mapping[str, Any], steps: int, seed: int) -> dict[str, Any]:
    """A config as experiment.yaml has it, in small."""
    raw: dict[str, Any] = {
        "task": {"name": "unshift", "semitones": 12.0},
        "model": {"name": "wav_unet", "channels": [32, 64], "kernels": [41]},
        "name": label,
        "data": {"path": "builtin", "sample_rate": 16000, "segment": 4096},
        "loss": {"l1": {"weight": 10.0}},
        "optim": {"name": "muon", "lr": 0.005, "momentum": 0.95},
        "train": {"steps": steps, "batch_size": 8, "seed": seed},
        "runtime": {"results": "results"},
    }
    for path, value in settings.items():
        *parents, last = path.split(".")
        inside = raw
        for name in parents:
            inside = inside.setdefault(name, {})
        inside[last] = value
    return raw


def make(
    folder: str,
    variants: Sequence[Made],
    *,
    seeds: int = 3,
    steps: int = 1000,
    log_every: int = 10,
    evaluations: int = 10,
    items: int = 16,
    clips: int = 2,
    clip_seconds: float = 1.0,
    clip_steps: int = 2,
    sample_rate: int = 16000,
    sources: Sequence[str] = ("",),
) -> None:
    """Write a sweep's folder, local or s3://: the first variant is the baseline.

    clips: of so many items, at the last `clip_steps` evaluations; each variant's sounds otherwise.
    """
    name = folder.rstrip("/").rsplit("/", 1)[-1]
    ids = [digest({"label": v.label, "folder": name})[:12] for v in variants]
    runs = {
        id: {str(seed): digest({"variant": id, "seed": seed})[:12] for seed in range(seeds)}
        for id in ids
    }
    manifest = {
        "name": name,
        "metric": "val_stft",
        "mode": "min",
        "baseline": ids[0],
        "rungs": [],
        "screening_seed": None,
        "variants": {
            id: {"label": v.label, "control": False, "runs": runs[id]}
            for id, v in zip(ids, variants, strict=True)
        },
    }
    storage.write_bytes(storage.join(folder, MANIFEST), json.dumps(manifest, indent=1).encode())
    every = steps // evaluations
    for number, (id, variant) in enumerate(zip(ids, variants, strict=True)):
        for seed in range(seeds):
            if variant.state == "waiting":
                continue
            url = storage.join(folder, runs[id][str(seed)])
            odd = seed == 0
            state = variant.state if odd else "finished"
            until = (variant.until if odd else None) or steps
            rng = np.random.default_rng([number, seed])
            raw = config(name, variant.settings, steps, seed)
            text = yaml.safe_dump(raw, sort_keys=False)
            storage.write_bytes(storage.join(url, "experiment.yaml"), text.encode())
            evaluated = list(range(every, until + 1, every))
            difficulty = np.random.default_rng(0).normal(0, 0.2, items)
            luck = np.random.default_rng([seed]).normal(0, 0.01) + rng.normal(0, 0.003)
            scores = [
                _scores(step / steps, variant.gain, luck, difficulty, rng) for step in evaluated
            ]
            lines = zip(evaluated, scores, strict=True)
            _lines(url, ITEMS, [{"step": step, **score} for step, score in lines])
            means = [{k: float(np.mean(v)) for k, v in score.items()} for score in scores]
            _write_curves(url, variant, until, log_every, dict(zip(evaluated, means, strict=True)))
            timing = {
                "steps_per_second": 10000 / 60 / variant.minutes_to_10k,
                "data_wait_share": 0.12,
                "train_seconds": until * variant.minutes_to_10k * 60 / 10000,
                "time_to_10k_steps": variant.minutes_to_10k * 60,
                "time_to_10k_steps_extrapolated": until < 10000,
                "vram_peak_gib": variant.vram_gib,
                "packed": False,
            }
            info = {
                "id": runs[id][str(seed)],
                "state": state,
                "reason": variant.reason if odd else None,
                "name": name,
                "attempts": [
                    {"from_step": 0, "started": "2026-01-01T00:00:00Z", "host": "made-up"}
                ],
                "steps": steps,
                "step": until,
                "seed": seed,
                "variant": id,
                "scores": SCORES,
                "baseline": UNPROCESSED,
                "validation": "made-up",
                "validation_items": items,
                "metrics": {"step": evaluated[-1], **means[-1]} if evaluated else {},
                "parameters": variant.parameters,
                "timing": timing,
                "warnings": [],
                "guards": {},
            }
            storage.write_bytes(storage.join(url, "run.json"), json.dumps(info, indent=1).encode())
            for item in range(0, items, max(1, items // clips)) if clips else ():
                for place, source in enumerate(sources):
                    suffix = f"-{source}" if source else ""
                    rng = np.random.default_rng([item, place])
                    target = _music(rng, clip_seconds, sample_rate)
                    noise = rng.normal(0, 0.1, target.shape)
                    write_clip(url, f"{item:03d}-target{suffix}", target, sample_rate)
                    if not place:
                        write_clip(url, f"{item:03d}-input", target + noise, sample_rate)
                    for step in evaluated[-clip_steps:]:
                        share = (0.6 - variant.gain) * (1.2 - 0.2 * step / steps)
                        clip = target + share * np.roll(noise, 97 * number)
                        write_clip(url, f"{item:03d}-step-{step:06d}{suffix}", clip, sample_rate)


def _scores(
    progress: float, gain: float, luck: float, difficulty: np.ndarray, rng: np.random.Generator
) -> dict[str, list[float]]:
    stft = 0.5 + 0.5 * np.exp(-4 * progress) - gain * progress + luck + difficulty
    stft = stft + rng.normal(0, 0.005, len(difficulty))
    return {"val_stft": stft.tolist(), "val_si_sdr": (20 - 20 * stft).tolist()}


def _write_curves(
    url: str, variant: Made, until: int, log_every: int, evaluated: dict[int, dict[str, float]]
) -> None:
    steps = np.arange(log_every, until + 1, log_every)
    rng = np.random.default_rng(zlib.crc32(variant.label.encode()))
    loss = 5 * np.exp(-steps / max(1, until) * 3) + rng.normal(0, 0.05, len(steps)) ** 2
    text, timing = [], []
    for step, value in zip(steps.tolist(), loss.tolist(), strict=True):
        line = {"step": step, "loss": value, "loss_l1": value / 10, "grad_norm": 1 + value}
        text.append(as_text(line))
        seconds = step * variant.minutes_to_10k * 60 / 10000
        timing.append(as_text({"step": step, "train_seconds": seconds, "warm_up_seconds": 1.0}))
        if step in evaluated:
            text.append(as_text({"step": step, "val": evaluated[step]}))
    storage.write_bytes(storage.join(url, METRICS), "".join(text).encode())
    storage.write_bytes(storage.join(url, TIMING), "".join(timing).encode())


def _lines(url: str, name: str, lines: list[dict[str, Any]]) -> None:
    storage.write_bytes(storage.join(url, name), "".join(map(as_text, lines)).encode())


def _music(rng: np.random.Generator, seconds: float, sample_rate: int) -> np.ndarray:
    """(T,): a few harmonics of notes that fade, one after another."""
    time = np.arange(int(seconds * sample_rate)) / sample_rate
    sound = np.zeros(len(time))
    for start in np.arange(0, seconds, 0.25):
        since = np.clip(time - start, 0, None)
        f0 = 110 * 2 ** (rng.integers(0, 24) / 12)
        tone = sum(np.sin(2 * np.pi * k * f0 * since) / k for k in range(1, 6))
        sound += tone * np.exp(-6 * since) * (time >= start)
    return 0.2 * sound


def write_clip(url: str, name: str, sound: np.ndarray, sample_rate: int) -> None:
    """(T,) or (C, T) as clips/<name>.wav of a run, 16 bits."""
    file = io.BytesIO()
    samples = np.clip(np.atleast_2d(sound).T, -1, 1)
    soundfile.write(file, samples, sample_rate, format="WAV", subtype="PCM_16")
    storage.write_bytes(storage.join(url, "clips", f"{name}.wav"), file.getvalue())
