"""Log 000's loss against a slow copy, what its repair changes, and the schedules of beta."""

import math

import numpy as np
import pytest
import torch

from bgray.losses.spectrogram import SpecMae, Spectrogram

RATE = 44_100


def noise(*shape, amplitude=0.05, seed=0):
    return amplitude * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sine(amplitude, hz=441, samples=RATE):
    t = torch.arange(samples) / RATE
    return (amplitude * torch.sin(2 * torch.pi * hz * t))[None, None, None]


def decibels(audio):
    """(B, S, C, T) -> dB re the largest power of all, 80 dB deep: log 000's, frame by frame."""
    window = np.hanning(2206)[:-1]
    rows = np.pad(audio.flatten(0, -2).double().numpy(), [(0, 0), (1102, 1102)], mode="reflect")
    starts = range(0, rows.shape[1] - 2205 + 1, 551)
    frames = np.stack([np.fft.rfft(window * rows[:, i : i + 2205]) for i in starts], axis=-1)
    power = np.abs(frames) ** 2
    db = 10 * np.log10(np.maximum(power / power.max(), 1e-10))
    return np.maximum(db, db.max() - 80)


# --- spectrogram ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 2, 1, 11_025), (1, 1, 2, 4410)])
def test_the_original_equals_the_formula_in_float64(shape):
    target, estimate = noise(*shape) * torch.linspace(0, 1, shape[-1]) ** 6, noise(*shape, seed=1)
    expected = np.mean((decibels(estimate) - decibels(target)) ** 2)
    ours = Spectrogram(version="original")(estimate, target)
    assert ours.item() == pytest.approx(expected, rel=1e-4)


def test_the_original_is_blind_to_gain_and_nan_for_silence():
    loss, x = Spectrogram(version="original"), noise(1, 2, 1, 11_025)
    assert loss(0.01 * x, x).item() < 1e-9
    assert loss(0 * x, x).isnan()


def test_in_the_original_a_loud_neighbour_hides_an_error_and_in_the_repair_it_does_not():
    target = noise(2, 1, 1, 11_025)
    estimate = target.clone()
    estimate[0] += noise(1, 1, 11_025, amplitude=1e-3, seed=1)
    loud = torch.tensor([1.0, 1000.0])[:, None, None, None]
    original, fixed = Spectrogram(version="original"), Spectrogram()
    assert original(loud * estimate, loud * target) < 0.5 * original(estimate, target)
    assert fixed(loud * estimate, loud * target) == pytest.approx(
        fixed(estimate, target).item(), rel=1e-2
    )


def test_half_the_amplitude_is_6_decibels_squared_where_all_is_above_the_floor():
    y = noise(1, 1, 1, 22_050)
    assert Spectrogram()(0.5 * y, y).item() == pytest.approx(20 * math.log10(2) * 6.0206, rel=2e-3)


def test_silence_for_a_full_scale_noise_is_far_and_for_silence_it_is_nothing():
    y, loss = noise(1, 1, 1, 22_050, amplitude=0.3), Spectrogram()
    assert 1000 < loss(0 * y, y).item() < 80**2
    assert loss(0 * y, 0 * y).item() == 0


def test_a_full_scale_sine_is_its_own_reference_and_a_quiet_one_is_20_decibels_below_full_scale():
    loss = Spectrogram()
    full, quiet = (loss.reference(loss.power(sine(a))).item() for a in (1.0, 0.01))
    scale = (loss.window.sum().item() / 2) ** 2
    assert 10 * math.log10(full / scale) == pytest.approx(0, abs=0.05)
    assert 10 * math.log10(quiet / scale) == pytest.approx(-20, abs=1e-3)


def test_what_the_log_calls_silent_costs_next_to_nothing_for_a_muted_source_and_a_leak_costs():
    loss, muted = Spectrogram(), torch.zeros(1, 1, 1, RATE)
    inaudible = 1e-4 * sine(1).sign()  # the loudest of |y| <= 1e-4
    assert loss(inaudible, muted).item() < 1.5
    assert loss(100 * inaudible, muted).item() > 100


def gradient(loss, estimate, target):
    estimate = estimate.clone().requires_grad_()
    loss(estimate, target).backward()
    return estimate.grad.norm().item()


def test_near_silence_the_gradient_is_there_and_does_not_explode():
    target, direction = noise(1, 1, 1, 11_025), noise(1, 1, 1, 11_025, amplitude=1, seed=1)
    norms = [gradient(Spectrogram(), a * direction, target) for a in (0, 1e-8, 1e-6, 1e-3)]
    assert norms[0] == 0  # the same for x and -x, so flat at 0
    assert norms[1] > 0.1
    assert max(norms) < 1e5
    assert gradient(Spectrogram(version="original"), 1e-8 * direction, target) > 1e8


def test_a_tenth_of_a_second_will_do_and_half_a_window_will_not():
    loss = Spectrogram()
    assert loss(noise(1, 1, 1, 4410), noise(1, 1, 1, 4410, seed=1)).isfinite()
    with pytest.raises(ValueError, match="needs 1103 samples or more, got 1102"):
        loss(noise(1, 1, 1, 1102), noise(1, 1, 1, 1102))


SIZES = {"fft_size": 2205, "hop_size": 551, "win_length": 2205}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hop_size": 0}, ("hop_size", "0 must be at least 1")),
        ({"win_length": 2206}, ("win_length", "2206 exceeds fft_size = 2205")),
        (
            {"hop_size": 3000},
            ("hop_size", "3000 skips samples between windows of 2205; use at most 2205"),
        ),
    ],
)
def test_check_names_the_option_and_the_way_out(changes, problem):
    assert Spectrogram.check(**SIZES) == []
    assert Spectrogram.check(**{**SIZES, **changes}) == [problem]


def test_constructors_raise_what_check_finds():
    with pytest.raises(ValueError, match="hop_size: 0 must be at least 1"):
        Spectrogram(hop_size=0)
    with pytest.raises(ValueError, match="beta: -1 must be above 0\npatience: 0 must be at least"):
        SpecMae(beta=-1.0, patience=0)


# --- spec_mae -------------------------------------------------------------------------------------


def alone(x):
    """The mean over the ranks of a run without ranks."""
    return x


def advance(loss, step, spec, mae, average=alone):
    """One training step in which the loss had these parts; the beta after it."""
    loss.logged = {"spec": torch.tensor(spec), "mae": torch.tensor(mae)}
    loss.advance(step, average)
    return loss.beta.item()


def falling_then_flat(steps=1200, seed=0):
    """(spec, mae) of each step: down within 400 steps, then flat but for the noise of batches."""
    rng = np.random.default_rng(seed)
    for k in range(steps):
        jitter = 1 + 0.05 * rng.standard_normal(2)
        yield (
            float((1000 * math.exp(-k / 60) + 20) * jitter[0]),
            float((0.1 * math.exp(-k / 60) + 0.004) * jitter[1]),
        )


def test_fixed_adds_500_times_the_mae_and_logs_the_parts():
    target, estimate = noise(2, 2, 1, 4410), noise(2, 2, 1, 4410, seed=1)
    loss = SpecMae()
    total = loss(estimate, target)
    spec, mae = Spectrogram()(estimate, target), (estimate - target).abs().mean()
    assert total.item() == pytest.approx((spec + 500 * mae).item())
    assert {key: value.item() for key, value in loss.logged.items()} == pytest.approx(
        {"spec": spec.item(), "mae": mae.item(), "beta": 500.0}
    )
    assert {advance(loss, step, 1.0, 1.0) for step in range(1, 300)} == {500.0}


def test_step_changes_beta_after_the_step_it_names():
    loss = SpecMae(mode="step")
    betas = [advance(loss, step, 1.0, 1.0) for step in range(1, 151)]
    assert betas == [500.0] * 99 + [5000.0] * 51


def test_balance_starts_with_equal_terms_and_no_gradient_through_beta():
    target, estimate = noise(2, 2, 1, 4410), noise(2, 2, 1, 4410, seed=1).requires_grad_()
    loss = SpecMae(mode="balance")
    total = loss(estimate, target)
    assert total.item() == pytest.approx(2 * loss.logged["spec"].item())
    (found,) = torch.autograd.grad(total, estimate)
    same = SpecMae(beta=loss.logged["beta"].item())
    (expected,) = torch.autograd.grad(same(estimate, target), estimate)
    torch.testing.assert_close(found, expected)
    before = loss.logged["beta"].item()
    for step in range(1, 11):
        loss.advance(step, alone)
    assert loss.beta.item() == pytest.approx(before)
    loss(0.5 * estimate, target)
    assert loss.logged["beta"].item() == pytest.approx(before)  # held from now on


@pytest.mark.parametrize("seed", range(3))
def test_balance_raises_beta_once_after_the_loss_is_flat(seed):
    loss = SpecMae(mode="balance")
    betas = [advance(loss, k + 1, *parts) for k, parts in enumerate(falling_then_flat(seed=seed))]
    assert betas[:9] == [0.0] * 9  # the choice is made from ten steps
    betas = betas[9:]
    first, second = sorted(set(betas))
    raised_at = betas.index(second)
    assert betas == [first] * raised_at + [second] * (len(betas) - raised_at)
    assert 400 < raised_at < 1000
    assert second * 0.004 / 20 == pytest.approx(10, rel=0.05)


def test_balance_does_not_raise_beta_while_the_loss_still_falls():
    loss = SpecMae(mode="balance")
    for step in range(1, 1001):
        advance(loss, step, 1000 * 0.999**step, 0.1 * 0.999**step)
    assert not loss.raised


def test_balance_raises_beta_at_a_step_if_told_to():
    loss = SpecMae(mode="balance", raise_at="step", raise_step=50, ratio=2.0, raised_ratio=8.0)
    betas = [advance(loss, step, 30.0, 0.01) for step in range(1, 101)]
    assert betas[9:] == pytest.approx([2 * 3000.0] * 40 + [8 * 3000.0] * 51)


def test_balance_waits_for_a_batch_that_sounds():
    loss = SpecMae(mode="balance")
    silence = torch.zeros(1, 2, 1, 4410)
    assert loss(silence, silence).item() == 0
    for step in range(1, 21):
        loss.advance(step, alone)
    assert loss.beta.item() == 0
    assert advance(loss, 21, 30.0, 0.01) == pytest.approx(3000)


def test_one_nearly_silent_batch_at_the_start_does_not_choose_beta():
    loss = SpecMae(mode="balance")
    betas = [advance(loss, 1, 0.01, 1e-4)]  # alone it would say 100
    betas += [advance(loss, step, 30.0, 0.01) for step in range(2, 11)]
    assert betas[-1] == pytest.approx(3000, rel=0.01)


@pytest.mark.parametrize("options", [{"mode": "balance"}, {"mode": "step", "raise_step": 700}])
def test_a_resumed_schedule_continues_to_the_bit(options):
    parts = list(falling_then_flat())
    unbroken, first, second = (SpecMae(**options) for _ in range(3))
    whole = [advance(unbroken, k + 1, *parts[k]) for k in range(len(parts))]
    broken = [advance(first, k + 1, *parts[k]) for k in range(500)]
    second.load_state_dict(first.state_dict())
    broken += [advance(second, k + 1, *parts[k]) for k in range(500, len(parts))]
    assert broken == whole
    assert len(set(whole) - {0.0}) == 2


def test_ranks_with_different_batches_keep_one_beta():
    ranks = [SpecMae(mode="balance"), SpecMae(mode="balance")]
    batches = [list(falling_then_flat(seed=seed)) for seed in (1, 2)]
    for step in range(1, 1001):
        parts = torch.tensor([batch[step - 1] for batch in batches])
        for rank, loss in enumerate(ranks):
            advance(loss, step, *parts[rank].tolist(), average=lambda x: parts.mean(0))  # noqa: B023
        assert ranks[0].beta == ranks[1].beta
    assert ranks[0].raised


# --- why the log saw estimates collapse -----------------------------------------------------------


@pytest.fixture(scope="module")
def turns():
    """Four sources that take turns, (1, 4, 1, T), and their sum for each of them."""
    target, quarter = torch.zeros(1, 4, 1, 22_050), 22_050 // 4
    for i, hz in enumerate((110, 220, 440, 880)):
        tone = sum(sine(0.1 / k, hz * k, quarter) for k in range(1, 20))
        target[0, i, 0, i * quarter : (i + 1) * quarter] = tone[0, 0, 0]
    target += (target != 0) * noise(1, 1, 1, 22_050, amplitude=0.01)
    return target, target.sum(1, keepdim=True).expand_as(target)


def best_gain(loss, turns):
    """Of the mixture given as the estimate of every source."""
    target, mixture = turns
    gains = (0, 1e-3, 0.01, 0.03, 0.1, 0.25, 0.5, 1)
    costs = {gain: loss(gain * mixture, target).item() for gain in gains}
    return min((cost, gain) for gain, cost in costs.items() if math.isfinite(cost))[1]


@pytest.mark.parametrize(
    ("version", "beta", "gain"),
    [
        ("original", 1.0, 1e-3),  # the smallest that is not NaN: only the MAE knows amplitude
        ("original", 500.0, 1e-3),
        ("fixed", 500.0, 0.03),
        ("fixed", 5000.0, 0.03),  # beta * mae is a third of the spectrogram at a gain of 1/4
        ("fixed", 5e4, 0.01),  # 3.5 times it
        ("fixed", 5e5, 0),  # 35 times it: silence is best
    ],
)
def test_estimates_collapse_to_silence_when_the_mae_outweighs_the_spectrogram(
    turns, version, beta, gain
):
    assert best_gain(SpecMae(version=version, beta=beta), turns) == gain
