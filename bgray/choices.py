"""What a run does to be fast where nothing else is asked for, and why: precision, compilation, CUDA
graphs, kernels."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from bgray.config import Experiment
from bgray.models.depthwise import missing
from bgray.probes import WARM_UP_STEPS
from bgray.step import EAGER_STEPS

COMPILE_STEPS = 1000
"""Shorter runs are over before compilation (a minute or so) has paid."""


@dataclass(frozen=True)
class Choices:
    """How the steps of a run are computed."""

    precision: str
    """fp32, tf32 or bf16."""
    compile: bool
    cuda_graphs: bool
    depthwise: Literal["auto", "library"]
    recompute: bool
    reasons: tuple[str, ...]
    """One for each choice that was not made by hand, in words."""

    @property
    def warm_up_steps(self) -> int:
        """Whose time is no training time: allocation, autotuning, compilation, recording."""
        return EAGER_STEPS + 1 if self.cuda_graphs else WARM_UP_STEPS

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"

    def applied(self, experiment: Experiment) -> Experiment:
        """The experiment with them made by hand."""
        train = replace(experiment.train, precision=self.precision)
        keys = ("compile", "cuda_graphs", "depthwise", "recompute")
        runtime = replace(experiment.runtime, **{key: getattr(self, key) for key in keys})
        return replace(experiment, train=train, runtime=runtime)

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {**asdict(self), "reasons": list(self.reasons)}


def choose(experiment: Experiment, device: torch.device, world: int = 1) -> Choices:
    """What `auto` means for this experiment on this device. Nothing of it is measured here, so that
    a run that goes on after a restart chooses the same again."""
    train, runtime, reasons = experiment.train, experiment.runtime, []

    def chosen(key: str, wanted: Any, automatic: Any, why: str) -> Any:
        if wanted != "auto":
            return wanted
        if why:
            value = str(automatic).lower() if isinstance(automatic, bool) else automatic
            reasons.append(f"{key}={value}: {why}")
        return automatic

    precision = chosen("train.precision", train.precision, *_precision(device))
    compiled = chosen("runtime.compile", runtime.compile, *_compile(device, train.steps))
    graphs = chosen("runtime.cuda_graphs", runtime.cuda_graphs, *_cuda_graphs(device, world))
    why = missing(device) if runtime.depthwise == "auto" else ""  # which starts a kernel
    depthwise = chosen("runtime.depthwise", runtime.depthwise, "library" if why else "auto", why)
    return Choices(
        precision=precision,
        compile=compiled,
        cuda_graphs=graphs and device.type == "cuda" and world == 1,
        depthwise=depthwise,
        recompute=runtime.recompute,
        reasons=tuple(reasons),
    )


# Each returns what it is, and why.


def _precision(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "tf32", "plain float32 on a CPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "tf32", "this GPU is too old for bf16"
    return "bf16", "the GPU is made for it, losses stay float32"


def _compile(device: torch.device, steps: int) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, "on a CPU it takes longer than it saves"
    if steps < COMPILE_STEPS:
        return False, f"{steps} steps do not pay for the minute that it takes"
    return True, f"{steps} steps pay for the minute that it takes"


def _cuda_graphs(device: torch.device, world: int) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, "there is no GPU"
    if world > 1:
        return False, "several workers exchange gradients within each step"
    return True, "shapes are fixed"
