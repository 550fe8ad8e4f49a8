"""Machines behind moto: each running EC2 instance is a `Lab` host with instance metadata."""

import contextlib
import json
import socketserver
import subprocess
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .lab import Host, Lab, _ip
from .moto_aws import KEYS, REGION, Moto

METADATA = "169.254.169.254"


class FakeCloud:
    """Boots a host for each instance that moto says is running, with the addresses moto made up,
    and cuts its power when it is terminated. A context manager.

    The hosts start bare (`environment=False`): setup.sh makes ~/bgray-env. The keys of `laptop`
    (~/.ssh/*.pem, which Ray's bootstrap writes) are let in. A host has the credentials that its
    metadata service gives it, when the instance has a profile, and no others, as in the cloud.
    """

    def __init__(self, lab: Lab, moto: Moto, laptop: Host, *, env: dict[str, str] | None = None):
        self.lab, self.moto, self.laptop = lab, moto, laptop
        self.env = {**moto.env, **(env or {})}
        self.hosts: dict[str, Host] = {}  # by instance id; also those that are gone
        self.errors: list[str] = []
        self._notices: dict[str, tuple[float, bool]] = {}
        self._services: dict[str, _Metadata] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fakecloud", daemon=True)

    def __enter__(self):
        self.lab.at_close(self.close)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Stops booting and serving; the hosts run on until the lab closes."""
        self._stop.set()
        self._thread.join(timeout=30)
        while self._services:
            self._services.popitem()[1].close()

    def instances(self, node_type: str | None = None, *, every: bool = False) -> list[dict]:
        """What moto's DescribeInstances says of living instances (pending or running), oldest
        first; of all with `every`; only those Ray started as `node_type`, if named."""
        with self.lab.network():
            answer = self.moto.client("ec2").describe_instances()
        found = [i for r in answer["Reservations"] for i in r["Instances"]]
        if not every:
            found = [i for i in found if i["State"]["Name"] in ("pending", "running")]
        if node_type is not None:
            found = [i for i in found if _tags(i).get("ray-user-node-type") == node_type]
        return sorted(found, key=lambda i: i["LaunchTime"])

    def host(self, node_type: str, index: int = -1) -> Host:
        """The host behind the latest living instance of a node type."""
        return self.hosts[self.instances(node_type)[index]["InstanceId"]]

    def terminate(self, instance_id: str) -> None:
        """What a person at the console, or AWS taking back a spot instance, does."""
        with self.lab.network():
            self.moto.client("ec2").terminate_instances(InstanceIds=[instance_id])

    def spot_notice(self, instance_id: str, *, seconds: float = 120.0, terminate: bool = True):
        """The metadata of the instance announces its end in `seconds`; then it ends."""
        self._notices[instance_id] = (time.time() + seconds, terminate)

    def notice(self, instance_id: str) -> float | None:
        """When (time.time()) the instance was told it ends; None without a notice."""
        return self._notices[instance_id][0] if instance_id in self._notices else None

    def _watch(self):
        while not self._stop.wait(0.5):
            try:
                for item in self.instances(every=True):
                    self._follow(item)
                for instance_id, (when, terminate) in list(self._notices.items()):
                    host = self.hosts.get(instance_id)
                    if terminate and time.time() >= when and host and host.alive:
                        self.terminate(instance_id)
            except Exception:  # the next round may do better; a test reads them
                self.errors.append(traceback.format_exc())

    def _follow(self, item):
        instance_id, state = item["InstanceId"], item["State"]["Name"]
        if instance_id in self._services:  # moto shows an instance before it has its profile
            self._services[instance_id].item = item
        host = self.hosts.get(instance_id)
        if state == "running" and host is None:
            name = f"{_tags(item).get('ray-user-node-type', 'i')}-{len(self.hosts)}"
            name = name.replace("_", "-")
            host = self.lab.host(
                name,
                item["PrivateIpAddress"],
                (item.get("PublicIpAddress", ""),),
                env=self.env,
                environment=False,
            )
            for key in self._public_keys():
                host.authorize(key)
            with self.lab.network(host):
                self._services[instance_id] = _Metadata(self, host, item)
            self.hosts[instance_id] = host
        elif state in ("terminated", "shutting-down", "stopped") and host and host.alive:
            host.kill()
            if service := self._services.pop(instance_id, None):
                service.close()

    def _public_keys(self):
        for path in sorted((self.laptop.root / ".ssh").glob("*.pem")):
            made = subprocess.run(
                ["ssh-keygen", "-y", "-f", str(path)], capture_output=True, text=True
            )
            if made.returncode == 0:
                yield made.stdout


def _tags(item):
    return {tag["Key"]: tag["Value"] for tag in item.get("Tags", [])}


class _Metadata(ThreadingHTTPServer):
    """IMDSv2 of one instance; its first token is late. Its socket is in the host's network (made
    while the thread was there), its threads are in this process."""

    daemon_threads = True

    def __init__(self, cloud, host, item):
        self.cloud, self.item, self.log = cloud, item, host.folder / "metadata.log"
        _ip(host.pid, f"addr add {METADATA}/32 dev lo")
        self.late = 2.0  # seconds; as on a machine that is busy starting Ray
        super().__init__((METADATA, 80), _Handler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.2,), daemon=True)
        self.thread.start()

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # http.server's asks a name server for its name
        self.server_name, self.server_port = METADATA, 80

    def close(self):
        self.shutdown()
        self.thread.join(timeout=10)
        self.server_close()

    def answer(self, path: str) -> str | None:
        item, instance_id = self.item, self.item["InstanceId"]
        profile = item.get("IamInstanceProfile", {}).get("Arn", "").rpartition("/")[2]
        when = self.cloud.notice(instance_id)
        zone = item["Placement"]["AvailabilityZone"]
        texts: dict[str, str | None] = {
            "meta-data/instance-id": instance_id,
            "meta-data/instance-type": item["InstanceType"],
            "meta-data/instance-life-cycle": item.get("InstanceLifecycle", "on-demand"),
            "meta-data/local-ipv4": item["PrivateIpAddress"],
            "meta-data/placement/availability-zone": zone,
            "meta-data/placement/region": REGION,
            "meta-data/iam/security-credentials/": profile or None,
        }
        if when is not None:
            at = datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            action = json.dumps({"action": "terminate", "time": at})
            texts["meta-data/spot/instance-action"] = action
            texts["meta-data/spot/termination-time"] = at
        if profile:
            until = datetime.now(UTC) + timedelta(hours=6)
            texts[f"meta-data/iam/security-credentials/{profile}"] = json.dumps(
                {
                    "Code": "Success",
                    "Type": "AWS-HMAC",
                    "AccessKeyId": KEYS["AWS_ACCESS_KEY_ID"],
                    "SecretAccessKey": KEYS["AWS_SECRET_ACCESS_KEY"],
                    "Token": "token",
                    "LastUpdated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "Expiration": until.strftime("%Y-%m-%dT%H:%M:%SZ"),
                }
            )
        return texts.get(path)


class _Handler(BaseHTTPRequestHandler):
    server: _Metadata  # pyright: ignore[reportIncompatibleVariableOverride]
    tokens: set[str] = set()

    def parse_request(self):
        self.began = time.time()
        return super().parse_request()

    def _send(self, status, text=""):
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            if self.command == "PUT":
                self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
            self.end_headers()
            self.wfile.write(text.encode())
            status = f"{status} sent"
        at = datetime.fromtimestamp(self.began).strftime("%H:%M:%S.%f")
        took = time.time() - self.began
        with self.server.log.open("a") as log:
            log.write(f"{at} {self.command} {self.path} {status} after {took:.2f} s\n")

    def do_PUT(self):
        if self.path != "/latest/api/token":
            return self._send(404)
        if not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdigit():
            return self._send(400)
        late, self.server.late = self.server.late, 0.0
        time.sleep(late)
        token = f"token-{time.time_ns()}"
        self.tokens.add(token)
        self._send(200, token)

    def do_GET(self):
        if self.headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return self._send(401)
        text = self.server.answer(self.path.removeprefix("/latest/"))
        self._send(404 if text is None else 200, text or "")

    def log_message(self, format, *args):
        pass
