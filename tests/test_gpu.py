"""What only a CUDA device can show; `pytest -m gpu` where there is one."""

import pytest
import test_models
import torch
from torch import nn

from bgray.context import Context
from bgray.experiment import prepare_data, resolve, run_url
from bgray.loop import split_extras
from bgray.optim import muon
from bgray.records import read_info, read_lines
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
    assert read_info(url)["compiled"] == "default"


def test_a_run_stopped_and_resumed_on_the_gpu_ends_where_the_unbroken_one_does(tiny, tmp_path):
    tiny["train"]["precision"] = "fp32"
    unbroken = losses(train(tiny))
    tiny["runtime"]["results"] = str(tmp_path / "broken")
    asked = iter(range(100))
    train(tiny, stop=lambda: next(asked) == 4)
    # cuDNN's backward kernels may add up in another order from run to run.
    assert losses(train(tiny)) == pytest.approx(unbroken, rel=1e-3)


def test_too_little_memory_is_a_result_that_says_so(tiny):
    tiny["train"]["batch_size"] = 4
    tiny["model"]["channels"] = [64, 128, 256]
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            train(tiny)
    finally:
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
