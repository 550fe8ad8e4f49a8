"""Runs on every machine of a cloud cluster: hears that a spot machine is to be taken away, and
drains its Ray node while there is time.

python -m bgray.spot [--every SECONDS]

Ray does not read the notice by itself. Draining lets trials on the machine checkpoint and go on
elsewhere (bgray.train.stop_asked), and keeps new work off it.
"""

import argparse
import datetime
import fcntl
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

METADATA = "http://169.254.169.254"
"""EC2's instance metadata service (Amazon EC2 User Guide, "Instance metadata")."""
TOKEN_SECONDS = 21600
MARGIN_SECONDS = 10
"""Of the notice's two minutes, kept back from those who are to finish in them."""
LOCK = "bgray-spot.lock"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bgray.spot", description=" ".join((__doc__ or "").split("\n\n")[0].split())
    )
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds between questions (default 5)"
    )
    args = parser.parse_args(argv)
    lock = os.open(Path.home() / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until this process ends
    except BlockingIOError:
        _say("another one watches this machine already")
        return
    watch(args.every)


def watch(every: float, base: str = METADATA) -> None:
    """Ask until a notice comes, then drain this machine's node, and return."""
    service, answered = Metadata(base), None
    _say(f"asking {base} every {every:g} s")
    while True:
        try:
            when = service.notice()
        except OSError as error:
            if answered is not False:
                _say(f"no answer ({error}); asking on")
            answered = False
        else:
            if answered is False:
                _say("answers again")
            answered = True
            if when is not None:
                break
        time.sleep(every)
    _say(f"notice: this machine is taken away in {when - time.time():.0f} s")
    while True:
        seconds = max(0, round(when - time.time() - MARGIN_SECONDS))
        try:
            node = drain(seconds)
        except Exception as error:  # the machine goes anyway: try until then, whatever Ray raises
            _say(f"could not drain: {type(error).__name__}: {error}")
            if time.time() > when:
                sys.exit(1)
            time.sleep(1)
            continue
        _say(f"node {node} drains, {seconds} s left")
        return


class Metadata:
    """The instance metadata service, version 2: every question carries a session token."""

    def __init__(self, base: str = METADATA):
        self.base, self._token = base, ""

    def notice(self) -> float | None:
        """When this machine will be taken away (Unix time), or None. OSError: no answer."""
        for _ in range(2):
            if not self._token:
                header = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
                self._token = self._ask("/latest/api/token", header, "PUT")
            try:
                text = self._ask(
                    "/latest/meta-data/spot/instance-action",
                    {"X-aws-ec2-metadata-token": self._token},
                )
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 404:
                    return None
                if error.code != 401:
                    raise
                self._token = ""  # has run out
                continue
            action = json.loads(text)
            if action.get("action") not in ("terminate", "stop", "hibernate"):
                return None
            when = datetime.datetime.fromisoformat(action["time"].replace("Z", "+00:00"))
            return when.timestamp()
        raise OSError("the metadata service takes none of its own tokens")

    def _ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str:
        request = urllib.request.Request(self.base + path, headers=headers, method=method)
        # Never through a proxy: the address is this machine's own.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=2) as answer:
            return answer.read().decode()


def drain(seconds: int) -> str:
    """Tell Ray that this machine's node is taken away in `seconds`; returns the node's id."""
    from ray._private import services
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2, gcs_pb2

    reasons: Any = autoscaler_pb2.DrainNodeReason  # type: ignore[attr-defined]
    address = services.canonicalize_bootstrap_address_or_die("auto")
    gcs = GcsClient(address=address)
    here = services.get_node_ip_address(address)
    alive = [
        node_id
        for node_id, info in gcs.get_all_node_info().items()
        if info.state == gcs_pb2.GcsNodeInfo.ALIVE  # type: ignore[attr-defined]
        and info.node_manager_address == here
    ]
    if not alive:
        raise RuntimeError(f"Ray has no node at {here}")
    for node_id in alive:
        accepted, why = gcs.drain_node(
            node_id.hex(),
            reasons.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "spot notice",
            (int(time.time()) + seconds) * 1000,
        )
        if not accepted:
            raise RuntimeError(why)
    return ", ".join(node_id.hex()[:12] for node_id in alive)


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}", flush=True)


if __name__ == "__main__":
    from bgray.spot import main

    main()
