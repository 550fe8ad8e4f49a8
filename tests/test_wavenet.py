import pytest
import torch
import torch.nn.functional as F

from bgray.models.wavenet import WaveNet

PROTOTYPE = {"channels": 16, "stacks": 1, "tail_channels": (16, 16)}
SMALL = {"channels": 4, "stacks": 2, "layers": 3, "tail_channels": (6, 5)}


def noise(*shape, seed=1):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(num_sources=1, **options):
    torch.manual_seed(0)
    return WaveNet(num_sources=num_sources, **options)


def parameters(k, blocks, heads, n):
    """Two dilated convolutions of 3 taps and two of 1 a block, then 3, 3 and 1 taps."""
    first = 2 * (3 * k + k) + 2 * (k * k + k)
    later = 2 * (3 * k * k + k) + 2 * (k * k + k)
    a, b = heads
    return first + (blocks - 1) * later + (3 * k * a + a) + (3 * a * b + b) + (b * n + n)


@pytest.mark.parametrize(
    ("expected", "num_sources", "options"),
    [
        (11_476, 4, {**PROTOTYPE, "shared_convolutions": True}),
        (21_316, 4, PROTOTYPE),
        (21_316, 4, PROTOTYPE | {"head": "softmax"}),
        (parameters(16, 10, (16, 16), 4), 4, PROTOTYPE),
        (parameters(128, 40, (512, 256), 4), 4, {}),
        (parameters(128, 40, (512, 256), 2), 2, {}),
    ],
)
def test_parameter_counts_of_the_log(expected, num_sources, options):
    with torch.device("meta"):
        model = build(num_sources, **options)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("num_sources", [1, 2, 4])
def test_the_final_net_has_the_report_s_5_76_million_parameters(num_sources):
    with torch.device("meta"):
        model = build(num_sources)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == "5.76"


@pytest.mark.parametrize("shared", [False, True])
def test_net_is_gated_dilated_convolutions_with_summed_skips(shared):
    model, audio = build(2, **SMALL, shared_convolutions=shared), noise(3, 1, 50)
    w = model.state_dict()

    def conv(x, name, dilation=1):
        weight = w[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv1d(x, weight, w[f"{name}.bias"], padding=padding, dilation=dilation)

    x, skips = audio, []
    for i, dilation in enumerate([1, 2, 4, 1, 2, 4]):
        gate = "signal" if shared else "gate"
        z = conv(x, f"blocks.{i}.signal", dilation).tanh()
        z = z * conv(x, f"blocks.{i}.{gate}", dilation).sigmoid()
        skips.append(conv(z, f"blocks.{i}.{'residual' if shared else 'skip'}"))
        x = x + conv(z, f"blocks.{i}.residual")
    y = sum(skips)
    for i in (1, 3, 5):
        y = conv(y.relu(), f"tail.{i}")
    torch.testing.assert_close(model(audio), y[:, :, None])


@pytest.mark.parametrize("shared", [False, True])
def test_shared_convolutions_make_the_gate_the_signal_and_the_skip_the_residual(shared):
    for block in build(**SMALL, shared_convolutions=shared).blocks:
        assert (block.gate is block.signal) == shared
        assert (block.skip is block.residual) == shared


def test_one_stack_of_ten_sees_2047_samples_and_the_tail_four_more():
    with torch.device("meta"):
        assert build(**PROTOTYPE).receptive_field == 2047 + 4
        assert build(**PROTOTYPE, tail_kernels=(1, 1, 1)).receptive_field == 2047


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "stacks": 1, "tail_kernels": (5, 1, 3)}])
def test_an_output_sample_sees_as_many_input_samples_as_receptive_field_says(options):
    model = build(**options)
    audio = noise(1, 1, 201).requires_grad_()
    (seen,) = torch.autograd.grad(model(audio)[0, 0, 0, 100], audio)
    at = seen[0, 0].nonzero().flatten()
    assert (at[0], at[-1]) == (100 - model.receptive_field // 2, 100 + model.receptive_field // 2)


def test_every_parameter_is_in_the_graph_for_ddp_to_reduce():
    model = build(**SMALL)
    model(noise(1, 1, 50)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers: 0 must be at least 1"),
        ({"tail_channels": (0, 4)}, "tail_channels: 0 must be at least 1"),
        ({"tail_kernels": (3, 2, 1)}, "tail_kernels: 2 is even and would change the length"),
        (
            {"tail_kernels": (3, 1)},
            "tail_kernels: 2 entries for 2 tail_channels and the sources; give 3",
        ),
        ({"head": "relu"}, "head: 'relu' is not one of softmax, none, complementary, tanh"),
    ],
)
def test_options_that_do_not_fit_are_named_with_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
