"""The 1-d pitch U-Net: its parts by hand, what it sees, what its options refuse."""

import pytest
import torch
import torch.nn.functional as F

from bgray.models.wav_unet import Down, Up, WavUNet, shuffle, unshuffle

pytestmark = pytest.mark.usefixtures("one_thread")


def resolved(chosen):
    return {**WavUNet.__init__.__kwdefaults__, **chosen}


def count(chosen):
    with torch.device("meta"):
        return sum(p.numel() for p in WavUNet(**chosen).parameters())


def test_options_may_be_lists_as_json_has_them():
    chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in resolved({}).items()}
    assert count(chosen) == 15_557_028
    assert count({**chosen, "kernels": [41]}) == 15_659_172


def test_unshuffle_puts_the_phase_before_the_channel():
    x = torch.arange(12.0).reshape(1, 2, 6)
    rows = [[0, 2, 4], [6, 8, 10], [1, 3, 5], [7, 9, 11]]
    assert torch.equal(unshuffle(x, 2)[0], torch.tensor(rows, dtype=torch.float32))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_shuffle_inverts_unshuffle(factor):
    x = torch.randn(2, 3, 16)
    assert torch.equal(shuffle(unshuffle(x, factor), factor), x)


def silence(module):
    """Zero its weights, so that only the skip is left."""
    for p in module.parameters():
        torch.nn.init.zeros_(p)
    return module


@pytest.mark.parametrize(("a", "b", "f"), [(4, 8, 2), (4, 4, 4), (2, 4, 8), (6, 3, 1)])
def test_down_skip_averages_adjacent_channels_of_unshuffle(a, b, f):
    x = torch.randn(2, a, 4 * f)
    average = a * f // b
    slow = torch.zeros(2, b, 4)
    for out in range(b):
        for n in range(4):
            for m in range(out * average, (out + 1) * average):
                phase, channel = divmod(m, a)
                slow[:, out, n] += x[:, channel, n * f + phase] / average
    torch.testing.assert_close(silence(Down(a, b, f))(x), slow)


@pytest.mark.parametrize(("a", "b", "f"), [(8, 4, 2), (4, 4, 4), (8, 2, 8), (3, 6, 1)])
def test_up_skip_repeats_channels_of_shuffle(a, b, f):
    x = torch.randn(2, a, 4)
    repeats = b * f // a
    slow = torch.zeros(2, b, 4 * f)
    for out in range(b):
        for n in range(4 * f):
            frame, phase = divmod(n, f)
            slow[:, out, n] = x[:, phase * (a // f) + out // repeats, frame]
    torch.testing.assert_close(silence(Up(a, b, f))(x), slow)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_down_and_up_are_their_convolution_plus_their_skip(factor):
    down, up = Down(2, 2 * factor, factor), Up(2 * factor, 2, factor)
    k = 2 * factor if factor > 1 else 1
    assert down.conv.kernel_size == up.conv.kernel_size == (k,)
    x, y = torch.randn(1, 2, 32), torch.randn(1, 2 * factor, 32 // factor)
    x.requires_grad_()
    y.requires_grad_()
    settings = {"stride": factor, "padding": factor // 2}
    main = F.conv1d(x, down.conv.weight, down.conv.bias, **settings)
    equal(down(x), main + unshuffle(x, factor), [x, *down.parameters()])
    main = F.conv_transpose1d(y, up.conv.weight, up.conv.bias, **settings)
    equal(up(y), main + shuffle(y, factor), [y, *up.parameters()])


def equal(fast, slow, inputs):
    """The values, and the gradients of each of the inputs."""
    torch.testing.assert_close(fast, slow)
    g = torch.randn_like(slow)
    for a, b in zip(*(torch.autograd.grad(y, inputs, g) for y in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def wake(net):
    """Set every gamma to 1, so that the blocks count."""
    for key, p in net.named_parameters():
        if key.endswith("gamma"):
            torch.nn.init.ones_(p)


SMALL_V1 = {
    "channels": (1, 2, 8),
    "blocks": (1, 2),
    "factors": (2, 4),
    "scale_vs_channels": (1, 1),
    "bottleneck_blocks": 0,
    "patching": 1,
    "kernels": (3, 5),
    "norm": "layer",
    "layout": "v1",
}
SMALL_V2 = {
    **SMALL_V1,
    "channels": (2, 4, 8),
    "scale_vs_channels": (1, 2),
    "bottleneck_blocks": 1,
    "layout": "v2",
}
ONE = {"blocks": (1, 1), "kernels": (3,), "bottleneck_blocks": 0}
SMALL = {
    "v1": SMALL_V1,
    "v2": SMALL_V2,
    "v2 patched": {**SMALL_V2, "bottleneck_blocks": 2, "patching": 2, "kernels": (7, 5)},
    "v2 factor 1": {**SMALL_V2, **ONE, "channels": (2, 2, 4), "factors": (1, 2)}
    | {"scale_vs_channels": (1, 1), "norm": "none", "activation": "snake"},
    "v2 factor 8": {**SMALL_V2, "channels": (2, 8), "blocks": (1,), "factors": (8,)}
    | {"scale_vs_channels": (2,), "kernels": (3,)},
}


@pytest.mark.parametrize("name", SMALL)
def test_receptive_field_is_what_the_gradient_sees(name):
    torch.manual_seed(0)
    net = WavUNet(**SMALL[name]).double()
    wake(net)
    m = net.length_multiple
    samples = m * (net.receptive_field // m + 4)  # room on both sides of the centre
    x = torch.randn(1, 1, samples, dtype=torch.float64, requires_grad=True)
    y = net(x)[0, 0, 0]  # (T)
    spans = []
    for centre in range(len(y) // 2, len(y) // 2 + m):  # one output sample of every phase
        (gradient,) = torch.autograd.grad(y[centre], x, retain_graph=True)
        seen = gradient[0, 0].nonzero()[:, 0]
        spans.append(int(seen.max() - seen.min()) + 1)
    assert max(spans) == net.receptive_field


def test_v1_adds_its_input_to_the_output():
    net = silence(WavUNet(**SMALL_V1))
    x = torch.randn(1, 1, 32)
    # A silent net is its fixed skips: each level adds what it shuffles down and back up to itself.
    torch.testing.assert_close(net(x)[:, 0], 3 * x)


def test_skip_conv_of_v1_weighs_the_skips_before_they_are_added():
    net = silence(WavUNet(**{**SMALL_V1, "skip_conv": True}))
    x = torch.randn(1, 1, 32)
    torch.testing.assert_close(net(x)[:, 0], x)  # only what passes through the bottom is left
    for i, weight in enumerate((10, 5)):
        torch.nn.init.dirac_(net.joins[i].weight)
        net.joins[i].weight.data.mul_(weight)
    torch.testing.assert_close(net(x)[:, 0], 16 * x)


@pytest.mark.parametrize("name", ["v2", "v2 patched"])
def test_output_says_what_becomes_of_the_input(name):
    torch.manual_seed(0)
    nets = {how: WavUNet(**SMALL[name], output=how) for how in ("direct", "difference", "product")}
    x = torch.randn(2, 2, 32)
    y = nets["direct"](x)
    for net in nets.values():
        net.load_state_dict(nets["direct"].state_dict())  # the option adds no parameter
    torch.testing.assert_close(nets["difference"](x), x[:, None] + y)
    torch.testing.assert_close(nets["product"](x), x[:, None] * y)
    silence(nets["difference"])
    assert torch.equal(nets["difference"](x), x[:, None])


def test_v2_joins_the_skip_after_the_levels_blocks():
    torch.manual_seed(0)
    net = WavUNet(**SMALL_V2)
    wake(net)
    x = torch.randn(1, 1, 32)
    a = net.conv_in(x)
    b = net.downs[0](net.encoder[0](a))
    c = net.bottom(net.downs[1](net.encoder[1](b)))
    d = net.joins[1](torch.cat([net.decoder[1](net.ups[1](c)), b], 1))
    e = net.joins[0](torch.cat([net.decoder[0](net.ups[0](d)), a], 1))
    torch.testing.assert_close(net(x)[:, 0], net.conv_out(e))


def test_kernels_go_to_the_jth_block_of_every_level_and_the_first_to_the_bottom():
    net = WavUNet(**SMALL_V2)

    def sizes(stack):
        return [block.depthwise.kernel_size[0] for block in stack]

    assert [sizes(s) for s in net.encoder] == [sizes(s) for s in net.decoder] == [[3], [3, 5]]
    assert sizes(net.bottom) == [3]
    assert sizes(WavUNet(**{**SMALL_V2, "bottleneck_kernel": 9}).bottom) == [9]


def test_weight_norm_is_on_all_but_the_transposed_convolutions():
    net = WavUNet(**{**SMALL_V2, "weight_norm": True})
    normed = {k.split(".parametrizations")[0] for k, _ in net.named_parameters() if "param" in k}
    kinds = {type(net.get_submodule(key)).__name__ for key in normed}
    assert kinds == {"ParametrizedConv1d", "ParametrizedLinear"}
    assert not any(type(m) in (torch.nn.Conv1d, torch.nn.Linear) for m in net.modules())
    gains = [p.shape for k, p in net.named_parameters() if k.endswith("original0")]
    assert all(shape.numel() == shape[0] for shape in gains)  # one per output channel


def test_bfloat16_autocast_stays_close_to_float32():
    torch.manual_seed(0)
    net, x = WavUNet(**SMALL_V2), torch.randn(1, 1, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(x)
    torch.testing.assert_close(half.float(), net(x).detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "option", "text"),
    [
        (
            {"channels": (32, 64, 128, 512, 512), "scale_vs_channels": (1, 1, 2, 8)},
            "scale_vs_channels",
            "level 2: channels[2]*factors[2]/scale[2] = 128*4/2 = 256 but channels[3] is 512; "
            "use 1 or channels[3] = 256",
        ),
        (
            {"scale_vs_channels": (1, 1, 3, 4)},
            "scale_vs_channels",
            "level 2: channels[2]*factors[2]/scale[2] = 128*4/3 = 170.667 but channels[3] is 256; "
            "use 2",
        ),
        (
            {"channels": (32, 64, 128, 300, 600)},
            "scale_vs_channels",
            "level 2: channels[2]*factors[2]/scale[2] = 128*4/2 = 256 but channels[3] is 300; "
            "use channels[3] = 256",
        ),
        (
            {"channels": (3, 2), "factors": (4,), "scale_vs_channels": (6,), "blocks": (1,)},
            "channels",
            "channels[1] = 2 is not a multiple of its factor 4",
        ),
        ({"channels": (32, 64)}, "channels", "2 entries for 4 factors; give 5"),
        ({"blocks": (3, 3)}, "blocks", "2 entries for 4 factors; give 4"),
        ({"scale_vs_channels": (1,) * 5}, "scale_vs_channels", "5 entries for 4 factors; give 4"),
        ({"kernels": (7, 23)}, "kernels", "2 entries for 3 blocks; give 1 or at least 3"),
        ({"kernels": (40,)}, "kernels", "40 is even and would change the length; use 39 or 41"),
        (
            {"bottleneck_kernel": 8},
            "bottleneck_kernel",
            "8 is even and would change the length; use 7 or 9",
        ),
        ({"bottleneck_kernel": 0}, "bottleneck_kernel", "0 must be at least 1"),
        ({"kernels": ()}, "kernels", "is empty; give at least one number"),
        ({"kernels": (0,)}, "kernels", "kernels[0] = 0 must be at least 1"),
        ({"blocks": (3, 3, 0, 3)}, "blocks", "blocks[2] = 0 must be at least 1"),
        ({"patching": 0}, "patching", "0 must be at least 1"),
        ({"bottleneck_blocks": -1}, "bottleneck_blocks", "-1 must be at least 0"),
        ({"factors": (2, 2, 3, 8)}, "factors", "factors[2] = 3; use one of (1, 2, 4, 8)"),
        ({"norm": "batch"}, "norm", "'batch' is not one of layer, none"),
        ({"activation": "relu"}, "activation", "'relu' is not one of gelu, snake"),
        ({"layout": "v3"}, "layout", "'v3' is not one of v1, v2"),
        ({"output": "mask"}, "output", "'mask' is not one of direct, difference, product"),
        ({"skip_conv": True}, "skip_conv", "only layout v1 has it; v2 joins by a convolution"),
    ],
)
def test_check_names_the_option_its_value_and_the_way_out(changes, option, text):
    assert WavUNet.check(**resolved(changes)) == [(option, text)]


def test_v1_refuses_what_it_does_not_have():
    assert WavUNet.check(**resolved({"layout": "v1"})) == [
        ("patching", "layout v1 needs patching = 1, not 4"),
        ("channels", "layout v1 needs channels[0] = 1, not 32"),
        ("bottleneck_blocks", "layout v1 needs bottleneck_blocks = 0, not 3"),
    ]
    assert WavUNet.check(**resolved({**SMALL_V1, "output": "difference"})) == [
        ("output", "difference is what layout v1 does by its last skip; use direct")
    ]
    assert WavUNet.check(**resolved({**SMALL_V1, "output": "product", "skip_conv": True})) == []


def test_constructor_reports_all_problems_at_once():
    with pytest.raises(ValueError, match=r"WavUNet:\n  patching: 0 .*\n  kernels: 40 is even"):
        WavUNet(patching=0, kernels=(40,))
