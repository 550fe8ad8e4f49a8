"""What several test files share: a tiny experiment, shards of generated sound, an S3 bucket."""

import fcntl
import os
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile

# Before anything imports Ray: tests must not depend on, or write to, the user's ~/.ray.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Where Python is told to write no bytecode, as in many containers, each process that a test starts
# would compile torch and Ray for itself: 12 s of imports instead of 5.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch: each core has its tests already.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers():
    """Of -n auto: a core each, but each process holds torch and some start a Ray of their own."""
    return min(4, len(os.sched_getaffinity(0)))


TINY = {
    "task": {"name": "unshift"},
    "data": {"sample_rate": 8000, "segment": 512, "batches_per_unit": 4},
    "model": {
        "name": "wav_unet",
        "channels": [4, 8, 16],
        "blocks": [1, 1],
        "factors": [2, 4],
        "scale_vs_channels": [1, 2],
        "bottleneck_blocks": 1,
        "patching": 1,
        "kernels": [7],
    },
    "loss": {"l1": 1.0},
    "train": {"steps": 24, "batch_size": 4},
    "validation": {"every": 8, "segment": 4096, "items": 4, "clips": 1},
    "runtime": {"log_every": 2, "checkpoint_every": 4, "device": "cpu", "threads": 1},
}


def write_songs(folder, *, num=6, seconds=6.0, sample_rate=8000):
    """WAV files of two tones and a little noise each, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    for i in range(num):
        rng = np.random.default_rng(i)
        audio = 0.3 * np.sin(2 * np.pi * (150 + 40 * i) * time)
        audio += 0.1 * np.sin(2 * np.pi * (310 + 55 * i) * time) + 0.02 * rng.standard_normal(
            len(time)
        )
        soundfile.write(folder / f"song{i}.wav", audio.astype(np.float32), sample_rate)
    return folder


LOCKS = Path(tempfile.gettempdir(), f"bgray-tests-{os.getuid()}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests marked `alone` wait until no other is at it, and no other begins meanwhile; of all runs
    of these tests by this user."""
    how = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    LOCKS.mkdir(exist_ok=True)
    # Unlike flock, lockf is nothing that a process forked here would hold on to.
    with open(LOCKS / "room", "a+") as room:
        with open(LOCKS / "door", "a+") as door:
            # Who waits to have the room to himself stands in the door: nobody passes him.
            fcntl.lockf(door, fcntl.LOCK_EX)
            fcntl.lockf(room, how)
        return (yield)


@pytest.fixture(scope="session")
def shards_url(tmp_path_factory):
    """Prepared shards with an octave-shift column, made once in this process."""
    from bgray.shards import Options, prepare

    root = tmp_path_factory.mktemp("prepared")
    options = Options(sample_rate=8000, shifts=(12.0,), validation=0.34)
    prepare(str(write_songs(root / "songs")), str(root / "shards"), options, workers=0)
    return str(root / "shards")


@pytest.fixture
def tiny(shards_url, tmp_path):
    """Raw config of an experiment that trains in a second on the CPU."""
    import copy

    raw = copy.deepcopy(TINY)
    raw["name"] = "tiny"
    raw["data"]["path"] = shards_url
    raw["runtime"]["results"] = str(tmp_path / "results")
    raw["runtime"]["cache"] = str(tmp_path / "data")
    return raw


@pytest.fixture
def s3(monkeypatch):
    """An S3 bucket `s3://bgray-test` answered by moto on this machine."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for key, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    # moto keeps its buckets for the life of the process, whichever server answers for them.
    urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"").close()
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bgray-test")
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://bgray-test"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def one_thread():
    """Tiny operations gain nothing from threads and lose much on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_stray_feed_threads():
    yield
    stray = [t for t in threading.enumerate() if t.name == "bgray-feed" and t.is_alive()]
    assert not stray, "a test left a feed thread running"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    from browser import chromium

    with chromium() as found:
        yield found


@pytest.fixture
def proxy(s3, monkeypatch):
    """The bucket `s3`, through a proxy; with short pauses between tries."""
    import s3fs
    from cluster.s3_proxy import Proxy

    from bgray import retries

    monkeypatch.setattr(retries, "PAUSE_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(retries, "_given_up", {})
    with Proxy(os.environ["AWS_ENDPOINT_URL"]) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        s3fs.S3FileSystem.clear_instance_cache()
        retries.incidents()
        yield made
    retries.incidents()
