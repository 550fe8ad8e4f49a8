"""What each trial gets of a GPU, from measurements that are made up here."""

import dataclasses
import json

import pytest

from bgray import packing
from bgray.config import ConfigError
from bgray.experiment import resolve
from bgray.packing import Packer, prepare, probe_all
from bgray.resources import Plan, Share


def measured(vram_gib, *, gpu_gib=24.0, overhead_gib=0.5, out=False, gpu="L4"):
    facts = {"vram_gib": vram_gib, "overhead_gib": overhead_gib, "gpu": gpu, "gpu_gib": gpu_gib}
    return {**facts, "out_of_memory": out}


@pytest.fixture
def packer(tmp_path):
    found = Packer(str(tmp_path))
    found.learn_probe("small", measured(4.0))
    return found


def test_a_trial_gets_what_it_held_with_a_margin_and_a_limit_without_the_context(packer):
    share = packer.share("small")
    assert share.gib == pytest.approx(1.1 * 4.5 + 0.3)  # 5.25 of 24 GiB
    assert share.limit_gib == pytest.approx(share.gib - 0.5)
    assert share.fraction == 0.22
    assert not share.alone
    assert "4.50 GiB in a probe" in share.why


@pytest.mark.parametrize("vram_gib", [0.01, 1.0, 2.9, 4.0, 7.77, 9.9])
def test_whatever_fits_by_ray_fits_by_gib(tmp_path, vram_gib):
    packer = Packer(str(tmp_path))
    packer.learn_probe("a", measured(vram_gib))
    share = packer.share("a")
    at_a_time = int(1 / share.fraction + 1e-9)
    assert at_a_time * share.gib <= 24.0 + 1e-6
    assert share.limit_gib >= vram_gib


def test_more_than_half_a_gpu_is_all_of_it_without_a_limit(packer):
    packer.learn_probe("big", measured(10.7))
    assert packer.share("big").fraction == 1.0
    assert packer.share("big").limit_gib is None
    packer.learn_probe("half", measured(10.0))  # 11.85 GiB
    assert packer.share("half").fraction == 0.5


def test_what_nobody_measured_is_alone(packer):
    assert packer.share("other").alone


def test_out_of_memory_beside_others_is_tried_once_alone_and_then_packed_by_what_it_held(packer):
    limit = packer.share("small").limit_gib
    oom = {"step": 7, "peak_gib": 4.6, "reserved_gib": 4.7, "asked_gib": 0.5, "limit_gib": limit}
    assert packer.learn_oom("small", oom, packed=True)
    assert packer.share("small").alone
    assert packer.peaks["small"].gib == pytest.approx(5.1)  # 4.6 + the 0.5 that did not fit
    assert not packer.hopeless("small")
    packer.learn_run("small", 6.0, packed=False)
    assert packer.share("small").gib == pytest.approx(1.1 * 6.5 + 0.3)
    assert packer.share("small").fraction == 0.32


def test_out_of_memory_alone_is_the_result(packer):
    oom = {"step": 1, "peak_gib": 23.0, "reserved_gib": 23.4, "limit_gib": None}
    assert not packer.learn_oom("small", oom, packed=False)
    assert packer.hopeless("small")
    assert packer.share("small").alone


def test_a_probe_that_ran_out_of_memory_is_known_to_be_hopeless(packer):
    packer.learn_probe("huge", measured(23.3, out=True))
    assert packer.hopeless("huge")
    assert packer.share("huge").alone
    packer.learn_run("huge", 23.5, packed=False)  # the run has it that the probe was wrong
    assert not packer.hopeless("huge")


def test_a_run_within_its_limit_teaches_nothing_and_one_alone_only_that_it_needs_more(packer):
    before = packer.share("small")
    packer.learn_run("small", 4.9, packed=True)
    packer.learn_run("small", 3.0, packed=False)
    assert packer.share("small") == before
    packer.learn_run("small", 4.9, packed=False)
    assert packer.share("small").gib > before.gib


def test_it_remembers_what_it_learnt(packer, tmp_path):
    packer.learn_oom("small", {"limit_gib": 4.75, "reserved_gib": 4.7}, packed=True)
    again = Packer(str(tmp_path))
    assert again.peaks == packer.peaks
    assert again.share("small").alone
    assert again.unknown(["small", "new", "new"], "L4") == ["new"]


def test_figures_of_another_kind_of_gpu_are_measured_again(packer):
    assert packer.unknown(["small"], "H100") == ["small"]
    assert packer.unknown(["small"]) == []  # nobody knows which one it will be


def test_the_smallest_gpu_counts(packer):
    packer.see_gpu(80.0)
    assert packer.gpu_gib == 24.0
    packer.see_gpu(12.0)
    assert packer.share("small").fraction == 0.44


def test_gib_given_by_a_person_are_not_measured(tmp_path):
    packer = Packer(str(tmp_path), 6.0)
    packer.see_gpu(24.0)
    assert packer.unknown(["a"]) == []
    share = packer.share("a")
    assert (share.fraction, share.gib) == (0.25, 6.0)
    assert share.limit_gib == pytest.approx(5.4)
    assert packer.learn_oom("a", {"limit_gib": 5.4, "reserved_gib": 5.3}, packed=True)
    assert packer.share("a").alone
    packer.learn_run("a", 7.0, packed=False)  # more than was given: that counts now
    assert packer.share("a").gib == pytest.approx(1.1 * 7.6 + 0.3)


def test_a_damaged_file_says_what_to_do(packer, tmp_path):
    path = tmp_path / "vram.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"vram\.json(.|\n)*is damaged(.|\n)*measured anew"):
        Packer(str(tmp_path))


# --- on Ray, whose answers are made up


class FakeRay:
    """Tasks run where they are asked for, one after another."""

    def __init__(self, nodes=()):
        self._nodes, self.asked = list(nodes), []

    def nodes(self):
        return self._nodes

    def remote(self, **options):
        self.asked.append(options)

        def decorate(function):
            return Task(function)

        return decorate

    def wait(self, refs):
        return refs[:1], refs[1:]

    def get(self, ref):
        return [self.get(one) for one in ref] if isinstance(ref, list) else ref()


class Task:
    def __init__(self, function):
        self.function = function

    def options(self, **options):
        return self

    def remote(self, *args):
        return lambda: self.function(*args)


@pytest.fixture
def packing_of(tiny, tmp_path, monkeypatch):
    """prepare() with made-up GPUs and probes: {key: GiB, or an error}."""

    def make(peaks, vram="auto", on_gpu=True, workers=1):
        tiny["runtime"] |= {"vram": vram, "device": "auto"}
        experiment = resolve(tiny, "f")
        runtime = dataclasses.replace(experiment.runtime, workers=workers)
        experiment = dataclasses.replace(experiment, runtime=runtime)
        answers = iter(peaks.values())
        probed = []

        def probe(experiment, threads):
            probed.append(experiment)
            found = next(answers)
            if isinstance(found, Exception):
                raise found
            return measured(found)

        monkeypatch.setattr(packing, "probe", probe)
        monkeypatch.setattr(packing, "gpus", lambda ray: {"L4": 24.0})
        node = {"CPU": 8.0, "GPU": 2.0} if on_gpu else {"CPU": 8.0}
        plan = Plan.make(experiment, 4, [node])
        said = []
        keys = dict.fromkeys(peaks, experiment)
        return prepare(FakeRay(), keys, plan, str(tmp_path), said.append), said, probed

    return make


def test_every_cost_is_measured_once_in_a_sweeps_life(packing_of, tmp_path):
    packer, said, probed = packing_of({"a": 4.0, "b": 8.0})
    assert len(probed) == 2
    assert "2 kinds of trial" in said[0]
    assert packer.share("b").fraction == 0.41
    _, said, probed = packing_of({"a": 99.0, "b": 99.0})
    assert (said, probed) == ([], [])
    assert json.loads((tmp_path / "vram.json").read_text())["gpu_gib"] == 24.0


def test_a_probe_that_fails_costs_only_the_neighbours(packing_of):
    packer, said, _ = packing_of({"a": RuntimeError("no kernel image"), "b": 4.0})
    assert packer.share("a").alone
    assert not packer.share("b").alone
    assert "RuntimeError: no kernel image" in said[1]


@pytest.mark.parametrize("options", [{"vram": "whole"}, {"on_gpu": False}, {"workers": 2}])
def test_where_no_gpu_is_shared_nothing_is_measured(packing_of, tmp_path, options):
    packer, said, probed = packing_of({"a": 4.0}, **options)
    assert (packer, said, probed) == (None, [], [])
    assert not (tmp_path / "vram.json").exists()


def test_a_probe_has_a_gpu_and_a_process_of_its_own():
    ray = FakeRay()
    assert list(probe_all(ray, {}, 1)) == []
    assert ray.asked[0]["num_gpus"] == 1
    assert ray.asked[0]["max_calls"] == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_machine_that_only_says_it_has_a_gpu_packs_nothing(tiny, tmp_path, monkeypatch):
    """Ray is told of a GPU that is not there."""
    import torch

    from bgray.session import ENVIRONMENT, ray_session

    if torch.cuda.is_available():
        pytest.skip("here is one")
    tiny["runtime"] |= {"vram": "auto", "device": "auto"}
    experiment = resolve(tiny, "f")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    import ray

    ray.init("local", num_gpus=1, num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        with ray_session() as session:
            plan = Plan.make(experiment, 1, [{"CPU": 2.0, "GPU": 1.0}])
            said = []
            packer = prepare(session, {"a": experiment}, plan, str(tmp_path), said.append)
    finally:
        ray.shutdown()
    assert packer.share("a") == Share(1.0, None, None, "its need is not known: alone")
    assert "there is no GPU" in said[-1]
