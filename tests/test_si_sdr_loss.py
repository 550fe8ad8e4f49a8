"""The SI-SDR loss against auraloss, and what muted sources do to it."""

import math
import warnings

import pytest
import torch

from bgray.losses.si_sdr import SiSdr

with warnings.catch_warnings():  # of its plotting
    warnings.simplefilter("ignore")
    import auraloss


def noise(*shape, seed=0):
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.01


@pytest.mark.parametrize("shape", [(2, 2, 2, 4410), (3, 1, 1, 1000)])
def test_value_and_gradient_equal_auralosss_on_targets_that_sound(shape):
    target = noise(*shape)
    ours = (0.7 * target + noise(*shape, seed=1)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    found, expected = SiSdr()(ours, target), auraloss.time.SISDRLoss()(theirs, target)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_muted_source_is_left_out_and_auraloss_would_add_80_db():
    target, estimate = noise(1, 4, 1, 4410), noise(1, 4, 1, 4410, seed=1)
    target[:, 3] = 0
    loss = SiSdr()
    sounding = loss(estimate[:, :3], target[:, :3]).item()
    assert loss(estimate, target).item() == pytest.approx(sounding)
    theirs = auraloss.time.SISDRLoss()(estimate, target).item()
    assert theirs == pytest.approx((3 * sounding + 80) / 4, rel=1e-5)
    assert loss(estimate, 0 * target).item() == 0


def test_a_perfect_estimate_reads_the_bound_and_a_silent_one_plus_80_db():
    target = noise(1, 1, 1, 4410)
    energy = (target - target.mean()).square().sum().item()
    bound = -10 * math.log10(energy / 1e-8)
    assert SiSdr()(target, target).item() == pytest.approx(bound, abs=0.1)
    assert SiSdr()(0 * target, target).item() == pytest.approx(80)
