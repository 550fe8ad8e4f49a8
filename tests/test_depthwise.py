"""The depthwise convolution: against the library's, by hand, and its Triton kernels without a
GPU in Triton's interpreter."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bgray.models import depthwise as module
from bgray.models.depthwise import depthwise, reference, use
from bgray.models.unet import recompute
from bgray.models.wav_unet import WavUNet

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
# (B, T, C, K): odd and even lengths, kernels longer than T, of one tap, on both sides of SHORT,
# several blocks with and without a rest, single channels and instants.
SIZES = [
    (2, 37, 3, 5),
    (1, 8, 4, 41),
    (3, 300, 5, 23),
    (2, 256, 2, 9),
    (2, 16, 1, 1),
    (1, 1, 4, 3),
    (1, 129, 1, 11),
]


@pytest.fixture(autouse=True)
def ours():
    yield
    use("auto", CPU)


def parts(b, t, c, k, dtype=torch.float32, device=CPU):
    torch.manual_seed(b + t + c + k)
    x, g = (torch.randn(b, t, c, device=device).to(dtype) for _ in range(2))
    weight, bias = torch.randn(c, 1, k, device=device), torch.randn(c, device=device)
    if dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    return [p.requires_grad_() for p in (x, weight, bias)], g


def test_three_taps_by_hand():
    x = torch.tensor([1.0, 2, 3, 4]).reshape(1, 4, 1)
    weight = torch.tensor([100.0, 10, 1]).reshape(1, 1, 3)  # the sample before, here, after
    y = depthwise(x, weight, torch.tensor([0.5]))
    assert y.flatten().tolist() == [12.5, 123.5, 234.5, 340.5]


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_the_librarys(size):
    inputs, g = parts(*size, dtype=torch.float64)
    y, slow = depthwise(*inputs), reference(*inputs)
    torch.testing.assert_close(y, slow)
    fast = torch.autograd.grad(y, inputs, g)
    for a, b in zip(fast, torch.autograd.grad(slow, inputs, g), strict=True):
        torch.testing.assert_close(a, b)


def test_first_and_second_gradients_are_those_of_finite_differences():
    for kernel in (3, 11):
        inputs, _ = parts(2, 5, 2, kernel, dtype=torch.float64)
        assert torch.autograd.gradcheck(depthwise, inputs)
        assert torch.autograd.gradgradcheck(depthwise, inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_wanted_gradients_are_made(wanted, monkeypatch):
    inputs, g = parts(2, 20, 3, 11)
    for i, p in enumerate(inputs):
        p.requires_grad_(i in wanted)
    slow = torch.autograd.grad(reference(*inputs), [inputs[i] for i in wanted], g)
    if wanted == (0,):
        only = SimpleNamespace(depthwise=module.OPS.depthwise)  # not the weight's, the slow part
        monkeypatch.setattr(module, "OPS", only)
    fast = torch.autograd.grad(depthwise(*inputs), [inputs[i] for i in wanted], g)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_any_memory_layout_and_no_bias():
    x = torch.randn(2, 3, 40).mT  # (B, T, C), time adjacent
    weight = torch.randn(11, 1, 3).permute(2, 1, 0)
    g = torch.randn(1, 1, 3).expand(2, 40, 3)
    slow, fast = (f(x, weight.requires_grad_(), None) for f in (reference, depthwise))
    torch.testing.assert_close(fast, slow)
    assert fast.is_contiguous()
    for y in (fast, slow):
        y.backward(g)
        if y is fast:
            first, weight.grad = weight.grad, None
    torch.testing.assert_close(first, weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [5, 23])
def test_autocast_rounds_the_signal_but_not_the_sums_of_the_weights_gradient(kernel):
    inputs, g = parts(4, 500, 3, kernel)
    rounded = inputs[0].detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise(*inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(*inputs), rtol=0.05, atol=0.2)
    g = g.bfloat16()
    exact = [rounded.double(), *(p.detach().double() for p in inputs[1:])]
    exact[1].requires_grad_()
    (slope,) = torch.autograd.grad(reference(*exact), exact[1:2], g.double())
    x_slope, to_weight, to_bias = torch.autograd.grad(y, inputs, g)
    assert to_weight.dtype == to_bias.dtype == x_slope.dtype == torch.float32
    # 2000 products were summed: bfloat16 sums would be off by some per cent.
    torch.testing.assert_close(to_weight, slope.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(to_bias, g.float().sum((0, 1)), rtol=1e-4, atol=1e-3)


def test_library_is_a_choice_of_the_process(monkeypatch):
    inputs, _ = parts(1, 8, 2, 3)
    assert depthwise(*inputs).grad_fn.name() != reference(*inputs).grad_fn.name()
    assert use("library", CPU) == ""
    assert depthwise(*inputs).grad_fn.name() == reference(*inputs).grad_fn.name()
    assert use("auto", CPU) == ""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
    assert use("auto", cuda) == "Old is too old for Triton"
    assert depthwise(*inputs).grad_fn.name() == reference(*inputs).grad_fn.name()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert use("auto", cuda) == "Triton for CUDA is not installed"
    assert "mps" in use("auto", torch.device("mps"))


def test_it_does_not_load_the_compiler():
    code = "import sys, torch; from bgray.models.depthwise import depthwise\n"
    code += "x, w = torch.ones(1, 4, 2), torch.ones(2, 1, 3, requires_grad=True)\n"
    code += "depthwise(x, w, None).sum().backward()\nsys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_it_is_one_operation_for_the_compiler():
    inputs, g = parts(2, 20, 3, 11)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module.OPS.depthwise, tuple(inputs), test_utils=checks)
    plain = tuple(p.detach() for p in (inputs[0], g))
    torch.library.opcheck(module.OPS.depthwise_slope, (*plain, 11), test_utils=checks)
    compiled = torch.compile(depthwise, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*inputs), inputs, g)
    for a, b in zip(ours, torch.autograd.grad(depthwise(*inputs), inputs, g), strict=True):
        assert torch.equal(a, b)


INTERPRETED = """
import sys
import torch
sys.path.insert(0, "tests")
from bgray.models import depthwise_triton
from bgray.models.depthwise import reference
from test_depthwise import parts
torch.set_num_threads(1)
for size in [(2, 37, 3, 5), (1, 8, 40, 41), (1, 70, 1, 11)]:
    for dtype, off in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        (x, weight, bias), g = parts(*size, dtype=dtype)
        y = reference(x.float(), weight, bias)
        to_x, to_weight, to_bias = torch.autograd.grad(y, (x, weight, bias), g.float())
        x, weight, bias = x.detach(), weight.detach(), bias.detach()
        ours = depthwise_triton.correlate(x, weight, bias, flip=False)
        torch.testing.assert_close(ours.float(), y.detach(), rtol=off, atol=off)
        ours = depthwise_triton.correlate(g, weight, None, flip=True)
        torch.testing.assert_close(ours, to_x, rtol=off, atol=off)
        ours = depthwise_triton.weight_gradient(x, g, weight.shape[-1])
        torch.testing.assert_close(ours, (to_weight, to_bias), rtol=1e-4, atol=1e-3)
print("equal")
"""


@pytest.mark.slow
def test_the_triton_kernels_are_right_at_all_edges_in_tritons_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", INTERPRETED]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [7, 41])
def test_the_triton_kernels_compile_for_a_gpu_that_is_not_there(kernel):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bgray.models import depthwise_triton as kernels

    (rows, wide), r = kernels._lanes(32, 2), kernels._outputs(kernel)
    tile = {"K": kernel, "R": r, "NT": rows, "BC": wide}
    for function, constants, pointers in [
        (kernels._correlate, {**tile, "FLIP": True, "BIAS": True}, ("x", "w", "bias", "y")),
        (kernels._weight_sums, tile, ("x", "g", "sums")),
    ]:
        kinds = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
        kinds |= {p: "*fp32" if p in ("w", "bias", "sums") else "*bf16" for p in pointers}
        places = {(function.arg_names.index(name),): v for name, v in constants.items()}
        source = ASTSource(function, kinds, constexprs=places)
        for capability in (80, 90):
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            # An inner loop of R steps with R products each, in registers only.
            assert made.asm["ptx"].count("fma.rn.f32") >= r * r
            assert ".local" not in made.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [*SIZES, (4, 8192, 32, 41), (8, 64, 512, 7), (3, 1000, 96, 23)])
def test_the_triton_kernels_equal_the_library_on_a_gpu(size, dtype):
    assert use("auto", torch.device("cuda")) == ""
    inputs, g = parts(*size, dtype=dtype, device=torch.device("cuda"))
    exact = [p.detach().double().requires_grad_() for p in inputs]
    y, slow = depthwise(*inputs), reference(*exact)
    assert y.dtype == dtype
    off = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), slow, rtol=off, atol=off)
    ours = torch.autograd.grad(y, inputs, g)
    theirs = torch.autograd.grad(slow, exact, g.double())
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=off, atol=off)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-2)
    again = torch.autograd.grad(depthwise(*inputs), inputs, g)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits_reach_the_last_sample():
    device = torch.device("cuda")
    if torch.cuda.get_device_properties(device).total_memory < 30 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    b, t, c = 3, 2**24, 64  # 3 * 2^30 values
    x = torch.zeros(b, t, c, device=device, dtype=torch.bfloat16)
    x[-1, -1, -1] = 1
    weight = torch.arange(1.0, 4, device=device).expand(c, 1, 3).clone().requires_grad_()
    y = depthwise(x, weight, None)
    assert y[-1, -2:, -1].tolist() == [3, 2]
    g = torch.zeros_like(y)
    g[-1, -1, -1] = 1
    (slope,) = torch.autograd.grad(y, weight, g)
    assert slope[-1, 0].tolist() == [0, 1, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["eager", "recompute", "compile"])
def test_a_u_net_has_the_gradients_of_the_library_on_a_gpu(how):
    device = torch.device("cuda")
    torch.manual_seed(0)
    sizes = {"channels": (16, 32, 64), "blocks": (3, 3), "factors": (2, 8)}
    net = WavUNet(**sizes, scale_vs_channels=(1, 4), bottleneck_blocks=1).to(device)
    for name, p in net.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(p)
    x = torch.randn(2, 1, 4096, device=device)

    def gradients():
        loss = net(x).square().mean()
        return torch.autograd.grad(loss, list(net.parameters()))

    use("library", device)
    slow = gradients()
    assert use("auto", device) == ""
    recompute(net, how == "recompute")
    if how == "compile":
        net.compile(fullgraph=True)
    for a, b in zip(gradients(), slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
