"""Where a run runs: rank, device, threads, who makes its batches, whom it reports to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bgray import probes
from bgray.config import ConfigError, Experiment


@dataclass
class Context:
    """Where a run runs. The three kinds differ in these few values only."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    threads: int = 1
    """torch threads on the CPU."""
    feed: str = "process"
    """Who makes batches: `ray` or `process`."""
    feed_reason: str = "asked for by the caller"
    data_cpus: float = 1.0
    """CPUs that each Ray Data task asks for."""
    report: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None
    """Called on every rank once a step is evaluated and checkpointed; Tune may end the run
    inside."""
    stop: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = print


def pick_device(wanted: str) -> torch.device:
    """ConfigError where a GPU is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", [("", "cuda is asked for, but there is no GPU; use auto")])
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu")


def choose_feed(experiment: Experiment) -> tuple[str, float, str]:
    """(feed, CPUs per Ray Data task, why) for a worker of a Ray session."""
    import ray

    cpus = ray.cluster_resources().get("CPU", 0)
    data_cpus = 1.0 if cpus >= 4 else 0.25
    wanted = experiment.runtime.feed
    if wanted != "auto":
        return wanted, data_cpus, f"runtime.feed={wanted}"
    if cpus >= 8:
        return "ray", data_cpus, f"{cpus:g} CPUs: Ray Data can keep up with the training beside it"
    # A work unit costs 0.4 ms CPU an example; an execution of Ray Data about 5 s CPU, and a CPU
    # that trials hold.
    return (
        "process",
        data_cpus,
        f"{cpus:g} CPUs: too few to share with Ray Data, a thread of the trial is cheaper",
    )


def on_ray(experiment: Experiment, threads: int, **options: Any) -> Context:
    """The context of a Tune trial or a Train worker; `options` are Context's remaining fields."""
    feed, data_cpus, reason = choose_feed(experiment)
    return Context(
        device=pick_device(experiment.runtime.device),
        threads=threads,
        feed=feed,
        feed_reason=reason,
        data_cpus=data_cpus,
        **options,
    )


def set_numerics(experiment: Experiment, context: Context) -> None:
    """Precision and threads of this process; everything that a warm worker may have inherited is
    set."""
    precision = experiment.train.precision
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = context.device.type == "cuda"
    torch.set_num_threads(context.threads)
    probes.reset_memory(context.device)
