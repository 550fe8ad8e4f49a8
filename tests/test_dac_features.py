"""The codec's feature loss: parameter counts, its formula on any encoder, weights from files."""

import math
import sys

import pytest
import torch
from torch import nn

from bgray.losses import dac_features
from bgray.losses.dac_features import DacFeatures, build_encoder, feature_distance, resampler


def noise(*shape, seed=0):
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(**options):
    return DacFeatures(**{"sample_rate": 44_100, "weights": "random", **options})


def count(loss):
    return sum(parameter.numel() for parameter in loss.parameters())


@pytest.mark.parametrize(
    ("blocks", "parameters"), [(1, 133_120), (2, 791_424), (3, 4_467_328), (4, 19_159_168)]
)
def test_as_many_parameters_as_the_log_loaded(blocks, parameters):
    assert count(build(blocks=blocks)) == parameters


def test_residual_units_leave_out_the_last_strided_convolution():
    loss = build(layers="residual_units")
    assert len(loss.stages) == 3
    assert count(loss) == 133_120 - 33_088  # its weights (128 x 64 x 4), gains, biases, one Snake


def test_residual_units_work_at_the_full_rate_on_64_channels_and_blocks_at_half_on_128():
    audio = features = noise(1, 1, 1024)
    with torch.no_grad():
        for stage in build(layers="residual_units").stages:
            features = stage(features)
            assert features.shape == (1, 64, 1024)
        assert build().stages[0](audio).shape == (1, 128, 512)


def test_two_blocks_of_residual_units_are_the_encoder_cut_elsewhere():
    x = noise(1, 1, 1024)
    with torch.no_grad():
        encoder = build_encoder("random", 2)
        cut = nn.Sequential(*build(layers="residual_units", blocks=2).stages)
        third = encoder[2].block[2](
            encoder[2].block[1](encoder[2].block[0](encoder[1](encoder[0](x))))
        )
        torch.testing.assert_close(cut(x), third)


def test_the_distance_on_any_encoder_is_the_sum_of_mean_differences_after_each_stage():
    double, square = nn.Conv1d(1, 1, 1, bias=False), nn.Module()
    nn.init.constant_(double.weight, 2.0)
    square.forward = torch.square
    a, b = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]])
    # After the first: (2, 4) and (0, 8), mean 3; after the second: (4, 16) and (0, 64), mean 26.
    assert feature_distance([double, square], a, b).item() == 29.0
    assert feature_distance([double], a, b).item() == 3.0


def test_gradient_reaches_the_estimate_and_nothing_of_the_target_or_the_network():
    loss = build().train()
    estimate, target = noise(1, 2, 1, 512).requires_grad_(), noise(1, 2, 1, 512).requires_grad_()
    with pytest.warns(UserWarning, match="random weights, which say nothing about how audio"):
        loss(0.5 * estimate, target).backward()
    assert estimate.grad.abs().sum() > 0
    assert target.grad is None
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert not any(module.training for module in loss.modules())


def test_48_khz_is_resampled_unless_told_not_to():
    seen = []

    def record(module, inputs):
        seen.append(inputs[0].shape)

    for resample in (True, False):
        loss = build(sample_rate=48_000, resample=resample)
        loss.stages[0].register_forward_pre_hook(record)
        loss(noise(1, 2, 2, 4800), noise(1, 2, 2, 4800))
    assert seen == [(4, 1, 4410)] * 2 + [(4, 1, 4800)] * 2


def test_a_tone_keeps_its_pitch_and_level_through_the_resampler():
    t = torch.arange(48_000) / 48_000
    tone = torch.sin(2 * torch.pi * 1000 * t)
    expected = torch.sin(2 * torch.pi * 1000 * torch.arange(44_100) / 44_100)
    error = (resampler(48_000, 44_100)(tone) - expected)[1000:-1000].abs().max().item()
    assert 20 * math.log10(error) < -60


def test_rates_without_a_common_divisor_are_refused_before_they_take_the_memory():
    with pytest.raises(ValueError, match="44101 Hz and 44100 Hz have no common divisor above 1"):
        build(sample_rate=44_101)
    assert isinstance(build(sample_rate=44_101, resample=False).resample, nn.Identity)


def test_random_weights_are_the_same_each_time_and_leave_the_generators_alone():
    torch.manual_seed(3)
    first = build().state_dict()
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.rand(1) == after
    second = build().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file like the package's, of an encoder with other weights than the random ones."""
    encoder = build_encoder("random", 4)
    path = tmp_path_factory.mktemp("dac") / "weights.pth"
    state = {f"encoder.block.{k}": v + 0.001 for k, v in encoder.state_dict().items()}
    torch.save({"state_dict": state | {"decoder.x": torch.ones(1)}, "metadata": {}}, path)
    return str(path)


def test_weights_are_read_from_a_file_of_the_packages_format(weights):
    loaded, random = build(weights=weights), build()
    for (name, ours), theirs in zip(
        loaded.state_dict().items(), random.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs + 0.001, msg=name)


def test_the_download_is_the_packages_own(weights, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    build()  # imports dac
    monkeypatch.setattr(sys.modules["dac.utils"], "download", lambda model_type: weights)
    assert count(build(weights="download")) == 133_120


def test_a_download_without_a_network_says_what_to_do_instead(monkeypatch, tmp_path):
    def fail(model_type):
        raise ConnectionError("no route to host")

    monkeypatch.setenv("HOME", str(tmp_path))
    build()
    monkeypatch.setattr(sys.modules["dac.utils"], "download", fail)
    message = r"download failed \(ConnectionError: no route to host\); get weights_44khz.* its path"
    with pytest.raises(ValueError, match=message):
        build(weights="download")


def test_a_file_that_is_no_encoder_is_named(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {"conv.weight": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match=r"other.pth has no encoder.block.0.bias: it is not a"):
        build(weights=str(path))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"blocks": 5}, ("blocks", "5 must be 1 to 4: DAC's encoder has 4")),
        (
            {"weights": "nowhere.pth"},
            ("weights", "there is no file 'nowhere.pth'; give a path, 'download' or 'random'"),
        ),
    ],
)
def test_check_names_the_option_and_the_way_out(changes, problem):
    options = {"layers": "blocks", "blocks": 1, "weights": "download", "resample": True}
    assert DacFeatures.check(**options) == []
    assert DacFeatures.check(**{**options, **changes}) == [problem]
    with pytest.raises(ValueError, match=problem[0]):
        build(**changes)


def test_the_codec_is_imported_only_when_it_is_built():
    assert "dac" not in vars(dac_features)
