"""A process that trains one trial after the other: what the first one leaves must not be seen."""

import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_trial import assert_same_weights, at, curves
from torch import nn

from bgray import storage, warm
from bgray.context import Context
from bgray.evaluation import Evaluator
from bgray.experiment import prepare_data, run_url
from bgray.loop import NotFinite
from bgray.records import recorded_failure
from bgray.starts import Start
from bgray.trial import run_trial


@pytest.fixture
def process(monkeypatch):
    """As if this one had trained nothing yet; afterwards it is as before."""
    before = warm._Settings()
    for name, value in {"before": None, "worn": "", "kept": {}}.items():
        monkeypatch.setattr(warm._Process, name, value)
    yield warm._Process
    before.put_back()


def trial(experiment, **context):
    """As a Tune worker does it."""
    start = Start(warm=warm.ready())
    with recorded_failure(run_url(experiment)), warm.watched():
        run_trial(experiment, prepare_data(experiment), Context(start=start, **context))
    return run_url(experiment)


def assert_same(url, other):
    assert curves(url) == curves(other)
    assert_same_weights(url, other)


# --- settings


def test_what_a_trial_sets_for_its_process_is_put_back(process):
    assert not warm.ready()
    precision = torch.get_float32_matmul_precision()
    filters, level = list(warnings.filters), logging.getLogger().level
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.autograd.set_detect_anomaly(True)
    nn.modules.module.register_module_forward_hook(lambda *args: 1 / 0)
    os.environ["BGRAY_LEFT_BEHIND"] = "1"
    path = os.environ.pop("PATH")
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    logging.getLogger().setLevel(1)
    logging.getLogger().addHandler(logging.NullHandler())
    handlers = len(logging.getLogger().handlers)
    assert warm.ready()
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_float32_matmul_precision() == precision
    assert not torch.is_anomaly_enabled()
    assert nn.Linear(1, 1)(torch.ones(1)).shape == (1,)  # the hook would divide by zero
    assert "BGRAY_LEFT_BEHIND" not in os.environ
    assert os.environ["PATH"] == path
    assert warnings.filters == filters
    assert np.geterr()["over"] == "warn"
    assert logging.getLogger().level == level
    assert len(logging.getLogger().handlers) == handlers - 1


@pytest.mark.slow  # torch imports its compiler to set it
def test_deterministic_algorithms_are_turned_off_again(process):
    warm.ready()
    torch.use_deterministic_algorithms(True, warn_only=True)
    warm.ready()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_generators_do_not_go_on_where_the_trial_before_left_them(process):
    warm.ready()
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        warm.ready()
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] != drawn[1]


@pytest.mark.slow  # the same
def test_compiled_code_of_the_trial_before_is_forgotten(process):
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    def twice(x):
        return 2 * x

    counter = CompileCounter()
    warm.ready()
    for _ in range(2):
        torch.compile(twice, backend=counter)(torch.ones(3))
        warm.ready()
    assert counter.frame_count == 2


# --- not clean


def test_after_an_error_the_process_is_not_used_again(process):
    warm.ready()
    with pytest.raises(ValueError, match="half"), warm.watched():
        raise ValueError("half done")
    with pytest.raises(warm.NotClean, match="the trial before ended with ValueError"):
        warm.ready()
    with pytest.raises(warm.NotClean):
        warm.ready()


def test_a_trial_that_the_scheduler_stopped_does_not_wear_the_process_out(process):
    warm.ready()
    with pytest.raises(SystemExit), warm.watched():
        raise SystemExit(0)
    assert warm.ready()


def test_a_loss_that_is_not_finite_wears_out_a_process_with_a_gpu_alone(process, monkeypatch):
    warm.ready()
    with pytest.raises(NotFinite), warm.watched():
        raise NotFinite(3, 0)
    assert warm.ready()
    monkeypatch.setattr(warm, "_on_gpu", lambda: True)
    warm.wear_out("", NotFinite(3, 0))
    warm.wear_out("a GPU's NaN", NotFinite(3, 0))
    assert process.worn == "a GPU's NaN"


def test_a_thread_of_ours_that_does_not_end_makes_the_process_unfit(process, monkeypatch):
    monkeypatch.setattr(warm, "PATIENCE_SECONDS", 0.05)
    warm.ready()
    done = threading.Event()
    for name in ("some-pool", "bgray-writer"):
        threading.Thread(target=done.wait, name=name, daemon=True).start()
    try:
        with pytest.raises(warm.NotClean, match=r"\(bgray-writer\) does not end"):
            warm.ready()
    finally:
        done.set()


def test_a_thread_of_ours_that_ends_soon_is_waited_for(process):
    warm.ready()
    threading.Thread(target=time.sleep, args=(0.2,), name="bgray-writer").start()
    assert warm.ready()


@pytest.mark.ray
def test_where_a_stopped_trial_does_not_end_the_next_one_goes_to_a_new_process(
    process, monkeypatch
):
    from ray.tune.trainable.function_trainable import FunctionTrainable

    from bgray.tuning import _lasting

    begun = []
    monkeypatch.setattr(FunctionTrainable, "reset_config", lambda self, config: False)
    monkeypatch.setattr(FunctionTrainable, "setup", lambda self, config: begun.append(config))
    lasting = _lasting(lambda config: None)
    warm.ready()
    assert object.__new__(lasting).reset_config({"trial": 2})  # or Tune would give trial 2 up
    assert begun == [{"trial": 2}]
    with pytest.raises(warm.NotClean, match="the trial before does not end"):
        warm.ready()


# --- what trials share


def test_what_was_asked_for_longest_ago_is_forgotten_first(process, monkeypatch):
    monkeypatch.setattr(warm, "KEPT_BYTES", 10)
    warm.ready()
    made = []

    def get(name):
        return warm.kept(name, lambda: made.append(name) or name, lambda value: 4)

    for name in ("a", "b", "a", "c", "a", "b"):
        assert get(name) == name
    assert made == ["a", "b", "c", "b"]


def test_a_process_that_trains_one_run_keeps_nothing(process):
    assert warm.kept("a", lambda: 1, lambda value: 4) == 1
    assert not process.kept


def test_the_validation_set_is_read_and_its_baseline_scored_once_for_all_trials(
    process, tiny, tmp_path, monkeypatch
):
    scored, scores = [], Evaluator.scores

    def counted(self, estimate, clip=None):
        scored.append(clip)
        return scores(self, estimate, clip)

    monkeypatch.setattr(Evaluator, "scores", counted)
    train = {"train": {"steps": 1}}
    urls = [trial(at(tiny, tmp_path, **train, optim={"lr": lr})) for lr in (0.1, 0.2)]
    assert scored == [None, "step-000001", "step-000001"]
    clips = [storage.listdir(f"{url}/clips") for url in urls]
    assert clips[0] == clips[1]
    for key in ("baseline", "baseline_items", "validation"):
        assert len({str(info(url)[key]) for url in urls}) == 1
    trial(at(tiny, tmp_path, **train, validation={"segment": 3072}))
    assert scored.count(None) == 2


def info(url):
    from bgray.records import read_info

    return read_info(url)


# --- whole trials

BEFORE = {
    "bf16": {"train": {"precision": "bf16"}},
    "psgd": {"optim": {"name": "psgd", "lr": 1e-3}},
    "diverges": {"optim": {"name": "adamw", "lr": 1e30}},
    "another net": {"model": {"channels": [2, 4, 8]}, "data": {"augment": [{"name": "gain"}]}},
}


@pytest.mark.parametrize("first", BEFORE)
def test_a_trial_in_a_warm_process_leaves_the_bytes_of_one_in_a_new_process(
    process, tiny, tmp_path, first
):
    second = {"optim": {"name": "adamw", "lr": 1e-3}}
    alone = trial(at(tiny, tmp_path / "alone", **second))
    process.before, process.kept = None, {}
    trial(at(tiny, tmp_path / "warm", **BEFORE[first]))
    torch.set_default_dtype(torch.float64)  # and it was badly brought up
    url = trial(at(tiny, tmp_path / "warm", **second))
    assert info(url)["attempts"][-1]["warm"]
    assert_same(url, alone)


@pytest.mark.slow  # processes that import torch
def test_a_new_processes_bytes_are_those_of_the_fourth_trial_of_a_warm_one(process, tiny, tmp_path):
    second = at(tiny, tmp_path / "alone", optim={"name": "psgd", "lr": 1e-3})
    file = tmp_path / "second.yaml"
    file.write_text(yaml.safe_dump(second.resolved()))
    command = [sys.executable, "-m", "bgray.train", str(file), "--local"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    trial(at(tiny, tmp_path / "warm", train={"steps": 9}))
    trial(at(tiny, tmp_path / "warm", train={"precision": "bf16"}, model={"kernels": [9]}))
    trial(at(tiny, tmp_path / "warm", optim={"name": "adamw", "lr": 1e30}))
    url = trial(at(tiny, tmp_path / "warm", optim={"name": "psgd", "lr": 1e-3}))
    assert_same(url, run_url(second))


def test_ten_trials_leave_no_thread_no_open_file_and_no_memory_behind(process, tiny, tmp_path):
    def held():
        status = Path("/proc/self/status").read_text().splitlines()
        rss = next(line for line in status if line.startswith("VmRSS:")).split()[1]
        return threading.active_count(), len(os.listdir("/proc/self/fd")), int(rss) / 1024

    quick = {"train": {"steps": 4}, "validation": {"every": 4}}
    seen = []
    for seed in range(13):
        trial(at(tiny, tmp_path, **{**quick, "train": {"steps": 4, "seed": seed}}))
        seen.append(held())
    threads, files, rss = zip(*seen[2:], strict=True)  # the first ones import and allocate
    assert threads[-1] <= threads[0]
    assert files[-1] <= files[0]
    assert rss[-1] < rss[0] + 8  # MiB


# --- how the start went


def test_the_parts_of_a_start_add_up_to_the_first_step():
    clock = iter([10.0, 12.0, 13.0, 13.5, 14.5, 99.0, 99.0])
    start = Start(warm=True, now=lambda: next(clock))
    start.mark("data")
    start.mark("model")
    start.first_batch()
    start.first_batch()
    start.mark("first_step")
    start.mark("first_step")
    assert start.record() == {
        "warm": True,
        "start_seconds": {"data": 2.0, "model": 1.0, "first_batch": 0.5, "first_step": 1.0},
        "entered_at": 10.0,
        "first_step_at": 13.5,
    }


def test_a_new_process_says_why_the_one_before_was_not_used_again(process, tiny, tmp_path):
    experiment = at(tiny, tmp_path, train={"steps": 1})
    start = Start(why_new="the trial before ended with ValueError")
    run_trial(experiment, prepare_data(experiment), Context(start=start))
    (attempt,) = info(run_url(experiment))["attempts"]
    assert not attempt["warm"]
    assert attempt["why_new"] == "the trial before ended with ValueError"
    assert set(attempt["start_seconds"]) >= {"model", "validation", "baseline", "first_batch"}


# --- on a GPU


@pytest.fixture
def cuda(process):
    yield torch.device("cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_a_small_trial_after_a_big_one_is_said_to_hold_what_it_holds_alone(
    cuda, process, tiny, tmp_path
):
    big = {"model": {"channels": [64, 128, 256]}, "runtime": {"compile": False}}
    small = {"runtime": {"compile": False}}
    trial(at(tiny, tmp_path / "libraries", **small), device=cuda)  # loads what stays loaded
    peaks = []
    for name, before in (("alone", small), ("after", big)):
        trial(at(tiny, tmp_path / name / "before", **before), device=cuda)
        url = trial(at(tiny, tmp_path / name, **small), device=cuda)
        peaks.append(info(url)["timing"])
    assert peaks[1]["vram_peak_gib"] == pytest.approx(peaks[0]["vram_peak_gib"], abs=0.002)
    assert peaks[1]["vram_reserved_gib"] == pytest.approx(peaks[0]["vram_reserved_gib"], abs=0.025)


@pytest.mark.gpu
def test_gpu_memory_that_is_not_given_back_makes_the_process_unfit(cuda, process):
    warm.ready()
    kept = torch.zeros(2**25, device=cuda)  # 128 MiB
    with pytest.raises(warm.NotClean, match="128 MiB of GPU memory are left"):
        warm.ready()
    del kept


@pytest.mark.gpu
def test_a_trial_without_a_limit_may_have_the_whole_gpu_after_one_with_a_limit(
    cuda, process, tiny, tmp_path
):
    trial(at(tiny, tmp_path), device=cuda, vram_gib=0.5)
    assert warm.ready()
    assert torch.empty(2**30, dtype=torch.uint8, device=cuda).nbytes == 2**30


@pytest.mark.gpu
def test_too_little_memory_wears_the_process_out(cuda, process, tiny, tmp_path):
    big = {"model": {"channels": [64, 128, 256]}}
    trial(at(tiny, tmp_path, **big), device=cuda, vram_gib=0.005)
    with pytest.raises(warm.NotClean, match="OutOfMemoryError"):
        warm.ready()
