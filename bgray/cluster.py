"""Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names, with settings that were
measured."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

GIB = 1024**3

ENVIRONMENT = {
    # Or every worker starts through `uv run`, which takes minutes.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # How often Train looks for reports; the default of 2 s delays every one of them.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # One actor fewer per trial.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # A driver without GPUs of its own must not lose sight of the machine's.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # One thread per Data task; training workers set their own number of torch threads.
    "OMP_NUM_THREADS": "1",
}


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
    else:
        options["include_dashboard"] = dashboard
        options["object_store_memory"] = _object_store_bytes()
        if dashboard:
            # With several Rays on a host that actor cannot tell which one is its own; so name it.
            port = os.environ.setdefault("RAY_GCS_SERVER_PORT", str(_free_port()))
            ip = ray.util.get_node_ip_address()
            options["runtime_env"] = {"env_vars": {"RAY_ADDRESS": f"{ip}:{port}"}}
    ray.init(**options)
    # Ray Data prints a plan, a progress bar and warnings per execution; a run starts many.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


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
