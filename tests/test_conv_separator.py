import pytest
import torch
import torch.nn.functional as F

from bgray.models.conv_separator import FFT_TAPS, ConvSeparator, convolve

LONG = {"kernels": (2205, 1), "inner_channels": 10}  # 50 ms at 44.1 kHz
SMALL = {"kernels": (9, 5, 3), "inner_channels": 4}


def noise(*shape, seed=1):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(num_sources=1, **options):
    torch.manual_seed(0)
    return ConvSeparator(num_sources=num_sources, **options)


def four_convs(width, num_sources):
    """Weights and biases of 1 -> width -> width -> width -> sources, 551/141/37/11 taps."""
    c = width
    return 551 * c + c + 141 * c * c + c + 37 * c * c + c + (11 * c + 1) * num_sources


@pytest.mark.parametrize(
    ("expected", "num_sources", "options"),
    [
        (22_071, 1, LONG),
        (22_071, 1, {**LONG, "activation": "none"}),
        (49_024, 4, {}),
        (48_692, 2, {}),
        (49_024, 4, {"residual": True}),
        (49_024, 4, {"inner_channels": (15, 15, 15)}),
        (474_904, 4, {"inner_channels": 50}),
        (four_convs(25, 4), 4, {"inner_channels": 25}),
        (four_convs(15, 3), 4, {"head": "complementary"}),
        (49_024 + 11 * 4, 4, {"present_input": True}),
    ],
)
def test_parameter_counts_of_the_log(expected, num_sources, options):
    with torch.device("meta"):
        model = build(num_sources, **options)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(("taps", "samples"), [(FFT_TAPS + 1, 1000), (551, 300), (2205, 5000)])
def test_long_kernels_by_fft_give_the_same_values_and_gradients(taps, samples):
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(1, 3, taps, padding=taps // 2)
    audio, weights = noise(2, 1, samples).requires_grad_(), noise(2, 3, samples, seed=2)
    inputs = [audio, *conv.parameters()]
    fast, slow = convolve(conv, audio), conv(audio)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_long_kernels_are_not_rounded_to_bfloat16_under_autocast():
    conv, audio = torch.nn.Conv1d(1, 3, 551, padding=275), noise(2, 1, 1000)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = convolve(conv, audio)
    assert torch.equal(rounded, convolve(conv, audio))


def test_plain_net_is_convolutions_with_relu_between():
    model, audio = build(2, **SMALL), noise(3, 1, 40)
    x = F.conv1d(audio, model.first.weight, model.first.bias, padding=4).relu()
    for conv, padding in ((model.core.convs[0], 2),):
        x = F.conv1d(x, conv.weight, conv.bias, padding=padding).relu()
    x = F.conv1d(x, model.core.last.weight, model.core.last.bias, padding=1)
    torch.testing.assert_close(model(audio), x[:, :, None])


def test_without_activation_the_net_is_linear():
    model = build(**SMALL, activation="none")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    audio = noise(1, 1, 40)
    torch.testing.assert_close(model(-3 * audio), -3 * model(audio))


def silenced(**options):
    """A net whose layers are all zero, and the last one the mean of its inputs."""
    model = build(**SMALL, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.core.last.weight[:, :, 1] = 1 / model.core.last.in_channels
    return model


def test_residual_carries_the_mixture_past_silent_layers():
    audio = noise(2, 1, 40)
    assert not silenced()(audio).any()
    torch.testing.assert_close(silenced(residual=True)(audio), audio[:, None])


def test_present_input_shows_the_mixture_to_the_last_layer():
    audio = noise(2, 1, 40)
    torch.testing.assert_close(silenced(present_input=True)(audio), audio[:, None] / 5)


@pytest.mark.parametrize("options", [SMALL, {"kernels": (301, 3), "inner_channels": 2}])
def test_an_output_sample_sees_as_many_input_samples_as_receptive_field_says(options):
    model = build(**options, activation="none")
    audio = torch.zeros(1, 1, 1001, requires_grad=True)
    (seen,) = torch.autograd.grad(model(audio)[0, 0, 0, 500], audio)
    # An FFT leaves traces of its rounding outside.
    at = (seen[0, 0].abs() > 1e-6 * seen.abs().max()).nonzero().flatten()
    assert (at[0], at[-1]) == (500 - model.receptive_field // 2, 500 + model.receptive_field // 2)


def test_the_log_s_long_net_sees_50_ms():
    assert build(**LONG).receptive_field == 2205 == round(0.05 * 44100)


def test_a_head_that_would_copy_the_input_is_refused():
    with pytest.raises(ValueError, match="softmax makes a single source equal to the input"):
        build(1, head="softmax")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": (551,)}, "kernels: 1 entries; give two layers or more"),
        ({"kernels": (550, 3)}, "kernels: 550 is even and would change the length; use 549 or 551"),
        ({"kernels": (0, 3)}, "kernels: 0 must be at least 1"),
        ({"inner_channels": 0}, "inner_channels: 0 must be at least 1"),
        (
            {"inner_channels": (15, 15)},
            r"inner_channels: 2 entries for 4 kernels; give 3 or 1 number for all",
        ),
        (
            {"inner_channels": (15, 20, 25), "residual": True},
            r"residual: needs equal inner_channels; \(15, 20, 25\) differ",
        ),
        ({"activation": "gelu"}, "activation: 'gelu' is not one of relu, none"),
        ({"head": "sigmoid"}, "head: 'sigmoid' is not one of softmax, none, complementary, tanh"),
    ],
)
def test_options_that_do_not_fit_are_named_with_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
