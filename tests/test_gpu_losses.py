"""Losses and optimizers within CUDA graphs; `pytest -m gpu` where there is a GPU."""

import pytest
import test_loss_contract as contract
import torch
from test_loss_contract import _cdpam  # noqa: F401 (stands in for the package)

from bgray.losses import LOSSES
from bgray.losses.multi_mel import MultiScaleMel

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LABELS = [label for label in contract.BEHAVIOUR if label not in ("kl", "umx_mse", "cdpam")]


@pytest.fixture(autouse=True)
def _exact():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def captured(loss, estimate, target):
    """(graph, value, gradient) of one forward and backward on fixed memory."""

    def step():
        estimate.grad = None
        value = loss(estimate, target)
        value.backward()
        return value

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    estimate.grad = None
    with torch.cuda.graph(graph):
        value = step()
    return graph, value, estimate.grad


@pytest.mark.filterwarnings("ignore:dac_features has random weights")
@pytest.mark.parametrize("label", LABELS)
def test_a_loss_replayed_from_a_graph_is_the_cpus_for_other_audio(label):
    loss = contract.build.__wrapped__(label)
    target, first = contract.target_of(label), contract.perfect(label, contract.target_of(label))
    other = contract.other(label)
    leaf = other.clone().requires_grad_()
    expected = loss(leaf, target)
    expected.backward()

    loss, on_gpu = loss.to(CUDA), (0.5 * first).to(CUDA).requires_grad_()
    graph, value, gradient = captured(loss, on_gpu, target.to(CUDA))
    with torch.no_grad():
        on_gpu.copy_(other)
    graph.replay()
    assert value.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    assert (gradient.cpu() - leaf.grad).norm() < 1e-2 * leaf.grad.norm()


def test_the_gradient_of_multi_mel_is_the_same_at_every_replay():
    target, other = contract.target_of("l1").to(CUDA), contract.other("l1").to(CUDA)
    loss = MultiScaleMel(sample_rate=44_100).to(CUDA)
    found = []
    for _ in range(3):
        leaf = other.clone().requires_grad_()
        loss(leaf, target).backward()
        found.append(leaf.grad)
    assert all(torch.allclose(found[0], x, rtol=1e-6, atol=1e-9) for x in found[1:])


def test_the_losses_left_out_need_what_the_model_gives_or_a_package():
    assert {label.split()[0] for label in LABELS} | {"kl", "umx_mse", "cdpam"} == set(LOSSES)
