"""Sweeps as Ray jobs: started through the tunnel, followed for as long as one looks, stopped."""

import contextlib
import functools
import http.client
import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bgray import remote
from bgray.problems import ConfigError
from bgray.provenance import commit_for_the_machines
from bgray.remote import Cluster, Tunnel, Unreachable
from bgray.shipment import Spec, package_digest

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION")
"""Of this machine's environment, where set; never credentials: the machines have their own."""
GONE_SECONDS = 60.0  # EC2 must deny for this long that there is a head before it is believed

Say = Callable[[str], None]


# --- the head's HTTP interface


class Head:
    """The jobs interface of Ray's dashboard, by a tunnel that is opened anew when it dropped."""

    def __init__(self, file: str, open_tunnel: Callable[[], Any], token: str):
        self._file, self._open, self._token = file, open_tunnel, token
        self._tunnel: Any = None
        self.openings = 0

    def drop(self) -> None:
        if self._tunnel is not None:
            self._tunnel.close()
        self._tunnel = None

    def call(self, method: str, path: str, data: bytes | None = None, seconds: float = 30) -> Any:
        """The answer's JSON (or text); None for 404. Unreachable when it should be tried again,
        ConfigError when that would not help."""
        if self._tunnel is None or not self._tunnel.open:
            self.drop()
            self._tunnel = self._open()
            self.openings += 1
        connection = http.client.HTTPConnection("127.0.0.1", self._tunnel.port, timeout=seconds)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, body=data, headers=headers)
            answer = connection.getresponse()
            status, body = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            what = str(error) or type(error).__name__
            raise Unreachable(f"the dashboard does not answer ({what})") from None
        finally:
            connection.close()
        text = body.decode("utf-8", "replace")
        if status in (401, 403):
            raise ConfigError(self._file, [("", WRONG_TOKEN)])
        if status == 404:
            return None
        if status >= 500:
            raise Unreachable(_last_line(text) or f"the dashboard says {status}")
        if status >= 400:
            raise ConfigError(self._file, [("", f"Ray refuses: {_last_line(text)}")])
        with contextlib.suppress(ValueError):
            return json.loads(text)
        return text

    def jobs(self) -> list[dict[str, Any]]:
        """Jobs that `submit` started, the newest first."""
        found = self.call("GET", "/api/jobs/") or []
        ours = [job for job in found if (job.get("metadata") or {}).get("bgray_sweep")]
        return sorted(ours, key=lambda job: job.get("start_time") or 0, reverse=True)


WRONG_TOKEN = (
    "the cluster does not take this machine's token: it was started with another one. Copy that "
    "one here (~/.ray/auth_token on the machine that ran `ray up`, or on the head), or start the "
    "cluster again with this one"
)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


@contextlib.contextmanager
def connected(cluster: Cluster, say: Say) -> Iterator[Head]:
    """The cluster's head, the tunnel open; ConfigError or Unreachable where that cannot be."""
    token = remote.auth_token()
    remote.head_or_refuse(cluster)
    said = False

    def open_tunnel() -> Tunnel:
        nonlocal said
        host = remote.head(cluster)  # asked again each time: a new head has a new address
        if host is None:
            raise Gone(f"no head of '{cluster.name}' runs")
        tunnel = Tunnel(host)
        if not said:
            say(f"tunnel to {host.address} open")
        said = True
        return tunnel

    head = Head(cluster.file, open_tunnel, token)
    try:
        yield head
    finally:
        head.drop()


def warn_of_other_code(cluster: Cluster, say: Say) -> dict[str, str]:
    """A job runs the bgray of the cluster's machines, which is that of the last `ray up`. Where it
    is this folder's, the environment by which its runs know their commit."""
    with contextlib.suppress(Unreachable):
        host = remote.head_or_refuse(cluster)
        there = host.run(f"{remote.PYTHON} -m bgray.cluster code").stdout.strip()
        if there and there != package_digest():
            say(
                f"the cluster's bgray is not this folder's; `ray up {cluster.file}` brings it "
                "there (stop what runs first)"
            )
        elif there:
            return commit_for_the_machines()
    return {}


class Gone(Unreachable):
    """EC2 says that there is no head."""


# --- submit


def running(head: Head) -> list[dict[str, Any]]:
    """Sweeps' jobs that have not ended."""
    return [job for job in head.jobs() if job["status"] not in ENDED]


def find(head: Head, name: str) -> dict[str, Any] | None:
    """The job of this sweep that has not ended."""
    found = (job for job in running(head) if job["metadata"]["bgray_sweep"] == name)
    return next(found, None)


def submit(head: Head, spec: Spec, say: Say, environment: Mapping[str, str] | None = None) -> str:
    """The id of the sweep's job: of the one that runs already, or of a new one. ConfigError where
    one runs with other settings."""
    number = 1
    while True:
        there = patiently(head, lambda: find(head, spec.name), say)
        if there is not None:
            if there["metadata"].get("bgray_digest") != spec.digest:
                text = f"runs already as job {there['submission_id']} with other settings: "
                text += f"{there['entrypoint'].removeprefix('exec ')}; stop that one first"
                raise ConfigError(spec.file, [(spec.name, text)])
            say(f"job {there['submission_id']} runs already")
            return str(there["submission_id"])
        # An id is taken once and for all, so that two submits at a time cannot start two jobs.
        taken = {job["submission_id"] for job in patiently(head, head.jobs, say)}
        while f"{_slug(spec.name)}-{number}" in taken:
            number += 1
        job = f"{_slug(spec.name)}-{number}"
        if patiently(head, functools.partial(_start, head, spec, job, environment or {}), say):
            say(f"job {job} started")
            return job
        number += 1


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def _start(head: Head, spec: Spec, job: str, more: Mapping[str, str]) -> bool:
    """False when there is a job of that id; safe to repeat, for the second one finds it."""
    name, data = spec.package()
    if head.call("GET", f"/api/packages/gcs/{name}") is None:
        head.call("PUT", f"/api/packages/gcs/{name}", data)
    environment = {key: os.environ[key] for key in PASSED_ON if os.environ.get(key)} | dict(more)
    request = {
        "entrypoint": spec.entrypoint,
        "submission_id": job,
        "entrypoint_num_cpus": 0,
        "runtime_env": {"working_dir": f"gcs://{name}", "env_vars": environment},
        "metadata": {"bgray_sweep": spec.name, "bgray_digest": spec.digest},
    }
    try:
        head.call("POST", "/api/jobs/", json.dumps(request).encode(), seconds=90)
    except (ConfigError, Unreachable):
        # Whatever was said: what counts is whether it is there, and whether it is ours.
        there = head.call("GET", f"/api/jobs/{job}")
        if there is None:
            raise
        return (there.get("metadata") or {}).get("bgray_digest") == spec.digest
    return True


# --- follow


def patiently(head: Head, ask: Callable[[], Any], say: Say, seconds: float = 120) -> Any:
    """`ask()`, tried again while the head does not answer; the last Unreachable after `seconds`."""
    deadline, pause, told = time.monotonic() + seconds, 1.0, False
    while True:
        try:
            return ask()
        except Unreachable as error:
            if time.monotonic() + pause > deadline:
                raise
            if not told:
                say(f"{error}; trying again")
            told = True
            head.drop()
        time.sleep(pause)
        pause = min(2 * pause, 15)


def follow(head: Head, job_id: str, write: Callable[[str], None], say: Say) -> int:
    """Print what the job prints until it ends. Returns its outcome: 0 done, 130 stopped, else its
    own exit code or 1. Waits for a head that does not answer, as long as EC2 has one."""
    path = f"/api/jobs/{urllib.parse.quote(job_id)}"
    seen, pause, opened = 0, 1.0, max(1, head.openings)
    lost: float | None = None
    denied: float | None = None
    waiting_since, waiting_told = time.monotonic(), False
    while True:
        try:
            # The state first: what is read after it says that it ended is all there is.
            job = head.call("GET", path)
            if job is None:
                say("this head does not know the job: it was started anew. `submit` again goes on")
                return 1
            text = (head.call("GET", f"{path}/logs") or {}).get("logs") or ""
        except Unreachable as error:
            if lost is None:
                say(f"{error}; the job goes on, trying to come back to it (Ctrl-C leaves)")
                lost, pause = time.monotonic(), 1.0
            denied = (denied or time.monotonic()) if isinstance(error, Gone) else None
            if denied is not None and time.monotonic() - denied > GONE_SECONDS:
                say(f"{error} any more; `ray up` and `submit` again go on with what is unfinished")
                return 1
            head.drop()
            time.sleep(pause)
            pause = min(2 * pause, 20)
            continue
        if lost is not None:
            say(f"back after {time.monotonic() - lost:.0f} s")
            lost, denied = None, None
        elif head.openings > opened:
            say("the tunnel had dropped; it is open again")
        opened = head.openings
        ended = job["status"] in ENDED
        new = text[seen:] if ended else text[seen : text.rfind("\n") + 1]
        if new:
            write(new)
            seen += len(new)
        if ended:
            return _outcome(job, say)
        if (
            job["status"] == "PENDING"
            and not waiting_told
            and time.monotonic() > waiting_since + 15
        ):
            say(f"waiting: {_last_line(job.get('message') or 'not started yet')}")
            waiting_told = True
        # The whole log comes each time, so a long one is asked for less often.
        pause = 0.5 if new else min(pause * 1.5, 3.0)
        time.sleep(pause + min(len(text) / 2e6, 10))


def _outcome(job: dict[str, Any], say: Say) -> int:
    name, status, code = job["submission_id"], job["status"], job.get("driver_exit_code")
    start, end = job.get("start_time"), job.get("end_time")
    took = f" after {(end - start) / 1000:.0f} s" if start and end else ""
    if status == "SUCCEEDED":
        say(f"job {name} is done{took}")
        return 0
    if status == "STOPPED" or code == 130:
        say(f"job {name} was stopped{took}; `submit` again goes on from what is written")
        return 130
    message = (job.get("message") or "").split(", last available logs")[0].splitlines()
    say(f"job {name} failed{took}" + (f": {message[0]}" if message else ""))
    return code if code in (1, 2) else 1


def stop(head: Head, name: str, say: Say) -> bool:
    """Ask the sweep's job to checkpoint and end, and wait until it has; False when none runs."""
    job = patiently(head, lambda: find(head, name), say)
    if job is None:
        return False
    path = f"/api/jobs/{urllib.parse.quote(job['submission_id'])}"
    patiently(head, lambda: head.call("POST", f"{path}/stop"), say)
    say(f"job {job['submission_id']}: asked to save its trials and end")
    start = told = time.monotonic()
    while True:
        now = patiently(head, lambda: head.call("GET", path), say)
        if now is None or now["status"] in ENDED:
            state = "gone" if now is None else now["status"].lower()
            say(f"job {job['submission_id']} is {state} after {time.monotonic() - start:.0f} s")
            return True
        if time.monotonic() - told > 20:
            told = time.monotonic()
            say(f"still saving ({told - start:.0f} s)")
        time.sleep(1)
