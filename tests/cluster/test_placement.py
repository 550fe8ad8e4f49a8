"""Where work goes among machines of different kinds, and what happens when one is taken away.

The machines are several Ray nodes on this one, which is what ray.cluster_utils is for.
"""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from bgray.records import NOTICE, read_info, read_lines, runs

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]


@pytest.fixture
def cluster(monkeypatch):
    """A head without CPUs; nodes are added by the test."""
    from bgray.session import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 200 * 1024**2}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    made.add = lambda **node: made.add_node(**memory, **node)
    yield made
    import ray

    ray.shutdown()
    made.shutdown()


class Where:
    """A task whose examples say which node made them."""

    voices, additive, full_scale = (), True, 32768.0

    def __init__(self, nodes):
        self.nodes = nodes

    def example(self, chunks, index, rng, length):
        import ray

        here = self.nodes.index(ray.get_runtime_context().get_node_id())
        x = np.full((1, length), here, np.int16)
        return x, x[None]


@pytest.mark.parametrize(("resources", "allowed"), [({"cpu_worker": 0.001}, {0}), (None, {0, 1})])
def test_batches_are_made_on_cpu_machines_and_not_on_spare_cpus_of_gpu_machines(
    cluster, shards_url, resources, allowed
):
    import ray
    from ray import cloudpickle

    from bgray import data, feed, shards

    nodes = [
        cluster.add(num_cpus=1, resources={"cpu_worker": 1}),
        cluster.add(num_cpus=4, num_gpus=1),
    ]
    ray.init(address=cluster.address, log_to_driver=False)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    recipe = data.training_recipe(
        shards.read_manifest(shards_url),
        shards_url,
        Where([node.node_id for node in nodes]),
        augment=(),
        segment=16,
        batch_size=2,
        seed=0,
        groups_per_unit=1,
        batches_per_unit=1,
    )
    batches = list(feed.on_ray(recipe, 0, 12, cpus=0.5, resources=resources))
    made = {int(batch.inputs.flat[0]) for batch in batches}
    assert [batch.step for batch in batches] == list(range(12))
    assert made <= allowed
    if resources is None:
        assert 1 in made  # the test could see the difference


def sweep(path, address, *sets, **options):
    words = [word for item in sets for word in ("--set", item)]
    return subprocess.Popen(
        [sys.executable, "-m", "bgray.sweep", str(path), *words],
        env={**os.environ, **({"RAY_ADDRESS": address} if address else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process, seconds=300):
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out
    return out


def drained_under_a_trial(cluster, path, folder, sets):
    """Start the sweep, drain the node on which training goes on, return the run when it is done."""
    import ray
    from ray._private.state import available_resources_per_node
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    process = sweep(path, cluster.address, *sets)
    try:
        deadline = time.monotonic() + 240
        while not (found := [r for r in runs(str(folder)) if (r.info.get("step") or 0) >= 100]):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ray.init(address=cluster.address, log_to_driver=False)
        free = available_resources_per_node()
        busy = [
            node["NodeID"]
            for node in ray.nodes()
            if free[node["NodeID"]].get("CPU", 0) < node["Resources"].get("CPU", 0) - 0.5
        ]
        ok, why = GcsClient(address=cluster.address).drain_node(
            busy[0],
            autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,
            "spot notice",
            int(time.time() + 60) * 1000,
        )
        assert ok, why
        noticed = time.monotonic()
        while (read_info(found[0].url) or {}).get("reason") != NOTICE:
            assert time.monotonic() - noticed < 30, read_info(found[0].url)
            time.sleep(0.02)
        cluster.add(num_cpus=2)  # the replacement, if the machines left do not suffice
        finish(process)
    finally:
        process.kill()
        process.communicate()
    (run,) = runs(str(folder))
    return run


@pytest.mark.parametrize("workers", [1, 2])
def test_a_trial_on_a_machine_that_is_taken_away_goes_on_elsewhere_from_its_step(
    cluster, tiny, tmp_path, workers
):
    for _ in range(2):
        cluster.add(num_cpus=2)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tiny, "optim": {"name": "adamw", "lr": 1e-3}}))
    sets = ["train.steps=600", "validation.every=100", "runtime.checkpoint_every=500"]
    sets += [f"runtime.workers={workers}", "runtime.cpus=1", "runtime.log_every=10"]
    run = drained_under_a_trial(cluster, path, tmp_path / "results" / "tiny", sets)
    assert run.state == "finished"
    first, *_, last = run.info["attempts"]
    assert first["ended"] == "interrupted"
    assert last["ended"] == "finished"
    # from the very step at which the notice was seen, which no regular checkpoint is at
    assert last["from_step"] > 0
    assert last["from_step"] % 500
    finish(sweep(path, None, *sets, f"runtime.results={tmp_path / 'unbroken'}"))
    (unbroken,) = runs(str(tmp_path / "unbroken" / "tiny"))
    assert read_lines(f"{run.url}/metrics.jsonl") == read_lines(f"{unbroken.url}/metrics.jsonl")
