"""What a run costs: a few real training steps and a validation item, on made-up data of the right
shape."""

import contextlib
import functools
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bgray import probes
from bgray.build import (
    build_loss,
    build_model,
    build_optimizer,
    build_task,
    validation_segment,
)
from bgray.choices import choose
from bgray.config import Experiment, digest
from bgray.context import Context, set_numerics
from bgray.data import Batch
from bgray.evaluation import items_at_once
from bgray.loop import Every, NotFinite, fit
from bgray.probes import GIB
from bgray.step import estimated
from bgray.transfer import to_device

STILL = 1e-9
"""Scale of the learning rate: noise teaches nothing, and at the full rate it may end in NaN."""
SAME_COST = ("lr", "adamw_lr", "weight_decay", "adamw_weight_decay", "eps", "betas")
"""Options of optimizers that change neither time nor memory."""


@dataclass(frozen=True)
class Cost:
    """What one run was measured to cost, by a process of its own or a part of one."""

    device: str
    """`cpu`, or the GPU's name."""
    batch: int
    """Examples in each timed step, of one worker."""
    step_seconds: tuple[float, ...]
    """Of each timed step, or the mean of each lot; waiting for data is not in it."""
    start_seconds: float
    """Building the model, and the steps before the timed ones: allocation, compilation."""
    item_seconds: float
    """Estimate and score of one validation item."""
    score_seconds: float
    """Score alone, as for the unprocessed input."""
    save_seconds: float
    checkpoint_bytes: int
    clip_bytes: int
    """Of one listening item's estimate, all sources."""
    scores: int
    """Numbers per validation item."""
    parts: int
    """Numbers per line of metrics.jsonl."""
    rss_gib: float
    """Peak resident memory of the process."""
    vram_gib: float | None
    """Peak held by torch's allocator (reserved); None on a CPU."""
    overhead_gib: float | None
    """Held on the GPU beside that: the CUDA context, and what other processes have there."""
    gpu_gib: float | None
    """Size of the GPU."""


def cost_key(experiment: Experiment) -> str:
    """Twelve hex digits: experiments with one key take the same time and memory. Seeds, learning
    rates, weights of losses and the data's content are left out."""
    raw = experiment.resolved()
    optim = {key: value for key, value in raw["optim"].items() if key not in SAME_COST}
    loss = {name: {**options, "weight": 1} for name, options in raw["loss"].items()}
    train, runtime, shape = raw["train"], raw["runtime"], raw["data"]
    kept = {
        "task": raw["task"],
        "model": raw["model"],
        "loss": loss,
        "optim": optim,
        "train": [train[key] for key in ("batch_size", "precision")] + [train["grad_clip"] is None],
        "data": [shape[key] for key in ("sample_rate", "channels", "segment")],
        "validation": validation_segment(experiment),
        "runtime": [
            runtime[key] for key in ("workers", "compile", "cuda_graphs", "depthwise", "recompute")
        ],
    }
    return digest(kept)[:12]


def rehearse(
    experiment: Experiment,
    context: Context,
    *,
    batch: int | None = None,
    warm_up: int = probes.WARM_UP_STEPS,
    steps: int = 3,
    each: int = 1,
    seconds: float = math.inf,
    ready: Callable[[], None] = lambda: None,
    whole: bool = True,
) -> Cost:
    """Train on noise for `warm_up` steps and then `steps`, or fewer once `seconds` have passed (at
    least one), through the same code as a run; then one validation item and a checkpoint's bytes.

    batch: examples a step; None: one worker's part of train.batch_size.
    each: steps timed together, for a GPU is faster where nobody waits for it after every step.
    ready: called after the warm-up, of at least one step then.
    whole: False leaves validation and checkpoint out, their figures are 0.
    Nothing is read or written. torch.cuda.OutOfMemoryError is the caller's.
    """
    device, task = context.device, build_task(experiment)
    choices = choose(experiment, device, experiment.runtime.workers)
    set_numerics(choices, context)
    if choices.cuda_graphs and warm_up:
        warm_up = max(warm_up, choices.warm_up_steps)
    began = _now(device)
    batch = batch or experiment.train.batch_size // experiment.runtime.workers
    rng = np.random.default_rng(0)
    inputs, targets = _made_up(experiment, rng, batch, experiment.data.segment)
    model: Any = build_model(experiment).to(device)
    if hasattr(model, "observe"):
        model.observe([to_device(inputs, device, task.full_scale)])
    optimizer = build_optimizer(experiment, model)
    loss = build_loss(experiment, rehearsal=True).to(device)
    marks = [] if warm_up else [began]  # when the warm-up was done, then each lot of timed steps
    done = 0

    def stop() -> bool:
        nonlocal done
        done += 1
        if done == warm_up:
            ready()
        if done < warm_up or (done - warm_up) % each:
            return False
        marks.append(_now(device))
        timed = done - warm_up
        return timed >= steps or (timed > 0 and marks[-1] - marks[0] > seconds)

    def stream() -> Iterator[Batch]:
        step = 0
        while True:
            yield Batch(step, inputs, targets)
            step += 1

    with contextlib.suppress(NotFinite):
        fit(
            model,
            loss,
            optimizer,
            stream(),
            steps=2**40,
            report=lambda kind, step, values: None,
            every=Every(2**40, 2**40, 2**40),
            schedule=lambda step, steps: STILL,
            device=device,
            bf16=choices.bf16,
            compile=choices.compile,
            graph=choices.cuda_graphs,
            grad_clip=experiment.train.grad_clip,
            seed=experiment.train.seed,
            full_scale=task.full_scale,
            stop=stop,
            earliest=lambda step: step,  # a loss that is not finite costs what any other does
        )
    timed = [(after - before) / each for before, after in itertools.pairwise(marks)]
    found: dict[str, Any] = dict.fromkeys(
        ("item_seconds", "score_seconds", "save_seconds", "checkpoint_bytes", "clip_bytes"), 0
    )
    if whole:
        estimate = functools.partial(estimated, model, bf16=choices.bf16, compiled=choices.compile)
        model.eval()
        found |= _validation(experiment, device, estimate, rng)
        found |= _checkpoint(model, optimizer, loss, device)
    return Cost(
        device=_name(device),
        batch=batch,
        step_seconds=tuple(timed),
        start_seconds=marks[0] - began,
        scores=len(task.scores),
        parts=len(experiment.loss) + 3,
        **found,
        **_memory(device),
    )


def _made_up(
    experiment: Experiment, rng: np.random.Generator, batch: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(B, C, T) and (B, S, C, T) int16: noise at a tenth of full scale; of piano rolls, long notes
    at an eighth of the keys."""
    task, channels = build_task(experiment), experiment.data.channels

    def sound(*shape: int) -> np.ndarray:
        if task.kind == "roll":
            notes = rng.random((*shape[:-1], -(-shape[-1] // 16))) < 1 / 8
            return notes.repeat(16, axis=-1)[..., : shape[-1]].astype(np.int16)
        return (0.1 * task.full_scale * rng.standard_normal(shape, np.float32)).astype(np.int16)

    return sound(batch, channels, length), sound(batch, len(task.sources), channels, length)


def _validation(
    experiment: Experiment,
    device: torch.device,
    estimate: Callable[[Tensor], Tensor],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Seconds of one item, the second of two, and the bytes of its clips."""
    task, rate = build_task(experiment), experiment.data.sample_rate
    score = task.scorer(rate)
    together = items_at_once(experiment, device)
    inputs, targets = _made_up(experiment, rng, together, validation_segment(experiment))

    def scored(estimate: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        """Seconds of an item, and the estimates (B, S, C, T)."""
        start = _now(device)
        x = to_device(inputs, device, task.full_scale)  # (B, C, T)
        y = to_device(targets, device, task.full_scale)  # (B, S, C, T)
        output = estimate(x)
        for i in range(together):
            score(output[i : i + 1], y[i : i + 1])
        return (_now(device) - start) / together, output

    with torch.no_grad():
        seconds, output = scored(estimate)
        if seconds < 1 or device.type == "cuda":  # the first one also plans, compiles, allocates
            seconds, output = scored(estimate)
        score_seconds, _ = scored(task.baseline)
    clips = [task.clips(source, rate) for source in output[0].float().cpu().numpy()]
    size = sum(len(content) for clip in clips for content in clip.values())
    return {"item_seconds": seconds, "score_seconds": score_seconds, "clip_bytes": size}


def _checkpoint(model: Any, optimizer: Any, loss: Any, device: torch.device) -> dict[str, Any]:
    """Bytes that a checkpoint has, and seconds to pack it; its writing is not in them."""
    start, counted = _now(device), _Counted()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "loss": loss.progress()}, cast(Any, counted))
    return {"checkpoint_bytes": counted.num_bytes, "save_seconds": _now(device) - start}


class _Counted(io.RawIOBase):
    """Keeps the number of bytes that are written, and not the bytes."""

    num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.num_bytes += size
        return size


def _memory(device: torch.device) -> dict[str, Any]:
    seen = probes.memory(device)
    facts: dict[str, Any] = {"rss_gib": seen["rss_peak_gib"]}
    facts |= {"vram_gib": seen["vram_reserved_gib"], "overhead_gib": None, "gpu_gib": None}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        facts |= {"overhead_gib": (total - free - held) / GIB, "gpu_gib": total / GIB}
    return facts


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
