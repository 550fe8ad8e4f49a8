"""The cluster's file, its head's address, ssh to its machines, and the tunnel to its dashboard.

Only asks: unlike Ray's own commands it creates no key, role or security group on the way.
"""

import contextlib
import os
import shlex
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bgray.problems import ConfigError

LIVE = ("pending", "running", "stopping", "stopped")
"""EC2 states in which an instance, or at least its disk, still costs money."""
DASHBOARD_PORT = 8265
PYTHON = "RAY_AUTH_MODE=token ~/bgray-env/bin/python -P"
"""On a machine of the cluster. -P: the folder ~/bgray there is the project, not the package."""


class Unreachable(Exception):
    """The head, or Ray on it, does not answer just now; the text says what was seen."""


@dataclass(frozen=True)
class Cluster:
    """A cluster's YAML file, as far as these commands need it."""

    file: str
    raw: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.raw["cluster_name"])

    @property
    def provider(self) -> dict[str, Any]:
        return self.raw["provider"]

    @property
    def auth(self) -> dict[str, Any]:
        return self.raw.get("auth") or {}

    @property
    def on_aws(self) -> bool:
        return self.provider["type"] == "aws"

    @property
    def node_types(self) -> dict[str, Any]:
        """Types of workers; empty for own machines, where each says itself what it is."""
        types = dict(self.raw.get("available_node_types") or {})
        types.pop(self.raw.get("head_node_type"), None)
        return types


@dataclass(frozen=True)
class Host:
    """A machine, and how ssh gets in."""

    address: str
    user: str = ""
    key: str = ""
    proxy: str = ""

    def ssh(self, *options: str, seconds: int = 15) -> list[str]:
        """The ssh command line up to the host. Like Ray's it does not check host keys: addresses
        are used again by other instances. It never asks a question."""
        settings = {
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": os.devnull,
            "LogLevel": "ERROR",
            "BatchMode": "yes",
            "ControlPath": "none",
            "ConnectTimeout": seconds,
            "ServerAliveInterval": 5,
            "ServerAliveCountMax": 3,
            "ExitOnForwardFailure": "yes",
        }
        if self.key:
            settings["IdentitiesOnly"] = "yes"
        if self.proxy:
            settings["ProxyCommand"] = self.proxy
        words = ["ssh", "-T", *(["-i", self.key] if self.key else [])]
        for key, value in settings.items():
            words += ["-o", f"{key}={value}"]
        user = ["-l", self.user] if self.user else []
        return [*words, *user, *options, self.address]

    def run(self, command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """A shell command there. Unreachable when ssh does not get in (its exit code 255) or it
        takes longer."""
        try:
            done = subprocess.run(
                [*self.ssh(), command],
                capture_output=True,
                text=True,
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Unreachable(f"{self.address}: no answer within {seconds:g} s") from None
        if done.returncode == 255:
            raise Unreachable(_ssh_says(self.address, done.stderr))
        return done

    def behind(self, gate: "Host") -> "Host":
        """This machine, reached through another one."""
        return Host(self.address, self.user, self.key, shlex.join(gate.ssh("-W", "%h:%p")))


def _ssh_says(address: str, errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"{address}: {lines[-1] if lines else 'ssh ended without a word'}"


def read_cluster(file: str) -> Cluster:
    """The file as these commands use it; ConfigError where it is none, or not for `ray up`.
    Whether it is a good one says `python -m bgray.cluster check`."""
    try:
        raw = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise ConfigError(file, [("", f"{error.strerror}; give the cluster's YAML")]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(file, [("", f"not valid YAML: {error}")]) from None
    if isinstance(raw, dict) and raw.get("kind") in ("RayJob", "RayCluster"):
        raise ConfigError(
            file, [("kind", "Kubernetes runs this one: `kubectl create -f`; see cluster/README.md")]
        )
    if not isinstance(raw, dict) or not raw.get("cluster_name"):
        raise ConfigError(file, [("cluster_name", "missing: is this a cluster's YAML?")])
    found = raw.get("provider")
    provider: dict[str, Any] = found if isinstance(found, dict) else {}
    kind = provider.get("type")
    if kind not in ("aws", "local"):
        raise ConfigError(file, [("provider.type", f"there is aws and local, got {kind!r}")])
    needed = ("region",) if kind == "aws" else ("head_ip", "worker_ips")
    missing = [(f"provider.{key}", "missing") for key in needed if not provider.get(key)]
    if missing:
        raise ConfigError(file, missing)
    return Cluster(file, raw)


def auth_token() -> str:
    """The token that this machine has, found where Ray's own clients look; ConfigError without."""
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    if not token:
        with contextlib.suppress(OSError):
            token = Path(path).expanduser().read_text().strip()
    if not token:
        raise ConfigError(
            path,
            [
                (
                    "",
                    "no token, and a cluster without one is open to anybody who reaches it; make "
                    "one before `ray up`: `ray get-auth-token --generate >/dev/null && chmod 600 "
                    f"{path}`; for a cluster that runs already, copy the one it was started with",
                )
            ],
        )
    return token


# --- where the machines are


def ec2(cluster: Cluster) -> Any:
    """EC2's client for the cluster's region (AWS_ENDPOINT_URL is honoured, credentials are found
    the usual way)."""
    try:
        import boto3
    except ImportError:
        text = "AWS needs boto3, as `ray up` itself does: `pip install 'bgray[aws]'`"
        raise ConfigError(cluster.file, [("provider", text)]) from None
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": 8}
    config = Config(retries=retries, connect_timeout=10, read_timeout=30)
    return boto3.client("ec2", region_name=cluster.provider["region"], config=config)


def instances(cluster: Cluster, states: tuple[str, ...] = LIVE) -> list[dict[str, Any]]:
    """What EC2 lists of this cluster, each with `Type` and `Kind` (head, worker) from Ray's tags.
    Unreachable when EC2 does not answer, ConfigError when it refuses."""
    from botocore.exceptions import BotoCoreError, ClientError

    filters = [
        {"Name": "tag:ray-cluster-name", "Values": [cluster.name]},
        {"Name": "instance-state-name", "Values": list(states)},
    ]
    try:
        pages = ec2(cluster).get_paginator("describe_instances").paginate(Filters=filters)
        found = [i for page in pages for r in page["Reservations"] for i in r["Instances"]]
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
            raise Unreachable(f"EC2 in {cluster.provider['region']}: {error}") from None
        text = f"EC2 refuses to list instances ({code}): {error}"
        raise ConfigError(cluster.file, [("provider", text)]) from None
    except BotoCoreError as error:
        if "redentials" in type(error).__name__:
            text = f"{error}; log in to AWS first (AWS_PROFILE, aws sso login)"
            raise ConfigError(cluster.file, [("provider", text)]) from None
        raise Unreachable(f"EC2 in {cluster.provider['region']}: {error}") from None
    for instance in found:
        tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
        instance["Kind"] = tags.get("ray-node-type", "")
        instance["Type"] = tags.get("ray-user-node-type", "?")
    return found


def head(cluster: Cluster) -> Host | None:
    """The head as this machine reaches it; None when EC2 has none that runs."""
    if cluster.on_aws:
        found = [i for i in instances(cluster, ("running",)) if i["Kind"] == "head"]
        if not found:
            return None
        newest = max(found, key=lambda instance: instance["LaunchTime"])
        return instance_host(cluster, newest, is_head=True)
    provider = cluster.provider
    return own_host(cluster, provider.get("external_head_ip") or provider["head_ip"])


def own_host(cluster: Cluster, address: str) -> Host:
    """One of the machines that a file of `provider: {type: local}` names."""
    key = str(cluster.auth.get("ssh_private_key") or "")
    return Host(
        str(address),
        str(cluster.auth.get("ssh_user") or ""),
        os.path.expanduser(key),
        str(cluster.auth.get("ssh_proxy_command") or ""),
    )


def instance_host(cluster: Cluster, instance: dict[str, Any], is_head: bool = False) -> Host | None:
    """An instance of EC2; None while it has no address."""
    provider = cluster.provider
    internal = provider.get("use_internal_ips", False)
    if is_head and provider.get("use_external_head_ip", False):
        internal = False
    address = instance.get("PrivateIpAddress" if internal else "PublicIpAddress")
    if cluster.auth.get("ssh_proxy_use_node_id"):
        address = instance["InstanceId"]
    # Ray's bootstrap makes a key pair and keeps its private part under the pair's name.
    key = cluster.auth.get("ssh_private_key") or f"~/.ssh/{instance.get('KeyName')}.pem"
    host = own_host(cluster, address or "")
    return Host(host.address, host.user, os.path.expanduser(key), host.proxy) if address else None


def head_or_refuse(cluster: Cluster) -> Host:
    """The head; ConfigError that says how to start one."""
    found = head(cluster)
    if found is None:
        region = cluster.provider["region"]
        text = f"no head of '{cluster.name}' runs in {region}; `ray up {cluster.file}` starts one"
        raise ConfigError(cluster.file, [("", text)])
    return found


# --- the tunnel


class Tunnel:
    """A port of this machine that leads to the head's dashboard, for as long as ssh holds."""

    def __init__(self, host: Host, remote_port: int = DASHBOARD_PORT, seconds: float = 30):
        """Unreachable when ssh does not get in within `seconds`."""
        self.host = host
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        forward = f"127.0.0.1:{self.port}:127.0.0.1:{remote_port}"
        self._errors = tempfile.TemporaryFile("w+")
        # `cat` ends when its input does, so that no tunnel outlives us, even after kill -9; an own
        # session, so that Ctrl-C is not ssh's.
        self._process = subprocess.Popen(
            [*host.ssh("-L", forward), "cat >/dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )
        deadline = time.monotonic() + seconds
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = self._said()
                self.close()
                raise Unreachable(text)
            time.sleep(0.1)

    def _listens(self) -> bool:
        if self._process.poll() is not None:
            return False
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def _said(self) -> str:
        self._errors.seek(0)
        return _ssh_says(self.host.address, self._errors.read())

    @property
    def open(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
