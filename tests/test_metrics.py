"""The scores on tones, where the answer is known, and on silence."""

import pytest
import torch
from auraloss.time import SISDRLoss

from bgray.metrics import sdr, si_sdr, usdr

SAMPLES = 4_800


def sine(periods, amplitude=1.0):
    t = torch.arange(SAMPLES, dtype=torch.float64) / SAMPLES
    return amplitude * torch.sin(2 * torch.pi * periods * t)


@pytest.mark.parametrize("score", [si_sdr, sdr])
def test_noise_at_a_tenth_of_the_amplitude_reads_20_db(score):
    target, noise = sine(100), sine(300)  # orthogonal over whole periods
    assert score(target + 0.1 * noise, target).item() == pytest.approx(20, abs=0.01)


@pytest.mark.parametrize("gain", [0.01, 0.5, -3.0])
def test_si_sdr_does_not_hear_gain_sign_or_offset(gain):
    target, estimate = sine(100), sine(100) + 0.1 * sine(300)
    changed = gain * estimate + 0.7
    assert si_sdr(changed, target).item() == pytest.approx(20, abs=0.01)


def test_sdr_hears_gain():
    target = sine(100)
    assert sdr(0.9 * target, target).item() == pytest.approx(20, abs=1e-3)
    assert sdr(-target, target).item() == pytest.approx(-6.02, abs=0.01)


def test_leading_axes_are_scored_one_by_one():
    target = torch.stack([sine(100), sine(50)])  # (2, T)
    estimate = target + torch.tensor([[0.1], [1.0]]) * sine(300)
    for score in (si_sdr, sdr):
        torch.testing.assert_close(
            score(estimate, target), torch.tensor([20.0, 0.0]).double(), atol=0.01, rtol=0
        )


def test_si_sdr_is_auralosss_loss_negated():
    rng = torch.Generator().manual_seed(0)
    target = torch.randn(3, 2, SAMPLES, generator=rng)
    estimate = target + 0.5 * torch.randn(3, 2, SAMPLES, generator=rng) + 0.1
    reference = -SISDRLoss(reduction="none")(estimate, target)
    torch.testing.assert_close(si_sdr(estimate, target), reference, rtol=1e-5, atol=1e-5)


def test_si_sdr_of_silence_is_minus_80_db():
    tone, silence = sine(100), torch.zeros(SAMPLES)
    for estimate, target in [(silence, tone), (tone, silence), (silence, silence)]:
        assert si_sdr(estimate, target).item() == pytest.approx(-80, abs=1e-3)


def test_sdr_of_silence_is_0_db_unless_only_the_target_is_silent():
    tone, silence = sine(100), torch.zeros(SAMPLES)
    assert sdr(silence, tone).item() == pytest.approx(0, abs=1e-6)
    assert sdr(silence, silence).item() == 0
    energy_db = 33.80  # 4800 samples of 1/2
    assert sdr(tone, silence).item() == pytest.approx(-100 - energy_db, abs=0.01)


def test_perfect_estimates_score_high_but_finite():
    target = sine(100)
    assert 100 < si_sdr(target, target) < 200
    assert sdr(target, target).item() == pytest.approx(133.80, abs=0.01)


def test_constant_audio_counts_as_silent_for_si_sdr():
    constant = torch.full((SAMPLES,), 0.5)
    assert si_sdr(constant, constant).item() == pytest.approx(-80, abs=1e-3)


def test_half_precision_is_scored_in_float32():
    target = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0)).bfloat16()
    estimate = (0.9 * target).bfloat16()
    for score in (si_sdr, sdr):
        found = score(estimate, target)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, score(estimate.float(), target.float()))


def test_usdr_pools_the_energy_of_all_channels():
    loud, quiet = sine(100), sine(50, 0.1)  # 20 dB apart
    target = torch.stack([loud, quiet])[None]  # (1, 2, T)
    estimate = target.clone()
    estimate[0, 1] += sine(300, 0.1)  # 0 dB in the quiet channel, 20.04 dB over both
    assert usdr(estimate, target).item() == pytest.approx(20.043, abs=1e-3)
    assert usdr(estimate.float(), target.float()).dtype == torch.float64
    assert sdr(estimate, target).mean() > 60  # what a mean over channels would have said
