"""Depthwise 1-d convolution on channels-last features, where the library's kernels are slow."""

import importlib.util
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F

from bgray.problems import first_line

OLDEST = (7, 0)
"""Least compute capability that Triton makes kernels for."""

SHORT = 9
"""Kernels below it: the library's gradient of the weight is as fast as anything. For 41 taps of
(2, 8192, 32) it takes 18 ms of CPU on AVX-512, `_by_blocks` 1.1 ms."""

BLOCK = 128
"""Instants of a block in `_by_blocks`: 1.1 ms where 64 take 1.3 ms, 32 take 1.9 ms, FFTs 1.7."""

_library = False


def use(how: Literal["auto", "library"], device: torch.device) -> str:
    """What `depthwise` does from now on in this process (runtime.depthwise), to be called at each
    run's start, as a warm worker may have another run's choice. Returns why `auto` takes the
    library's kernels on this device after all, or an empty string."""
    global _library
    why = missing(device) if how == "auto" else ""
    _library = how == "library" or bool(why)
    return why


def missing(device: torch.device) -> str:
    """Why there are no kernels of ours on this device; empty if there are."""
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return f"there are no depthwise kernels for {device.type}"
    if torch.version.hip or importlib.util.find_spec("triton") is None:
        return "Triton for CUDA is not installed"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is too old for Triton"
    return _tried(device)


@cache
def _tried(device: torch.device) -> str:
    """Why a first kernel of ours does not run there; empty if it does. Triton builds its launcher
    then, which takes a C compiler and Python's headers."""
    try:
        x, weight = torch.zeros(1, 8, 16, device=device), torch.zeros(16, 1, 3, device=device)
        _triton().correlate(x, weight, None, flip=False)
        torch.cuda.synchronize(device)
    except Exception as error:
        return f"Triton does not run: {first_line(error)}"
    return ""


def depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(B, T, C), weight (C, 1, K) with K odd, bias (C,) -> (B, T, C): `reference`, faster.

    Under autocast x is rounded and the output is of its type, as usual, but weights, sums and the
    weight's gradient stay float32."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if _library:
        return reference(x, weight, bias)
    return OPS.depthwise(x, weight, bias)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y[b, t, c] = bias[c] + sum_j weight[c, 0, j] x[b, t + j - K//2, c], zeros around x: as the
    library does it."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv1d(x.mT, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    return y.mT


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, flip: bool = False
) -> torch.Tensor:
    x = x.contiguous()
    if x.is_cuda and x.dtype != torch.float64 and not _kernels_missing(x.device):
        return _triton().correlate(x, weight, bias, flip=flip)
    weight, k = weight.flip(-1) if flip else weight, weight.shape[-1]
    # oneDNN's bfloat16 kernels of channels-last never end for 23 taps (torch 2.14, AVX-512).
    kind = torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype
    kernel = weight.to(kind).unsqueeze(2)  # (C, 1, 1, K)
    bias = None if bias is None else bias.to(kind)
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(_plane(x.to(kind)), kernel, bias, padding=(0, k // 2), groups=x.shape[-1])
    return y.squeeze(2).mT.to(x.dtype).contiguous()


def _forward_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, flip: bool = False
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _weight_gradient(
    x: torch.Tensor, g: torch.Tensor, kernel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    x, g = x.contiguous(), g.contiguous()
    if x.is_cuda and x.dtype != torch.float64 and not _kernels_missing(x.device):
        return _triton().weight_gradient(x, g, kernel)
    if x.dtype != torch.float64:
        x, g = x.float(), g.float()
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda or kernel < SHORT:
            slope = _by_library(x, g, kernel)
        else:
            slope = _by_blocks(x, g, kernel)
        return slope, g.sum((0, 1))


def _weight_gradient_fake(
    x: torch.Tensor, g: torch.Tensor, kernel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    c, dtype = x.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(c, 1, kernel, dtype=dtype), x.new_empty(c, dtype=dtype)


def _by_library(x: torch.Tensor, g: torch.Tensor, kernel: int) -> torch.Tensor:
    """(B, T, C) twice -> (C, 1, K)."""
    c = x.shape[-1]
    weight, pad = x.new_empty(c, 1, 1, kernel), [0, kernel // 2]
    sides, ones, mask = [0, 0], [1, 1], [False, True, False]
    _, slope, _ = torch.ops.aten.convolution_backward(
        _plane(g), _plane(x), weight, None, ones, pad, ones, False, sides, c, mask
    )
    return slope.squeeze(2)


def _by_blocks(x: torch.Tensor, g: torch.Tensor, kernel: int) -> torch.Tensor:
    """(B, T, C) twice -> (C, 1, K): as the *forward* of a depthwise convolution, which is fast.

    Blocks of T are its channels, beside B and C: each block of g is a kernel of BLOCK taps that is
    moved over the block of x around it to K positions."""
    b, t, c = x.shape
    size = min(BLOCK, t)
    count, pad = -(-t // size), kernel // 2
    fill = count * size - t
    padded = F.pad(x, (0, 0, pad, pad + fill))  # (B, T', C)
    along, step, _ = padded.stride()
    span = size + kernel - 1
    windows = padded.as_strided((span, b, count, c), (step, along, size * step, 1))
    windows = windows.reshape(1, span, b * count * c)
    kernels = F.pad(g, (0, 0, 0, fill)).reshape(b, count, size, c)
    kernels = kernels.mT.reshape(b * count * c, 1, 1, size)
    slopes = F.conv2d(_plane(windows), kernels, groups=b * count * c)  # (1, B*count*C, 1, K)
    return slopes.reshape(b * count, c, 1, kernel).sum(0)


def _plane(x: torch.Tensor) -> torch.Tensor:
    """(B, T, C) -> (B, C, 1, T), a view that the library knows as channels-last: it copies a 3-d
    input with these strides to another order first."""
    return x.mT.unsqueeze(2)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, flip = inputs
    ctx.save_for_backward(x, weight)
    ctx.flip, ctx.bias = flip, None if bias is None else bias.dtype


def _gradients(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
    dx = OPS.depthwise(g, weight, None, not ctx.flip) if to_x else None
    slope = shift = None
    if to_weight or to_bias:
        slope, shift = OPS.depthwise_slope(x, g, weight.shape[-1])
        slope = (slope.flip(-1) if ctx.flip else slope).to(weight.dtype) if to_weight else None
        shift = shift.to(ctx.bias) if to_bias else None
    return dx, slope, shift, None


def _remember_both(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _second_gradients(
    ctx: Any, slope: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    x, g = ctx.saved_tensors
    to_x, to_g = ctx.needs_input_grad[:2]
    dx = OPS.depthwise(g, slope, None, True) if to_x else None
    dg = OPS.depthwise(x, slope, shift) if to_g else None
    return dx, dg, None


@cache
def _kernels_missing(device: torch.device) -> str:
    return missing(device)


@cache
def _triton() -> Any:
    from bgray.models import depthwise_triton

    return depthwise_triton


# Operations of their own, so that torch.compile takes each as one. Not by torch.library.custom_op:
# its first call imports the compiler, wanted or not, which is seconds of a run's start.
_LIBRARY = torch.library.Library("bgray", "DEF")
for _schema, _run, _fake, _back, _keep in [
    (
        "depthwise(Tensor x, Tensor weight, Tensor? bias, bool flip=False) -> Tensor",
        *(_forward, _forward_fake, _gradients, _remember),
    ),
    (
        "depthwise_slope(Tensor x, Tensor g, int kernel) -> (Tensor, Tensor)",
        *(_weight_gradient, _weight_gradient_fake, _second_gradients, _remember_both),
    ),
]:
    _name = _LIBRARY.define(_schema, tags=())
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bgray::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"bgray::{_name}", _back, setup_context=_keep, lib=_LIBRARY)
OPS = torch.ops.bgray
