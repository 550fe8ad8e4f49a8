"""Spot machines that do not come: after a while the same type is asked for on demand.

Ray's autoscaler asks for a spot type again and again when the cloud has none, and never turns to
its on-demand twin (ray-project/ray#20774). So the driver of a sweep watches what waits and why.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bgray.fleet_state import LOGS, launch_failures
from bgray.resources import FALLBACK, Group, Node, node_groups

POLL_SECONDS = 5.0
SETUP_SECONDS = 900.0
"""A machine that is granted and has not joined after so long is no longer waited for: its set-up
hangs, or on Kubernetes no machine has room for the pod."""


@dataclass(frozen=True)
class Demand:
    """What waits for machines now."""

    bundles: tuple[Node, ...] = ()
    """Resources that tasks, actors and placement groups wait for."""
    there: dict[str, int] = field(default_factory=dict)
    """Machines that have joined, by type."""
    coming: frozenset[str] = frozenset()
    """Types of which a machine has been granted, and is being set up."""
    refused: dict[str, str] = field(default_factory=dict)
    """Type to the cloud's reason for a launch that failed a moment ago."""


def machines(bundles: tuple[Node, ...], groups: dict[str, Group]) -> dict[str, int]:
    """How many machines of each type that has an on-demand twin those bundles need: each bundle
    goes to the smallest type that holds it and that there may be any of, filled one after the
    other."""
    types = [name for name, group in groups.items() if group.most and not name.endswith(FALLBACK)]
    types.sort(key=lambda name: _size(groups[name].resources))
    rooms: dict[str, list[Node]] = {}
    for bundle in sorted(bundles, key=_size, reverse=True):
        for name in types:
            if not _fits(bundle, groups[name].resources):
                continue
            filled = rooms.setdefault(name, [])
            room = next((room for room in filled if _fits(bundle, room)), None)
            if room is None:
                room = dict(groups[name].resources)
                filled.append(room)
            for resource, amount in bundle.items():
                room[resource] -= amount
            break
    return {name: len(filled) for name, filled in rooms.items() if name + FALLBACK in groups}


def _size(resources: Node) -> tuple[float, float]:
    return resources.get("GPU", 0), resources.get("CPU", 0)


def _fits(bundle: Node, room: Node) -> bool:
    return all(room.get(name, 0) >= amount - 1e-9 for name, amount in bundle.items())


class Patience:
    """When to stop waiting for spot: fed what waits every few seconds, says what to ask for."""

    def __init__(self, seconds: float, groups: dict[str, Group]):
        self.seconds, self.groups = seconds, groups
        self._since: dict[str, float] = {}
        self._coming: dict[str, float] = {}
        self._bought: dict[str, int] = {}

    def wanted(self, demand: Demand, now: float) -> dict[str, int]:
        """On-demand machines that there should be, by spot type. A type's clock runs while
        something waits for it and none of it is on its way; it begins anew when nothing waits any
        more, and when an on-demand one has joined, which takes what waits in a moment."""
        needed = {
            name: count
            for name, count in machines(demand.bundles, self.groups).items()
            # With some there and none refused, what waits only waits for its turn.
            if name in demand.refused
            or not demand.there.get(name, 0) + demand.there.get(name + FALLBACK, 0)
            if demand.there.get(name, 0) < self.groups[name].most
        }
        for clock in (self._since, self._coming):
            for name in list(clock):
                if name not in needed:
                    del clock[name]
        found = {}
        for name, count in needed.items():
            if name not in demand.coming:
                self._coming.pop(name, None)
            elif now - self._coming.setdefault(name, now) < SETUP_SECONDS:
                self._since[name] = now
            bought = demand.there.get(name + FALLBACK, 0)
            if bought > self._bought.get(name, 0):
                self._since[name] = now
            self._bought[name] = bought
            since = self._since.setdefault(name, now)
            if now - since >= self.seconds:
                # Those that are there are busy, or nothing would wait.
                found[name] = min(bought + count, self.groups[name + FALLBACK].most)
        return {name: count for name, count in found.items() if count}


@contextlib.contextmanager
def on_demand_when_spot_is_out(
    ray: Any, seconds: float, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """In the block, a thread asks for on-demand machines where spot ones stay away; nothing
    happens in a cluster without types that have a twin. Yields what ends the asking early."""
    groups = node_groups(ray)
    done = threading.Event()
    if not any(name + FALLBACK in groups for name in groups):
        yield done.set
        return
    thread = threading.Thread(
        target=_watch, args=(ray, Patience(seconds, groups), say, done), daemon=True
    )
    thread.start()
    try:
        yield done.set
    finally:
        done.set()
        thread.join(timeout=30)


def _watch(ray: Any, patience: Patience, say: Callable[[str], None], done: threading.Event) -> None:
    asked: dict[str, tuple[int, Any]] = {}  # spot type: (machines, placement group)
    address, trouble = ray.get_runtime_context().gcs_address, ""
    while not done.wait(POLL_SECONDS):
        try:
            demand = _demand(address, patience.groups)
            _ask_for(ray, patience, demand, asked, say)
        except Exception as error:  # Ray has many; asked again, and the sweep goes on
            if str(error) != trouble:
                trouble = str(error)
                say(f"cannot ask for machines ({type(error).__name__}: {error}); trying on")
    for _, group in asked.values():
        with contextlib.suppress(Exception):
            ray.util.remove_placement_group(group)


def _ask_for(ray: Any, patience: Patience, demand: Demand, asked: dict, say: Any) -> None:
    wanted = patience.wanted(demand, time.monotonic())
    for name, count in wanted.items():
        if asked.get(name, (0, None))[0] >= count:
            continue
        if name in asked:
            ray.util.remove_placement_group(asked.pop(name)[1])
        why = demand.refused.get(name) or "none came"
        say(f"no {name} for {patience.seconds:.0f} s ({why}): {count} {name}{FALLBACK} instead")
        # Not request_resources: Ray Data calls that too, and the last call wins.
        group = ray.util.placement_group([{name + FALLBACK: 1.0}] * count)
        asked[name] = (count, group)
    for name in [name for name in asked if name not in wanted]:
        # What waited has its machine, which now stays as long as it is used.
        ray.util.remove_placement_group(asked.pop(name)[1])


def _demand(address: str, groups: dict[str, Group]) -> Demand:
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(address)
    waiting = status.resource_demands
    marks = {name + FALLBACK for name in groups}
    bundles = tuple(
        dict(shape.bundle)
        for demand in (*waiting.ray_task_actor_demand, *waiting.placement_group_demand)
        for shape in demand.bundles_by_count
        if not marks & set(shape.bundle)  # our own question
        for _ in range(shape.count)
    )
    refused = launch_failures(Path(LOGS), datetime.now())
    coming = frozenset(node.ray_node_type_name for node in status.pending_nodes)
    there = Counter(n.ray_node_type_name for n in (*status.active_nodes, *status.idle_nodes))
    return Demand(bundles, dict(there), coming, refused)
