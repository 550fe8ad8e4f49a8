"""The schedules by values solved by hand, and the plateau against torch's."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bgray import optim
from bgray.schedules import SCHEDULES, Constant, Plateau, WarmupStableDecay, set_lr


def observed(scores, mode="min", **options):
    """The factor after each of the scores."""
    plateau = Plateau(**options)
    factors = []
    for score in scores:
        plateau.observe(score, mode)
        factors.append(plateau.scale(0, 1))
    return factors


def test_constant_warms_up_linearly_and_stays():
    assert [Constant(4).scale(s, 10) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert Constant().scale(0, 10) == 1


def test_wsd_warms_up_stays_and_decays_to_final_one_past_the_last_step():
    wsd = WarmupStableDecay(warmup_steps=2, decay_share=0.4, final=0.2)
    scales = [wsd.scale(s, 10) for s in range(11)]
    assert scales == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert WarmupStableDecay(decay_share=1.0).scale(5, 10) == 0.5
    assert WarmupStableDecay(decay_share=0.0).scale(9, 10) == 1


def test_wsd_refuses_a_warm_up_that_runs_into_the_decay():
    with pytest.raises(
        ValueError,
        match=r"wsd: warmup_steps 7 and decay_share 0.4 \(= 4 steps\) must fit into 10 steps",
    ):
        WarmupStableDecay(warmup_steps=7, decay_share=0.4).scale(0, 10)


def test_plateau_lowers_after_patience_and_then_does_not_count_the_cooldown():
    # The first score is the best; two bad ones are borne, the third lowers; of the next, one is
    # not counted.
    factors = observed([1.0] * 10, factor=0.5, patience=2, cooldown=1)
    assert factors == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_plateau_counts_only_a_gain_of_the_threshold_as_a_new_best():
    options = {"factor": 0.5, "patience": 0, "cooldown": 0, "threshold": 0.1}
    assert observed([1.0, 0.91, 0.89], **options) == [1, 0.5, 0.5]
    assert observed([1.0, 1.09, 1.11], "max", **options) == [1, 0.5, 0.5]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("seed", range(8))
def test_plateau_equals_torch_on_random_scores(mode, seed):
    rng = np.random.default_rng([3, seed])
    options = {
        "factor": rng.uniform(0.1, 0.9),
        "patience": int(rng.integers(0, 6)),
        "cooldown": int(rng.integers(0, 4)),
        "threshold": float(rng.choice([0.0, 1e-4, 0.05])),
    }
    scores = rng.normal(size=150) + (0 if seed % 2 else 5)  # below zero too
    scores[40] = math.nan
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, eps=0, **options)
    expected = []
    for score in scores:
        reference.step(score)
        expected.append(optimizer.param_groups[0]["lr"])
    assert observed(scores.tolist(), mode, **options) == pytest.approx(expected, rel=1e-12)
    assert expected[-1] < 1


def test_plateau_lowers_by_default_as_open_unmix_does():
    factors = observed([1.0] * 200)
    assert [i for i in range(1, 200) if factors[i] < factors[i - 1]] == [81, 172]
    assert factors[-1] == pytest.approx(0.09)


def test_a_plateau_that_is_told_the_earlier_scores_goes_on_as_the_unbroken_one():
    scores = np.random.default_rng(0).normal(size=60).tolist()
    whole, resumed = (Plateau(patience=3, cooldown=2) for _ in range(2))
    for score in scores:
        whole.observe(score, "max")
    for score in scores[:30]:
        resumed.observe(score, "max")
    assert resumed != whole
    for score in scores[30:]:
        resumed.observe(score, "max")
    assert resumed == whole


def test_set_lr_scales_the_first_rate_however_often_and_after_a_resume():
    def build():
        return optim.muon(nn.Linear(4, 4), lr=0.02)

    optimizer, other = build(), build()
    for scale in (0.5, 0.1):
        set_lr(optimizer, scale)
    other.load_state_dict(optimizer.state_dict())
    set_lr(other, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.002, 0.0002])
    assert [g["lr"] for g in other.param_groups] == pytest.approx([0.01, 0.001])


@pytest.mark.parametrize(
    ("schedule", "options", "text"),
    [
        ("constant", {"warmup_steps": -1}, "constant:\n  warmup_steps: must be at least 0, got -1"),
        ("wsd", {"decay_share": 1.5}, r"wsd:\n  decay_share: must be in \[0, 1\], got 1.5"),
        ("wsd", {"final": -0.1}, r"final: must be in \[0, 1\], got -0.1"),
        ("plateau", {"factor": 1.0}, r"plateau:\n  factor: must be in \(0, 1\), got 1.0"),
        ("plateau", {"patience": -1}, "patience: must be at least 0, got -1"),
        ("plateau", {"threshold": math.nan}, r"threshold: must be in \[0, 1\), got nan"),
    ],
)
def test_a_schedule_out_of_range_is_named_with_its_value(schedule, options, text):
    with pytest.raises(ValueError, match=text):
        SCHEDULES[schedule](**options)


def test_the_config_can_read_the_options_from_the_signatures():
    from bgray.config import resolve_options

    for entry in SCHEDULES.values():
        assert resolve_options(entry, {}, "x")[1] == []
    resolved, problems = resolve_options(SCHEDULES["plateau"], {"factor": 2.0}, "schedule")
    assert sorted(resolved) == ["cooldown", "factor", "metric", "patience", "threshold"]
    assert problems == [("schedule.factor", "must be in (0, 1), got 2.0")]
