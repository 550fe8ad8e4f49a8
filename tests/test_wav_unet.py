"""The pitch U-Nets: the logs' parameter counts, the parts by hand, what the options refuse."""

import time

import pytest
import torch
import torch.nn.functional as F

from bgray.models.wav_unet import Block, Down, Snake, Up, WavUNet, shuffle, unshuffle


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operations gain nothing from threads and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# run | channels | blocks | factors | scale | bottleneck | patching | kernels | rest | count
# A count of "-" is not in the logs to the last digit; the closed form below stands in for it.
LOGS = """
001 out23 | 1 8 64 256 512 | 2 2 3 4 | 8 8 4 2 | 1 1 1 1 | 0 | 1 | 7 | v1 layer | 21479313
001 out24 | 1 8 64 256 512 | 2 2 3 4 | 8 8 4 2 | 1 1 1 1 | 0 | 1 | 41 | v1 layer | 21680593
001 out25 | 1 8 64 256 512 | 4 4 4 4 | 8 8 4 2 | 1 1 1 1 | 0 | 1 | 41 | v1 layer | 22902289
001 out29 | 1 8 32 128 256 512 | 4 4 4 4 4 | 8 4 4 2 2 | 1 1 1 1 1 | 0 | 1 | 41 | v1 layer | -
001 out30 | 1 8 64 128 256 | 4 4 4 4 | 8 8 2 2 | 1 1 1 1 | 0 | 1 | 41 | v1 layer | 6036497
002 out0 | 8 32 128 256 512 | 1 3 4 4 | 8 8 4 2 | 2 2 2 1 | 4 | 1 | 41 | layer | 15828073
002 out3 | 8 32 128 256 512 | 2 4 6 6 | 8 8 4 2 | 2 2 2 1 | 6 | 1 | 41 | layer | 22793225
002 out4|8 32 64 128 256 512 1024|1 3 4 4 4 4|8 4 2 2 2 2|2 2 1 1 1 1|4|1|41|layer|62800169
002 DAC | 32 64 128 256 512 | 3 3 3 3 | 2 4 8 8 | 1 2 4 4 | 3 | 1 | 41 | layer | 16256865
002 out5 | 32 64 128 256 512 | 1 3 3 3 | 2 4 8 8 | 1 2 4 4 | 3 | 1 | 41 | layer | 16217697
002 out6 | 16 32 128 256 512 | 1 3 3 3 | 2 4 8 8 | 1 1 4 4 | 3 | 1 | 41 | layer | 15960945
002 out7 | 8 16 64 256 512 | 1 3 3 3 | 2 4 8 8 | 1 1 2 4 | 3 | 1 | 41 | layer | 14703033
002 out8|8 16 32 64 128 256 512|1 3 3 3 3 3|4 2 4 2 4 2|2 1 2 1 2 1|3|1|41|layer|12563225
002 out9|8 16 32 64 128 256 512|1 3 3 3 3 3|2 4 2 4 2 4|1 2 1 2 1 2|3|1|41|layer|-
002 out10 | 16 32 64 128 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 2 | 3 | 4 | 41 | layer | 9778836
002 out11 | 16 32 64 128 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 2 | 3 | 2 | 41 | layer | 9778514
002 out11b | 16 32 128 256 512 | 3 3 3 3 | 2 4 4 8 | 1 1 2 4 | 3 | 2 | 41 | layer | 15448210
002 out11c | 16 32 128 256 512 | 3 3 3 3 | 2 4 4 8 | 1 1 2 4 | 3 | 2 | 7 23 41 | none | 15342802
002 out12 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 41 | layer | 15668004
002 out13 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 41 | none | 15659172
002 out14 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 41 | none weight_norm | -
002 out15 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 41 | none snake | 15676836
002 out15b | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 41 | layer snake | 15685668
002 out16 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 7 | none | 15509028
002 out17 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 23 | none | 15579684
002 out18 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 97 | none | 15906468
002 out19 | 32 64 128 256 512 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 7 23 41 | none | 15557028
002 out20 | 32 64 128 256 512 | 4 4 4 4 | 2 2 4 8 | 1 1 2 4 | 4 | 4 | 7 23 41 97 | none | -
002 out21 | 48 96 192 384 768 | 3 3 3 3 | 2 2 4 8 | 1 1 2 4 | 3 | 4 | 7 23 41 | none | 34918516
"""
# Two-decimal counts that the log prints for runs whose exact count comes from the closed form.
CLAIMS = {"002 out9": "13.40", "002 out20": "19.15"}


def read_row(row):
    name, *lists, bottom, patching, kernels, rest, exact = (cell.strip() for cell in row.split("|"))
    names = ("channels", "blocks", "factors", "scale_vs_channels", "kernels")
    numbers = (tuple(map(int, cell.split())) for cell in (*lists, kernels))
    chosen = {
        **dict(zip(names, numbers, strict=True)),
        "bottleneck_blocks": int(bottom),
        "patching": int(patching),
        "norm": "layer" if "layer" in rest else "none",
        "weight_norm": "weight_norm" in rest,
        "activation": "snake" if "snake" in rest else "gelu",
        "layout": "v1" if "v1" in rest else "v2",
    }
    return name, chosen, None if exact == "-" else int(exact)


RUNS = {name: (chosen, exact) for name, chosen, exact in map(read_row, LOGS.strip().split("\n"))}


def closed_form(o):
    """Parameters from the layer list alone, independent of the module's code."""
    snake, norm, wn = o["activation"] == "snake", o["norm"] == "layer", o["weight_norm"]

    def block(c, k):
        depthwise = c * k + c + wn * c  # weight_norm adds one gain per output channel
        widen, narrow = 4 * c * c + 4 * c + wn * 4 * c, 4 * c * c + c + wn * c
        return depthwise + 2 * c * norm + widen + 4 * c * snake + narrow + c

    def conv(a, b, k):
        return a * b * k + b + wn * b

    channels, k = o["channels"], o["kernels"]
    v1 = o["layout"] == "v1"
    total = 0
    for i, (f, count) in enumerate(zip(o["factors"], o["blocks"], strict=True)):
        a, b = channels[i], channels[i + 1]
        strided = {1: 1, 2: 4, 4: 8, 8: 16}[f]
        total += conv(a, b, strided) + (b * a * strided + a)
        total += 2 * sum(block(b if v1 else a, k[j % len(k)]) for j in range(count))
        total += 0 if v1 else conv(2 * a, a, 1)
    total += o["bottleneck_blocks"] * block(channels[-1], o["bottleneck_kernel"] or k[0])
    p = o["patching"]
    return total + (0 if v1 else conv(p, channels[0], 5) + conv(channels[0], p, 5))


def resolved(chosen):
    return {**WavUNet.__init__.__kwdefaults__, **chosen}


def count(chosen):
    with torch.device("meta"):
        return sum(p.numel() for p in WavUNet(**chosen).parameters())


@pytest.mark.parametrize("name", RUNS)
def test_parameter_count_is_the_logs_and_the_closed_forms(name):
    chosen, exact = RUNS[name]
    found = count(chosen)
    assert found == closed_form(resolved(chosen))
    assert found == (exact or found)
    if name in CLAIMS:
        assert f"{found / 1e6:.2f}" == CLAIMS[name]


def test_check_accepts_every_run_of_the_logs():
    assert [WavUNet.check(**resolved(chosen)) for chosen, _ in RUNS.values()] == [[]] * len(RUNS)


def test_default_options_are_output_19():
    assert resolved({}) == resolved(RUNS["002 out19"][0])
    assert count({}) == 15_557_028


def test_options_may_be_lists_as_json_has_them():
    chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in resolved({}).items()}
    assert count(chosen) == 15_557_028
    assert count({**chosen, "kernels": [41]}) == 15_659_172


@pytest.mark.parametrize(
    ("name", "matrices", "vectors"),
    [("001 out24", (74, 21_626_144), (140, 54_449)), ("002 out0", (98, 15_778_336), (182, 49_737))],
)
def test_parameters_split_into_matrices_and_vectors_as_in_the_log(name, matrices, vectors):
    with torch.device("meta"):
        parameters = list(WavUNet(**RUNS[name][0]).parameters())
    deep = [p.numel() for p in parameters if p.ndim >= 2]
    flat = [p.numel() for p in parameters if p.ndim < 2]
    assert (len(deep), sum(deep)) == matrices
    assert (len(flat), sum(flat)) == vectors


def test_meta_device_builds_the_default_net_in_a_moment():
    count({})
    start = time.perf_counter()
    count({})
    assert time.perf_counter() - start < 0.5  # about 0.02 s; allocation alone would take longer


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
    settings = {"stride": factor, "padding": factor // 2}
    main = F.conv1d(x, down.conv.weight, down.conv.bias, **settings)
    torch.testing.assert_close(down(x), main + unshuffle(x, factor))
    main = F.conv_transpose1d(y, up.conv.weight, up.conv.bias, **settings)
    torch.testing.assert_close(up(y), main + shuffle(y, factor))


@pytest.mark.parametrize(("norm", "activation"), [("layer", "gelu"), ("none", "snake")])
def test_fresh_block_is_the_identity_to_a_millionth(norm, activation):
    block = Block(8, 7, norm, activation)
    x = torch.randn(2, 8, 64)
    assert 0 < (block(x) - x).abs().max() < 5e-6


def test_block_equals_its_formula():
    block = Block(4, 5, "layer", "gelu")
    torch.nn.init.ones_(block.gamma)
    x = torch.randn(1, 4, 16)
    y = F.conv1d(x, block.depthwise.weight, block.depthwise.bias, padding=2, groups=4).mT
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    y = y @ block.widen.weight.T + block.widen.bias
    y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    y = y @ block.narrow.weight.T + block.narrow.bias
    torch.testing.assert_close(block(x), x + y.mT)


def test_snake_adds_sine_squared():
    x = torch.linspace(-3, 3, 12).reshape(1, 3, 4)
    snake = Snake(4)
    assert snake.alpha.shape == (1, 1, 4)
    torch.testing.assert_close(snake(x), x + torch.sin(x) ** 2)
    torch.nn.init.constant_(snake.alpha, 2.0)
    torch.testing.assert_close(snake(x), x + torch.sin(2 * x) ** 2 / 2)


def wake(net):
    """Set every gamma to 1, so that the blocks count."""
    for key, p in net.named_parameters():
        if key.endswith("gamma"):
            torch.nn.init.ones_(p)


SMALL_ROWS = """
v1 | 1 2 8 | 1 2 | 2 4 | 1 1 | 0 | 1 | 3 5 | v1 layer | -
v2 | 2 4 8 | 1 2 | 2 4 | 1 2 | 1 | 1 | 3 5 | layer | -
v2 patched | 2 4 8 | 1 2 | 2 4 | 1 2 | 2 | 2 | 7 5 | layer | -
v2 factor 1 | 2 2 4 | 1 1 | 1 2 | 1 1 | 0 | 1 | 3 | none snake | -
v2 factor 8 | 2 8 | 1 | 8 | 2 | 1 | 1 | 3 | layer | -
"""
SMALL = {row[0]: row[1] for row in map(read_row, SMALL_ROWS.strip().split("\n"))}
SMALL_V1, SMALL_V2 = SMALL["v1"], SMALL["v2"]


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
        ({"blocks": (3, 3, 0, 3)}, "blocks", "blocks[2] = 0 must be at least 1"),
        ({"patching": 0}, "patching", "0 must be at least 1"),
        ({"bottleneck_blocks": -1}, "bottleneck_blocks", "-1 must be at least 0"),
        ({"factors": (2, 2, 3, 8)}, "factors", "factors[2] = 3; use one of (1, 2, 4, 8)"),
        ({"norm": "batch"}, "norm", "'batch' is not one of layer, none"),
        ({"activation": "relu"}, "activation", "'relu' is not one of gelu, snake"),
        ({"layout": "v3"}, "layout", "'v3' is not one of v1, v2"),
    ],
)
def test_check_names_the_option_its_value_and_the_way_out(changes, option, text):
    assert WavUNet.check(**resolved(changes)) == [(option, text)]


def test_v1_refuses_what_it_does_not_have():
    assert WavUNet.check(**resolved({"layout": "v1"})) == [
        ("channels", "layout v1 needs channels[0] = 1, not 32"),
        ("bottleneck_blocks", "layout v1 needs bottleneck_blocks = 0, not 3"),
        ("patching", "layout v1 needs patching = 1, not 4"),
    ]


def test_constructor_reports_all_problems_at_once():
    with pytest.raises(ValueError, match=r"WavUNet:\n  patching: 0 .*\n  kernels: 40 is even"):
        WavUNet(patching=0, kernels=(40,))
