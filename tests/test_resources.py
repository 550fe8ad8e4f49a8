"""How many trials at a time, solved by hand."""

import pytest

from bgray.config import ConfigError
from bgray.experiment import resolve
from bgray.resources import Plan


@pytest.fixture
def plan(tiny):
    def make(*nodes, num=4, **runtime):
        raw = {**tiny, "runtime": {**tiny["runtime"], "device": "auto", **runtime}}
        raw["train"] = {**tiny["train"], "batch_size": 8}
        return Plan.make(resolve(raw, "f"), num, list(nodes))

    return make


def test_two_trials_share_a_gpu_when_each_asks_for_half(plan):
    found = plan({"CPU": 16, "GPU": 1}, gpus=0.5)
    assert (found.concurrency, found.gpus) == (2, 0.5)


def test_three_quarters_of_a_gpu_is_one_trial_a_gpu(plan):
    assert plan({"CPU": 16, "GPU": 3}, gpus=0.75).concurrency == 3


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
