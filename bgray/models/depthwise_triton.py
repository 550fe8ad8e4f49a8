"""Triton kernels of the depthwise 1-d convolution on channels-last audio features, for CUDA."""

# Inside the kernels it is Triton that reads the code, and pyright that misunderstands it.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

SPLITS = 4096
"""Most partial sums of a weight's gradient: they take SPLITS * (K + 1) * C floats."""


@triton.jit
def _correlate(
    x,  # (B, T, C)
    w,  # (K, C) float32
    bias,  # (C,) float32, or anything if not BIAS
    y,  # (B, T, C)
    T,
    C,
    tiles,
    K: tl.constexpr,
    FLIP: tl.constexpr,
    BIAS: tl.constexpr,
    R: tl.constexpr,
    NT: tl.constexpr,
    BC: tl.constexpr,
):
    """y[t] = sum_j w[j] x[t + j - K//2]. Lane (i, c) makes R adjacent outputs, so that each loaded
    x serves R of them; the last R weights stay in registers."""
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * (NT * R)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    i = tl.arange(0, NT)[:, None] * R
    # Offsets that may pass 2^31 go into the pointers; what is left fits 32 bits.
    start = (clip * T + first) * C
    inside = c < C
    acc = (tl.zeros((NT, BC), tl.float32),) * R
    taps = (tl.zeros((1, BC), tl.float32),) * R
    for s0 in range(0, K + R - 1, R):
        # Unrolled by R, after which the weights are in the same registers again: no moves.
        for u in tl.static_range(R):
            s = s0 + u
            t = i + (s - K // 2)
            there = (first + t >= 0) & (first + t < T) & inside
            here = tl.load(x + start + t * C + c, mask=there, other=0.0).to(tl.float32)
            j = K - 1 - s if FLIP else s
            fresh = tl.load(w + j * C + c, mask=(s < K) & inside, other=0.0)
            taps = (fresh,) + taps[: R - 1]  # noqa: RUF005 - Triton knows no unpacking here
            added = ()
            for r in tl.static_range(R):
                added = added + (acc[r] + here * taps[r],)  # noqa: RUF005
            acc = added
    shift = tl.zeros((1, BC), tl.float32)
    if BIAS:
        shift = tl.load(bias + c, mask=inside, other=0.0)
    for r in tl.static_range(R):
        out = (acc[r] + shift).to(y.dtype.element_ty)
        tl.store(y + start + (i + r) * C + c, out, mask=(first + i + r < T) & inside)


@triton.jit
def _weight_sums(
    x,  # (B, T, C)
    g,  # (B, T, C)
    sums,  # (B * tiles, K + 1, C) float32; row K is the bias's
    T,
    C,
    tiles,
    S,
    K: tl.constexpr,
    R: tl.constexpr,
    NT: tl.constexpr,
    BC: tl.constexpr,
):
    """sums[tile, j] = sum over the tile's NT * S instants t of g[t] x[t + j - K//2], for R taps j.

    Lane (i, c) walks S adjacent instants with the R values of x around each in registers; S is a
    multiple of R."""
    tile = tl.program_id(0)
    clip = (tile // tiles).to(tl.int64)
    first = (tile % tiles) * (NT * S)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    j0 = tl.program_id(2) * R
    i = tl.arange(0, NT)[:, None] * S
    start = (clip * T + first) * C
    inside = c < C
    acc = (tl.zeros((NT, BC), tl.float32),) * R
    bias = tl.zeros((NT, BC), tl.float32)
    around = ()
    for r in tl.static_range(R - 1):
        t = i + (j0 + r - K // 2)
        there = (first + t >= 0) & (first + t < T) & inside
        value = tl.load(x + start + t * C + c, mask=there, other=0.0).to(tl.float32)
        around = around + (value,)  # noqa: RUF005
    for s0 in range(0, S, R):
        for u in tl.static_range(R):
            t = i + s0 + u
            there = (first + t < T) & inside
            slope = tl.load(g + start + t * C + c, mask=there, other=0.0).to(tl.float32)
            t += j0 + R - 1 - K // 2
            there = (first + t >= 0) & (first + t < T) & inside
            value = tl.load(x + start + t * C + c, mask=there, other=0.0).to(tl.float32)
            around = around + (value,)  # noqa: RUF005
            added = ()
            for r in tl.static_range(R):
                added = added + (acc[r] + slope * around[r],)  # noqa: RUF005
            acc = added
            around = around[1:]
            bias += slope
    row = sums + tile.to(tl.int64) * (K + 1) * C + c
    for r in tl.static_range(R):
        total = tl.sum(acc[r], 0, keep_dims=True)
        tl.store(row + (j0 + r) * C, total, mask=(j0 + r < K) & inside)
    total = tl.sum(bias, 0, keep_dims=True)
    tl.store(row + K * C, total, mask=(j0 == 0) & inside)


def _lanes(channels: int, element_bytes: int) -> tuple[int, int]:
    """(rows NT, channels BC) of a program's tile: rows of 128 bytes at most, 512 lanes, four to a
    thread: about 170 registers of it, so that three programs fit a multiprocessor."""
    wide = min(triton.next_power_of_2(channels), 128 // element_bytes)
    return 512 // max(wide, 16), wide


def _outputs(kernel: int) -> int:
    """R: outputs or taps per lane; more would be wasted on a short kernel."""
    return 8 if kernel > 9 else 4


# No autotuning: a run that goes on after a restart must add in the same order as before.


def correlate(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, flip: bool
) -> torch.Tensor:
    """(B, T, C) contiguous, weight (C, 1, K), bias (C,) -> (B, T, C) of x's type, summed in
    float32. flip: with the kernel reversed, which is the way back of the gradient."""
    b, t, c = x.shape
    k = weight.shape[-1]
    y = torch.empty_like(x)
    taps = weight.reshape(c, k).t().contiguous().float()  # (K, C): neighbouring channels together
    shift = taps if bias is None else bias.contiguous().float()
    (rows, wide), r = _lanes(c, x.element_size()), _outputs(k)
    rows = min(rows, triton.next_power_of_2(triton.cdiv(t, r)))
    tiles = triton.cdiv(t, rows * r)
    _correlate[(b * tiles, triton.cdiv(c, wide))](
        x, taps, shift, y, t, c, tiles,
        K=k, FLIP=flip, BIAS=bias is not None, R=r, NT=rows, BC=wide,
        num_warps=max(1, min(8, rows * wide // 128)),
    )  # fmt: skip
    return y


def weight_gradient(
    x: torch.Tensor, g: torch.Tensor, kernel: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and the output's gradient g, (B, T, C) contiguous -> gradients (C, 1, K) of the weight and
    (C,) of the bias, float32. Summed in a fixed order: the same bits at every call."""
    b, t, c = x.shape
    (rows, wide), r = _lanes(c, x.element_size()), _outputs(kernel)
    steps = max(min(64, triton.cdiv(t, rows)), triton.cdiv(b * t, SPLITS * rows))
    steps = triton.cdiv(steps, r) * r
    rows = min(rows, triton.next_power_of_2(triton.cdiv(t, steps)))
    tiles = triton.cdiv(t, rows * steps)
    sums = torch.empty(b * tiles, kernel + 1, c, device=x.device, dtype=torch.float32)
    _weight_sums[(b * tiles, triton.cdiv(c, wide), triton.cdiv(kernel, r))](
        x, g, sums, t, c, tiles, steps,
        K=kernel, R=r, NT=rows, BC=wide,
        num_warps=max(1, min(8, rows * wide // 128)),
    )  # fmt: skip
    total = sums.sum(0)  # (K + 1, C)
    return total[:kernel].t().contiguous().unsqueeze(1), total[kernel].clone()
