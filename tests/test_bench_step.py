"""A measured step: the loops that are compared do the same work, and the figures are theirs."""

import dataclasses
import json
import queue

import pytest
import torch

from bgray import bench_step, bench_trial
from bgray.bench_step import Options, as_text, others
from bgray.bench_turns import Link, spread
from bgray.choices import choose
from bgray.experiment import prepare_data, resolve

CPU = torch.device("cpu")


def turns(work, orders, *args):
    """What a candidate answers when it is ready, and to each order."""
    link = Link(queue.Queue(), queue.Queue())
    for order in (*orders, None):
        link.orders.put(order)
    work(link, *args)
    kept = [link.answers.get_nowait()[1] for _ in range(len(orders) + 1)]
    return kept[0], kept[1:]


@pytest.fixture
def prepared(tiny, monkeypatch):
    monkeypatch.setitem(bench_trial.WARM_UP, "cpu", (2, 0.0))
    experiment = resolve(tiny, "f")
    return bench_trial.pinned(experiment, CPU, depthwise="library"), prepare_data(experiment)


def test_the_plainest_loop_and_a_run_do_the_same_steps(tiny, monkeypatch):
    from bgray import build, trial

    monkeypatch.setitem(bench_trial.WARM_UP, "cpu", (2, 0.0))
    tiny["optim"] = {"name": "sgd", "lr": 0.1}  # which makes no more of rounding than there is
    experiment = resolve(tiny, "f")
    prepared = bench_trial.pinned(experiment, CPU, depthwise="library"), prepare_data(experiment)

    made, real = [], build.build_model

    def remembered(experiment):
        made.append(real(experiment))
        return made[-1]

    monkeypatch.setattr(build, "build_model", remembered)
    monkeypatch.setattr(trial, "build_model", remembered)
    fit = trial.fit
    for work in (bench_trial.plainest, bench_trial.as_trial):
        ready, (first, second) = turns(work, [(1, 3), (0, 4)], *prepared)
        assert ready > 0
        assert (first["steps"], second["steps"]) == (3, 4)
        assert 0 <= first["wait_seconds"] < first["seconds"]
        assert second["rss_peak_gib"] > 0
    assert trial.fit is fit
    plain, ours = made
    before = real(prepared[0])
    moved = [
        (b - a).abs().max().item()
        for a, b in zip(before.parameters(), plain.parameters(), strict=True)
    ]
    assert max(moved) > 1e-3
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_batches_in_memory_are_the_first_ones_again_and_again(prepared):
    ready, (found,) = turns(bench_trial.as_trial, [(0, 20)], *prepared, bench_trial.IN_MEMORY)
    assert found["steps"] == 20
    assert found["wait_seconds"] < 0.2 * found["seconds"]


class Clock:
    """Time that passes only where somebody sleeps; half of it on the CPU."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.now / 2


def test_a_lot_of_steps_is_timed_from_its_lead_in_on_and_questions_while_waiting_are_no_steps(
    monkeypatch,
):
    clock = Clock()
    monkeypatch.setattr(bench_trial, "time", clock)
    monkeypatch.setitem(bench_trial.WARM_UP, "cpu", (2, 0.0))
    link = Link(queue.Queue(), queue.Queue())
    for order in ((2, 3), (0, 1), None):
        link.orders.put(order)
    loop = bench_trial.Turns(link, CPU)

    def slow():
        for step in range(100):
            assert loop.stop() == ""  # as Prefetched asks
            clock.sleep(1)
            yield step

    done = 0
    for _ in loop.watched(slow()):
        done += 1
        clock.sleep(2)
        if loop.stop():
            break
    assert done == 2 + (2 + 3) + 1
    assert link.answers.get_nowait()[1] == 3
    first, second = (link.answers.get_nowait()[1] for _ in range(2))
    assert (first["steps"], second["steps"]) == (3, 1)
    assert (first["seconds"], first["wait_seconds"], first["cpu_seconds"]) == (9, 3, 4.5)
    assert second["seconds"] == 3


def test_each_choice_is_the_only_one_that_is_different(tiny):
    chosen = choose(resolve(tiny, "f"), CPU)
    seen = {name: (work, changed) for name, work, changed in others(chosen, CPU)}
    for name, (work, changed) in seen.items():
        fields = [
            field.name
            for field in dataclasses.fields(chosen)
            if getattr(chosen, field.name) != getattr(changed, field.name)
        ]
        assert len(fields) + bool(work) == 1, name
    assert {"precision bf16", "compile", "depthwise library", "recompute"} < set(seen)
    on_gpu = dict.fromkeys(name for name, _, _ in others(chosen, torch.device("cuda")))
    assert "CUDA graph" in on_gpu


def test_an_optimizer_can_go_tensor_by_tensor_and_learns_the_same(prepared, monkeypatch):
    from bgray import trial

    made, real = [], trial.build_optimizer

    def remembered(experiment, model):
        made.append((model, real(experiment, model)))
        return made[-1][1]

    monkeypatch.setattr(trial, "build_optimizer", remembered)
    for but in ("", bench_trial.ONE_BY_ONE):
        turns(bench_trial.as_trial, [(0, 2)], *prepared, but)
    (batched, _), (single, optimizer) = made
    assert all(len(group["params"]) == 1 for group in optimizer.param_groups)
    for a, b in zip(batched.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def turn(seconds, cpu, steps=10, wait=0.0):
    memory = {"rss_peak_gib": 1.5, "vram_peak_gib": None, "vram_reserved_gib": None}
    return {
        "steps": steps,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "wait_seconds": wait,
        **memory,
    }


def test_ratios_are_of_rounds_and_say_whether_they_overlap():
    fast, slow = [turn(1.0, 2.0), turn(1.0, 2.0)], [turn(2.0, 3.0), turn(4.0, 3.0)]
    ratio = bench_step._ratio(fast, slow)
    assert ratio["rounds"] == [2.0, 4.0]
    assert ratio["median"] == 3.0
    assert ratio["by_cpu"] == pytest.approx(1.5)
    assert ratio["clear"]
    assert not bench_step._ratio(fast, [turn(0.9, 1.0), turn(3.0, 1.0)])["clear"]


def test_the_table_has_the_same_figures_as_the_json():
    mine = [turn(1.0, 2.0, wait=0.1), turn(1.25, 2.0, wait=0.1)]
    theirs = [turn(2.0, 3.0), turn(2.5, 3.0)]
    found = {
        "name": "made up",
        "device": "toy",
        "threads": 1,
        "parameters": 1_234_567,
        "batch": 4,
        "segment": 512,
        "channels": 1,
        "rounds": 2,
        "chosen": {"reasons": ["runtime.compile=false: because"]},
        "candidates": {
            "plainest": bench_step._summary(theirs),
            "bgray": bench_step._summary(mine),
        },
        "ratio": bench_step._ratio(mine, theirs),
        "choices": {"compile": {"error": "no compiler"}},
        "split_steps": 3,
        "split": {"forward": 0.06, "backward": 0.04},
        "floor": {
            "matrix": {"fp32": 2e9},
            "vector": 1e9,
            "saved": 2**30,
            "parameters": 2**20,
            "state": 2**21,
            "peak": None,
        },
        "prediction": {
            "minutes_to_10k": 18.5,
            "minutes_to_10k_without_wait": 17.25,
            "segments_per_second": 40.0,
            "cpu_ms_per_segment": 0.5,
            "cores_per_gpu": 0.02,
        },
    }
    found = json.loads(json.dumps(found))
    text = as_text(found)
    speed = found["candidates"]["bgray"]["steps_per_second"]
    assert speed == spread([10.0, 8.0])
    line = next(line for line in text.splitlines() if line.startswith("bgray  "))
    assert line.split()[1:] == ["9.000", "8.000", "10.000", "0.2000", "1.50", "8.9%"]
    assert "1.23M parameters" in text
    assert "bgray / plainest: 2.000 times (round by round: 2.000, 2.000)" in text
    assert "compile                    failed: no compiler" in text
    assert "sum             100.00 ms; the step as it is, above: 111.11 ms" in text
    assert "not in bgray/devices.py" in text
    assert "10,000 steps: 18.50 minutes, 17.25 without waiting for data" in text


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.ray
def test_a_whole_measurement_in_processes_of_their_own(tiny, tmp_path, capsys):
    import yaml

    from bgray.bench import main

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    main(["step", str(path), "--rounds", "1", "--steps", "8", "--ray", "--json"])
    found = json.loads(capsys.readouterr().out)
    one = found["candidates"]["bgray"]
    assert found["ratio"]["median"] == pytest.approx(
        one["steps_per_second"]["median"]
        / found["candidates"]["plainest"]["steps_per_second"]["median"]
    )
    parts = sum(found["split"].values())
    assert 0.2 < parts * one["steps_per_second"]["median"] < 5
    assert found["floor"]["share"] > 0
    assert found["candidates"]["on Ray"]["steps"] == 8
    bare, there = (
        found["candidates"][name]["steps_per_second"]["median"] for name in ("bare", "on Ray")
    )
    assert found["ray_ratio"]["median"] == pytest.approx(there / bare)
    assert not (tmp_path / "results").exists()


@pytest.mark.gpu
def test_on_a_gpu_a_step_waits_for_nothing_and_its_memory_is_the_gpus(tiny):
    tiny["runtime"]["device"] = "cuda"
    experiment = resolve(tiny, "f")
    found = bench_step.measured(experiment, Options(rounds=1, steps=20, profile=True))
    assert sum(found["profile"]["syncs"].values()) == 0
    assert found["candidates"]["bgray"]["vram_peak_gib"] > 0
