"""Spectra with their own gradient against torch.stft with torch's."""

import pytest
import torch

from bgray.losses.spectra import log_distance, magnitudes, powers, reflected

# FFT, window, hop: multi_mel's, mrstft's, the spectrogram's odd one, and windows that hardly fit.
SIZES = [(32, 32, 8), (64, 40, 10), (63, 63, 16), (64, 33, 32), (45, 20, 7)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(fft_size, length, hop, num_samples, widest=0, *, floor):
    """(ours, torch's) magnitudes, or powers without a floor, and the gradients of a random sum."""
    found = []
    for ours in (True, False):
        audio = noise(3, num_samples).requires_grad_()
        window = torch.hann_window(length, dtype=torch.float64)
        if ours:
            padded = reflected(audio, max(fft_size, widest))
            sizes = padded, num_samples, window, fft_size, hop
            x = powers(*sizes) if floor is None else magnitudes(*sizes, floor)
        else:
            spectrum = torch.stft(audio, fft_size, hop, length, window, return_complex=True)
            x = spectrum.abs().square() if floor is None else spectrum.abs().clamp(min=floor)
            x = x.mT
        (x * noise(*x.shape, seed=1)).sum().backward()
        found.append((x.detach(), audio.grad))
    return found


@pytest.mark.parametrize("floor", [None, 1e-9, 1.5])
@pytest.mark.parametrize("num_samples", [200, 203])
@pytest.mark.parametrize(("fft_size", "length", "hop"), SIZES)
def test_values_and_gradient_are_those_of_stft(fft_size, length, hop, num_samples, floor):
    (ours, slope), (theirs, wanted) = both(fft_size, length, hop, num_samples, floor=floor)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-12)
    if floor == 1.5:  # of which there are some on both sides
        assert 0.1 < (ours == floor).double().mean() < 0.9


def test_the_padding_of_a_wider_fft_serves_a_narrower_one():
    alone, _ = both(32, 32, 8, 200, floor=1e-9)
    shared, _ = both(32, 32, 8, 200, widest=128, floor=1e-9)
    for a, b in zip(alone, shared, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_silence_has_the_floor_and_no_gradient():
    audio = torch.zeros(1, 100, requires_grad=True)
    found = magnitudes(reflected(audio, 32), 100, torch.hann_window(32), 32, 8, 1e-12)
    found.sum().backward()
    assert (found == 1e-12).all()
    assert torch.equal(audio.grad, torch.zeros(1, 100))


def test_a_target_keeps_nothing_for_a_gradient():
    audio = torch.randn(1, 100)
    assert (
        magnitudes(reflected(audio, 32), 100, torch.hann_window(32), 32, 8, 1e-12).grad_fn is None
    )


def test_log_distance_is_the_sum_of_means_and_blind_below_the_floor():
    x = torch.tensor([[1e-3, 10.0, 0.0]], requires_grad=True)
    other = torch.tensor([100.0], requires_grad=True)
    targets = [torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([1.0])]
    found = log_distance([x, other], targets, floor=0.01)
    assert found.item() == pytest.approx((2 + 1 + 2) / 3 + 2)
    (2 * found).backward()
    step = 0.4342944819  # d log10(x) / dx at 1
    assert x.grad.tolist()[0] == pytest.approx([0, 2 * step / 10 / 3, 0])
    assert other.grad.item() == pytest.approx(2 * step / 100)


def test_log_distance_of_a_million_values_does_not_lose_digits():
    x = torch.full((1_000_000,), 0.5)
    assert log_distance([x], [2 * x], floor=1e-5).item() == pytest.approx(0.30103, rel=1e-6)
