"""The losses against the libraries that the logs used, and where those would mislead."""

import warnings

import pytest
import torch
from torch import nn

from bgray.losses import LOSSES, LossSum
from bgray.losses.mrstft import MultiResolutionStft, a_weighting_taps
from bgray.losses.multi_mel import MultiScaleMel, mel_matrix
from bgray.losses.waveform import L1, Mse

with warnings.catch_warnings():  # audiotools is full of old syntax
    warnings.simplefilter("ignore")
    import audiotools
    import auraloss
    import librosa
    from audiotools.metrics.spectral import MelSpectrogramLoss

RESOLUTIONS = {
    "fft_sizes": [4096, 2048, 1024],
    "hop_sizes": [480, 240, 120],
    "win_lengths": [2400, 1200, 600],
}
DAC = {
    "n_mels": [5, 10, 20, 40, 80, 160, 320],
    "window_lengths": [32, 64, 128, 256, 512, 1024, 2048],
    "mel_fmin": [0.0] * 7,
    "mel_fmax": [None] * 7,
    "pow": 1.0,
    "clamp_eps": 1e-5,
    "mag_weight": 0.0,
}
SPECTRAL = ("mrstft", "multi_mel")


def build(name, sample_rate=48_000, **options):
    context = {"sample_rate": sample_rate} if name in SPECTRAL else {}
    return LOSSES[name](**context, **options)


def noise_pair(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    first, second = (0.05 * torch.randn(*shape, generator=rng) for _ in range(2))
    return first, second


def audiotools_loss(estimate, target, sample_rate):
    signals = [audiotools.AudioSignal(x.flatten(1, 2), sample_rate) for x in (estimate, target)]
    with warnings.catch_warnings():  # about empty mel rows and about its own cache
        warnings.simplefilter("ignore")
        return MelSpectrogramLoss(**DAC)(*signals)


@pytest.mark.parametrize(
    ("sample_rate", "shape", "bins", "weighting"),
    [
        (48_000, (2, 1, 1, 32_768), 128, True),
        (44_100, (2, 2, 2, 8_191), 128, True),
        (16_000, (2, 2, 2, 8_191), 128, True),
        (48_000, (2, 2, 2, 8_191), None, True),
        (48_000, (2, 2, 2, 8_191), 128, False),
    ],
)
def test_mrstft_equals_auraloss(sample_rate, shape, bins, weighting):
    target, estimate = noise_pair(*shape)
    estimate = 0.3 * estimate + target
    reference = auraloss.freq.MultiResolutionSTFTLoss(
        **RESOLUTIONS,
        scale="mel" if bins else None,
        n_bins=bins,
        sample_rate=sample_rate,
        perceptual_weighting=weighting,
    )(estimate.flatten(1, 2), target.flatten(1, 2)).item()
    ours = build("mrstft", sample_rate, n_bins=bins, perceptual_weighting=weighting)
    assert ours(estimate, target).item() == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("sample_rate", [48_000, 44_100, 16_000])
@pytest.mark.parametrize("shape", [(2, 1, 1, 32_768), (2, 2, 2, 8_191)])
def test_multi_mel_equals_audiotools(sample_rate, shape):
    target, estimate = noise_pair(*shape)
    estimate = 0.3 * estimate + target
    reference = audiotools_loss(estimate, target, sample_rate).item()
    ours = build("multi_mel", sample_rate)(estimate, target).item()
    assert ours == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("name", SPECTRAL)
def test_gradient_equals_the_librarys(name):
    target, estimate = noise_pair(1, 1, 1, 8_192)
    theirs, ours = estimate.clone().requires_grad_(), estimate.clone().requires_grad_()
    if name == "mrstft":
        options = {"scale": "mel", "n_bins": 128, "perceptual_weighting": True}
        loss = auraloss.freq.MultiResolutionSTFTLoss(**RESOLUTIONS, **options, sample_rate=48_000)
        loss(theirs[0], target[0]).backward()
    else:
        audiotools_loss(theirs, target, 48_000).backward()
    build(name)(ours, target).backward()
    error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
    assert error < 1e-3


def test_mrstft_reads_the_numbers_noted_for_the_logs():
    torch.manual_seed(0)
    y = 0.05 * torch.randn(2, 1, 1, 32_768)
    other = 0.05 * torch.randn(2, 1, 1, 32_768)
    loss = build("mrstft")
    assert loss(other, y).item() == pytest.approx(0.9102, abs=5e-5)
    assert loss(0.5 * y, y).item() == pytest.approx(1.1931, abs=5e-5)  # 0.5 + ln 2
    assert loss(torch.zeros_like(y), y).item() == pytest.approx(9.5522, abs=5e-5)
    assert loss(-y, y).item() == 0  # blind to sign


def test_multi_mel_of_half_the_amplitude_is_log10_of_2_per_scale():
    y, _ = noise_pair(1, 1, 1, 8_192)
    y = 20 * y  # well above the clamp nearly everywhere
    loss = build("multi_mel", 44_100)  # no empty mel rows at this rate
    assert loss(0.5 * y, y).item() == pytest.approx(7 * 0.30103, rel=1e-3)
    assert loss(-y, y).item() == 0


def test_two_scales_have_an_empty_row_at_48_khz_and_none_at_44_1_khz():
    def empty(sample_rate):
        loss = build("multi_mel", sample_rate)
        return [int((getattr(loss, f"mel{i}").sum(1) == 0).sum()) for i in range(7)]

    assert empty(48_000)[:2] == [1, 1]
    assert sum(empty(48_000)) == 2
    assert sum(empty(44_100)) == 0


@pytest.mark.parametrize(("rate", "fft", "mels"), [(48_000, 2048, 128), (800, 64, 8)])
def test_mel_matrix_equals_librosas(rate, fft, mels):
    reference = torch.from_numpy(librosa.filters.mel(sr=rate, n_fft=fft, n_mels=mels))
    torch.testing.assert_close(mel_matrix(rate, fft, mels), reference, rtol=1e-5, atol=1e-9)


def test_a_weighting_passes_1_khz_and_takes_19_db_from_100_hz():
    taps = a_weighting_taps(48_000).double()
    n = torch.arange(101, dtype=torch.float64)

    def gain_db(hz):
        return 20 * torch.polar(taps, -2 * torch.pi * hz / 48_000 * n).sum().abs().log10().item()

    assert gain_db(1000) == pytest.approx(0, abs=0.5)
    assert gain_db(100) == pytest.approx(-19.1, abs=3)  # 101 taps are short for that


@pytest.mark.parametrize("name", SPECTRAL)
def test_exactly_silent_estimate_gets_no_gradient_because_of_the_clamp(name):
    target, _ = noise_pair(1, 1, 1, 4_096)
    estimate = torch.zeros_like(target).requires_grad_()
    build(name)(estimate, target).backward()
    assert not estimate.grad.any()


def test_waveform_losses_by_hand():
    estimate = torch.tensor([1.0, -1.0, 3.0, 0.0]).reshape(1, 1, 1, 4)
    target = torch.tensor([0.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    assert L1()(estimate, target).item() == 1.25
    assert Mse()(estimate, target).item() == 2.75


def test_loss_sum_weights_the_total_but_not_the_parts():
    target, estimate = noise_pair(1, 1, 1, 4_096)
    estimate.requires_grad_()
    total, parts = LossSum({"l1": (L1(), 10.0), "mel": (build("multi_mel"), 1.0)})(estimate, target)
    assert list(parts) == ["l1", "mel"]
    assert parts["l1"].item() == pytest.approx((estimate - target).abs().mean().item())
    assert total.item() == pytest.approx(10 * parts["l1"].item() + parts["mel"].item())
    assert total.requires_grad
    assert not any(part.requires_grad for part in parts.values())


def test_loss_sum_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"differ in shape: \(2, 1, 1, 8\) and \(2, 1, 8\)"):
        LossSum({"l1": (L1(), 1.0)})(torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 8))


def test_loss_sum_refuses_to_be_empty():
    with pytest.raises(ValueError, match="at least one term"):
        LossSum({})


@pytest.mark.parametrize(("name", "shortest"), [("mrstft", 2049), ("multi_mel", 1025)])
def test_too_short_audio_is_an_error_that_names_the_least(name, shortest):
    loss = build(name)
    assert loss(*noise_pair(1, 1, 1, shortest)).isfinite()
    with pytest.raises(ValueError, match=f"{name} needs {shortest} samples or more, got 1000"):
        loss(*noise_pair(1, 1, 1, 1000))


STFT_OPTIONS = {**RESOLUTIONS, "n_bins": 128, "perceptual_weighting": True}
MEL_OPTIONS = {"num_mels": (5, 10), "window_lengths": (32, 64)}


@pytest.mark.parametrize(
    ("changes", "option", "text"),
    [
        ({"hop_sizes": (480, 240)}, "hop_sizes", "2 entries for 3 fft_sizes; give 3"),
        (
            {"win_lengths": (2400, 4096, 600)},
            "win_lengths",
            "win_lengths[1] = 4096 exceeds fft_sizes[1] = 2048; use at most 2048",
        ),
        (
            {"hop_sizes": (480, 240, 601)},
            "hop_sizes",
            "hop_sizes[2] = 601 skips samples between windows of 600; use at most 600",
        ),
        ({"n_bins": 0}, "n_bins", "0 must be at least 1, or null for linear frequency"),
        ({"hop_sizes": (480, 0, 120)}, "hop_sizes", "0 must be at least 1"),
        (
            {"fft_sizes": (), "hop_sizes": (), "win_lengths": ()},
            "fft_sizes",
            "is empty; give at least one",
        ),
    ],
)
def test_mrstft_check_names_the_option_and_the_way_out(changes, option, text):
    assert MultiResolutionStft.check(**STFT_OPTIONS) == []
    assert MultiResolutionStft.check(**{**STFT_OPTIONS, **changes}) == [(option, text)]


@pytest.mark.parametrize(
    ("changes", "option", "text"),
    [
        ({"num_mels": (5,)}, "num_mels", "1 entries for 2 window_lengths; give 2"),
        ({"num_mels": (5, 0)}, "num_mels", "0 must be at least 1"),
        (
            {"window_lengths": (32, 62)},
            "window_lengths",
            "62 must be a positive multiple of 4, as the hop is a quarter of it",
        ),
        (
            {"num_mels": (), "window_lengths": ()},
            "window_lengths",
            "is empty; give at least one",
        ),
    ],
)
def test_multi_mel_check_names_the_option_and_the_way_out(changes, option, text):
    assert MultiScaleMel.check(**MEL_OPTIONS) == []
    assert MultiScaleMel.check(**{**MEL_OPTIONS, **changes}) == [(option, text)]


def test_constructors_raise_what_check_finds():
    with pytest.raises(ValueError, match="win_lengths: 2 entries for 3 fft_sizes"):
        build("mrstft", win_lengths=(600, 600))
    with pytest.raises(ValueError, match="num_mels: 1 entries for 7"):
        build("multi_mel", num_mels=(5,))


def test_mrstft_refuses_mel_bins_that_would_be_empty():
    message = "n_bins: 128 mel bins at 96000 Hz and FFT size 1024 leave .* use fewer bins or larger"
    with pytest.raises(ValueError, match=message):
        build("mrstft", 96_000)


class Moving(nn.Module):
    """Its weight follows the training: it grows by one at each step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, estimate, target, extras):
        self.logged = {"steps": self.steps.clone()}
        return self.steps * extras["latent"].mean()

    extras = ("latent",)

    def advance(self, step, average):
        self.steps += average(torch.ones(()))


def test_loss_sum_passes_extras_logs_the_inner_parts_and_keeps_what_moves_for_the_checkpoint():
    loss = LossSum({"l1": (L1(), 1.0), "moving": (Moving(), 2.0)})
    x = torch.ones(1, 1, 1, 4)
    loss.advance(1, lambda value: value)
    loss.advance(2, lambda value: value)
    total, parts = loss(x, 0 * x, {"latent": torch.tensor([3.0])})
    assert total.item() == 1 + 2 * (2 * 3)
    assert {name: part.item() for name, part in parts.items()} == {
        "l1": 1,
        "moving": 6,
        "moving_steps": 2,
    }
    assert loss.progress().keys() == {"moving"}
    other = LossSum({"l1": (L1(), 1.0), "moving": (Moving(), 2.0)})
    other.restore(loss.progress())
    assert other(x, 0 * x, {"latent": torch.tensor([3.0])})[0].item() == total.item()
