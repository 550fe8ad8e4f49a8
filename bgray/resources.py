"""How many trials run at a time, and what each training worker gets of the machines."""

import os
from dataclasses import dataclass
from typing import Any

from bgray.config import ConfigError, Experiment

TRAINING_SHARE = 0.75
"""Of a node's CPUs; the rest stays free for Ray Data, which needs some to make any batch at all."""

Node = dict[str, float]
"""Resources of one machine, as Ray names them: {"CPU": 8, "GPU": 1}."""


@dataclass(frozen=True)
class Plan:
    """What Ray is asked for."""

    concurrency: int
    """Trials at a time."""
    cpus: float
    """Per training worker."""
    gpus: float
    """Per training worker; 0 on a CPU."""
    threads: int
    """torch threads of a worker."""
    text: str
    """In words, for the console."""

    @staticmethod
    def make(experiment: Experiment, num_trials: int, nodes: list[Node]) -> "Plan":
        """The plan for trials like `experiment`. ConfigError where the machines can never hold one:
        Ray would wait for ever, and say nothing."""
        runtime = experiment.runtime
        cpus_in_all = sum(node.get("CPU", 0) for node in nodes)
        gpus_in_all = sum(node.get("GPU", 0) for node in nodes)
        on_gpu = runtime.device != "cpu" and gpus_in_all > 0
        if runtime.device == "cuda" and not on_gpu:
            _refuse("runtime.device", "cuda, but there is no GPU here; use auto or cpu")
        if on_gpu:
            hosts = [node for node in nodes if node.get("GPU", 0) > 0]
            slots = [_gpu_slots(node, runtime.gpus) for node in hosts]
            limit = f"{gpus_in_all:g} GPUs, {runtime.gpus * runtime.workers:g} a trial"
            if sum(slots) < runtime.workers:
                _refuse(
                    "runtime.gpus",
                    f"{runtime.workers} workers x {runtime.gpus:g} GPUs do not fit on "
                    f"{gpus_in_all:g} GPUs",
                )
        else:
            hosts = [node for node in nodes if node.get("CPU", 0) > 0]
            slots = [max(1, int(node["CPU"])) for node in hosts]
            limit = f"{cpus_in_all:g} CPUs, no GPU"
        largest = max((node.get("CPU", 0) for node in hosts), default=0)
        if (runtime.cpus or 0) > largest:
            _refuse("runtime.cpus", f"{runtime.cpus:g} on one machine; the largest has {largest:g}")
        fit = max(1, sum(slots) // runtime.workers)
        concurrency = min(runtime.concurrency or fit, num_trials)
        # A worker lives on one node, so its share is that of the node where CPUs are scarcest.
        busy = concurrency * runtime.workers / max(1, sum(slots))
        share = min(
            node.get("CPU", 0) / max(1.0, slot * busy)
            for node, slot in zip(hosts, slots, strict=True)
        )
        threads = runtime.threads or max(1, int(share))
        return Plan(
            concurrency=concurrency,
            cpus=runtime.cpus or round(max(0.1, TRAINING_SHARE * share), 2),
            gpus=runtime.gpus if on_gpu else 0.0,
            threads=threads,
            text=f"{concurrency} of {num_trials} trials at a time ({limit}); "
            f"{threads} torch threads a worker",
        )

    def per_worker(self) -> Node:
        """Resources of one training worker."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def _gpu_slots(node: Node, gpus: float) -> int:
    """Workers of `gpus` each that fit: two of 0.75 do not share a GPU and a half."""
    return int(node["GPU"]) * int(1 / gpus) if gpus < 1 else int(node["GPU"] / gpus)


def _refuse(path: str, text: str) -> None:
    raise ConfigError("resources", [(path, text)])


def this_machine() -> list[Node]:
    """Before Ray is started: the CPUs here."""
    return [{"CPU": float(os.cpu_count() or 1)}]


def of_cluster(ray: Any) -> list[Node]:
    """The machines of the running Ray."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
