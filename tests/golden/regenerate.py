"""Writes tests/golden/unshift.json anew: `.venv/bin/python tests/golden/regenerate.py`.

The change it makes is to be reviewed and explained in the commit, before and after.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import soundfile

FILE = Path(__file__).with_name("unshift.json")

# Not conftest's: a change there must not move the record.
CONFIG = {
    "name": "golden",
    "task": {"name": "unshift"},
    "data": {"sample_rate": 8000, "segment": 512, "batches_per_unit": 4},
    "model": {
        "name": "wav_unet",
        "channels": [4, 8, 16],
        "blocks": [1, 1],
        "factors": [2, 4],
        "scale_vs_channels": [1, 2],
        "bottleneck_blocks": 1,
        "patching": 1,
        "kernels": [7],
    },
    "loss": {"l1": 1.0},
    "optim": {"name": "adamw", "lr": 0.003},
    "train": {"steps": 20, "batch_size": 4, "precision": "fp32"},
    "validation": {"every": 20, "segment": 4096, "items": 2, "clips": 0},
    "runtime": {"log_every": 1, "device": "cpu", "threads": 1},
}


def write_chirps(folder: Path) -> None:
    """Six WAV files of a rising tone and its third, pure arithmetic."""
    folder.mkdir()
    time = np.arange(6 * 8000) / 8000
    for i in range(6):
        phase = 2 * np.pi * (120 + 30 * i) * time + 40 * time**2
        audio = 0.4 * np.sin(phase) + 0.1 * np.sin(3 * phase)
        soundfile.write(folder / f"chirp{i}.wav", audio.astype(np.float32), 8000)


def losses(folder: Path) -> list[float]:
    """The loss of each of the 20 steps."""
    from bgray.context import Context
    from bgray.experiment import prepare_data, resolve, run_url
    from bgray.records import read_lines
    from bgray.shards import Options, prepare
    from bgray.trial import run_trial

    write_chirps(folder / "chirps")
    options = Options(sample_rate=8000, shifts=(12.0,), validation=0.34)
    prepare(str(folder / "chirps"), str(folder / "shards"), options, workers=0)
    raw = json.loads(json.dumps(CONFIG))
    raw["data"]["path"] = str(folder / "shards")
    raw["runtime"]["results"] = str(folder / "results")
    experiment = resolve(raw, "golden")
    run_trial(experiment, prepare_data(experiment), Context())
    lines = read_lines(run_url(experiment) + "/metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = losses(Path(name))
    FILE.write_text(json.dumps([float(f"{loss:.7g}") for loss in found], indent=1) + "\n")
    print(FILE)
