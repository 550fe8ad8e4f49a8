import numpy as np
import pytest
import torch

from bgray.probes import WARM_UP_STEPS, Clock, memory, out_of_memory, reset_memory


class FakeTime:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run_steps(clock, time, num, *, compute=1.0, wait=0.25):
    for _ in range(num):
        with clock.waiting():
            time.now += wait
        time.now += compute
        clock.step()


def test_ten_thousand_steps_are_extrapolated_without_warm_up_and_validation():
    time = FakeTime()
    clock = Clock(torch.device("cpu"), now=time)
    clock.start()
    run_steps(clock, time, WARM_UP_STEPS, compute=100)
    run_steps(clock, time, 8)
    with clock.apart():
        time.now += 500
    run_steps(clock, time, 8)
    clock.read()
    seen = clock.summary()
    assert seen["time_to_10k_steps"] == pytest.approx(12_500)
    assert seen["time_to_10k_steps_extrapolated"]
    assert seen["steps_per_second"] == pytest.approx(0.8)
    assert seen["data_wait_share"] == pytest.approx(0.2)
    assert seen["warm_up_seconds"] == pytest.approx(300.75)
    assert seen["other_seconds"] == pytest.approx(500)


def test_a_run_of_ten_thousand_steps_is_measured_not_extrapolated():
    time = FakeTime()
    clock = Clock(torch.device("cpu"), now=time)
    clock.start()
    run_steps(clock, time, 10_000, compute=0.01, wait=0)
    clock.read()
    assert not clock.summary()["time_to_10k_steps_extrapolated"]


def test_counters_go_on_after_a_restart():
    time = FakeTime()
    first = Clock(torch.device("cpu"), now=time)
    first.start()
    run_steps(first, time, WARM_UP_STEPS + 5)
    second = Clock(torch.device("cpu"), now=time)
    second.restore(first.state())
    time.now += 1000  # the time between them is nobody's
    second.start()
    run_steps(second, time, WARM_UP_STEPS + 5)
    second.read()
    assert second.steps == 10
    assert second.summary()["steps_per_second"] == pytest.approx(0.8)


def test_nothing_measured_reads_as_unknown_not_as_zero():
    seen = Clock(torch.device("cpu")).summary()
    assert seen["time_to_10k_steps"] is None
    assert seen["data_wait_share"] is None


def test_resident_memory_peak_sees_an_allocation_and_can_be_reset():
    device = torch.device("cpu")
    reset_memory(device)
    before = memory(device)["rss_peak_gib"]
    block = np.ones(2**27, np.uint8)  # 128 MiB
    assert memory(device)["rss_peak_gib"] >= before + 0.11
    del block
    reset_memory(device)
    assert memory(device)["rss_peak_gib"] < before + 0.06
    assert memory(device)["vram_peak_gib"] is None


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has", 0.02),
        ("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has", 1.5),
        ("CUDA out of memory. Tried to allocate 512.00 KiB.", 0.0),
        ("CUDA error: out of memory", None),
    ],
)
def test_how_much_did_not_fit_is_read_from_the_error(text, gib):
    found = out_of_memory(torch.device("cpu"), torch.cuda.OutOfMemoryError(text), 4.7496)
    assert found["asked_gib"] == gib
    assert found["limit_gib"] == 4.75
    assert found["peak_gib"] is None  # nothing was measured on a CPU
