"""From a sweep's files to what a page is sent: time and memory, of a sweep that is made up."""

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bgray.config import ConfigError

SEEDS, EVALUATIONS = 2, 20


def measured(trials: int, steps: int, log_every: int) -> dict[str, Any]:
    """Seconds, CPU seconds and the peak of memory so far (MiB) after each stage, in a process of
    its own; beside these the bytes of the sweep's files and of the figures as JSON."""
    few = [
        ("--trials", trials, 2 * SEEDS),
        ("--steps", steps, EVALUATIONS),
        ("--log-every", log_every, 1),
    ]
    problems = [(key, f"must be at least {least}, got {v}") for key, v, least in few if v < least]
    if problems:
        raise ConfigError("bench page", problems)
    from bgray.specimen import Made, make

    variants = [Made("baseline")] + [
        Made(f"draw {i}", {"optim.lr": 1e-4 * i, "model.kernels": [7 + 2 * (i % 9)]}, gain=2e-4 * i)
        for i in range(1, trials // SEEDS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        make(
            folder,
            variants,
            seeds=SEEDS,
            steps=steps,
            log_every=log_every,
            evaluations=EVALUATIONS,
            clips=0,
        )
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(1) as pool:  # so that nothing of the making is in its memory
            found = pool.apply(stages, (folder,))
        found["file_bytes"] = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    return {"trials": len(variants) * SEEDS, "steps": steps, "log_every": log_every, **found}


def stages(folder: str) -> dict[str, Any]:
    """Of this process, for a sweep's folder; appends one line to one of its files."""
    from bgray import figures
    from bgray.reading import Reader

    found: dict[str, Any] = {"stages": {}, "figure_bytes": {}}

    def stage(name: str, do: Callable[[], Any]) -> Any:
        began, worked = time.perf_counter(), time.process_time()
        result = do()
        found["stages"][name] = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - worked,
            "peak_mib": peak_mib(),
        }
        return result

    def drawn(name: str, draw: Callable[[], Any]) -> None:
        found["figure_bytes"][name] = len(stage(name, lambda: draw().to_json()))

    found["start_mib"] = peak_mib()
    reader = Reader(folder)
    results = stage("first read", reader.read)
    stage("comparison", lambda: results.entries)
    metric = results.metric or ""
    drawn("curves of a score", lambda: figures.learning_curves(results, metric))
    drawn("what quality costs", lambda: figures.quality_cost(results, metric))
    drawn("parallel coordinates", lambda: figures.parallel(results, metric))
    drawn("curves of the loss", lambda: figures.learning_curves(results, "loss"))
    drawn("curves by minutes", lambda: figures.learning_curves(results, metric, "minutes"))
    again = stage("read again, nothing new", reader.read)
    assert again is results, "nothing has changed, and all was made anew"
    file = sorted(Path(folder).glob("*/metrics.jsonl"))[0]
    last = json.loads(file.read_text().splitlines()[-1])["step"]
    with file.open("a") as log:
        log.write(json.dumps({"step": last + 1, "loss": 0.5}) + "\n")
    newer = stage("read again, one line more", lambda: _whole(reader))
    assert newer is not results, "a file has grown, and nothing was read"
    drawn("curves of a score again", lambda: figures.learning_curves(newer, metric))
    return found


def _whole(reader: Any) -> Any:
    results = reader.read()
    assert results.entries
    return results


def peak_mib() -> float:
    """Most memory this process has held; Linux says it of it alone, others since its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def as_text(found: dict[str, Any]) -> str:
    lines = [
        f"{found['trials']} trials x {found['steps']} steps, a line every {found['log_every']}: "
        f"{found['file_bytes'] / 2**20:.0f} MiB of files",
        f"{'':28}{'seconds':>9}{'CPU s':>8}{'peak MiB':>10}{'sent kB':>9}",
    ]
    for name, stage in found["stages"].items():
        sent = found["figure_bytes"].get(name)
        lines.append(
            f"{name:28}{stage['seconds']:9.2f}{stage['cpu_seconds']:8.2f}{stage['peak_mib']:10.0f}"
            + ("" if sent is None else f"{sent / 1000:9.0f}")
        )
    return "\n".join(lines)
