import contextlib

import pytest
import torch

from bgray import bench_plain
from bgray.losses import LOSSES
from bgray.models import unet, wav_unet
from bgray.optim import muon

SMALL = {
    "channels": (8, 16, 32),
    "blocks": (1, 2),
    "factors": (2, 8),
    "scale_vs_channels": (1, 4),
    "bottleneck_blocks": 1,
    "patching": 2,
    "kernels": (7, 11),
}


@pytest.mark.parametrize("output", ["direct", "product"])
def test_the_plain_net_has_the_values_and_the_gradients_of_ours(output):
    torch.manual_seed(0)
    net = wav_unet.WavUNet(**SMALL, output=output)
    for name, p in net.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(p)
    x = torch.randn(2, 1, 512)
    found = []
    for how in (contextlib.nullcontext(), bench_plain.first_written()):
        net.zero_grad()
        with how:
            y = net(x)
        y.square().sum().backward()
        found.append((y.detach(), [p.grad.clone() for p in net.parameters()]))
    (ours, our_grads), (plain, plain_grads) = found
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    for a, b in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["multi_mel", "mrstft"])
def test_the_plain_losses_have_the_values_of_ours(name):
    loss = LOSSES[name](sample_rate=48000)
    generator = torch.Generator().manual_seed(0)
    x, y = (0.1 * torch.randn(2, 1, 1, 8192, generator=generator) for _ in range(2))
    ours = loss(x, y)
    with bench_plain.first_written():
        plain = loss(x, y)
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=0)
    assert torch.equal(loss(x, y), ours)  # and ours are back


def test_what_was_swapped_is_back_even_after_an_error():
    before = unet.Block.forward, wav_unet.Down.forward, unet.join
    broken = unet.Snake(2)
    with pytest.raises(RuntimeError), bench_plain.first_written():
        broken(torch.zeros(1, 3))  # two channels are not three
    assert (unet.Block.forward, wav_unet.Down.forward, unet.join) == before


def test_an_optimizer_one_by_one_moves_each_tensor_as_before():
    ends = []
    for alone in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
        optimizer = muon(net, lr=1e-2, ns_dtype="fp32")
        if alone:
            bench_plain.one_by_one(optimizer)
            assert all(len(group["params"]) == 1 for group in optimizer.param_groups)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        ends.append([p.detach() for p in net.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
