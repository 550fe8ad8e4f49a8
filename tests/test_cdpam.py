"""CDPAM as a loss: what the package gets to hear, and what is said where it is missing."""

import importlib.machinery
import importlib.util
import os
import sys
import types

import pytest
import torch
from torch import nn

from bgray.losses.cdpam import Cdpam


class Recorder:
    """cdpam.CDPAM's interface: the distance is that of the means of two samples' networks."""

    def __init__(self, dev="cuda:0"):
        self.loaded_with = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
        self.device = torch.device(dev)
        self.model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.heard = []

    def forward(self, wav_in, wav_out):
        self.heard.append((wav_in, wav_out))
        return (wav_in - wav_out).abs().mean(1)


@pytest.fixture
def _fake(monkeypatch):
    module = types.ModuleType("cdpam")
    module.__spec__ = importlib.machinery.ModuleSpec("cdpam", None)
    module.CDPAM = Recorder
    monkeypatch.setitem(sys.modules, "cdpam", module)


def noise(*shape, seed=0):
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("_fake")
def test_it_hears_the_target_first_at_22050_hz_in_the_range_of_16_bits():
    loss = Cdpam(sample_rate=44_100)
    estimate, target = torch.zeros(1, 2, 2, 4410), torch.full((1, 2, 2, 4410), 0.5)
    value = loss(estimate, target).item()
    reference, heard = loss.metric.heard[0]
    assert reference.shape == heard.shape == (4, 2205)
    assert reference[:, 200:-200].mean().item() == pytest.approx(0.5 * 32768, rel=1e-3)
    assert not heard.any()
    assert value == pytest.approx(0.5 * 32768, rel=2e-2)


@pytest.mark.usefixtures("_fake")
def test_rate_and_range_are_left_alone_if_told_to():
    loss = Cdpam(sample_rate=48_000, resample=False, int16_range=False)
    estimate, target = noise(2, 1, 1, 480), noise(2, 1, 1, 480, seed=1)
    assert loss(estimate, target).item() == pytest.approx((estimate - target).abs().mean().item())
    assert torch.equal(loss.metric.heard[0][0], target[:, 0, 0])


@pytest.mark.usefixtures("_fake")
def test_the_network_is_frozen_and_stays_in_evaluation_mode():
    loss = Cdpam(sample_rate=22_050).train()
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not any(module.training for module in loss.modules())
    assert sum(parameter.numel() for parameter in loss.parameters()) == 12


@pytest.mark.usefixtures("_fake")
def test_the_packages_pickle_may_be_loaded_and_nothing_after_it(monkeypatch):
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(name, raising=False)
    assert Cdpam(sample_rate=22_050).metric.loaded_with == "1"
    assert name not in os.environ
    monkeypatch.setenv(name, "0")
    assert Cdpam(sample_rate=22_050).metric.loaded_with == "1"
    assert os.environ[name] == "0"


def test_without_the_package_check_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "cdpam", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "cdpam is not installed; pip install 'bgray[cdpam]'"
    assert Cdpam.check(resample=True, int16_range=True) == [("package", message)]
    with pytest.raises(ValueError, match=r"pip install 'bgray\[cdpam\]'"):
        Cdpam(sample_rate=22_050)
