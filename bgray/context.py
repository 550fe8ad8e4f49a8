"""Where a run runs: rank, device, threads, who makes its batches, whom it reports to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bgray import probes
from bgray.choices import Choices
from bgray.config import ConfigError, Experiment
from bgray.models import depthwise
from bgray.resources import Feed, Plan, Share, by_hand
from bgray.starts import Start


@dataclass
class Context:
    """Where a run runs. The three kinds differ in these few values only."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    threads: int = 1
    """torch threads on the CPU."""
    feed: Feed = Feed("process", "asked for by the caller")  # noqa: RUF009
    """Who makes batches."""
    report: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None
    """Called on every rank once a step is evaluated and checkpointed; Tune may end the run
    inside."""
    session: str = ""
    """Names the command that this is part of; its restarts share it."""
    stop: Callable[[], str] = lambda: ""
    """Asked after every step: why to stop with a checkpoint (records.CTRL_C, NOTICE), or empty."""
    warn: Callable[[str], None] = print
    packed: bool = False
    """Whether it shares its GPU: its speed is then no figure to compare with one that does not."""
    vram_gib: float | None = None
    """Most that torch may hold on the GPU, so that neighbours are safe from this run; None: no
    limit. The CUDA context comes on top."""
    start: Start = field(default_factory=Start)
    """How the way to the first step goes."""


def pick_device(wanted: str) -> torch.device:
    """ConfigError where a GPU is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", [("", "cuda is asked for, but there is no GPU; use auto")])
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu")


def on_ray(
    experiment: Experiment, plan: Plan, share: Share | None = None, **options: Any
) -> Context:
    """The context of a Tune trial or a Train worker; `options` are Context's remaining fields.

    share: what a Packer gave it of a GPU; None: as runtime.gpus says. Below 1 that is a share of
    the memory, too.
    """
    device = pick_device(experiment.runtime.device)
    limit = share.limit_gib if share else None
    packed = share is not None and not share.alone
    if share is None and device.type == "cuda" and 0 < plan.gpus < 1:
        size = torch.cuda.get_device_properties(device).total_memory / probes.GIB
        limit, packed = by_hand(plan.gpus, size), True
    return Context(
        device=device,
        threads=plan.threads,
        feed=plan.feed,
        packed=packed,
        vram_gib=limit,
        **options,
    )


def why_stalled(context: Context, url: str) -> str:
    """What may keep the batches of the shards at `url` away, for a person."""
    if context.feed.kind != "ray":
        return f"a work unit takes longer than that, or {url} does not answer"
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    need, text = {"CPU": context.feed.cpus, **context.feed.resources}, "Ray Data needs "
    text += ", ".join(
        f"{amount:g} {name} a task ({free.get(name, 0):g} of {total.get(name, 0):g} free)"
        for name, amount in need.items()
    )
    if any(total.get(name, 0) < amount for name, amount in need.items()):
        text += "; no machine has that: are the cluster's CPU machines up?"
    elif free.get("CPU", 0) < context.feed.cpus:
        text += "; trials hold the rest: lower runtime.cpus or runtime.concurrency, or set "
        text += "runtime.feed=process"
    return text


def set_numerics(choices: Choices, context: Context) -> None:
    """Precision, kernels and threads of this process; everything that a warm worker may have
    inherited is set."""
    exact = choices.precision == "fp32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.benchmark = context.device.type == "cuda"
    torch.set_num_threads(context.threads)
    depthwise.use(choices.depthwise, context.device)
    if context.device.type == "cuda":
        size = torch.cuda.get_device_properties(context.device).total_memory / probes.GIB
        share = 1.0 if context.vram_gib is None else min(1.0, context.vram_gib / size)
        torch.cuda.set_per_process_memory_fraction(share, context.device.index)
    probes.reset_memory(context.device)
