"""Nothing in a training step asks the GPU for a number: it would wait at every step."""

import pytest
import test_loss_contract as contract
import test_models
import torch
from dispatched import Dispatched
from test_loss_contract import _cdpam  # noqa: F401 (stands in for the package)
from torch import nn

from bgray import optim
from bgray.losses import LOSSES, LossSum
from bgray.losses.spectrogram import SpecMae
from bgray.step import split_extras

HEAVYBALL = ("psgd", "soap")  # theirs to mend


def test_the_ban_notices_who_asks():
    x = torch.ones(3)
    for asks in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[x > 0]):
        with pytest.raises(AssertionError, match="waits"), Dispatched(waits=False):
            asks()


@pytest.mark.filterwarnings("ignore:dac_features has random weights")
@pytest.mark.parametrize("label", contract.BEHAVIOUR)
def test_no_loss_waits_forward_or_backward(label):
    target, other = contract.target_of(label), contract.other(label)
    # torchaudio's resampler asks a tensor that is on the CPU anyway how long its output is.
    plain = label == "cdpam"
    loss = LOSSES[label](sample_rate=44_100, resample=False) if plain else contract.build(label)
    with Dispatched(waits=False):
        contract.apply(loss, label, other, target)[0].backward()


def test_a_sum_of_losses_and_a_loss_that_moves_do_not_wait():
    target, estimate = contract.target_of("l1"), contract.other("l1").requires_grad_()
    for mode in ("fixed", "step", "balance"):
        loss = LossSum({"l1": (contract.build("l1"), 10.0), "moving": (SpecMae(mode=mode), 1.0)})
        with Dispatched(waits=False):
            loss(estimate, target)[0].backward()
            loss.advance(1, lambda value: value)
            loss.advance(200, lambda value: value)


@pytest.mark.parametrize("name", sorted(set(optim.OPTIMIZERS) - set(HEAVYBALL)))
def test_no_step_of_an_optimizer_waits(name):
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    optimizer = optim.OPTIMIZERS[name](model)
    for step in range(3):
        model(torch.ones(2, 8)).sum().backward()
        with Dispatched(waits=False):
            optim.set_lr(optimizer, 0.5**step)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("key", test_models.TINY)
def test_no_model_waits_for_the_gpu_forward_or_back(key):
    """But an RNN with dropout, which asks for its seed on a GPU alone."""
    model, inputs = test_models.build(key), test_models.batch(key, 2)
    with Dispatched(waits=False):
        split_extras(model(inputs))[0].square().mean().backward()
