"""The parts that both pitch U-Nets are made of, by hand."""

import pytest
import torch
import torch.nn.functional as F

from bgray.models.unet import Block, Snake, receptive_frames


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
