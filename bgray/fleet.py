"""The cluster's machines from afar: wait until they have joined, and see that none is left."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from bgray import remote
from bgray.problems import ConfigError, unknown
from bgray.remote import Cluster, Host, Unreachable

HOPELESS = re.compile(
    r"InvalidParameter|InvalidAMIID|InvalidGroup|InvalidSubnet|InvalidKeyPair|InvalidIamInstance"
    r"|UnauthorizedOperation|AccessDenied|AuthFailure|OptInRequired|UnsupportedOperation|InvalidBlockDevice"
    r"|Invalid IAM Instance Profile|NoSuchEntity",
)
"""What EC2 answers to a request that will never do, as opposed to one that comes too early."""
RAY_PROCESSES = (
    r"[/ ](raylet|gcs_server)( |$)|ray::|[/ ]ray/dashboard/|/ray/_private/runtime_env/agent/"
    r"|/ray/autoscaler/.*monitor\.py|/ray/_private/log_monitor\.py|-m bgray\.spot"
)
# pgrep leaves itself out, but not the shell whose command line has the pattern in it.
LOOK = (
    f"pgrep -u $(id -u) -af '{RAY_PROCESSES}'".replace("ray::", "[r]ay::")
    .replace("-m bgray", "[-]m bgray")
    .replace("(raylet|gcs_server)", "([r]aylet|[g]cs_server)")
    + " | grep -v pgrep"
)
ONE_TYPE = "local.cluster.node"
GIVEN_UP_SECONDS = 45.0

Say = Callable[[str], None]


# --- wait


def ask_state(host: Host) -> dict[str, Any]:
    """`fleet_state.state()` of the head; Unreachable when it cannot say."""
    done = host.run(f"{remote.PYTHON} -m bgray.cluster state")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            found = json.loads(line)
            if "error" in found:
                raise Unreachable(found["error"])
            return found
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    said = errors[-1] if errors else f"exit code {done.returncode}"
    raise Unreachable(f"the head's set-up is not finished ({said})")


def wait(
    cluster: Cluster, kind: str, count: int, seconds: float, say: Say, pause: float = 4
) -> bool:
    """Until `count` nodes of a type are alive (kind "": any but the head). False, with the reason
    said, at the time-out or as soon as it is hopeless."""
    if kind and cluster.node_types and kind not in cluster.node_types:
        raise ConfigError(
            cluster.file, [("--type", unknown(kind, cluster.node_types, what="node type"))]
        )
    label = kind or "worker"
    start, last, known = time.monotonic(), "", None
    changed = start
    while True:
        try:
            known = _look(cluster)
            joined, line = describe(known, kind, count)
        except Unreachable as error:
            joined, line = 0, str(error)
        if line != last:
            say(f"{time.monotonic() - start:4.0f} s  {label}: {line}")
            last, changed = line, time.monotonic()
        if joined >= count:
            return True
        reason = known and hopeless(known, kind, time.monotonic() - changed)
        if reason or time.monotonic() - start > seconds:
            break
        time.sleep(pause)
    after = f"after {time.monotonic() - start:.0f} s"
    say(f"{label}: {joined} of {count} {after}" + (f"; hopeless: {reason}" if reason else ""))
    for line in why_not(cluster, known, kind) if known else []:
        say(f"  {line}")
    return False


def _look(cluster: Cluster) -> dict[str, Any]:
    host = remote.head(cluster)
    if host is None:
        raise Unreachable(f"no head runs; `ray up {cluster.file}` starts one")
    return ask_state(host)


def _of_type(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    # Own machines are all of one type to the autoscaler: which is which, a joined one says.
    return [entry for entry in found if not kind or entry["type"] in (kind, ONE_TYPE)]


def describe(known: dict[str, Any], kind: str, count: int) -> tuple[int, str]:
    """(nodes of the type that have joined, a line that says how it stands)."""
    alive = [n for n in known["nodes"] if not n["head"] and (not kind or kind in n["types"])]
    parts = [f"{len(alive)} of {count} joined"]
    if len(alive) >= count:
        return len(alive), parts[0]
    pending = Counter(entry["what"] for entry in _of_type(known["pending"], kind))
    parts += [f"{number} x {what}" if number > 1 else what for what, number in pending.items()]
    parts += sorted({_short(e["reason"]) for e in _of_type(known["failed"], kind)} - {""})
    return len(alive), "; ".join(parts)


def _short(reason: str) -> str:
    return " ".join(reason.split())[:200]


def hopeless(known: dict[str, Any], kind: str, unchanged_seconds: float) -> str:
    """The reason why no such node will ever come, or ""."""
    # A launch that is only asked for is no news: v2 asks again every few seconds.
    asked = re.compile(r"\d+ requested")
    pending = [e["what"] for e in _of_type(known["pending"], kind) if not asked.match(e["what"])]
    if pending:
        # Where v1 could not set a machine up, it leaves it "uninitialized" and does not try again.
        given_up = all(what.endswith("uninitialized") for what in pending)
        failed = [line for line in known["log"] if "commands failed" in line]
        return failed[-1] if given_up and failed and unchanged_seconds > GIVEN_UP_SECONDS else ""
    reasons = [entry["reason"] for entry in _of_type(known["failed"], kind)]
    if not reasons or not kind:
        return ""
    return next((_short(text) for text in reversed(reasons) if HOPELESS.search(text)), "")


def why_not(cluster: Cluster, known: dict[str, Any], kind: str) -> list[str]:
    """What the autoscaler has to say about nodes that did not come."""
    lines = list(known["log"])
    smallest = int((cluster.node_types.get(kind) or {}).get("min_workers", 0))
    quiet = not _of_type(known["pending"], kind) and not _of_type(known["failed"], kind)
    if quiet and cluster.node_types and not known["asked"] and not smallest:
        lines.append("nothing asks for one: its min_workers is 0, and no sweep waits for a node")
    return lines or ["the autoscaler's log has no complaint (`ray monitor` shows all of it)"]


# --- down


def ends(cluster: Cluster) -> list[str]:
    """What `down` would end, as lines: of a cluster of that name somebody else may have started."""
    if not cluster.on_aws:
        head = remote.head(cluster)
        machines = [head.address if head else "", *map(str, cluster.provider["worker_ips"])]
        return [f"ends: every Ray process of this user on {', '.join(machines)}"]
    try:
        there = remote.instances(cluster)
    except Unreachable as error:
        return [f"what would end cannot be said: {error}"]
    return [f"ends: {_named(instance)}, {_origin(instance)}" for instance in there]


def _origin(instance: dict[str, Any]) -> str:
    launched = instance.get("LaunchTime")
    since = f"{launched:%Y-%m-%d %H:%M} UTC" if launched else "at a time unknown"
    return f"launched {since} with the key {instance.get('KeyName', '(none)')}"


def down(cluster: Cluster, say: Say) -> bool:
    """`ray down`, then look for what is left and end it; True when nothing is."""
    there = remote.instances(cluster) if cluster.on_aws else []
    if there:
        kinds = Counter(instance["Type"] for instance in there)
        say("there is " + ", ".join(f"{number} {kind}" for kind, number in kinds.items()))
    if there or not cluster.on_aws:
        _ray_down(cluster, say)
    else:
        say(f"no instance of '{cluster.name}' in {cluster.provider['region']}; looking once more")
    left = _aws_left(cluster, say) if cluster.on_aws else _machines_left(cluster, say)
    for line in left:
        say(f"  {line}")
    say(f"{len(left)} left: see to it" if left else "nothing is left")
    return not left


def _ray_down(cluster: Cluster, say: Say) -> None:
    """Its chatter is shown only when it fails; then what follows does its work."""
    say(f"ray down {cluster.file}")
    command = "from ray.scripts.scripts import main; main()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", command, "down", "-y", cluster.file],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
    except subprocess.TimeoutExpired:
        say("ray down has not ended within 15 min; going on without it")
        return
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        said = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", lines[-1]) if lines else "nothing"
        say(f"ray down failed (exit code {done.returncode}): {said}; going on without it")


def _aws_left(cluster: Cluster, say: Say, seconds: float = 240, pause: float = 5) -> list[str]:
    """Lists until EC2 has twice had none: an instance that was asked for may appear late."""
    deadline, told, none = time.monotonic() + seconds, set(), 0
    while True:
        try:
            found = remote.instances(cluster)
        except Unreachable as error:
            if time.monotonic() > deadline:
                return [f"cannot be checked: {error}"]
            time.sleep(pause)
            continue
        none = 0 if found else none + 1
        if none == 2:
            return []
        if found and time.monotonic() > deadline:
            return [_named(instance) for instance in found]
        # The head first: it would start others in their place.
        for instance in sorted(found, key=lambda i: i["Kind"] != "head"):
            if instance["InstanceId"] not in told:
                say(f"terminating {_named(instance)}")
            told.add(instance["InstanceId"])
        if found:
            _terminate(cluster, [i["InstanceId"] for i in found], say)
        time.sleep(pause)


def _named(instance: dict[str, Any]) -> str:
    name, kind = instance["State"]["Name"], instance["InstanceType"]
    return f"{instance['InstanceId']} ({instance['Type']}, {kind}, {name})"


def _terminate(cluster: Cluster, ids: list[str], say: Say) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        remote.ec2(cluster).terminate_instances(InstanceIds=ids)
    except (BotoCoreError, ClientError) as error:
        say(f"EC2: {error}")


def _machines_left(cluster: Cluster, say: Say) -> list[str]:
    """On own machines: `ray down` has stopped Ray on the head only."""
    provider = cluster.provider
    head = remote.head(cluster)
    assert head is not None
    left = []
    for address in [head.address, *map(str, provider["worker_ips"])]:
        host = head if address == head.address else remote.own_host(cluster, address)
        try:
            left += _sweep_up(_reached(host, head), say)
        except Unreachable as error:
            left.append(f"{error}: could not look there")
    return left


def _reached(host: Host, head: Host) -> Host:
    """The host, through the head where this machine has no way to it."""
    try:
        host.run("true", 20)
    except Unreachable:
        if host is head:
            raise
        through = host.behind(head)
        through.run("true", 20)
        return through
    return host


def _sweep_up(host: Host, say: Say) -> list[str]:
    """Stop Ray and the spot watcher there; the processes that outlive it, as lines."""
    stop = (
        "PATH=~/bgray-env/bin:$PATH; pkill -u $(id -u) -f '[-]m bgray\\.spot'; "
        "command -v ray >/dev/null && ray stop --force >/dev/null 2>&1; true"
    )
    found = host.run(LOOK).stdout.splitlines()
    if found:
        host.run(stop, 120)
        for _ in range(10):
            found = host.run(LOOK).stdout.splitlines()
            if not found:
                say(f"{host.address}: Ray stopped")
                return []
            time.sleep(1)
    else:
        say(f"{host.address}: nothing runs")
    return [f"{host.address}: pid {line[:120]}" for line in found]
