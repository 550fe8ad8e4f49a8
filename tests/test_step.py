import contextlib

import pytest
import torch
from torch import nn

from bgray import step as step_module
from bgray.losses import LossSum
from bgray.losses.waveform import L1
from bgray.optim import muon, psgd
from bgray.step import EAGER_STEPS, Step, estimated

CPU = torch.device("cpu")


class Net(nn.Module):
    """(B, C, T) -> (B, 1, C, T)"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.b(self.dropout(self.a(x).tanh()))[:, None]


def made(device=CPU, **options):
    torch.manual_seed(0)
    net = Net().to(device)
    loss = LossSum({"l1": (L1(), 1.0)}).to(device)
    return net, Step(net, loss, device=device, grad_clip=1.0, **options)


def data(seed=0, batch=4, device=CPU):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, 16, generator=generator).to(device)
    return x, (0.5 * x)[:, None]


def test_gradients_are_those_of_this_batch_alone_and_clipped():
    net, step = made()
    step(*data(1))
    step(*data(2))
    torch.manual_seed(7)
    logged = step(*data(3))
    found = [p.grad.clone() for p in net.parameters()]
    torch.manual_seed(7)
    fresh, alone = made()
    torch.manual_seed(7)
    expected = alone(*data(3))
    assert logged["loss"] == expected["loss"]
    assert set(logged) == {"loss", "loss_l1", "grad_norm"}
    for grad, p in zip(found, fresh.parameters(), strict=True):
        assert torch.equal(grad, p.grad)
    total = torch.cat([g.flatten() for g in found]).norm()
    assert total <= 1.0001


def test_bf16_rounds_the_net_and_not_the_loss():
    net, step = made(bf16=True)
    seen = {}
    net.a.register_forward_hook(lambda _, args, output: seen.update(dtype=output.dtype))
    logged = step(*data())
    assert seen["dtype"] == torch.bfloat16
    assert logged["loss"].dtype == torch.float32
    assert net.a.weight.grad.dtype == torch.float32


def test_no_graph_is_recorded_on_a_cpu():
    net, step = made(graph=True)
    for i in range(EAGER_STEPS + 3):
        step(*data(i))
    assert net.calls == EAGER_STEPS + 3


# --- a recorder in the place of the GPU's: it computes again what it saw recorded


class Recorder:
    """As torch.cuda.CUDAGraph: replay fills the same tensors again."""

    recorded = None

    def replay(self):
        run, args, logged, params = self.recorded
        kept = [p.grad for p in params]
        again = run(*args)
        for name, value in logged.items():
            value.copy_(again[name])
        for p, grad in zip(params, kept, strict=True):
            if grad is not None:
                grad.copy_(p.grad)
                p.grad = grad


@pytest.fixture
def recorder(monkeypatch):
    class Recorded(step_module._Recorded):
        def __init__(self, run, params, inputs, targets, stream):
            drawn = torch.get_rng_state()
            super().__init__(run, params, inputs, targets, stream)
            torch.set_rng_state(drawn)  # recording computes nothing
            self._graph.recorded = (run, (self._inputs, self._targets), self._logged, params)

    monkeypatch.setattr(step_module, "_Recorded", Recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: contextlib.nullcontext())


def as_on_a_gpu(**options):
    net, step = made(**options)
    step._graph = True  # torch takes no stream for none to change
    step._beside = step._compute
    return net, step


def test_a_replayed_step_gives_what_a_computed_one_does_batch_by_batch(recorder):
    (net, step), (plain, computed) = as_on_a_gpu(), made()
    for i in range(EAGER_STEPS + 4):
        torch.manual_seed(i)
        found = {name: value.clone() for name, value in step(*data(i)).items()}
        torch.manual_seed(i)
        assert found == computed(*data(i))
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert step._recorded is not None


def test_gradients_that_an_optimizer_took_away_come_back_with_the_next_replay(recorder):
    net, step = as_on_a_gpu()
    for i in range(EAGER_STEPS + 2):
        step(*data(i))
        assert all(p.grad is not None for p in net.parameters())
        for p in net.parameters():
            p.grad = None


def test_another_shape_is_computed_beside_the_graph(recorder):
    net, step = as_on_a_gpu()
    for i in range(EAGER_STEPS + 1):
        step(*data(i))
    odd, computed = data(9, batch=3), made()[1]
    torch.manual_seed(1)
    found = step(*odd)
    torch.manual_seed(1)
    assert found == computed(*odd)


def test_where_recording_fails_it_is_said_once_and_training_goes_on(recorder, monkeypatch):
    @contextlib.contextmanager
    def refuses(graph, **_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    said = []
    net, step = as_on_a_gpu(said=lambda what, why: said.append((what, why)))
    for i in range(EAGER_STEPS + 3):
        step(*data(i))
    assert said == [("cuda_graphs", "operation not permitted when stream is capturing")]
    assert net.calls == EAGER_STEPS + 3
    assert all(p.grad is not None for p in net.parameters())


# --- compilation


def test_a_compiler_that_fails_is_said_and_the_step_is_computed_without_it(monkeypatch):
    class Failed(RuntimeError):  # importing the compiler takes longer than all of this file
        __module__ = "torch._inductor.exc"

    said = []
    net, _ = made()

    def broken(*args):
        raise Failed("no C++ compiler")

    monkeypatch.setattr(net, "compile", lambda **_: setattr(net, "_compiled_call_impl", broken))
    loss = LossSum({"l1": (L1(), 1.0)})
    step = Step(net, loss, device=CPU, compile=True, said=lambda *text: said.append(text))
    torch.manual_seed(5)
    found = step(*data())
    torch.manual_seed(5)
    computed = made()[1]
    torch.manual_seed(5)
    assert found["loss"] == computed(*data())["loss"]
    assert said[0][0] == "compile"
    assert "no C++ compiler" in said[0][1]
    step(*data(1))
    assert len(said) == 1


def test_an_error_of_the_model_itself_is_raised_and_not_taken_for_the_compilers():
    net, _ = made()
    net.compile = lambda **_: None
    step = Step(net, LossSum({"l1": (L1(), 1.0)}), device=CPU, compile=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        step(torch.zeros(1, 1, 3), torch.zeros(1, 1, 1, 3))


def test_an_estimate_is_float32_and_rounded_only_when_training_is():
    net, _ = made()
    net.eval()
    x, _ = data()
    with torch.no_grad():
        exact, rounded = estimated(net, x, bf16=False), estimated(net, x, bf16=True)
    assert exact.dtype == rounded.dtype == torch.float32
    assert torch.equal(exact, net(x))
    assert not torch.equal(exact, rounded)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [muon, psgd])
def test_a_recorded_step_trains_as_one_that_is_launched_kernel_by_kernel(optimizer):
    device, ends = torch.device("cuda"), []
    for graph in (False, True):
        net, step = made(device, graph=graph)
        update = optimizer(net, lr=1e-3)
        for i in range(EAGER_STEPS + 8):
            torch.manual_seed(i)
            step(*data(i, device=device))
            update.step()
        assert (step._recorded is not None) == graph
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_step_that_asks_the_gpu_something_is_not_recorded_and_still_trains():
    said, device = [], torch.device("cuda")
    net, step = made(device, graph=True, said=lambda what, why: said.append(what))
    net.register_forward_hook(lambda module, args, output: float(output.sum()) and None)
    for i in range(EAGER_STEPS + 3):
        logged = step(*data(i, device=device))
    assert said == ["cuda_graphs"]
    assert torch.isfinite(logged["loss"])
