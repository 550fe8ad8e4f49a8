"""What only a CUDA device can show; `pytest -m gpu` where there is one."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import test_models
import torch
from torch import nn

from bgray import packing
from bgray.context import Context
from bgray.experiment import prepare_data, resolve, run_url
from bgray.optim import muon
from bgray.probes import GIB, out_of_memory
from bgray.records import CTRL_C, read_info, read_lines
from bgray.rehearsal import rehearse
from bgray.step import split_extras
from bgray.trial import run_trial

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def train(raw, **context):
    experiment = resolve(raw, "gpu test")
    run_trial(experiment, prepare_data(experiment), Context(device=CUDA, **context))
    return run_url(experiment)


def losses(url):
    return [line["loss"] for line in read_lines(f"{url}/metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_gpu_follows_the_cpu_within_its_precision(tiny, tmp_path, precision):
    tiny["optim"] = {"name": "adamw", "lr": 1e-3}
    tiny["train"]["precision"] = "fp32"
    tiny["runtime"]["results"] = str(tmp_path / "cpu")
    experiment = resolve(tiny, "cpu")
    run_trial(experiment, prepare_data(experiment), Context())
    tiny["train"]["precision"] = precision
    tiny["runtime"]["results"] = str(tmp_path / "gpu")
    # tf32 has 10 bits of mantissa, bf16 has 7; the losses here are means over 2048 samples.
    tolerance = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}[precision]
    assert losses(train(tiny)) == pytest.approx(losses(run_url(experiment)), rel=tolerance)


def test_peaks_are_measured_and_a_big_model_needs_more(tiny):
    small = read_info(train(tiny))["timing"]
    tiny["model"]["channels"] = [64, 128, 256]
    big = read_info(train(tiny))["timing"]
    assert 0 < small["vram_peak_gib"] < big["vram_peak_gib"] <= big["vram_reserved_gib"]


def test_compiling_changes_speed_and_not_the_curve(tiny, tmp_path):
    tiny["optim"] = {"name": "adamw", "lr": 1e-3}
    tiny["train"]["precision"] = "fp32"
    eager = losses(train(tiny))
    tiny["runtime"] |= {"compile": True, "results": str(tmp_path / "compiled")}
    url = train(tiny)
    assert losses(url) == pytest.approx(eager, rel=1e-3)
    assert read_info(url)["choices"]["compile"] is True


def test_a_run_stopped_and_resumed_on_the_gpu_ends_where_the_unbroken_one_does(tiny, tmp_path):
    tiny["train"]["precision"] = "fp32"
    unbroken = losses(train(tiny))
    tiny["runtime"]["results"] = str(tmp_path / "broken")
    asked = iter(range(100))
    train(tiny, stop=lambda: CTRL_C if next(asked) == 4 else "")
    # cuDNN's backward kernels may add up in another order from run to run.
    assert losses(train(tiny)) == pytest.approx(unbroken, rel=1e-3)


def test_too_little_memory_is_a_result_that_says_so(tiny):
    tiny["train"]["batch_size"] = 4
    tiny["model"]["channels"] = [64, 128, 256]
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            train(tiny, vram_gib=0.005)
    finally:  # the next run would do so itself, the next test may be none
        torch.cuda.set_per_process_memory_fraction(1.0)
    info = read_info(run_url(resolve(tiny, "gpu test")))
    assert info["state"] == "out_of_memory"
    assert "lower train.batch_size" in info["reason"]


def test_muon_on_the_gpu_follows_the_cpu():
    def steps(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8))
        x = torch.randn(16, 32)
        model, x = model.to(device), x.to(device)
        optimizer = muon(model, lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])

    # Newton-Schulz runs in bf16 on both, with products added up in another order.
    assert torch.allclose(steps("cuda"), steps("cpu"), atol=5e-3)


@pytest.mark.parametrize("key", test_models.TINY)
def test_every_model_gives_on_the_gpu_what_it_gives_on_the_cpu(key):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model = test_models.build(key).eval()
    inputs = test_models.batch(key, 2)
    with torch.no_grad():
        expected, _ = split_extras(model(inputs))
        found, _ = split_extras(model.to(CUDA)(inputs.to(CUDA)))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("key", test_models.TINY)
def test_every_models_core_compiles_and_other_lengths_still_run(key):
    model = test_models.build(key).to(CUDA)
    getattr(model, "core", model).compile()
    inputs = test_models.batch(key, 2).to(CUDA)
    split_extras(model(inputs))[0].square().mean().backward()
    model.eval()
    with torch.no_grad():
        longer = torch.cat([inputs, inputs], dim=-1)
        assert split_extras(model(longer))[0].shape[-1] == longer.shape[-1]


# --- several on one GPU


def wide(raw, **train):
    """Tens to hundreds of MiB on the GPU, whose allocator grows by 2 to 20 MiB at a time."""
    raw["model"]["channels"] = [32, 64, 128]
    raw["data"]["segment"] = 8192
    raw["validation"]["segment"] = 32768
    raw["train"] |= {"batch_size": 32, **train}
    raw["runtime"] |= {"device": "cuda", "checkpoint_every": 24}
    return raw


def trained(raw, limit_gib=None):
    """In a process of its own: run.json after a run that may have had too little memory."""
    experiment = resolve(raw, "gpu test")
    context = Context(device=CUDA, vram_gib=limit_gib, packed=limit_gib is not None)
    try:
        run_trial(experiment, prepare_data(experiment), context)
    except torch.cuda.OutOfMemoryError as error:
        return read_info(run_url(experiment)), out_of_memory(CUDA, error, limit_gib)
    return read_info(run_url(experiment)), None


@pytest.fixture
def apart():
    """Fresh processes, two at a time: nothing of one stays on the GPU for the next."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
        yield pool


def test_the_probes_peak_is_that_of_a_run_within_a_tenth(tiny, apart):
    raw = wide(tiny)
    found = apart.submit(packing.probe, resolve(raw, "gpu test")).result()
    info, _ = apart.submit(trained, raw).result()
    assert not found["out_of_memory"]
    assert found["vram_gib"] == pytest.approx(info["timing"]["vram_reserved_gib"], rel=0.1)
    assert 0 < found["overhead_gib"]
    free, total = torch.cuda.mem_get_info()
    assert found["gpu_gib"] == pytest.approx(total / GIB)


def test_a_process_over_its_limit_runs_out_of_memory_and_its_neighbour_does_not(tiny, apart):
    raw = wide(tiny, steps=48)
    peak = apart.submit(packing.probe, resolve(raw, "gpu test")).result()["vram_gib"]
    enough, too_little = 1.2 * peak + 0.1, 0.4 * peak
    neighbour = apart.submit(trained, {**raw, "name": "neighbour"}, enough)
    info, oom = apart.submit(trained, {**raw, "name": "over"}, too_little).result()
    assert info["state"] == "out_of_memory"
    assert oom["reserved_gib"] <= too_little + 0.002
    assert oom["limit_gib"] == pytest.approx(too_little, abs=0.001)
    assert oom["asked_gib"] is not None
    info, _ = neighbour.result()
    assert info["state"] == "finished"


def test_two_packed_trials_on_one_gpu_end_as_they_do_alone(tiny, apart, tmp_path):
    raw = wide(tiny, precision="fp32")
    raw["optim"] = {"name": "adamw", "lr": 1e-3}
    packer = packing.Packer(str(tmp_path))
    packer.learn_probe("a", apart.submit(packing.probe, resolve(raw, "gpu test")).result())
    share = packer.share("a")
    assert not share.alone
    names = ("one", "two")
    both = [apart.submit(trained, {**raw, "name": name}, share.limit_gib) for name in names]
    assert [job.result()[0]["state"] for job in both] == ["finished", "finished"]
    alone, _ = apart.submit(trained, {**raw, "name": "alone"}).result()
    assert alone["state"] == "finished"
    curves = [losses(run_url(resolve({**raw, "name": n}, "gpu test"))) for n in (*names, "alone")]
    # cuDNN may pick other kernels where memory is short.
    assert curves[0] == pytest.approx(curves[2], rel=1e-2)
    assert curves[1] == pytest.approx(curves[2], rel=1e-2)


def test_a_rehearsal_leaves_the_clock_to_the_gpu_and_sees_its_memory(tiny):
    cost = rehearse(resolve(wide(tiny), "gpu test"), Context(device=CUDA), steps=20, each=10)
    assert len(cost.step_seconds) == 2
    assert 0 < cost.vram_gib < cost.gpu_gib
    assert cost.device == torch.cuda.get_device_name()


@pytest.mark.ray
def test_a_sweeps_trials_are_probed_on_ray_and_packed(tiny, tmp_path):
    from bgray.resources import Plan, of_cluster
    from bgray.session import ray_session

    raw = wide(tiny)
    raw["runtime"]["vram"] = "auto"
    experiment = resolve(raw, "gpu test")
    with ray_session() as ray:
        plan = Plan.make(experiment, 4, of_cluster(ray))
        packer = packing.prepare(ray, {"a": experiment}, plan, str(tmp_path))
        share = packer.share("a")
        assert not share.alone
        assert Plan.make(experiment, 4, of_cluster(ray), [share] * 4).concurrency >= 2


@pytest.mark.slow
def test_packs_throughput_is_measured(tiny, tmp_path, capsys):
    import json

    import yaml

    from bgray.bench import main

    path = tmp_path / "wide.yaml"
    path.write_text(yaml.safe_dump(wide(tiny)))
    main(["pack", str(path), "--rounds", "1", "--seconds", "3", "--most", "2", "--json"])
    seen = json.loads(capsys.readouterr().out)
    assert seen["at_a_time"] == 2
    assert seen["ratio"] == pytest.approx(sum(seen["packed"][0]) / seen["alone"][0])
