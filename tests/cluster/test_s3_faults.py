"""Training with its data and its results on an S3 that misbehaves for a while."""

import contextlib
import copy
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml

from bgray import retries, shards, storage
from bgray.context import Context
from bgray.experiment import prepare_data, resolve, run_url
from bgray.records import METRICS, Run, read_info, read_lines
from bgray.trial import run_trial
from cluster.s3_proxy import Fault, Proxy

pytestmark = pytest.mark.slow

# As `python -m bgray.train`, with bounds that a test can wait for.
TRAIN = """
import sys
from bgray import retries, storage
retries.RETRY_SECONDS, retries.PAUSE_SECONDS = float(sys.argv[1]), (0.2, 1.0)
retries.SLOW_SECONDS, storage.READ_SECONDS = 1.0, 3
from bgray.train import main
main([sys.argv[2], "--local"])
"""
STEPS, AT = 48, "checkpoint/step-00000012.pt"


def at_checkpoint(method, path):
    return method == "PUT" and AT in path


def of_shards(method, path):
    return method == "GET" and ".parquet" in path


@pytest.fixture
def raw(tiny):
    tiny = copy.deepcopy(tiny)
    tiny["train"]["steps"] = STEPS
    return tiny


@pytest.fixture
def undisturbed(raw, tmp_path):
    """metrics.jsonl of the same training on this machine's disk."""
    experiment = resolve(raw, "test")
    run_trial(experiment, prepare_data(experiment), Context())
    return storage.read_bytes(storage.join(run_url(experiment), METRICS))


class Bucket:
    """The experiment with everything on S3 behind the proxy, and a look past it."""

    def __init__(self, raw, s3, proxy, client, file):
        raw["data"]["path"] = f"{s3}/shards"
        raw["runtime"]["results"] = f"{s3}/results"
        experiment = resolve(raw, "test")
        file.write_text(yaml.safe_dump(experiment.resolved()))
        self.proxy, self.file = proxy, file
        self.url = run_url(experiment)
        self._client, self._key = client, self.url.removeprefix(f"{s3}/")

    def train(self, retry_seconds=60.0):
        """Runs the command; (exit code, everything it printed)."""
        command = [sys.executable, "-c", TRAIN, str(retry_seconds), str(self.file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    def read(self, name):
        """A file of the run, from the server itself."""
        answer = self._client.get_object(Bucket="bgray-test", Key=f"{self._key}/{name}")
        return answer["Body"].read()

    @contextlib.contextmanager
    def watched(self):
        """Looks at the checkpoint all the time; yields the pointers it saw and what was wrong."""
        seen, wrong, done = [], [], threading.Event()

        def look():
            while not done.wait(0.03):
                with contextlib.suppress(self._client.exceptions.NoSuchKey):
                    pointer = self.read("checkpoint/latest").decode()
                    problem = self._problem(pointer)
                    # The next state may have replaced this one between the two requests.
                    if problem and self.read("checkpoint/latest").decode() == pointer:
                        wrong.append(f"{pointer}: {problem}")
                    seen.extend([pointer] * (pointer not in seen))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield seen, wrong
        finally:
            done.set()
            thread.join()

    def _problem(self, pointer):
        name, num_bytes, sha256 = pointer.split()
        try:
            data = self.read(f"checkpoint/{name}")
        except self._client.exceptions.NoSuchKey:
            return "missing"
        if (len(data), hashlib.sha256(data).hexdigest()) != (int(num_bytes), sha256):
            return f"{len(data)} other bytes"
        state = torch.load(io.BytesIO(data), weights_only=True)
        return "" if f"step-{state['step']:08d}.pt" == name else "another step"


@pytest.fixture
def bucket(raw, undisturbed, s3, shards_url, tmp_path, monkeypatch):
    import boto3
    import s3fs

    for name in storage.listdir(shards_url):
        storage.write_bytes(f"{s3}/shards/{name}", storage.read_bytes(f"{shards_url}/{name}"))
    server = os.environ["AWS_ENDPOINT_URL"]
    with Proxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3", endpoint_url=server)
        yield Bucket(raw, s3, proxy, client, tmp_path / "tiny.yaml")


FAULTS = {
    "503 for four seconds": ("503", {"seconds": 4.0}, "503 SlowDown"),
    "nobody listens for four seconds": ("refused", {"seconds": 4.0}, "no connection"),
    "connections end without an answer": ("closed", {"seconds": 3.0}, "connection closed"),
    "every answer takes two seconds": ("slow", {"seconds": 6.0, "delay": 2.0}, "slow"),
    "no answer in time": ("slow", {"times": 3, "delay": 8.0}, "no answer in time"),
    "shards cut short": ("cut", {"times": 5, "hits": of_shards}, "cut short"),
    "shards short, and it does not show": ("short", {"times": 5, "hits": of_shards}, "bytes came"),
    "every body cut short": ("cut", {"times": 12}, "cut short"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_training_goes_on_as_if_nothing_had_been(bucket, undisturbed, name):
    kind, options, words = FAULTS[name]
    bucket.proxy.fault = Fault(kind, begins=at_checkpoint, **options)
    with bucket.watched() as (seen, wrong):
        code, printed = bucket.train()
    assert code == 0, printed
    assert bucket.proxy.fault.suffered
    assert wrong == []
    assert len(seen) > 3
    assert seen[-1].startswith(f"step-{STEPS:08d}.pt ")
    assert bucket.read(METRICS) == undisturbed
    info = json.loads(bucket.read("run.json"))
    assert (info["state"], len(info["attempts"])) == ("finished", 1)
    told = [line for line in printed.splitlines() if "answered after" in line]
    assert any("s3://bgray-test/" in line and words in line for line in told), printed


def test_s3_away_for_too_long_ends_in_one_line_and_the_same_command_goes_on(bucket, undisturbed):
    bucket.proxy.fault = Fault("503", begins=at_checkpoint)
    began = time.monotonic()
    with bucket.watched() as (seen, wrong):
        code, printed = bucket.train(retry_seconds=2.0)
    assert code == 2, printed
    assert time.monotonic() - began < 60
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "503" in line
    assert "tried for" in line
    assert "s3://bgray-test/" in line
    assert "run the same command again: it continues" in line
    assert "Traceback" not in printed
    assert wrong == []
    assert seen[-1].startswith("step-00000008.pt ")

    # Going on reads what is there, and each first read comes short.
    met = set()

    def first_of_each(method, path):
        mine = method == "GET" and ("/checkpoint/" in path or ".jsonl" in path) and path not in met
        return mine and not met.add(path)

    bucket.proxy.fault = Fault("short", hits=first_of_each)
    with bucket.watched() as (_, wrong):
        code, printed = bucket.train()
    assert code == 0, printed
    assert wrong == []
    assert any("checkpoint/step-00000008.pt" in path for path in met)
    assert any(METRICS in path for path in met)
    assert bucket.read(METRICS) == undisturbed
    info = json.loads(bucket.read("run.json"))
    assert [attempt["from_step"] for attempt in info["attempts"]] == [0, 8]
    assert info["state"] == "finished"


def test_lines_that_could_not_be_written_are_written_by_the_next_flush(bucket, raw, monkeypatch):
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.3)
    monkeypatch.setattr(retries, "PAUSE_SECONDS", (0.1, 0.1))
    monkeypatch.setattr(retries, "_given_up", {})
    experiment = resolve(raw, "test")
    run = Run(run_url(experiment), experiment, "0" * 64)
    run.begin(0)
    run.append(METRICS, {"step": 1})
    bucket.proxy.fault = Fault("503", hits=lambda method, path: method == "PUT")
    with pytest.raises(retries.NoAnswer):
        run.flush()
    with pytest.raises(retries.NoAnswer):
        run.update(step=1)
    bucket.proxy.fault = None
    assert read_lines(storage.join(run.url, METRICS)) == []
    run.append(METRICS, {"step": 2})
    run.flush()
    assert read_lines(storage.join(run.url, METRICS)) == [{"step": 1}, {"step": 2}]
    run.update(reason=None)
    assert read_info(run.url)["step"] == 1


def test_a_row_group_is_read_whole_or_not_at_all(bucket, shards_url, monkeypatch):
    monkeypatch.setattr(retries, "PAUSE_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(retries, "_given_up", {})
    monkeypatch.setattr(retries, "RETRY_SECONDS", 5.0)
    name = shards.read_manifest(shards_url).shards[0].name
    whole = shards.read_row_group(shards_url, name, 0)
    for kind in ("503", "closed", "cut", "short"):
        bucket.proxy.fault = Fault(kind, hits=of_shards, times=3)
        assert shards.read_row_group("s3://bgray-test/shards", name, 0) == whole
        assert len(bucket.proxy.fault.suffered) == 3
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.2)
    bucket.proxy.fault = Fault("short", hits=of_shards)
    with pytest.raises(retries.NoAnswer, match="bytes came"):
        shards.read_row_group("s3://bgray-test/shards", name, 0)
