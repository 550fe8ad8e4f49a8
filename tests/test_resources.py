"""How many trials at a time, solved by hand."""

import itertools
import json

import pytest
import yaml

from bgray import resources
from bgray.config import ConfigError
from bgray.experiment import resolve
from bgray.resources import (
    SLIVER,
    Plan,
    Share,
    by_hand,
    data_placement,
    of_cluster,
    wait_for_own_machines,
)


@pytest.fixture
def plan(tiny):
    def make(*nodes, num=4, **runtime):
        raw = {**tiny, "runtime": {**tiny["runtime"], "device": "auto", **runtime}}
        raw["train"] = {**tiny["train"], "batch_size": 8}
        return Plan.make(resolve(raw, "f"), num, list(nodes))

    auto = {**tiny, "runtime": {**tiny["runtime"], "device": "auto"}}
    make.experiment = resolve(auto, "f")
    return make


def test_two_trials_share_a_gpu_when_each_asks_for_half(plan):
    found = plan({"CPU": 16, "GPU": 1}, gpus=0.5)
    assert (found.concurrency, found.gpus) == (2, 0.5)


def test_three_quarters_of_a_gpu_is_one_trial_a_gpu(plan):
    assert plan({"CPU": 16, "GPU": 3}, gpus=0.75).concurrency == 3


def test_workers_of_one_trial_fit_on_the_one_machine_that_can_hold_them(plan):
    node = {"CPU": 96, "GPU": 8}
    found = plan(node, node, num=1, workers=8)  # one of them is not there yet
    assert 8 * found.cpus <= 96
    assert 2 * plan(node, node, num=2).cpus <= 96


def test_trials_with_two_workers_take_two_gpus_each(plan):
    assert plan({"CPU": 16, "GPU": 8}, workers=2).concurrency == 4


def test_a_gpu_worker_asks_for_no_more_cpus_than_a_gpu_node_has(plan):
    found = plan({"CPU": 64}, {"CPU": 8, "GPU": 1}, num=1, threads=None)
    assert found.cpus <= 6
    assert found.threads <= 8


def test_some_cpu_is_left_for_ray_data_whatever_the_number_of_trials(plan):
    for cpus in (1, 2, 3, 16):
        for num in (1, 2, 5):
            found = plan({"CPU": cpus}, num=num)
            assert found.concurrency * found.cpus <= 0.8 * cpus


def test_without_a_gpu_each_trial_gets_its_share_of_threads(plan):
    assert plan({"CPU": 2}, num=1, threads=None).threads == 2
    assert plan({"CPU": 2}, num=3, threads=None).threads == 1


def test_a_machine_told_to_use_the_cpu_ignores_its_gpus(plan):
    assert plan({"CPU": 4, "GPU": 2}, device="cpu").gpus == 0


@pytest.mark.parametrize(
    ("node", "runtime", "path"),
    [
        ({"CPU": 8, "GPU": 2}, {"workers": 4}, "runtime.gpus"),
        ({"CPU": 2}, {"cpus": 8.0}, "runtime.cpus"),
        ({"CPU": 2}, {"device": "cuda"}, "runtime.device"),
    ],
)
def test_what_the_machines_can_never_hold_is_refused_instead_of_waited_for(
    plan, node, runtime, path
):
    with pytest.raises(ConfigError) as caught:
        plan(node, **runtime)
    assert path in dict(caught.value.problems)


# --- GPUs shared by GiB


def shares(*fractions, gpu_gib=24.0):
    return [
        Share(f, f * gpu_gib, None if f >= 1 else f * gpu_gib - 0.5, "made up") for f in fractions
    ]


@pytest.mark.parametrize(
    ("fractions", "gpus", "at_a_time"),
    [
        ((0.22,) * 8, 1, 4),
        ((0.22,) * 8, 2, 8),
        ((0.5, 0.5, 0.5), 1, 2),
        ((0.34,) * 6, 2, 4),  # three thirds would be more than one
        ((1.0, 1.0, 0.3, 0.3), 2, 3),  # two small ones share, a big one has the other
        ((1.0,) * 3, 2, 2),
        ((0.1, 0.9, 0.9), 2, 3),
        ((0.2,), 4, 1),
    ],
)
def test_as_many_trials_at_a_time_as_their_gib_allow(plan, fractions, gpus, at_a_time):
    node = {"CPU": 64, "GPU": gpus}
    found = Plan.make(plan.experiment, len(fractions), [node], shares(*fractions))
    assert found.concurrency == at_a_time


def test_a_packed_trial_asks_for_its_share_and_one_alone_for_a_gpu(plan):
    small, big = shares(0.22, 1.0)
    found = Plan.make(plan.experiment, 2, [{"CPU": 16, "GPU": 1}], [small, big])
    assert found.per_worker(small)["GPU"] == 0.22
    assert found.per_worker(big)["GPU"] == 1.0
    assert found.per_worker()["GPU"] == 1.0
    assert found.per_worker(small)["CPU"] == found.per_worker()["CPU"]
    assert "5.3 to 24.0 GiB a trial, 1 of them alone" in found.text


def test_cpus_are_enough_for_all_that_share_a_gpu_on_the_machine_with_fewest(plan):
    nodes = [{"CPU": 8, "GPU": 1}, {"CPU": 64, "GPU": 1}]
    found = Plan.make(plan.experiment, 20, nodes, shares(*[0.1] * 20))
    assert found.concurrency == 20
    assert 10 * found.cpus <= 8


def test_on_a_cpu_nobody_asks_for_a_share_of_a_gpu(plan):
    found = Plan.make(plan.experiment, 2, [{"CPU": 4}], shares(0.2, 0.2))
    assert found.per_worker(shares(0.2)[0]) == {"CPU": found.cpus}


def test_a_share_set_by_hand_is_one_of_the_memory_too_less_the_context():
    assert by_hand(0.5, 24.0) == pytest.approx(11.4)
    assert by_hand(0.01, 24.0) == pytest.approx(0.12)  # not less than half of it


# --- clusters

CPU = {"CPU": 16.0, "cpu_worker": 1.0}
GPU = {"CPU": 8.0, "GPU": 1.0, "gpu_worker": 1.0}


class FakeRay:
    """The few answers of Ray that `of_cluster` asks for."""

    def __init__(self, nodes, head="10.0.0.1", here="10.0.0.1"):
        self.util = self
        self._nodes, self.gcs_address, self._here = nodes, f"{head}:6379", here

    def nodes(self):
        return [{"Alive": True, "Labels": {"ray.io/node-group": n}, "Resources": r}
                for n, r in self._nodes]  # fmt: skip

    def get_runtime_context(self):
        return self

    def get_node_ip_address(self):
        return self._here


@pytest.fixture
def on_the_head(monkeypatch, tmp_path):
    """The cluster's file as `ray up` leaves it on the head."""
    types = {
        "head": {"resources": {"CPU": 0}},
        "cpu_worker": {"resources": CPU, "max_workers": 8},
        "gpu_worker": {"resources": GPU, "max_workers": 3},
        "gpu_worker_ondemand": {"resources": {**GPU, "gpu_worker_ondemand": 1}, "max_workers": 2},
    }
    path = tmp_path / "ray_bootstrap_config.yaml"
    config = {"provider": {"type": "aws"}, "head_node_type": "head", "max_workers": 5}
    path.write_text(yaml.safe_dump({**config, "available_node_types": types}))
    monkeypatch.setattr(resources, "BOOTSTRAP", path)


def test_machines_that_the_autoscaler_may_add_count_and_twins_do_not_count_twice(on_the_head):
    ray = FakeRay([("head", {"CPU": 0})])
    nodes = of_cluster(ray)
    assert nodes.count(GPU) == 3
    assert nodes.count(CPU) == 5  # the cluster's max_workers, not the type's 8
    # three of the four are there, one of them bought on demand: still four in all
    some = [("head", {"CPU": 0}), ("gpu_worker", GPU), ("gpu_worker_ondemand", GPU)]
    assert of_cluster(FakeRay(some)).count(GPU) == 3


def test_away_from_the_head_only_machines_that_are_there_count(on_the_head):
    ray = FakeRay([("head", {"CPU": 0}), ("gpu_worker", GPU)], here="10.0.0.7")
    assert of_cluster(ray) == [{"CPU": 0}, GPU]


@pytest.mark.parametrize(
    ("wanted", "nodes", "expected"),
    [
        ("auto", [CPU, GPU], {"cpu_worker": SLIVER}),
        ("auto", [GPU, {"CPU": 64}], {}),
        ("any", [CPU, GPU], {}),
        ("cpu_worker", [GPU], {"cpu_worker": SLIVER}),
    ],
)
def test_batches_are_made_on_machines_that_are_there_for_it(wanted, nodes, expected):
    assert data_placement(wanted, nodes) == expected


@pytest.mark.parametrize(
    ("runtime", "nodes", "kind"),
    [
        ({}, [CPU, GPU], "ray"),
        ({}, [{"CPU": 2, "cpu_worker": 1}, GPU], "ray"),  # small, but it is there for nothing else
        ({}, [{"CPU": 4}], "process"),
        ({}, [{"CPU": 8}], "ray"),
        ({"feed": "process"}, [CPU, GPU], "process"),
    ],
)
def test_who_makes_the_batches(plan, runtime, nodes, kind):
    assert plan(*nodes, **runtime).feed.kind == kind


def test_a_cluster_without_any_machine_for_trials_is_refused(plan):
    with pytest.raises(ConfigError, match="no machine of this cluster"):
        plan({"CPU": 0})


def test_kubernetes_tells_its_groups_in_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "BOOTSTRAP", tmp_path / "none")
    told = {"gpu_worker": {"resources": GPU, "max_workers": 2}}
    monkeypatch.setenv("BGRAY_NODE_TYPES", json.dumps(told))
    assert of_cluster(FakeRay([("headgroup", {"CPU": 0})])) == [{"CPU": 0}, GPU, GPU]


def test_own_machines_are_waited_for_and_those_that_stay_away_are_named(monkeypatch, tmp_path):
    path = tmp_path / "ray_bootstrap_config.yaml"
    ips = ["10.0.0.2", "10.0.0.3"]
    path.write_text(yaml.safe_dump({"provider": {"type": "local", "worker_ips": ips}}))
    monkeypatch.setattr(resources, "BOOTSTRAP", path)
    ray, said = FakeRay([]), []
    asked = itertools.count()

    def nodes():
        there = ips[: min(2, next(asked))]
        return [{"Alive": True, "NodeManagerAddress": ip} for ip in there]

    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    wait_for_own_machines(ray, said.append)
    assert said == ["waiting for 10.0.0.2, 10.0.0.3 to join"]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "NodeManagerAddress": ips[0]}])
    wait_for_own_machines(ray, said.append, seconds=0)
    assert "without 10.0.0.3" in said[-1]
    # one that has joined and died is not waited for
    lost = {"Alive": False, "NodeManagerAddress": ips[1]}
    first = {"Alive": True, "NodeManagerAddress": ips[0]}
    monkeypatch.setattr(ray, "nodes", lambda: [first, lost])
    said.clear()
    wait_for_own_machines(ray, said.append)
    assert said == []
