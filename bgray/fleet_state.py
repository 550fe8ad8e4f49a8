"""What Ray on the head knows of its cluster: who has joined, what is being started, what failed and
why."""

import contextlib
import json
import os
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

LOGS = "/tmp/ray/session_latest/logs"
TROUBLE = re.compile(
    r"bgray setup on|cannot|error|fail|exception|denied|unauthorized|insufficient"
    r"|timed out|unable|could not|refused|no such file|not found",
    re.IGNORECASE,
)
NOISE = re.compile(
    r"Recent failures|\(no failures\)|Failed nodes:? *$|num_failed|^\s*File \"|^V+INFO |lastlog"
    r"|VERR|click\.|SSH command failed|show_color|cannot modify limit|New status"
    r"|ALLOCATION_FAILED|PANIC|Attempt failed"
)
LAUNCH_FAILED = re.compile(
    r"Failed to launch \d+ nodes? of type (\S+): (?:Node Launch Exception )?(.*)"
)
STALE = timedelta(seconds=60)  # a launch that failed longer ago says nothing of now


def state() -> dict[str, Any]:
    """What Ray on this machine knows of its cluster, as plain data; runs on the head.

    nodes: alive ones, with `types` (its node type, and the marker resources it carries);
    pending, failed: launches and nodes with type and reason; asked: requests that wait for
    resources, with the resources; log: the autoscaler's last complaints.
    """
    from ray._private.utils import read_ray_address
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.autoscaler.v2.sdk import get_cluster_status

    address = read_ray_address()
    if not address:
        return {"error": "Ray does not run on the head; `ray up` starts it"}
    try:
        client = GcsClient(address=address)
        known = client.get_all_node_info(timeout=10)
        status = get_cluster_status(address)
    except Exception as error:  # Ray has a class of its own for each way in which this can fail
        return {"error": f"Ray at {address} does not answer: {error}"}
    nodes = [_node(info) for info in known.values() if info.state == 0]  # 0: ALIVE
    # Autoscaler v2 reports to GCS; v1, which own machines need, leaves a JSON in its store.
    first = json.loads(client.internal_kv_get(b"__autoscaling_status", None) or b"{}")
    report = first.get("autoscaler_report") or {}
    pending = [
        *(
            (n.ray_node_type_name, n.details or n.node_status or "starting")
            for n in status.pending_nodes
        ),
        *((p.ray_node_type_name, f"{p.count} requested") for p in status.pending_launches),
        *((kind, f"{ip}: {what}") for ip, kind, what in report.get("pending_nodes") or []),
        *((k, f"{n} requested") for k, n in (report.get("pending_launches") or {}).items()),
    ]
    # Not `failed_launches`: it goes back to the start, and has no reasons.
    failed = [
        *launch_failures(Path(LOGS), datetime.now()).items(),
        *((n.ray_node_type_name, n.failure_detail or "") for n in status.failed_nodes),
        *((kind, f"{ip} failed") for ip, kind in report.get("failed_nodes") or []),
    ]
    availability = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    for kind, record in availability.items():
        reason = (record.get("unavailable_node_information") or {}).get("description")
        if reason:
            failed.append((kind, reason))
    demands = status.resource_demands
    asked = [
        bundle.bundle
        for group in (
            demands.placement_group_demand,
            demands.ray_task_actor_demand,
            demands.cluster_constraint_demand,
        )
        for demand in group
        for bundle in demand.bundles_by_count
    ]
    return {
        "nodes": nodes,
        "pending": [{"type": kind, "what": what} for kind, what in pending],
        "failed": [{"type": kind, "reason": reason} for kind, reason in failed],
        "asked": asked,
        "log": complaints(Path(LOGS)),
    }


def _node(info: Any) -> dict[str, Any]:
    resources = dict(info.resources_total)
    own = ("CPU", "GPU", "memory", "object_store_memory")
    markers = [key for key in resources if key not in own and ":" not in key]
    named = [info.node_type_name, dict(info.labels).get("ray.io/node-group")]
    return {
        "id": info.node_id.hex(),
        "ip": info.node_manager_address,
        "head": bool(info.is_head_node),
        "types": sorted({*filter(None, named), *markers}),
        "CPU": resources.get("CPU", 0),
        "GPU": resources.get("GPU", 0),
    }


def complaints(folder: Path, lines: int = 12, look_at_bytes: int = 300_000) -> list[str]:
    """The last lines of the autoscaler's logs that speak of trouble, each once."""
    found: dict[str, None] = {}
    for name in ("monitor.log", "monitor.out", "monitor.err"):
        for line in _tail(folder / name, look_at_bytes):
            # Without the time and place in the source, so that a repeated one is one.
            plain = re.sub(r"^\d{4}-\d\d-\d\d[ T][\d:,.]+\s*", "", line)
            plain = re.sub(r"^(DEBUG|INFO|WARNING|ERROR)\s+\S+:\d+\s+--\s+", "", plain)
            if TROUBLE.search(plain) and not NOISE.search(plain):
                found.pop(plain[:400], None)
                found[plain[:400]] = None
    return list(found)[-lines:]


def launch_failures(folder: Path, now: datetime, look_at_bytes: int = 300_000) -> dict[str, str]:
    """Node type to what the cloud said, where the last launch failed a moment ago. Ray's own status
    has that it failed, and not why.

    now: in the head's local time, as the log is.
    """
    found: dict[str, str] = {}
    for line in _tail(folder / "monitor.log", look_at_bytes):
        if (match := LAUNCH_FAILED.search(line)) and not match[1].endswith(":"):
            with contextlib.suppress(ValueError):
                if now - datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S") < STALE:
                    found[match[1]] = match[2]
    return found


def _tail(path: Path, look_at_bytes: int) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - look_at_bytes))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).strip() for line in text.splitlines()]
