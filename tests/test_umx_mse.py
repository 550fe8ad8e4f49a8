"""The magnitude loss against the model whose magnitudes it compares."""

import pytest
import torch

from bgray.losses.umx_mse import UmxMse
from bgray.models.open_unmix import OpenUnmix


def noise(*shape, seed=0):
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_targets_magnitude_is_made_as_the_model_makes_the_mixtures():
    loss = UmxMse(n_fft=64, hop=16)
    model = OpenUnmix(
        sample_rate=800, num_sources=2, channels_in=2, n_fft=64, hop=16, hidden=4, bandwidth_hz=None
    ).eval()
    target = noise(3, 2, 2, 200)
    for s in range(2):
        assert torch.equal(loss.magnitude(target)[:, s], model.stft(target[:, s]).abs())
    estimate, extras = model(target.sum(1))
    found = loss(estimate, target, extras).item()
    expected = [(extras["magnitude"][:, s] - model.stft(target[:, s]).abs()) for s in range(2)]
    assert found == pytest.approx(torch.stack(expected).square().mean().item())


def test_an_impulse_in_the_middle_of_a_frame_has_a_flat_magnitude():
    loss = UmxMse(n_fft=8, hop=8)
    impulse = torch.zeros(1, 1, 1, 32)
    impulse[..., 16] = 3.0
    magnitude = torch.zeros(1, 1, 1, 5, 5)  # (B, S, C, F, N)
    magnitude[..., 2] = 3.0
    assert loss(impulse, impulse, {"magnitude": magnitude}).item() == pytest.approx(0, abs=1e-10)
    assert loss(impulse, impulse, {"magnitude": 0 * magnitude}).item() == pytest.approx(9 / 5)


def test_another_stft_than_the_models_is_an_error_that_names_both():
    audio = noise(1, 1, 1, 400)
    magnitude = UmxMse(n_fft=64, hop=16).magnitude(audio)
    with pytest.raises(ValueError, match="so its n_fft is 64; umx_mse has n_fft = 32, hop = 16,"):
        UmxMse(n_fft=32, hop=16)(audio, audio, {"magnitude": magnitude})


def test_too_short_audio_is_an_error_that_names_the_least():
    audio = noise(1, 1, 1, 32)
    with pytest.raises(ValueError, match="umx_mse needs 33 samples or more, got 32"):
        UmxMse(n_fft=64, hop=16)(audio, audio, {"magnitude": audio})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"n_fft": 63, "hop": 16}, ("n_fft", "63 must be even and at least 2")),
        ({"n_fft": 64, "hop": 65}, ("hop", "65 must be 1 to n_fft = 64")),
    ],
)
def test_check_names_the_option_and_the_way_out(options, problem):
    assert UmxMse.check(n_fft=64, hop=16) == []
    assert UmxMse.check(**options) == [problem]
    with pytest.raises(ValueError, match=problem[0]):
        UmxMse(**options)
