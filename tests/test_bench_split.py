"""Parts of a step, its operations and bytes, against those counted by hand."""

import queue

import numpy as np
import pytest
import torch
from test_bench_step import Clock
from torch import nn

from bgray import bench_split
from bgray.bench_split import PARTS, Borders, counted, floor_seconds, saved_bytes, with_borders
from bgray.bench_turns import Link
from bgray.data import Batch
from bgray.devices import Peak
from bgray.experiment import prepare_data, resolve
from bgray.loop import fit
from bgray.losses import LossSum
from bgray.losses.waveform import L1
from bgray.optim import adamw

CPU = torch.device("cpu")
CLOCK = Clock()


class SlowBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        CLOCK.sleep(0.02)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        CLOCK.sleep(0.05)
        return grad


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return SlowBack.apply(x * self.gain)[:, None]


def test_each_part_has_its_own_time_and_together_they_are_the_whole(monkeypatch):
    monkeypatch.setattr(bench_split, "time", CLOCK)
    model, loss = Slow(), LossSum({"l1": (L1(), 1.0)})
    optimizer = adamw(model, lr=1e-3)
    update, evaluate = optimizer.step, loss.forward

    def slow_update():
        CLOCK.sleep(0.04)
        return update()

    def slow_loss(*args):
        CLOCK.sleep(0.03)
        return evaluate(*args)

    def batches():
        for step in range(4):
            CLOCK.sleep(0.06)
            x = np.ones((1, 1, 8), np.int16)
            yield Batch(step, x, 2 * x[:, None])

    optimizer.step, loss.forward = slow_update, slow_loss
    borders = Borders(CPU)
    watched, stream = with_borders(borders, model, loss, optimizer, batches())
    began = CLOCK.now
    fit(watched, loss, optimizer, stream, steps=4, report=lambda *a: None)
    borders.mark("rest")
    assert sum(borders.seconds.values()) == pytest.approx(CLOCK.now - began)
    least = {"data wait": 0.06, "forward": 0.02, "loss": 0.03, "backward": 0.05, "optimizer": 0.04}
    for part, seconds in least.items():
        assert borders.seconds[part] == pytest.approx(4 * seconds), part
    assert set(borders.seconds) == set(PARTS)


@pytest.fixture
def link():
    return Link(queue.Queue(), queue.Queue())


def answer(link):
    kind, found = link.answers.get(timeout=1)
    assert kind == "found"
    return found


def test_a_runs_step_is_split_and_counted_and_its_profile_names_operators(tiny, link, tmp_path):
    experiment = resolve(tiny, "f")
    from bgray.bench_trial import pinned

    own, prepared = pinned(experiment, CPU), prepare_data(experiment)
    bench_split.split(link, own, prepared, 1, 2)
    parts = answer(link)
    assert tuple(parts) == PARTS
    assert min(parts[key] for key in ("forward", "loss", "backward", "optimizer")) > 0
    bench_split.floor(link, own, prepared)
    found = answer(link)
    assert found["matrix"]["fp32"] > 0
    assert found["vector"] > 0
    assert found["saved"] > 0
    trace = tmp_path / "trace.json"
    bench_split.profile(link, own, prepared, 1, 1, str(trace))
    seen = answer(link)
    assert seen["on"] == "CPU"
    assert sum(seen["syncs"].values()) == 0
    assert any("aten::" in row["name"] for row in seen["top"])
    assert trace.stat().st_size > 1000
    assert not (tmp_path / "results").exists()


class Wrapped(nn.Module):
    """(B, C, T) -> (B, 1, C, T) through one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[:, None]


def flops_of(layer, inputs, *, learned_input=False):
    inputs = inputs.requires_grad_(learned_input)
    model, loss = Wrapped(layer), LossSum({"l1": (L1(), 1.0)})
    targets = torch.zeros_like(model(inputs)).detach()
    optimizer = adamw(model, lr=1e-3)
    return counted(model, loss, optimizer, inputs, targets, bf16=False)


def test_a_linear_layers_operations_are_two_for_each_weight_and_row_three_times():
    x = torch.randn(2, 3, 8)
    found = flops_of(nn.Linear(8, 16), x, learned_input=True)
    assert found["matrix"] == {"fp32": 3 * 2 * 6 * 8 * 16}
    assert found["vector"] == 0
    # The gradient of an input that nobody asks for is not computed.
    assert flops_of(nn.Linear(8, 16), x.detach())["matrix"] == {"fp32": 2 * 2 * 6 * 8 * 16}
    assert found["parameters"] == 4 * (8 * 16 + 16)
    assert found["state"] == pytest.approx(2 * found["parameters"], abs=16)  # and two step counts


def test_a_depthwise_convolutions_gradients_cost_what_its_forward_pass_does():
    x = torch.randn(2, 6, 32)
    found = flops_of(nn.Conv1d(6, 6, 5, padding=2, groups=6), x, learned_input=True)
    assert found["vector"] == 3 * 2 * (2 * 6 * 32) * 5
    assert found["matrix"] == {}
    dense = flops_of(nn.Conv1d(6, 4, 5, padding=2), x.detach(), learned_input=True)
    assert dense["matrix"] == {"fp32": 3 * 2 * (2 * 4 * 32) * 6 * 5}


def test_transforms_count_and_bf16_products_are_told_apart():
    class Magnitudes(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.fft.rfft(x * self.gain).abs()

    found = flops_of(Magnitudes(), torch.randn(2, 1, 64))
    assert found["vector"] >= 2.5 * 128 * 6
    model, loss = Wrapped(nn.Linear(8, 8)), LossSum({"l1": (L1(), 1.0)})
    x = torch.randn(1, 2, 8)
    seen = counted(model, loss, adamw(model, lr=1e-3), x, torch.zeros(1, 1, 2, 8), bf16=True)
    assert seen["matrix"] == {"bf16": 2 * 2 * 2 * 8 * 8}


def test_saved_bytes_are_those_of_what_the_backward_pass_needs_and_no_weights():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1000))

        def forward(self, x):
            return ((x * self.gain) ** 2)[:, None]

    x = torch.randn(2, 3, 1000)
    loss = LossSum({"l1": (L1(), 1.0)})
    found = saved_bytes(Squares(), loss, x, torch.zeros(2, 1, 3, 1000))
    # x for the gain, x * gain for the square; the sign or the difference for the mean.
    size = 4 * 6000
    assert 3 * size <= found <= 4 * size


def test_the_floor_is_hand_computed_operations_and_bytes():
    peak = Peak("toy", {"fp32": 1.0, "tf32": 2.0, "bf16": 4.0}, 10.0, "made up")
    found = {
        "matrix": {"fp32": 2e12, "bf16": 4e12},
        "vector": 1e12,
        "parameters": 1e9,
        "state": 0.5e9,
        "saved": 1e9,
    }
    least = floor_seconds(found, "bf16", peak)
    assert least["compute"] == pytest.approx(1.0 + 1.0 + 1.0)  # the losses' products are tf32 then
    assert least["bytes"] == pytest.approx(7e9 + 1e9 + 2e9)
    assert least["memory"] == pytest.approx(1.0)
    exact = floor_seconds({**found, "matrix": {"fp32": 2e12}}, "fp32", peak)
    assert exact["compute"] == pytest.approx(3.0)
