"""What every loss in the table sees and what it is blind to, written down and checked."""

import functools
import importlib.machinery
import importlib.util
import sys
import types
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import nn

from bgray.losses import LOSSES, LossSum


@dataclass(frozen=True)
class Behaviour:
    gain: Literal["sees", "blind"]
    """Whether the estimate at another gain costs something else."""
    sign: Literal["sees", "blind"]
    """Whether the estimate with its sign turned costs something else."""
    silence: Literal["finite", "nan"]
    """What an exactly silent estimate, target, or both give."""
    start: Literal["gradient", "none"]
    """What an exactly silent estimate gets from a target that sounds."""
    batch: Literal["mean", "coupled"]
    """Whether the loss of a batch is the mean of the losses of its items."""
    best: Literal["zero", "bound", "latents"] = "zero"
    """What a perfect estimate costs; `latents`: the estimate does not matter at all."""


BEHAVIOUR = {
    "l1": Behaviour("sees", "sees", "finite", "gradient", "mean"),
    "mse": Behaviour("sees", "sees", "finite", "gradient", "mean"),
    "mrstft": Behaviour("sees", "blind", "finite", "none", "coupled"),
    "multi_mel": Behaviour("sees", "blind", "finite", "none", "mean"),
    "spectrogram": Behaviour("sees", "blind", "finite", "none", "mean"),
    "spectrogram original": Behaviour("blind", "blind", "nan", "none", "coupled"),
    "spec_mae": Behaviour("sees", "sees", "finite", "gradient", "mean"),
    "spec_mae original": Behaviour("sees", "sees", "nan", "none", "coupled"),
    "sum_constraint": Behaviour("sees", "sees", "finite", "gradient", "mean"),
    "dac_features": Behaviour("sees", "sees", "finite", "gradient", "mean"),
    "dac_features residual_units": Behaviour("sees", "sees", "finite", "gradient", "mean"),
    "cdpam": Behaviour("sees", "sees", "finite", "gradient", "mean"),
    "si_sdr": Behaviour("blind", "blind", "finite", "none", "mean", "bound"),
    "umx_mse": Behaviour("sees", "blind", "finite", "gradient", "mean"),
    "bce_logits": Behaviour("sees", "sees", "finite", "gradient", "mean"),
    "dice": Behaviour("sees", "sees", "finite", "gradient", "coupled"),
    "kl": Behaviour("blind", "blind", "finite", "gradient", "mean", "latents"),
}
"""By loss, and loss with an option that changes what it does."""

OPTIONS = {
    "spectrogram original": {"version": "original"},
    "spec_mae original": {"version": "original"},
    "dac_features": {"weights": "random"},
    "dac_features residual_units": {"weights": "random", "layers": "residual_units"},
}
ROLLS = ("bce_logits", "dice")


class FakeCdpam:
    """The interface of cdpam.CDPAM on a tiny network, where the package is not installed."""

    def __init__(self, dev="cuda:0"):
        self.device = torch.device(dev)
        conv = nn.Conv1d(1, 4, 15, stride=4)
        with torch.no_grad():
            conv.weight.copy_(torch.linspace(-1, 1, 60).sin().reshape(4, 1, 15) / 2000)
            conv.bias.copy_(torch.tensor([0.1, -0.1, 0.2, -0.2]))
        self.model = nn.Sequential(conv, nn.LeakyReLU(0.1), nn.AdaptiveAvgPool1d(16))

    def forward(self, wav_in, wav_out):
        a, b = (self.model(x.to(self.device)[:, None]) for x in (wav_in, wav_out))
        return (a - b).abs().sum((1, 2))


@pytest.fixture(autouse=True)
def _cdpam(monkeypatch):
    if "cdpam" in sys.modules or importlib.util.find_spec("cdpam"):
        return
    module = types.ModuleType("cdpam")
    module.__spec__ = importlib.machinery.ModuleSpec("cdpam", None)
    module.CDPAM = FakeCdpam
    monkeypatch.setitem(sys.modules, "cdpam", module)


@functools.cache  # for speed: no test changes a loss that came from here
def build(label):
    entry = LOSSES[label.split()[0]]
    context = {"sample_rate": 44_100} if "sample_rate" in entry.__init__.__annotations__ else {}
    return entry(**context, **OPTIONS.get(label, {}))


def noise(*shape, seed=0):
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shape_of(label):
    """(B, S, C, T); the network at the full rate is slow."""
    return 2, 2, 1, 1024 if label.startswith("dac_features") else 4410


def target_of(label):
    """Noise, the second item a fifth as loud, or rolls, the second a fifth as dense."""
    scale = torch.tensor([1.0, 0.2])[:, None, None, None]
    if label in ROLLS:
        return (20 * noise(*shape_of(label)).abs() < 0.5 * scale).float()
    return scale * noise(*shape_of(label))


def perfect(label, target):
    return 60 * target - 30 if label in ROLLS else target


def other(label):
    return (
        20 * noise(*shape_of(label), seed=1) if label in ROLLS else noise(*shape_of(label), seed=1)
    )


def apply(loss, label, estimate, target):
    """(loss, the leaf whose gradient trains the model): extras made as the model would."""
    if label == "umx_mse":
        leaf = loss.magnitude(estimate.float()).to(estimate.dtype).requires_grad_()
        return loss(estimate, target, {"magnitude": leaf}), leaf
    if label == "kl":
        leaf = noise(*target.shape[:1], 8, seed=2).requires_grad_()
        return loss(estimate, target, latents(leaf)), leaf
    leaf = estimate.detach().clone().requires_grad_()
    return loss(leaf, target), leaf


def latents(mean):
    return {"mean": mean, "log_variance": torch.zeros_like(mean)}


def cost(loss, label, estimate, target):
    return apply(loss, label, estimate, target)[0].item()


def test_every_loss_of_the_table_is_described():
    assert {label.split()[0] for label in BEHAVIOUR} == set(LOSSES)
    assert set(OPTIONS) <= set(BEHAVIOUR)


@pytest.mark.filterwarnings("ignore:dac_features has random weights")
@pytest.mark.parametrize("label", BEHAVIOUR)
class TestContract:
    def test_a_perfect_estimate_costs_nothing_or_least(self, label):
        loss, target = build(label), target_of(label)
        best = cost(loss, label, perfect(label, target), target)
        worse = cost(loss, label, other(label), target)
        if BEHAVIOUR[label].best == "latents":
            assert best == worse
        else:
            assert best < worse
            assert best < -80 if BEHAVIOUR[label].best == "bound" else best == pytest.approx(0)

    def test_larger_errors_cost_more(self, label):
        loss, target = build(label), target_of(label)
        costs = [
            cost(loss, label, perfect(label, target) + gain * other(label), target)
            for gain in (0.01, 0.1, 1)
        ]
        assert costs == sorted(costs)

    @pytest.mark.parametrize("change", ["gain", "sign"])
    def test_gain_and_sign_are_seen_or_not_as_written_down(self, label, change):
        loss, target = build(label), target_of(label)
        factors = (0.5, 2.0) if change == "gain" else (-1.0,)
        best = perfect(label, target)
        noisy = best + 0.3 * other(label)
        for factor in factors:
            if getattr(BEHAVIOUR[label], change) == "blind":
                before, after = (cost(loss, label, x, target) for x in (noisy, factor * noisy))
                assert after == pytest.approx(before, rel=1e-3)
            elif factor == 2 and label in ROLLS:
                continue  # louder logits are surer ones
            else:
                before, after = (cost(loss, label, x, target) for x in (best, factor * best))
                assert after > before + 1e-9

    @pytest.mark.parametrize("case", ["equal", "silent estimate", "silent target", "both silent"])
    def test_silence_and_equality_give_finite_gradients_unless_written_down(self, label, case):
        loss, target = build(label), target_of(label)
        estimate = perfect(label, target) if case == "equal" else other(label)
        estimate = 0 * estimate if case in ("silent estimate", "both silent") else estimate
        target = 0 * target if case in ("silent target", "both silent") else target
        value, leaf = apply(loss, label, estimate, target)
        value.backward()
        if BEHAVIOUR[label].silence == "nan" and "silent" in case:
            assert value.isnan()
            return
        assert value.isfinite()
        assert leaf.grad.isfinite().all()
        if case == "silent estimate":
            assert bool(leaf.grad.any()) == (BEHAVIOUR[label].start == "gradient")

    def test_the_loss_of_a_batch_is_the_mean_of_its_items_or_not_as_written_down(self, label):
        loss, target, estimate = build(label), target_of(label), other(label)
        if label == "kl":  # its latents are what differs between items
            mean = noise(2, 8, seed=2)
            items = [
                loss(estimate[i : i + 1], target[i : i + 1], latents(mean[i : i + 1]))
                for i in range(2)
            ]
            whole = loss(estimate, target, latents(mean)).item()
        else:
            items = [
                apply(loss, label, estimate[i : i + 1], target[i : i + 1])[0] for i in range(2)
            ]
            whole = cost(loss, label, estimate, target)
        same = whole == pytest.approx(torch.stack(items).mean().item(), rel=1e-4)
        assert same == (BEHAVIOUR[label].batch == "mean")

    def test_the_order_of_the_batch_changes_nothing(self, label):
        loss, target = build(label), target_of(label)
        estimate = perfect(label, target) + 0.3 * other(label)
        forward = cost(loss, label, estimate, target)
        backward = cost(loss, label, estimate.flip(0), target.flip(0))
        assert backward == pytest.approx(forward, rel=1e-5)

    def test_bfloat16_autocast_changes_nothing(self, label):
        loss, target, estimate = build(label), target_of(label), other(label)
        with torch.autocast("cpu", torch.bfloat16):
            inside = apply(loss, label, estimate, target)[0]
        assert inside.dtype == torch.float32
        assert torch.equal(inside, apply(loss, label, estimate, target)[0])

    def test_bfloat16_estimates_are_compared_in_float32(self, label):
        loss, target, estimate = build(label), target_of(label), other(label).bfloat16()
        found = apply(loss, label, estimate, target)[0]
        assert found.dtype == torch.float32
        if label != "umx_mse":  # whose magnitudes the test rounds too
            assert torch.equal(found, apply(loss, label, estimate.float(), target)[0])

    def test_two_built_alike_agree_to_the_bit(self, label):
        target, estimate = target_of(label), other(label)
        first, second = (
            apply(build.__wrapped__(label), label, estimate, target)[0] for _ in range(2)
        )
        assert torch.equal(first, second)
        assert first.shape == ()

    def test_nothing_to_learn_and_no_network_in_the_checkpoint(self, label):
        loss = build.__wrapped__(label).train()
        assert not any(parameter.requires_grad for parameter in loss.parameters())
        assert not any(part.training for part in loss.modules() if list(part.parameters()))
        saved = LossSum({"it": (loss, 1.0)}).progress()
        assert sum(x.numel() for state in saved.values() for x in state.values()) < 100
        assert bool(saved) == label.startswith("spec_mae")
