"""Where a run runs: what its share of a GPU comes to."""

import types

import pytest
import torch

from bgray import context as module
from bgray.choices import Choices
from bgray.context import Context, on_ray, set_numerics
from bgray.experiment import resolve
from bgray.resources import Plan, Share

CUDA = torch.device("cuda")

CHOICES = Choices("tf32", False, False, "library", False, ())


@pytest.fixture
def gpu(monkeypatch):
    """A made-up GPU of 24 GiB; the shares of it that torch was told to keep to."""
    told = []
    size = types.SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: size)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, index: told.append(share)
    )
    monkeypatch.setattr(module, "pick_device", lambda wanted: CUDA)
    monkeypatch.setattr(module.probes, "reset_memory", lambda device: None)
    return told


@pytest.fixture
def plan_of(tiny):
    def make(gpus):
        tiny["runtime"] |= {"device": "auto", "gpus": gpus}
        experiment = resolve(tiny, "f")
        return experiment, Plan.make(experiment, 2, [{"CPU": 8.0, "GPU": 1.0}])

    return make


def test_a_packed_run_has_its_limit_and_is_marked(gpu, plan_of):
    experiment, plan = plan_of(1.0)
    found = on_ray(experiment, plan, Share(0.25, 6.0, 5.4, "made up"))
    assert (found.packed, found.vram_gib) == (True, 5.4)
    set_numerics(CHOICES, found)
    assert gpu == [pytest.approx(5.4 / 24)]


def test_a_run_alone_has_no_limit_even_where_the_process_had_one(gpu, plan_of):
    experiment, plan = plan_of(1.0)
    for share in (None, Share(1.0, 20.0, None, "made up")):
        found = on_ray(experiment, plan, share)
        assert (found.packed, found.vram_gib) == (False, None)
        set_numerics(CHOICES, found)
    assert gpu == [1.0, 1.0]


def test_a_share_set_by_hand_is_a_limit_and_is_marked(gpu, plan_of):
    experiment, plan = plan_of(0.5)
    found = on_ray(experiment, plan)
    assert found.packed
    assert found.vram_gib == pytest.approx(11.4)


def test_a_limit_above_the_gpus_size_is_all_of_it(gpu):
    set_numerics(CHOICES, Context(device=CUDA, vram_gib=80.0))
    assert gpu == [1.0]
