"""Muon: momentum whose matrices are made orthogonal, many at a time, and AdamW for what is none."""
# pyright: reportPrivateImportUsage=false
# torch._foreach_: the kernels of torch.optim, which do lists of tensors at once.

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.adamw import adamw as adamw_update

Group = dict[str, Any]
Size = tuple[int, int]

CALL_FLOPS = {True: 1e10, False: 5e7}
"""By whether it is a GPU: what it could compute while it is being told of one more batch (about 30
kernels: 0.1 ms on a GPU, where small matrices run at a tenth of its peak)."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def orthogonalize(matrices: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """(K, rows, cols) -> the same shape in `dtype`, each matrix with singular values near 1.

    Newton-Schulz iteration with the coefficients of https://kellerjordan.github.io/posts/muon/:
    fast rather than convergent, so the singular values end anywhere in about [0.7, 1.2].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    rows, cols = matrices.shape[-2:]
    x = matrices.to(dtype)
    x = x.mT if rows > cols else x  # the Gram matrix of the short side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (K, short, short)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if rows > cols else x


def orthogonalize_all(stacks: Mapping[Size, torch.Tensor], steps: int, dtype: torch.dtype) -> None:
    """`orthogonalize` in place for stacks (k, rows, cols) by (rows, cols), in few batches."""
    lying = defaultdict(list)
    for shape in stacks:
        lying[min(shape), max(shape)].append(shape)
    sizes = tuple((size, sum(len(stacks[s]) for s in found)) for size, found in lying.items())
    device = next(iter(stacks.values())).device.type
    together = defaultdict(list)
    for size, padded in batches(sizes, CALL_FLOPS[device == "cuda"]).items():
        together[padded] += lying[size]
    for size, shapes in together.items():
        if len(shapes) == 1:
            stack = stacks[shapes[0]]
            stack.copy_(orthogonalize(stack, steps, dtype))
            continue
        counts = [len(stacks[shape]) for shape in shapes]
        batch = torch.zeros(sum(counts), *size, dtype=dtype, device=stacks[shapes[0]].device)
        for shape, part in zip(shapes, batch.split(counts), strict=True):
            _corner(part, shape).copy_(stacks[shape])
        batch = orthogonalize(batch, steps, dtype)
        for shape, part in zip(shapes, batch.split(counts), strict=True):
            stacks[shape].copy_(_corner(part, shape))


def _corner(padded: torch.Tensor, shape: Size) -> torch.Tensor:
    """Where matrices (k, rows, cols) are in (k, short, long): a view of that shape."""
    part = padded[:, : min(shape), : max(shape)]
    return part.mT if shape[0] > shape[1] else part


@functools.cache
def batches(sizes: tuple[tuple[Size, int], ...], call_flops: float) -> dict[Size, Size]:
    """What matrices of each (short, long) are padded to, from (size, how many of them).

    Zeros beside a matrix stay zeros in Newton-Schulz and change nothing else. So small matrices of
    several sizes can share a batch, and do where that costs less than `call_flops`.
    """
    groups = [(size, count, (size,)) for size, count in sorted(sizes)]
    while len(groups) > 1:
        pairs = [(x, y) for i, x in enumerate(groups) for y in groups[:i]]
        extra = [_flops(_joined(x, y)) - _flops(x) - _flops(y) for x, y in pairs]
        least = extra.index(min(extra))
        if extra[least] > call_flops:
            break
        groups = [g for g in groups if g not in pairs[least]] + [_joined(*pairs[least])]
    return {size: padded for padded, _, members in groups for size in members}


Batch = tuple[Size, int, tuple[Size, ...]]
"""The padded size, how many matrices, and their own sizes."""


def _joined(x: Batch, y: Batch) -> Batch:
    size = max(x[0][0], y[0][0]), max(x[0][1], y[0][1])
    return size, x[1] + y[1], x[2] + y[2]


def _flops(batch: Batch) -> float:
    """Of six iterations."""
    (short, long), count, _ = batch
    return 6 * count * 2 * short**2 * (2 * long + short)


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one object: each group says in `optimizer` which of the two updates it.

    A Muon group holds lr, momentum, nesterov, weight_decay, ns_steps and ns_dtype; an AdamW group
    lr, betas, eps, weight_decay and fused. Matrices of one shape, lying or standing, and small ones
    of similar shapes go through one batched product; against one at a time that differs by rounding
    only.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["optimizer"] == "muon" else self._adamw)(group, params)
        return loss

    def _muon(self, group: Group, params: list[Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        updates: Any = momenta
        if group["nesterov"]:
            updates = torch._foreach_add(grads, momenta, alpha=group["momentum"])

        kinds = defaultdict(list)
        for p, update in zip(params, updates, strict=True):
            kinds[p.device, p.dtype].append((p, update))
        for members in kinds.values():
            self._turn(group, members)

    def _turn(self, group: Group, members: list[tuple[Any, torch.Tensor]]) -> None:
        """Moves each parameter along its update made orthogonal; all of one device and dtype."""
        by_shape = defaultdict(list)
        for p, update in members:
            by_shape[p.shape[0], p.numel() // p.shape[0]].append((p, update))
        # One tensor, of which the matrices of each shape are a view (k, rows, cols).
        flat = torch.cat([u.flatten() for found in by_shape.values() for _, u in found])
        parts = flat.split([len(found) * r * c for (r, c), found in by_shape.items()])
        stacks = {shape: part.view(-1, *shape) for shape, part in zip(by_shape, parts, strict=True)}
        orthogonalize_all(stacks, group["ns_steps"], DTYPES[group["ns_dtype"]])
        scales = [-group["lr"] * max(1.0, rows / cols) ** 0.5 for rows, cols in stacks]
        torch._foreach_mul_(list(stacks.values()), scales)
        params = [p for found in by_shape.values() for p, _ in found]
        steps = [step for stack in stacks.values() for step in stack]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            params, [step.view(p.shape) for p, step in zip(params, steps, strict=True)]
        )

    def _adamw(self, group: Group, params: list[Any]) -> None:
        for p in params:
            if not self.state[p]:  # "step" lives where torch.optim.AdamW keeps it
                device = p.device if group["fused"] else "cpu"
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                self.state[p] |= {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
        adamw_update(
            params=params,
            grads=[p.grad for p in params],
            exp_avgs=[self.state[p]["exp_avg"] for p in params],
            exp_avg_sqs=[self.state[p]["exp_avg_sq"] for p in params],
            max_exp_avg_sqs=[],
            state_steps=[self.state[p]["step"] for p in params],
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{key: group[key] for key in ("lr", "eps", "weight_decay", "fused")},
        )
