"""How many trials run at a time, and what each training worker gets of the machines."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from bgray.config import ConfigError, Experiment, FeedCache, Runtime

TRAINING_SHARE = 0.75
"""Of a node's CPUs; the rest stays free for Ray Data, which needs some to make any batch at all."""

Node = dict[str, float]
"""Resources of one machine, as Ray names them: {"CPU": 8, "GPU": 1}."""


@dataclass(frozen=True)
class Feed:
    """Who makes the batches of a trial, and why."""

    kind: str
    """`ray` or `process`."""
    reason: str
    cpus: float = 1.0
    """That each Ray Data task asks for."""
    resources: Node = field(default_factory=dict)
    """What it asks for besides."""
    cache: FeedCache | None = None
    """Where finished work units are kept, and taken from."""

    @staticmethod
    def choose(runtime: Runtime, nodes: list[Node], on_gpu: bool) -> "Feed":
        """Training nodes' spare CPUs stay theirs where there are machines for data.

        on_gpu: whether trials ask for GPUs, and so leave those machines alone.
        """
        cache = feed_cache(runtime)
        found = Feed._made_by(runtime, nodes, on_gpu)
        if cache is None:
            return found
        text = f"units are kept in {cache.path}, {cache.gib:g} GiB at most: runtime.feed_cache"
        return replace(found, cache=cache, reason=f"{found.reason}; {text}")

    @staticmethod
    def _made_by(runtime: Runtime, nodes: list[Node], on_gpu: bool) -> "Feed":
        place = data_placement(runtime.data_nodes, nodes)
        if place:
            nodes = [node for node in nodes if node.get(CPU_WORKER, 0) > 0]
        cpus = sum(node.get("CPU", 0) for node in nodes)
        share = 1.0 if cpus >= 4 else 0.25
        if place:
            # Where trials run on CPUs, what they leave of the smallest machine must do for a task.
            least = min((node.get("CPU", 0) for node in nodes), default=math.inf)
            share = 1.0 if on_gpu else min(1.0, (1 - TRAINING_SHARE) * least)
        if runtime.feed != "auto":
            return Feed(runtime.feed, f"runtime.feed={runtime.feed}", share, place)
        if place:
            return Feed("ray", f"{cpus:g} CPUs of machines that are there for it", share, place)
        if cpus >= 8:
            reason = f"{cpus:g} CPUs: Ray Data can keep up with the training beside it"
            return Feed("ray", reason, share)
        # A work unit costs 0.4 ms CPU an example; an execution of Ray Data about 5 s CPU, and a
        # CPU that trials hold.
        reason = f"{cpus:g} CPUs: too few to share with Ray Data, a thread of the trial is cheaper"
        return Feed("process", reason, share)


def feed_cache(runtime: Runtime) -> FeedCache | None:
    """The one that is asked for by hand. ConfigError where it is not on this machine's disks."""
    asked = runtime.feed_cache
    if not isinstance(asked, FeedCache):
        return None
    if "://" in asked.path:
        text = f"must be a local folder, for its files are mapped into memory, got {asked.path}"
        raise ConfigError("runtime", [("feed_cache.path", text)])
    return FeedCache(str(Path(asked.path).expanduser().absolute()), asked.gib)


@dataclass(frozen=True)
class Share:
    """What one trial gets of a GPU."""

    fraction: float
    """Of one GPU, as Ray is asked for it; 1: all of it."""
    gib: float | None
    """Of its memory, the CUDA context included; None: not known, so all of it."""
    limit_gib: float | None
    """Most that torch may hold; None: no limit."""
    why: str
    """Where the figure comes from, in words."""

    @property
    def alone(self) -> bool:
        """Nobody else on its GPU: only then is its speed a figure to compare."""
        return self.fraction >= 1


CONTEXT_GIB = 0.6
"""Of a process on a GPU beside what torch holds, where it was not measured: rather much than
little."""


def by_hand(fraction: float, gpu_gib: float) -> float:
    """GiB that torch may hold where runtime.gpus is below 1: that part of the GPU's memory, less
    the CUDA context's."""
    return max(0.5 * fraction * gpu_gib, fraction * gpu_gib - CONTEXT_GIB)


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
    feed: Feed
    text: str
    """In words, for the console."""

    @staticmethod
    def make(
        experiment: Experiment, num_trials: int, nodes: list[Node], shares: Sequence[Share] = ()
    ) -> "Plan":
        """The plan for trials like `experiment`. ConfigError where the machines can never hold one:
        Ray would wait for ever, and say nothing.

        shares: what a Packer gives each of the trials (of one worker) of a GPU; none: as
        runtime.gpus says.
        """
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
            if shares:
                slots = [_packed(shares, int(node["GPU"])) for node in hosts]
                limit = f"{gpus_in_all:g} GPUs, {_sizes(shares)}"
        else:
            hosts = [node for node in nodes if node.get("CPU", 0) > 0]
            slots = [max(1, int(node["CPU"])) for node in hosts]
            limit = f"{cpus_in_all:g} CPUs, no GPU"
        if not hosts:
            text = "no machine of this cluster has a CPU for trials; have its workers joined?"
            _refuse("runtime.device", text)
        largest = max(node.get("CPU", 0) for node in hosts)
        if (runtime.cpus or 0) > largest:
            _refuse("runtime.cpus", f"{runtime.cpus:g} on one machine; the largest has {largest:g}")
        fit = max(1, sum(slots) // runtime.workers)
        if on_gpu and shares:
            # The smallest fit anywhere, but each of them on one node only.
            fit = _packed(shares, sum(int(node["GPU"]) for node in hosts))
        concurrency = min(runtime.concurrency or fit, num_trials)
        # A worker lives on one node, so its share is that of the node where CPUs are scarcest; all
        # may come to live on one, if it has room.
        share = min(
            node.get("CPU", 0) / max(1, min(slot, concurrency * runtime.workers))
            for node, slot in zip(hosts, slots, strict=True)
        )
        threads = runtime.threads or max(1, int(share))
        return Plan(
            concurrency=concurrency,
            cpus=runtime.cpus or round(max(0.1, TRAINING_SHARE * share), 2),
            gpus=runtime.gpus if on_gpu else 0.0,
            threads=threads,
            feed=Feed.choose(runtime, nodes, on_gpu),
            text=f"{concurrency} of {num_trials} trials at a time ({limit}); "
            f"{threads} torch threads a worker",
        )

    def per_worker(self, share: Share | None = None) -> Node:
        """Resources of one training worker; share: what a Packer gives it of a GPU."""
        gpus = share.fraction if share and self.gpus else self.gpus
        return {"CPU": self.cpus, **({"GPU": gpus} if gpus else {})}


def _packed(shares: Sequence[Share], gpus: int) -> int:
    """How many of these trials, the smallest first, so many GPUs hold at a time."""
    free, held = [1.0] * gpus, 0
    for fraction in sorted(share.fraction for share in shares):
        place = next((i for i, left in enumerate(free) if left >= fraction - 1e-9), None)
        if place is None:
            break
        free[place] -= fraction
        held += 1
    return max(held, gpus)


def _sizes(shares: Sequence[Share]) -> str:
    sizes = sorted(share.gib for share in shares if share.gib is not None)
    if not sizes:
        return "one trial each"
    low, high = f"{sizes[0]:.1f}", f"{sizes[-1]:.1f}"
    alone = sum(share.alone for share in shares)
    text = f"{low} GiB a trial" if low == high else f"{low} to {high} GiB a trial"
    return text + (f", {alone} of them alone" if alone else "")


def _gpu_slots(node: Node, gpus: float) -> int:
    """Workers of `gpus` each that fit: two of 0.75 do not share a GPU and a half."""
    return int(node["GPU"]) * int(1 / gpus) if gpus < 1 else int(node["GPU"] / gpus)


def _refuse(path: str, text: str) -> None:
    raise ConfigError("resources", [(path, text)])


def this_machine(gpus: int = 0) -> list[Node]:
    """Before Ray is started: the CPUs here, and as many GPUs as the caller has counted."""
    return [{"CPU": float(os.cpu_count() or 1), **({"GPU": float(gpus)} if gpus else {})}]


def of_cluster(ray: Any) -> list[Node]:
    """The machines of the running Ray, and those that its autoscaler may still add."""
    alive = [
        (node.get("Labels", {}).get(GROUP_LABEL), node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    groups = node_groups(ray)
    found = [resources for group, resources in alive if group not in groups]
    for name, group in groups.items():
        if name.endswith(FALLBACK) and name.removesuffix(FALLBACK) in groups:
            continue  # stands in for its spot type, and is not there besides
        found += [group.resources] * max(group.most, sum(kind == name for kind, _ in alive))
    return found


# --- clusters


BOOTSTRAP = Path("~/ray_bootstrap_config.yaml").expanduser()
"""The cluster's YAML as `ray up` leaves it on the head."""
GROUP_LABEL = "ray.io/node-group"
CPU_WORKER = "cpu_worker"
"""Resource that marks the machines which are there to make batches."""
SLIVER = 0.001
"""Of a marker: what each task asks for, to be placed there without ever filling it."""
FALLBACK = "_ondemand"
"""`<type>_ondemand` is the same machine as the spot type `<type>`, bought on demand; it has a
resource of its own name, so that it can be asked for."""


@dataclass(frozen=True)
class Group:
    """A type of machine that the autoscaler adds: what one has, and how many there may be."""

    resources: Node
    most: int


def node_groups(ray: Any) -> dict[str, Group]:
    """The types of workers that the autoscaler may add, asked on the head: of a cluster that `ray
    up` started, or of one on Kubernetes that tells them in BGRAY_NODE_TYPES. None anywhere else,
    for Ray itself does not tell them."""
    config = _cluster_file(ray)
    types = config.get("available_node_types") or {}
    if config.get("provider", {}).get("type") == "local":
        return {}
    if told := os.environ.get("BGRAY_NODE_TYPES"):
        types = json.loads(told)
    every = config.get("max_workers", math.inf)
    return {
        name: Group(kind.get("resources") or {}, int(min(every, kind.get("max_workers", every))))
        for name, kind in types.items()
        if name != config.get("head_node_type")
    }


def _cluster_file(ray: Any) -> dict[str, Any]:
    """The YAML of the cluster whose head this machine is; empty where it is none."""
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0]
    if ray.util.get_node_ip_address() not in (head, "127.0.0.1") or not BOOTSTRAP.exists():
        return {}
    return yaml.safe_load(BOOTSTRAP.read_text())


def wait_for_own_machines(ray: Any, say: Callable[[str], None], seconds: float = 180.0) -> None:
    """Until the machines of a `provider: local` cluster have joined, for the plan is made once, and
    `ray up` does not wait for them. Those that stay away are done without, and named."""
    provider = _cluster_file(ray).get("provider", {})
    if provider.get("type") != "local":
        return
    deadline, told = time.monotonic() + seconds, False
    while True:
        # One that was there and is gone is not waited for.
        known = {node["NodeManagerAddress"] for node in ray.nodes()}
        missing = sorted(set(provider.get("worker_ips") or []) - known)
        if not missing:
            return
        if time.monotonic() > deadline:
            say(f"going on without {', '.join(missing)}: not joined within {seconds:.0f} s")
            return
        if not told:
            told = True
            say(f"waiting for {', '.join(missing)} to join")
        time.sleep(1)


def data_placement(wanted: str, nodes: list[Node]) -> Node:
    """What a Ray Data task asks for besides its CPUs, from `runtime.data_nodes`."""
    marked = any(node.get(CPU_WORKER, 0) > 0 for node in nodes)
    dedicated = wanted == CPU_WORKER or (wanted == "auto" and marked)
    return {CPU_WORKER: SLIVER} if dedicated else {}
