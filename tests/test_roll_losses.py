"""The piano-roll losses by values solved by hand, and against torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from bgray.losses import LOSSES, LossSum
from bgray.losses.roll import BceLogits, Dice, Kl
from bgray.losses.waveform import Mse

FLOOR = math.log(1 + math.exp(-1))  # 0.3133 nats


def rolls(*shape, density=0.1, seed=0):
    """(B, S, P, T) of 0 and 1."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).float()


def logits(*shape, seed=1):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPE = (2, 1, 88, 96)


# --- bce_logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pos_weight", [None, 9.0])
def test_bce_logits_equals_torch(pos_weight):
    estimate, target = logits(*SHAPE), rolls(*SHAPE)
    weight = None if pos_weight is None else torch.tensor(pos_weight)
    expected = F.binary_cross_entropy_with_logits(estimate, target, pos_weight=weight)
    ours = BceLogits(pos_weight=pos_weight)(estimate, target)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_hidden_state_cannot_bring_cross_entropy_below_0_3133_and_a_logit_can():
    target = rolls(*SHAPE)
    best = 2 * target - 1  # 1 where a note sounds and -1 where none does
    assert BceLogits()(best, target).item() == pytest.approx(0.3133, abs=5e-5)
    assert BceLogits()(best, target).item() == pytest.approx(FLOOR, rel=1e-6)
    assert BceLogits()(12 * best, target).item() < 1e-4


def test_a_logit_of_at_least_zero_costs_a_silent_cell_ln_2_at_least():
    silence = torch.zeros(SHAPE)
    for estimate in (silence, logits(*SHAPE).relu()):  # the legacy autoencoder's best, and any
        assert BceLogits()(estimate, silence).item() >= math.log(2) - 1e-6


def test_pos_weight_of_the_density_makes_an_undecided_roll_a_stationary_point():
    target = rolls(*SHAPE)
    density = target.mean().item()
    shift = torch.zeros((), requires_grad=True)  # the same logit everywhere
    BceLogits(pos_weight=(1 - density) / density)(shift.expand(SHAPE), target).backward()
    assert shift.grad.item() == pytest.approx(0, abs=1e-6)


def test_cross_entropy_of_huge_logits_is_finite_and_linear_in_them():
    target = torch.zeros(SHAPE)
    assert BceLogits()(torch.full(SHAPE, 1e4), target).item() == pytest.approx(1e4)
    assert BceLogits()(torch.full(SHAPE, -1e4), target).item() == 0


# --- mse on a roll --------------------------------------------------------------------------------


def test_saying_nothing_scores_the_note_density_in_squared_error():
    target = rolls(*SHAPE)
    density = target.mean().item()
    assert 0.05 < density < 0.15
    assert Mse()(torch.zeros(SHAPE), target).item() == pytest.approx(density, rel=1e-5)


# --- dice -----------------------------------------------------------------------------------------


def test_dice_is_zero_for_the_roll_itself_and_near_one_for_its_complement():
    target = rolls(*SHAPE)
    sure = 60 * (2 * target - 1)
    assert Dice()(sure, target).item() == pytest.approx(0, abs=1e-6)
    cells = target.numel()  # nothing in common: 1 - 1 / (cells + 1)
    assert Dice()(-sure, target).item() == pytest.approx(1 - 1 / (cells + 1), abs=1e-6)


def test_dice_of_half_the_notes_is_solved_by_hand():
    target = torch.zeros(1, 1, 4, 4)
    target[..., :2] = 1  # 8 cells, of which 4 are found
    sure = torch.full((1, 1, 4, 4), -60.0)
    sure[..., :1] = 60
    assert Dice()(sure, target).item() == pytest.approx(1 - (2 * 4 + 1) / (4 + 8 + 1), abs=1e-6)


def test_dice_of_silence_taken_for_silence_is_zero():
    silence = torch.zeros(SHAPE)
    assert Dice()(silence - 60, silence).item() == pytest.approx(0, abs=1e-6)


def test_dice_of_a_batch_is_one_ratio_and_not_the_mean_over_its_items():
    estimate, target = logits(*SHAPE), rolls(*SHAPE)
    target[1] *= rolls(*SHAPE[1:], density=0.1, seed=5)  # the second is sparser
    single = torch.stack([Dice()(estimate[i : i + 1], target[i : i + 1]) for i in range(2)])
    both = Dice()(estimate, target)
    assert single.min() < both < single.max()
    assert abs(both - single.mean()) > 1e-3


# --- kl -------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_torch_distributions_per_target_value():
    mean, log_variance = logits(3, 4, 5, 2), logits(3, 4, 5, 2, seed=2) / 3
    latent = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(latent, prior).sum() / (3 * 88 * 40)
    roll = torch.zeros(3, 1, 88, 40)
    ours = Kl()(roll, roll, {"mean": mean, "log_variance": log_variance})
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_divergence_is_zero_at_the_prior_and_flat_around_it():
    roll = torch.zeros(SHAPE)
    mean, log_variance = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    loss = Kl()(roll, roll, {"mean": mean, "log_variance": log_variance})
    loss.backward()
    assert loss.item() == 0
    assert not mean.grad.any()
    assert not log_variance.grad.any()
    near = Kl()(roll, roll, {"mean": mean, "log_variance": log_variance + 1e-3})
    expected = 6 * 0.5 * (math.expm1(1e-3) - 1e-3) / roll.numel()
    assert near.item() == pytest.approx(expected, rel=1e-3)  # not lost in cancellation


# --- all three ------------------------------------------------------------------------------------


def test_the_log_s_loss_is_a_weighted_sum_in_the_config():
    estimate, target = logits(*SHAPE), rolls(*SHAPE)
    total, parts = LossSum({"bce_logits": (BceLogits(), 0.2), "dice": (Dice(), 0.8)})(
        estimate, target
    )
    expected = 0.2 * BceLogits()(estimate, target) + 0.8 * Dice()(estimate, target)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert list(parts) == ["bce_logits", "dice"]


@pytest.mark.parametrize("name", ["bce_logits", "dice", "kl"])
def test_half_precision_is_computed_in_float32(name):
    loss = LOSSES[name]()
    estimate, target = logits(*SHAPE).bfloat16(), rolls(*SHAPE).bfloat16()
    moments = {"mean": estimate, "log_variance": estimate / 3}

    def value(cast):
        more = ({key: cast(x) for key, x in moments.items()},) if name == "kl" else ()
        return loss(cast(estimate), cast(target), *more)

    low = value(lambda x: x)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(value(torch.Tensor.float).item(), rel=1e-6)


def test_what_takes_logits_says_so_and_refuses_a_bounded_output_unless_told():
    for kind in (BceLogits, Dice):
        assert kind().estimates == "logits"
        assert not kind().bounded_ok
        assert kind(bounded_ok=True).bounded_ok


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_pos_weight_that_cannot_be_is_named_with_its_value(weight):
    with pytest.raises(ValueError, match=f"pos_weight: must be above 0, .* got {weight:g}"):
        BceLogits(pos_weight=weight)
