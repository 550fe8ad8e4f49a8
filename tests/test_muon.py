"""Muon's batches: what shares one, that sharing changes nothing, and how many kernels a step is."""

import pytest
import torch
from dispatched import Dispatched

from bgray import optim
from bgray.muon import CALL_FLOPS, batches, orthogonalize, orthogonalize_all


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(32, 32), (24, 60), (60, 24), (8, 1, 41), (64, 3, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_orthogonalized_matrices_have_singular_values_near_one(shape, dtype):
    matrix = noise(*shape).reshape(1, shape[0], -1)
    values = torch.linalg.svdvals(orthogonalize(matrix, 6, dtype).float())
    assert values.min() > 0.6  # a square Gaussian's smallest singular value starts near zero
    assert values.max() < 1.25


def test_a_batch_of_matrices_is_orthogonalized_like_one_at_a_time():
    matrices = noise(5, 24, 60)
    for dtype, atol in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        batched = orthogonalize(matrices, 6, dtype)
        for matrix, ours in zip(matrices, batched, strict=True):
            torch.testing.assert_close(
                ours, orthogonalize(matrix[None], 6, dtype)[0], atol=atol, rtol=0
            )


SHAPES = {(24, 60): 2, (60, 24): 3, (8, 41): 1, (64, 7): 2, (16, 16): 1, (30, 33): 1}


@pytest.mark.parametrize("call_flops", [0, 1e15])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_sharing_a_batch_changes_a_matrix_by_rounding_only(call_flops, dtype, atol, monkeypatch):
    monkeypatch.setitem(CALL_FLOPS, False, call_flops)
    stacks = {shape: noise(k, *shape, seed=k) for shape, k in SHAPES.items()}
    alone = {
        shape: torch.cat([orthogonalize(matrix[None], 6, dtype) for matrix in stack]).float()
        for shape, stack in stacks.items()
    }
    orthogonalize_all(stacks, 6, dtype)
    for shape, stack in stacks.items():
        torch.testing.assert_close(stack, alone[shape], atol=atol, rtol=0)


def test_matrices_share_a_batch_where_the_zeros_cost_less_than_a_batch_does():
    sizes = (((7, 32), 2), ((7, 64), 2), ((512, 2048), 6))
    assert batches(sizes, 0) == {size: size for size, _ in sizes}
    small = batches(sizes, 5e7)
    assert small == {(7, 32): (7, 64), (7, 64): (7, 64), (512, 2048): (512, 2048)}
    assert set(batches(sizes, 1e15).values()) == {(512, 2048)}


def test_a_step_of_the_default_net_is_launched_in_fewer_than_300_kernels(monkeypatch):
    """As a GPU is told: it took 1500 when each parameter and each shape was done by itself."""
    from bgray.models.wav_unet import WavUNet

    monkeypatch.setitem(CALL_FLOPS, False, CALL_FLOPS[True])
    model = WavUNet()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    counts = []
    for ns_steps in (1, 2):  # six would take seconds
        optimizer = optim.muon(model, ns_steps=ns_steps)
        group = optimizer.param_groups[0]
        with torch.no_grad(), Dispatched() as seen:
            optimizer._muon(group, group["params"])
        seen.kernels = seen.kernels[len(group["params"]) :]  # the state, made at the first step
        # CUDA's baddbmm copies its first argument before it multiplies.
        counts.append(len(seen.kernels) + seen.kernels.count("aten.baddbmm.default"))
    assert 100 < counts[0] + 5 * (counts[1] - counts[0]) < 300
