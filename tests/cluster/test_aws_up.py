"""`ray up cluster/gpu.yaml` for real: Ray's own AWS provider, moto for AWS, namespaces as machines.

Spot machines that do not come, that are taken away with and without a notice, and a lost head.
"""

import json
import re
import time
from pathlib import Path

import pytest
import yaml

from bgray.records import NOTICE

from .fakecloud import FakeCloud
from .moto_aws import Moto

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

FILE, BUCKET, PATIENCE = "cluster/gpu.yaml", "bgray-lab", 20


class Cluster:
    """What a test does from the laptop, and what it reads from the bucket."""

    def __init__(self, lab, moto, laptop, cloud, tiny):
        self.lab, self.moto, self.laptop, self.cloud, self.tiny = lab, moto, laptop, cloud, tiny
        with lab.network():
            self.s3 = moto.client("s3")
            self.s3.create_bucket(
                Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "us-west-2"}
            )
            for path in Path(tiny["data"]["path"]).rglob("*"):
                if path.is_file():
                    key = f"shards/{path.relative_to(tiny['data']['path'])}"
                    self.s3.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
        path = laptop.root / "project" / FILE
        text = path.read_text().replace("ami-0123456789abcdef0", "ami-12c6146b")
        # Machines of this test's size: all of them share two cores.
        text = re.sub(r"CPU: (16|8|96)\b", "CPU: 2", text)
        text = text.replace(
            "--object-spilling", "--object-store-memory=150000000 --object-spilling"
        )
        path.write_text(text)

    def bgray(self, command, **options):
        options = {"timeout": 240, **options}
        return self.laptop.run(f"cd project && python -m bgray.cluster {command}", **options)

    def up(self):
        self.laptop.run(f"cd project && ray up -y {FILE}", timeout=300)

    def write(self, name, seeds, steps):
        raw = {**self.tiny, "name": name, "optim": {"name": "adamw", "lr": 1e-3}}
        raw["data"]["path"] = f"s3://{BUCKET}/shards"
        raw["train"]["steps"] = steps
        raw["validation"]["every"] = steps // 2
        raw["seeds"] = len(seeds)
        raw["runtime"] = {
            "results": f"s3://{BUCKET}/results",
            "checkpoint_every": 100,
            "log_every": 10,
            "threads": 1,
            "concurrency": 1,
            "spot_patience_seconds": PATIENCE,
        }
        (self.laptop.root / "project" / "sweeps" / f"{name}.yaml").write_text(yaml.safe_dump(raw))
        return f"sweeps/{name}.yaml"

    def submit(self, sweep):
        command = f"cd project && exec python -m bgray.cluster submit {FILE} {sweep}"
        return self.laptop.popen(command, stdout=-1, stderr=-2)

    def read(self, key):
        with self.lab.network():
            return self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()

    def keys(self, prefix):
        with self.lab.network():
            pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
            return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def runs(self, name):
        """{seed: run.json} of a sweep's runs."""
        found = [k for k in self.keys(f"results/{name}/") if k.endswith("/run.json")]
        runs = [{**json.loads(self.read(k)), "folder": k.rpartition("/")[0]} for k in found]
        return {run["seed"]: run for run in runs if "seed" in run}

    def checkpoint(self, run):
        """The step of the run's latest checkpoint: that of the pointer, which is written last."""
        key = f"{run['folder']}/checkpoint/latest"
        if key not in self.keys(f"{run['folder']}/checkpoint/"):
            return 0
        return int(re.search(r"(\d+)\.pt", self.read(key)).group(1))

    def logged(self, run):
        lines = [
            json.loads(line)
            for line in self.read(f"{run['folder']}/metrics.jsonl").split("\n")
            if line
        ]
        return [line["step"] for line in lines if "val" not in line]

    def until(self, condition, seconds, process=None):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert process is None or process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"waited {seconds} s; {self.cloud.errors[-1:]}"
            time.sleep(0.3)
        return found

    def under_way(self, name, seed, process, at_least=100, seconds=300):
        """The run once it has a checkpoint of so many steps, and has not ended."""

        def ready():
            run = self.runs(name).get(seed)
            return run if run and self.checkpoint(run) >= at_least else None

        run = self.until(ready, seconds, process)
        assert run["state"] == "running"
        return run


@pytest.fixture
def cluster(lab, tiny):
    moto = Moto(lab)
    laptop = lab.laptop(env={**moto.env, **moto.keys})
    with FakeCloud(lab, moto, laptop) as cloud:
        yield Cluster(lab, moto, laptop, cloud, tiny)


@pytest.fixture
def took(capsys):
    """Prints how long each part of a test took."""
    clock = [time.monotonic()]

    def say(what):
        clock.append(time.monotonic())
        with capsys.disabled():
            print(f"\n  {what}: {clock[-1] - clock[-2]:.0f} s", end="")

    return say


def finished(process, seconds=420):
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out
    return out


def down(cluster):
    cluster.bgray(f"down {FILE} -y", timeout=300)
    assert cluster.cloud.instances() == []


def test_without_spot_capacity_on_demand_comes_and_a_lost_machine_costs_only_its_last_steps(
    cluster, took
):
    assert cluster.bgray(f"check {FILE}").returncode == 0
    cluster.up()
    took("ray up")
    assert [i["InstanceType"] for i in cluster.cloud.instances()] == ["m7i.2xlarge"]
    cluster.moto.faults(no_spot=["g6.2xlarge"])
    steps = 400
    process = cluster.submit(cluster.write("fallback", [0], steps))
    run = cluster.under_way("fallback", 0, process)
    took("submit, CPU machine, no spot GPU, on-demand GPU, first checkpoint")
    # The CPU machine came for the data, and it made them.
    assert cluster.cloud.instances("cpu_worker")
    assert run["feed"] == "ray"
    assert cluster.cloud.instances("gpu_worker") == []
    (bought,) = cluster.cloud.instances("gpu_worker_ondemand")
    assert "InstanceLifecycle" not in bought
    asked = cluster.moto.calls("RunInstances")
    refused = [call for call in asked if call["fault"] == "InsufficientInstanceCapacity"]
    instead = next(call for call in asked if "ondemand" in json.dumps(call["params"]))
    waited = instead["t"] - refused[0]["t"]
    assert PATIENCE - 5 <= waited <= PATIENCE + 30
    took(f"(asked on demand {waited:.0f} s after the first refusal, {PATIENCE} s stated)")

    # Spot is back; the machine under the trial loses its power without a word.
    cluster.moto.faults()
    cluster.cloud.terminate(bought["InstanceId"])
    out = finished(process)
    took("machine terminated, trial went on elsewhere and finished")
    assert "InsufficientInstanceCapacity" in out or "no gpu_worker for" in out
    run = cluster.runs("fallback")[0]
    assert run["state"] == "finished"
    first, *_, last = run["attempts"]
    assert "ended" not in first
    assert last["from_step"] >= 100
    assert last["host"] != first["host"]
    assert cluster.logged(run) == list(range(10, steps + 1, 10))
    down(cluster)
    took("down")


def test_a_notice_and_a_lost_head_cost_nothing_that_was_finished(cluster, took):
    cluster.up()
    took("ray up")
    steps = 500
    sweep = cluster.write("notice", [0, 1], steps)
    process = cluster.submit(sweep)
    run = cluster.under_way("notice", 0, process)
    took("submit, machines, first checkpoint")
    (spot,) = cluster.cloud.instances("gpu_worker")
    assert spot["InstanceLifecycle"] == "spot"
    cluster.cloud.spot_notice(spot["InstanceId"], seconds=90)
    told = time.monotonic()

    def stopped():
        run = cluster.runs("notice")[0]
        return run if run["state"] == "interrupted" else None

    run = cluster.until(stopped, 90, process)
    assert run["reason"] == NOTICE
    step = run["step"]
    assert cluster.checkpoint(run) == step
    assert cluster.logged(run)[-1] > step - 10  # all that was trained is in the checkpoint
    took(f"told at step {step}, checkpointed {time.monotonic() - told:.0f} s after the notice")
    cluster.until(lambda: len(cluster.runs("notice")[0]["attempts"]) > 1, 240, process)
    took(f"the trial went on elsewhere {time.monotonic() - told:.0f} s after the notice")
    run = cluster.runs("notice")[0]
    assert run["attempts"][0]["ended"] == "interrupted"
    assert run["attempts"][1]["from_step"] == step
    assert run["attempts"][1]["host"] != run["attempts"][0]["host"]

    # The head goes while the second trial trains.
    cluster.under_way("notice", 1, process)
    done = cluster.runs("notice")[0]
    assert done["state"] == "finished"
    assert cluster.logged(done) == list(range(10, steps + 1, 10))
    took("the first trial finished, the second one began")
    (head,) = cluster.cloud.instances("head")
    cluster.cloud.terminate(head["InstanceId"])
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 1, out
    assert "ray up" in out
    assert cluster.runs("notice")[1]["state"] != "finished"
    took("head lost; the follower said so")
    cluster.up()
    took("ray up again")
    finished(cluster.submit(sweep))
    took("submit again, finished")
    after = cluster.runs("notice")
    assert after[0]["attempts"] == done["attempts"]  # not touched
    assert after[1]["state"] == "finished"
    assert after[1]["attempts"][-1]["from_step"] >= 100
    assert cluster.logged(after[1]) == list(range(10, steps + 1, 10))
    down(cluster)
    took("down")
