"""Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names, with settings that were
measured."""

import contextlib
import json
import logging
import os
import re
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bgray import storage
from bgray.config import ConfigError
from bgray.problems import first_line

GIB = 1024**3

ENVIRONMENT = {
    # Or every worker starts through `uv run`, which takes minutes.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # How often Train looks for reports; the default of 2 s delays every one of them.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # For a trial that was stopped to end, before its process is given up: 2 s are not enough where
    # a work unit is being made, or S3 answers late.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "10",
    # One actor fewer per trial.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Ray Data would ask the autoscaler for twice the CPUs that it uses, wherever they are: GPU
    # machines too. What waits for the marked machines is enough of a demand.
    **{
        f"RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_{what}_UTIL_THRESHOLD": "2"
        for what in ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY")
    },
    # A driver without GPUs of its own must not lose sight of the machine's.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # One thread per Data task; training workers set their own number of torch threads.
    "OMP_NUM_THREADS": "1",
}
VITAL = ("raylet", "gcs_server")
"""Processes that Ray cannot be without."""
PATIENT = {"AWS_METADATA_SERVICE_TIMEOUT": "5", "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "10"}
"""On a cluster credentials come from the machine's metadata service; the default is one question
of one second, which many workers that start at once do not all get answered."""


@contextlib.contextmanager
def ray_session(*, dashboard: bool = False) -> Iterator[Any]:
    """`with ray_session() as ray:` an initialised Ray, shut down at the end if it was started here.

    dashboard: needed where Tune runs Train inside: Train's placement groups outlive a stopped
    trial, and the actor
    that frees them asks the dashboard's State API; without it the second trial waits for ever.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        options["address"] = address
        # A cluster's workers start with their machine's environment, not with this one.
        options["runtime_env"] = {"env_vars": {**ENVIRONMENT, **PATIENT}}
        for key, value in PATIENT.items():
            os.environ.setdefault(key, value)
    else:
        # Without "local" Ray joins whatever `ray start` has left on this machine.
        options["address"] = "local"
        options["include_dashboard"] = dashboard
        options["object_store_memory"] = _object_store_bytes()
        if dashboard:
            # With several Rays on a host that actor cannot tell which one is its own; so name it.
            port = os.environ.setdefault("RAY_GCS_SERVER_PORT", str(_free_port()))
            ip = ray.util.get_node_ip_address()
            options["runtime_env"] = {"env_vars": {"RAY_ADDRESS": f"{ip}:{port}"}}
    try:
        with contextlib.nullcontext() if address else _ending_with_ray():
            _init(ray, options)
            yield ray
    finally:
        ray.shutdown()


def _init(ray: Any, options: dict[str, Any]) -> None:
    from ray._private import worker

    worker.print_to_stdstream = _print_in_short
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise ConfigError(
            "RAY_ADDRESS",
            [("", f"no Ray answers at {options['address']} ({first_line(error)}). Is it "
                  "up? One that asks for a token says no more than this: RAY_AUTH_MODE=token and "
                  "its ~/.ray/auth_token must be here too")],
        ) from None  # fmt: skip
    # Ray Data prints a plan, a progress bar and warnings per execution; a run starts many.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _print_in_short(data: dict[str, Any], ignore_prefix: bool) -> None:
    """What Ray says of a process that died, without half a page of guesses and pages of its log:
    those are in /tmp/ray."""
    for text in data["lines"]:
        first = re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]
        print(f"({data['pid']}) {first[:200]}", flush=True)


# --- its dashboard


@contextlib.contextmanager
def dashboard_told(folder: str, say: Callable[[str], None]) -> Iterator[None]:
    """Where Ray's own dashboard is, if one runs: said, and left within, as `left_beside` has it."""
    from ray._private import worker

    address = worker.get_dashboard_url()
    url = f"http://{address}" if address else None
    if url:
        say(f"Ray's own dashboard: {url}{_way_in()}")
    with left_beside(folder, url, say):
        yield


@contextlib.contextmanager
def left_beside(folder: str, url: str | None, say: Callable[[str], None]) -> Iterator[None]:
    """Within, `<folder>/.ray/session.json` has {"ray_dashboard": url or null, "driver": host and
    process}; where it cannot be written, that is said."""
    place = storage.join(folder, ".ray", "session.json")
    driver = f"{socket.gethostname()} {os.getpid()}"
    text = json.dumps({"ray_dashboard": url, "driver": driver})
    try:
        storage.write_bytes(place, text.encode())
    except OSError as error:  # a link is not worth a sweep
        say(f"{place} cannot be written ({error}): the dashboard will have no link to Ray's own")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if storage.read_bytes(place) == text.encode():  # or another driver has taken over
                storage.remove(place)


def _way_in() -> str:
    """Ray turns its token on by itself where RAY_AUTH_MODE is not set: the page loads without it,
    and shows nothing."""
    token = os.environ.get("RAY_AUTH_MODE") == "token"
    text = "; it asks for the token that `uv run ray get-auth-token` prints" if token else ""
    if "RAY_ADDRESS" in os.environ:
        text += "; from your own machine: `uv run ray dashboard cluster/gpu.yaml`"
    return text


# --- its death


@contextlib.contextmanager
def _ending_with_ray() -> Iterator[None]:
    """Within, this process ends in one line once the Ray that it has started has died.

    Ray would end it too, but up to a minute later and with pages of its own; and what is left of it
    cannot be shut down in an orderly way.
    """
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), name="bgray-watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()


def _watch(ended: threading.Event) -> None:
    found: dict[str, int] = {}  # where there is no /proc none is found
    handles: list[int] = []
    while not ended.is_set():
        for pid in _children() if len(found) < len(VITAL) else ():
            if (name := _read(f"/proc/{pid}/comm").strip()) in VITAL and name not in found:
                found[name] = int(pid)
                with contextlib.suppress(OSError):
                    handles.append(os.pidfd_open(int(pid)))
        for name, pid in found.items():
            state = _read(f"/proc/{pid}/stat").rpartition(")")[2].strip()[:1]
            if state in ("", "Z", "X") and not ended.is_set():
                _die(f"Ray's {name} (process {pid}) has died: killed, or out of memory?")
        # Told at once: soon after, another of Ray's processes sends pages to be printed.
        select.select(handles, [], [], 0.05 if len(handles) < len(VITAL) else 1.0)
    for handle in handles:
        os.close(handle)


def _children() -> list[str]:
    """Numbers of the processes that this one has started and that are there."""
    return [
        pid for task in Path("/proc/self/task").glob("*/children") for pid in _read(task).split()
    ]


def _read(path: str | Path) -> str:
    """Its text; nothing where it is not there any more."""
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _die(why: str) -> None:
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    text = f"{show_cursor}error: {why} The same command goes on from what is written\n"
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        os.write(2, text.encode())
    os._exit(2)


def _object_store_bytes() -> int:
    """2 GiB, or what shared memory has room for: a few work units per trial (each about 35 MiB)
    are in flight."""
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    free = shm.f_bavail * shm.f_frsize if shm else GIB
    return int(max(128 * 1024**2, min(2 * GIB, 0.6 * free)))


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]
