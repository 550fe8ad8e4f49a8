"""The parts that both pitch U-Nets are made of, by hand."""

import pytest
import torch
import torch.nn.functional as F

from bgray.models import MODELS
from bgray.models.unet import Block, Snake, Squeeze, join, receptive_frames, recompute


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


def test_squeeze_has_the_gradients_of_gelu_and_a_linear_layer():
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    inputs = random(2, 3, 8), random(2, 8), random(2)
    plain = F.linear(F.gelu(inputs[0]), *inputs[1:])
    torch.testing.assert_close(Squeeze.apply(*inputs), plain)
    assert torch.autograd.gradcheck(Squeeze.apply, inputs)
    assert torch.autograd.gradgradcheck(Squeeze.apply, inputs)


@pytest.mark.parametrize("dims", [1, 2])
def test_join_is_the_convolution_of_both_on_top_of_each_other(dims):
    conv = (torch.nn.Conv1d if dims == 1 else torch.nn.Conv2d)(7, 3, 1)
    x, skip = torch.randn(2, 5, *[6] * dims), torch.randn(2, 2, *[6] * dims)
    torch.testing.assert_close(join(conv, x, skip), conv(torch.cat([x, skip], 1)))


def kept(function):
    """Result, and floats that autograd keeps of it."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes() // 4, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    return y, sum(floats for floats, _ in storages.values())


@pytest.mark.parametrize(("dims", "times"), [(1, 6), (2, 6)])
def test_a_block_keeps_six_times_its_input_and_with_recomputation_once(dims, times):
    c, size = 4, 40
    block = Block(c, 5, "none", dims=dims)
    x = torch.randn(2, c, *[size] * dims, requires_grad=True)
    parameters = sum(p.numel() for p in block.parameters())
    _, floats = kept(lambda: block(x))
    assert times * x.numel() <= floats <= times * x.numel() + 2 * parameters
    assert recompute(block) == 1
    _, floats = kept(lambda: block(x))
    assert floats == x.numel()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("norm", "activation", "dims"),
    [("none", "gelu", 1), ("layer", "snake", 1), ("layer", "gelu", 2)],
)
def test_recomputing_changes_no_bit_of_result_and_gradients(norm, activation, dims, autocast):
    torch.manual_seed(0)
    block = Block(4, 11, norm, activation, dims)
    torch.nn.init.ones_(block.gamma)
    x = torch.randn(2, 4, *[16] * dims, requires_grad=True)
    found = []
    for on in (False, True, False):
        recompute(block, on)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize(("kernel", "dims"), [(15, 2), (23, 1)])
def test_long_kernels_come_to_an_end_in_bfloat16(kernel, dims):
    torch.manual_seed(0)
    block, x = Block(4, kernel, "none", dims=dims), torch.randn(1, 4, *[16] * dims)
    torch.nn.init.ones_(block.gamma)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    torch.testing.assert_close(y.float(), block(x), rtol=0.05, atol=0.05)
    y.sum().backward()


def test_recomputation_is_of_blocks_and_of_nothing_else():
    net = MODELS["wav_unet"](channels=(2, 4), blocks=(2,), factors=(2,), scale_vs_channels=(1,))
    assert recompute(net) == 2 + 3 + 2
    assert recompute(MODELS["wavenet"](num_sources=1, channels=2, stacks=1, layers=1)) == 0


SMALL = {"channels": (4, 8, 16), "blocks": (1, 1), "factors": (2, 8), "scale_vs_channels": (1, 4)}
SMALL |= {"bottleneck_blocks": 1}
SMALL_V1 = {**SMALL, "channels": (1, 2, 16), "bottleneck_blocks": 0, "patching": 1, "layout": "v1"}
SMALL_V1 |= {"scale_vs_channels": (1, 1), "skip_conv": True, "kernels": (3,)}
PLANE = {"channels": (8, 16, 16), "blocks": (1, 1), "factors": (2, 2), "n_fft": 62, "hop": 16}
PLANE |= {"scale_vs_channels": (2, 4), "bottleneck_blocks": 1, "layout": "v2"}
TWO = {"num_sources": 2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at its inputs'
@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("wav_unet", SMALL, (1, 2, 512)),
        ("wav_unet", {**SMALL, "weight_norm": True, "activation": "snake"}, (1, 1, 512)),
        ("wav_unet", {**SMALL_V1, "norm": "layer"}, (1, 1, 64)),
        ("spec_unet", PLANE, (1, 1, 496)),
        ("wavenet", {**TWO, "channels": 4, "stacks": 1, "layers": 3}, (1, 2, 128)),
        ("conv_separator", TWO, (1, 1, 2048)),
        ("wave_unet", TWO, (1, 1, 2**15)),
        ("roll_autoencoder", {"widths": (2, 4, 8), "variational": True}, (1, 88, 16)),
    ],
)
def test_the_core_of_every_model_is_one_graph(name, options, shape):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = MODELS[name](**options).eval()
    first = options is SMALL
    recompute(net, not first)
    x = torch.rand(shape)

    def estimate():
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            y = net(x)
        return y[0] if isinstance(y, tuple) else y

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), list(net.parameters()), allow_unused=True)

    plain = estimate()
    # The backward pass is traced once: with operations and an autograd function of our own.
    backend = "aot_eager" if first else "eager"
    getattr(net, "core", net).compile(fullgraph=True, backend=backend)
    compiled = estimate()
    torch.testing.assert_close(compiled, plain)
    for a, b in zip(gradients(compiled), gradients(plain), strict=True):
        torch.testing.assert_close(a, b)


def test_snake_adds_sine_squared():
    x = torch.linspace(-3, 3, 12).reshape(1, 3, 4)
    snake = Snake(4)
    assert snake.alpha.shape == (1, 1, 4)
    torch.testing.assert_close(snake(x), x + torch.sin(x) ** 2)
    torch.nn.init.constant_(snake.alpha, 2.0)
    torch.testing.assert_close(snake(x), x + torch.sin(2 * x) ** 2 / 2)


def test_2d_block_that_looks_along_one_axis_is_the_1d_block_of_every_line():
    torch.manual_seed(0)
    line, plane = Block(4, 5), Block(4, 5, dims=2)
    torch.nn.init.ones_(line.gamma)
    weights = line.state_dict()
    kernel = torch.zeros(4, 1, 5, 5)
    kernel[:, :, 2] = weights["depthwise.weight"]  # the middle row: along the last axis only
    plane.load_state_dict({**weights, "depthwise.weight": kernel})
    x = torch.randn(2, 4, 3, 8)  # (B, C, F, N)
    lines = [line(x[:, :, f]) for f in range(3)]
    torch.testing.assert_close(plane(x), torch.stack(lines, 2))


def test_receptive_frames_by_hand():
    # A block of kernel 3 at the bottom, under a transposed kernel of 4 and a strided one of 3, both
    # by 2: one frame touches 2 below, which see 4, which see (4 - 1) * 2 + 3 = 9 above.
    assert receptive_frames([0], [2], [3], bottom=2) == 9
    assert receptive_frames([0], [2], [4], bottom=2) == 10
    # Nothing is resampled: only the kernels count, at the top twice.
    assert receptive_frames([6], [1], [1], bottom=4) == 1 + 6 + 4 + 6
    assert receptive_frames([6], [1], [1], bottom=4, width=5) == 5 + 6 + 4 + 6
