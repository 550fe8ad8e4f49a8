"""The 2-d pitch U-Net: its parts by hand, its padding, what it sees, what its options refuse."""

import pytest
import torch
import torch.nn.functional as F

from bgray.models.spec_unet import Down2d, SpecUNet, Up2d

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL_V1 = {
    "channels": (2, 4, 8),
    "blocks": (1, 2),
    "factors": (2, 2),
    "scale_vs_channels": (2, 2),
    "kernel": 3,
    "n_fft": 14,
    "hop": 4,
}
SMALL_V2 = {
    **SMALL_V1,
    "channels": (4, 8, 16),
    "bottleneck_blocks": 1,
    "layout": "v2",
}
SMALL_FACTOR_4 = {
    **SMALL_V2,
    "channels": (2, 16, 16),
    "blocks": (1, 1),
    "factors": (4, 1),
    "scale_vs_channels": (2, 1),
}
SMALL = {"v1": SMALL_V1, "v2": SMALL_V2, "v2 factors 4 and 1": SMALL_FACTOR_4}
LOG_002 = {
    "channels": (4, 16, 128, 256, 512),
    "blocks": (1, 3, 4, 4),
    "factors": (4, 4, 2, 2),
    "scale_vs_channels": (4, 2, 2, 2),
    "bottleneck_blocks": 4,
    "n_fft": 1022,
    "hop": 256,
    "layout": "v2",
}


def noise(*shape, seed=1):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def silence(module):
    """Zero its weights, so that only the skip is left."""
    for p in module.parameters():
        torch.nn.init.zeros_(p)
    return module


def wake(net):
    """Set every gamma to 1, so that the blocks count."""
    for key, p in net.named_parameters():
        if key.endswith("gamma"):
            torch.nn.init.ones_(p)


def meta(chosen):
    with torch.device("meta"):
        return SpecUNet(**chosen)


def resolved(chosen):
    return {**SpecUNet.__init__.__kwdefaults__, **chosen}


@pytest.mark.parametrize(("a", "b", "f"), [(2, 4, 2), (4, 16, 4), (2, 32, 4), (6, 3, 1)])
def test_down_skip_averages_adjacent_phases_of_a_channel(a, b, f):
    x = noise(2, a, 2 * f, 3 * f)
    average = a * f * f // b
    slow = torch.zeros(2, b, 2, 3)
    for out in range(b):
        for m in range(out * average, (out + 1) * average):
            channel, phase = divmod(m, f * f)
            row, column = divmod(phase, f)
            slow[:, out] += x[:, channel, row::f, column::f] / average
    torch.testing.assert_close(silence(Down2d(a, b, f))(x), slow)


@pytest.mark.parametrize(("a", "b", "f"), [(4, 2, 2), (16, 4, 4), (32, 2, 4), (3, 6, 1)])
def test_up_skip_repeats_channels_of_pixel_shuffle(a, b, f):
    x = noise(2, a, 2, 3)
    repeats = b * f * f // a
    slow = torch.zeros(2, b, 2 * f, 3 * f)
    for out in range(b):
        for row in range(f):
            for column in range(f):
                channel = (out // repeats) * f * f + row * f + column
                slow[:, out, row::f, column::f] = x[:, channel]
    torch.testing.assert_close(silence(Up2d(a, b, f))(x), slow)


@pytest.mark.parametrize(("factor", "down_size", "up_size"), [(1, 1, 1), (2, 3, 4), (4, 5, 8)])
def test_down_and_up_are_their_convolution_plus_their_skip(factor, down_size, up_size):
    c = factor**2
    down, up = Down2d(2, 2 * c, factor), Up2d(2 * c, 2, factor)
    assert down.conv.kernel_size == (down_size, down_size)
    assert up.conv.kernel_size == (up_size, up_size)
    x, y = noise(1, 2, 8, 16), noise(1, 2 * c, 8 // factor, 16 // factor)
    settings = {"stride": factor, "padding": factor // 2}
    main = F.conv2d(x, down.conv.weight, down.conv.bias, **settings)
    torch.testing.assert_close(down(x), main + F.pixel_unshuffle(x, factor))
    main = F.conv_transpose2d(y, up.conv.weight, up.conv.bias, **settings)
    torch.testing.assert_close(up(y), main + F.pixel_shuffle(y, factor))


def test_v2_joins_the_skip_after_the_levels_blocks():
    torch.manual_seed(0)
    net = SpecUNet(**SMALL_V2).core
    wake(net)
    x = noise(1, 2, 8, 8)
    a = net.conv_in(x)
    b = net.downs[0](net.encoder[0](a))
    c = net.bottom(net.downs[1](net.encoder[1](b)))
    d = net.joins[1](torch.cat([net.decoder[1](net.ups[1](c)), b], 1))
    e = net.joins[0](torch.cat([net.decoder[0](net.ups[0](d)), a], 1))
    torch.testing.assert_close(net(x), net.conv_out(e))


def test_silent_v1_net_returns_its_input_once_per_level_and_once_more():
    options = {**SMALL_V1, "channels": (2, 8, 32), "scale_vs_channels": (1, 1)}  # averages nothing
    x = noise(2, 2, 101)
    torch.testing.assert_close(silence(SpecUNet(**options))(x), 3 * x[:, None])
    torch.testing.assert_close(silence(SpecUNet(**options, output="difference"))(x), 4 * x[:, None])


def test_difference_is_what_the_net_adds_to_its_input():
    torch.manual_seed(0)
    direct, difference = SpecUNet(**SMALL_V2), SpecUNet(**SMALL_V2, output="difference")
    difference.load_state_dict(direct.state_dict())
    x = noise(2, 2, 101)
    torch.testing.assert_close(difference(x), x[:, None] + direct(x))
    assert torch.equal(silence(difference)(x), x[:, None])


def test_core_sees_the_real_and_the_imaginary_part_of_the_centred_stft():
    net = SpecUNet(**SMALL_V2)
    seen = []
    net.core.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    samples = 7 * 4  # 8 frames: nothing is padded
    x = noise(1, 1, samples)
    net(x)
    padded = F.pad(x, (7, 7), mode="reflect")[0, 0]
    time = torch.arange(14)
    window = 0.5 - 0.5 * torch.cos(2 * torch.pi * time / 14)
    for n in range(8):
        frame = window * padded[4 * n : 4 * n + 14]
        for k in range(8):
            angle = 2 * torch.pi * k * time / 14
            parts = torch.stack([(frame * angle.cos()).sum(), -(frame * angle.sin()).sum()])
            torch.testing.assert_close(seen[0][0, :, k, n], parts, atol=1e-5, rtol=0)


def test_padding_is_the_logs_for_the_nets_of_the_logs():
    small = meta(
        {"channels": (2, 32, 128, 256), "blocks": (2, 2, 2), "factors": (4, 2, 2)}
        | {"scale_vs_channels": (1, 1, 2)}
    )
    second = meta(LOG_002)
    for net, add, unit in ((small, 512, 8192), (second, 256, 16384)):
        for samples in (9000, 32256, 48640, 65024, 65025, 131072, 144_000):
            logs = next(t for t in range(samples, samples + unit) if (t + add) % unit == 0)
            assert net.padded_length(samples) == logs
    # The deeper net of 001 halves once more, so the frames must be a multiple of 32, not 16. At the
    # log's own lengths both rules agree.
    deeper = meta({})
    assert [deeper.padded_length(t) for t in (32256, 48640, 65024)] == [32256, 48640, 65024]
    assert deeper.padded_length(65025) == 65024 + 16384
    assert 1 + deeper.padded_length(65025) // 512 == 160
    training, validation = 2 * 16384 - 256, 8 * 16384 - 256
    assert second.padded_length(training) == training
    assert 1 + second.padded_length(validation) // 256 == 512


@pytest.mark.parametrize("samples", [1, 2, 7, 8, 9, 27, 28, 29, 44, 45])
def test_lengths_shorter_than_the_window_pass_too(samples):
    net = silence(SpecUNet(**SMALL_V2, output="difference"))
    x = noise(1, 1, samples)
    torch.testing.assert_close(net(x), x[:, None])
    padded = net.padded_length(samples)
    assert (padded + 4) % 16 == 0
    assert padded > 7  # what is reflected on each side


@pytest.mark.parametrize("name", SMALL)
def test_receptive_field_is_what_the_gradient_sees(name):
    torch.manual_seed(0)
    net = SpecUNet(**SMALL[name])
    wake(net)
    unit = net.hop * net.frame_multiple
    samples = unit * (net.receptive_field // unit + 4) - net.hop  # room on both sides
    x = noise(1, 1, samples).requires_grad_()
    y = net(x)[0, 0, 0]  # (T)
    spans = []
    for centre in range(samples // 2, samples // 2 + unit):  # one output sample of every phase
        (gradient,) = torch.autograd.grad(y[centre], x, retain_graph=True)
        seen = gradient[0, 0].nonzero()[:, 0]
        spans.append(int(seen.max() - seen.min()) + 1)
    assert max(spans) == net.receptive_field


def test_fourier_transforms_are_float32_under_autocast():
    torch.manual_seed(0)
    net, x = SpecUNet(**SMALL_V2, output="difference"), noise(1, 2, 101)
    kinds = []
    net.core.register_forward_hook(lambda _, args, out: kinds.append((args[0].dtype, out.dtype)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(x)
    assert kinds == [(torch.float32, torch.bfloat16)]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, net(x).detach(), rtol=0.05, atol=0.01)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        # With nothing but the input's own path left, not a bit of it is lost.
        assert torch.equal(silence(net)(x), x[:, None])


def test_the_validation_shape_gives_the_same_bits_after_a_step_at_the_training_shape():
    def net():
        torch.manual_seed(0)
        return SpecUNet(**SMALL_V2)

    fresh, used = net().eval(), net()
    long = noise(2, 1, 8 * 16 - 4)
    with torch.no_grad():
        expected = fresh(long)
    used(noise(4, 1, 2 * 16 - 4)).square().sum().backward()  # log 002: a quarter of the length
    with torch.no_grad():
        assert torch.equal(used.eval()(long), expected)


@pytest.mark.gpu
def test_only_the_core_is_compiled_and_takes_the_validation_shape_after_the_training_shape():
    torch.manual_seed(0)
    net = SpecUNet(**SMALL_V2).cuda()
    training, validation = noise(4, 1, 2 * 16 - 4).cuda(), noise(2, 1, 8 * 16 - 4).cuda()
    expected = [net(x).detach() for x in (training, validation)]
    names = list(net.state_dict())
    net.core.compile()
    found = net(training)
    found.square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(found, expected[0], rtol=1e-3, atol=1e-3)  # tf32, perhaps
        torch.testing.assert_close(net.eval()(validation), expected[1], rtol=1e-3, atol=1e-3)
    assert list(net.state_dict()) == names


@pytest.mark.parametrize(
    ("changes", "option", "text"),
    [
        (
            {"scale_vs_channels": (1, 1, 2, 1)},
            "scale_vs_channels",
            "level 3: channels[3]*factors[3]^2/scale[3] = 256*2^2/1 = 1024 but channels[4] is 512; "
            "use 2 or channels[4] = 1024",
        ),
        (
            {"channels": (2, 8, 8), "factors": (4, 1), "scale_vs_channels": (4, 1)}
            | {"blocks": (1, 1)},
            "channels",
            "channels[1] = 8 is not a multiple of the square of its factor 4",
        ),
        ({"factors": (8, 2, 2, 2)}, "factors", "factors[0] = 8; use one of (1, 2, 4)"),
        ({"channels": (2, 32)}, "channels", "2 entries for 4 factors; give 5"),
        ({"kernel": 6}, "kernel", "6 is even and would change the length; use 5 or 7"),
        ({"kernel": 0}, "kernel", "0 must be at least 1"),
        ({"n_fft": 2047}, "n_fft", "2047 is odd; use 2046 or 2048"),
        (
            {"n_fft": 2048},
            "n_fft",
            "2048 has 1025 bins, not a multiple of all factors' product 32; use 2046 or 2110",
        ),
        (
            {"hop": 1024},
            "hop",
            "1024 is more than half of n_fft = 2046, so the windows barely overlap; "
            "use at most 1023",
        ),
        ({"hop": 0}, "hop", "0 must be at least 1"),
        (
            {"bottleneck_blocks": 2},
            "bottleneck_blocks",
            "layout v1 needs bottleneck_blocks = 0, not 2",
        ),
        ({"layout": "v3"}, "layout", "'v3' is not one of v1, v2"),
        ({"output": "product"}, "output", "'product' is not one of direct, difference"),
    ],
)
def test_check_names_the_option_its_value_and_the_way_out(changes, option, text):
    assert SpecUNet.check(**resolved(changes)) == [(option, text)]


def test_v1_works_on_two_channels():
    assert SpecUNet.check(**{**resolved(LOG_002), "layout": "v1", "bottleneck_blocks": 0}) == [
        ("channels", "layout v1 needs channels[0] = 2, not 4")
    ]
    assert SpecUNet.check(**resolved(LOG_002)) == []


def test_constructor_reports_all_problems_at_once():
    with pytest.raises(ValueError, match=r"SpecUNet:\n  hop: 0 .*\n  kernel: 6 is even"):
        SpecUNet(hop=0, kernel=6)
