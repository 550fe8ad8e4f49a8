import dataclasses

import pytest
import torch

from bgray.choices import COMPILE_STEPS, choose
from bgray.config import ConfigError, Runtime, Train
from bgray.experiment import resolve
from bgray.models import depthwise

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def experiment(tiny):
    return resolve(tiny, "choices")


def with_train(experiment, **changes):
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **changes))


def with_runtime(experiment, **changes):
    runtime = dataclasses.replace(experiment.runtime, **changes)
    return dataclasses.replace(experiment, runtime=runtime)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's compute capability, without the GPU."""

    monkeypatch.setattr(depthwise, "_tried", lambda device: "")

    def of(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    of(9, 0)
    return of


def test_who_asks_for_nothing_gets_it_all_on_a_gpu_and_is_told_why(experiment, gpu):
    chosen = choose(with_train(experiment, steps=COMPILE_STEPS), CUDA)
    assert (chosen.precision, chosen.compile, chosen.cuda_graphs) == ("bf16", True, True)
    said = [reason.partition(":")[0] for reason in chosen.reasons]
    assert said == ["train.precision=bf16", "runtime.compile=true", "runtime.cuda_graphs=true"]


def test_a_cpu_computes_plainly_and_says_so(experiment):
    chosen = choose(experiment, CPU)
    assert (chosen.precision, chosen.compile, chosen.cuda_graphs) == ("tf32", False, False)
    assert len(chosen.reasons) == 3


def test_what_is_written_is_done_and_needs_no_reason(experiment, gpu):
    asked = with_train(experiment, precision="fp32")
    asked = with_runtime(asked, compile=False, cuda_graphs=False)
    chosen = choose(asked, CUDA)
    assert (chosen.precision, chosen.compile, chosen.cuda_graphs) == ("fp32", False, False)
    assert chosen.reasons == ()
    assert choose(with_runtime(experiment, compile=True), CPU).compile


def test_an_old_gpu_a_short_run_and_ddp_each_leave_something_out(experiment, gpu):
    long = with_train(experiment, steps=COMPILE_STEPS)
    assert not choose(with_train(experiment, steps=COMPILE_STEPS - 1), CUDA).compile
    assert not choose(long, CUDA, world=2).cuda_graphs
    gpu(7, 5)
    assert choose(long, CUDA).precision == "tf32"


def test_kernels_that_there_are_not_for_a_gpu_are_the_librarys_and_it_is_said(experiment, gpu):
    assert choose(experiment, CUDA).depthwise == "auto"
    gpu(6, 1)
    chosen = choose(experiment, CUDA)
    assert chosen.depthwise == "library"
    assert "runtime.depthwise=library: a GPU is too old for Triton" in chosen.reasons


def test_recomputation_is_refused_where_it_would_do_nothing(tiny):
    tiny["runtime"]["recompute"] = True
    assert choose(resolve(tiny, "u-net"), CPU).recompute
    tiny["model"] = {"name": "wavenet"}
    with pytest.raises(ConfigError, match="wavenet has no blocks to recompute"):
        resolve(tiny, "wavenet")


def test_a_graph_over_several_workers_is_refused_before_anything_starts(tiny):
    tiny["runtime"] |= {"cuda_graphs": True, "workers": 2}
    with pytest.raises(ConfigError, match="true is for one worker"):
        resolve(tiny, "two workers")


def test_where_a_graph_is_recorded_more_steps_are_no_training_time(experiment, gpu):
    graph, plain = (
        choose(with_runtime(experiment, cuda_graphs=on), CUDA).warm_up_steps for on in (True, False)
    )
    assert (graph, plain) == (5, 3)


def test_no_graph_is_asked_for_without_a_gpu(experiment):
    assert not choose(with_runtime(experiment, cuda_graphs=True), CPU).cuda_graphs


def test_the_same_run_chooses_the_same_again_and_its_id_does_not_depend_on_where(experiment, gpu):
    assert choose(experiment, CUDA) == choose(experiment, CUDA)
    assert experiment.train.precision == Train().precision == "auto"
    asked = with_runtime(experiment, compile=True, cuda_graphs=False, depthwise="library")
    assert asked.identity("data") == experiment.identity("data")
    assert Runtime().compile == "auto"


def test_the_record_is_plain_data(experiment):
    record = choose(experiment, CPU).record()
    assert record["precision"] == "tf32"
    assert isinstance(record["reasons"], list)
