import math

import numpy as np
import pytest
from scipy import stats

from bgray.verdicts import (
    bootstrap_variance,
    judge,
    mean_squares,
    parts,
    pooled,
    removed_by_pairing,
)

ZERO_3X4 = np.zeros((3, 4))


def noise(rng, shape, tails="normal"):
    return rng.standard_normal(shape) if tails == "normal" else rng.standard_t(3, shape) / 3**0.5


def sweep(rng, *, variants=8, seeds=3, items=16, noisy=None, effect=0.0, tails="normal"):
    """Scores (V, N, M): luck of seed and variant of deviation 1, of the cell 1; items and seeds
    differ by much that all variants share. Row 0 is the baseline, row 1 has the effect."""
    luck = noise(rng, (variants, seeds, 1), tails)
    if noisy is not None:
        luck[noisy] *= 3
    scores = luck + noise(rng, (variants, seeds, items), tails)
    scores += 5 * noise(rng, (1, 1, items)) + 2 * noise(rng, (1, seeds, 1))
    scores[1] += effect
    return scores


def judged(scores, **options):
    found = [parts(variant, scores[0]) for variant in scores[1:]]
    options = {"mode": "max", "pool": pooled(found), "comparisons": len(found), **options}
    return [judge(one, **options) for one in found]


def kinds(scores, **options):
    return [verdict.kind for verdict in judged(scores, **options)]


# --- solved by hand


def test_mean_squares_of_a_two_by_two_table_are_those_of_the_textbook():
    # Mean 4, rows -1 and 1, columns -2 and 2, interaction +-1.
    d = np.array([[2.0, 4.0], [2.0, 8.0]])
    assert mean_squares(d) == pytest.approx((4.0, 16.0, 4.0))


def test_one_comparison_of_seeds_alone_is_the_paired_t_test():
    differences = np.array([1.0, 2.0, 3.0])
    verdict = judge(parts(differences[:, None] + ZERO_3X4, ZERO_3X4), mode="max")
    assert verdict.standard_error == pytest.approx(1 / math.sqrt(3))
    # Of the 5% that may go wrong over all looks the first one has 6 / pi^2.
    half = stats.t.ppf(1 - 0.025 * 6 / math.pi**2, 2) / 3**0.5
    assert verdict.interval == pytest.approx((2 - half, 2 + half))
    assert verdict.kind == "open"


def test_the_bootstrap_of_a_table_by_hand_adds_its_three_parts():
    # (1 + 1) / 4 + (4 + 4) / 4 + 4 / 16
    assert bootstrap_variance(np.array([[2.0, 4.0], [2.0, 8.0]])) == pytest.approx(2.75)


def test_the_bootstraps_closed_form_is_what_resampling_tends_to():
    rng = np.random.default_rng(0)
    d = rng.standard_normal((3, 1)) + rng.standard_normal((1, 5)) + rng.standard_normal((3, 5))
    seeds, items = rng.integers(0, 3, (200_000, 3)), rng.integers(0, 5, (200_000, 5))
    by_seed = np.stack([(seeds == s).mean(1) for s in range(3)], 1)
    by_item = np.stack([(items == i).mean(1) for i in range(5)], 1)
    means = ((by_seed @ d) * by_item).sum(1)
    assert bootstrap_variance(d) == pytest.approx(means.var(), rel=0.02)


def test_interval_and_verdict_agree_and_the_mode_says_which_way():
    better = np.array([5.0, 5.1, 4.9])[:, None] + ZERO_3X4
    for sign in (1, -1):
        for mode in ("min", "max"):
            verdict = judge(parts(sign * better, ZERO_3X4), mode=mode)
            assert verdict.kind == ("better" if (sign > 0) == (mode == "max") else "worse")
            assert verdict.interval[0] * verdict.interval[1] > 0


def test_an_item_without_a_value_on_one_side_is_left_out_on_both():
    variant, baseline = np.ones((2, 3)), np.zeros((2, 3))
    variant[0, 1], baseline[:, 2] = np.nan, np.nan
    variant[1, 1], variant[1, 2] = 100, 100
    found = parts(variant, baseline)
    assert (found.items, found.mean) == (1, 1.0)
    assert parts(np.full((2, 3), np.nan), baseline) is None


def test_variants_that_are_equal_to_the_bit_are_no_different_even_by_one_seed():
    scores = np.random.default_rng(0).standard_normal((3, 4))
    verdict = judge(parts(scores, scores.copy()), mode="max")
    assert (verdict.kind, verdict.interval) == ("same", (0.0, 0.0))
    assert verdict.text == "no difference: all scores are equal"
    assert judge(parts(scores[:1], scores[:1]), mode="max").kind == "same"


def test_one_seed_never_gets_a_verdict_however_large_the_difference():
    one = parts(np.full((1, 64), 1000.0), np.zeros((1, 64)))
    verdict = judge(one, mode="max")
    assert (verdict.text, verdict.interval) == ("one seed: about 2 more", None)
    rng = np.random.default_rng(0)
    others = pooled([parts(noise(rng, (3, 8)), noise(rng, (3, 8))) for _ in range(4)])
    assert judge(one, mode="max", pool=others).text == "one seed: about 1 more"
    unpaired = parts(np.full((1, 4), 1000.0), noise(rng, (3, 4)), paired=False)
    assert judge(unpaired, mode="max").kind == "open"


def test_survivors_of_a_variant_that_diverged_are_never_better_but_may_be_worse():
    good, bad = (parts(sign * np.full((2, 4), 5.0), np.zeros((2, 4))) for sign in (1, -1))
    verdict = judge(good, mode="max", lost=(1, 3))
    assert verdict.text == "unstable: 1 of 3 seeds diverged"
    assert judge(bad, mode="max", lost=(1, 3)).kind == "worse"
    assert judge(None, mode="max", lost=(3, 3)).kind == "unstable"


def test_no_variant_is_worse_than_the_survivors_of_a_baseline_that_diverged():
    good, bad = (parts(sign * np.full((2, 4), 5.0), np.zeros((2, 4))) for sign in (1, -1))
    verdict = judge(bad, mode="max", baseline_lost=(1, 3))
    assert verdict.text == "baseline unstable: 1 of 3 seeds diverged"
    assert judge(good, mode="max", baseline_lost=(1, 3)).kind == "better"


def test_runs_without_a_common_seed_are_compared_unpaired():
    a, b = np.array([[3.0], [5.0]]), np.array([[0.0], [1.0], [2.0]])
    verdict = judge(parts(a, b, paired=False), mode="max")
    assert verdict.standard_error == pytest.approx(math.sqrt(2 / 2 + 1 / 3))
    assert parts(a, b, paired=False).other_seeds == 3


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(0)
    shared, own = 3 * rng.standard_normal((500, 1)), rng.standard_normal((2, 500, 1))
    found = parts(shared + own[0], shared + own[1])
    # 1 - (1 + 1) / (10 + 10)
    assert removed_by_pairing([found]) == pytest.approx(0.9, abs=0.02)
    assert removed_by_pairing([parts(own[0][:1], own[1][:1])]) is None


# --- how many more seeds


def test_the_seeds_that_are_said_to_be_wanting_find_the_difference_four_times_in_five():
    rng = np.random.default_rng(1)
    luck = noise(rng, (3, 1))
    luck = (luck - luck.mean()) / luck.std(ddof=1)
    verdict = judge(parts(1.0 + luck + np.zeros((3, 4)), ZERO_3X4), mode="max")
    assert verdict.text == f"can't tell yet: about {verdict.more_seeds} more seeds"
    whole = 3 + verdict.more_seeds
    d = 1.0 + noise(rng, (1000, whole, 1)) + np.zeros((1, 1, 4))
    found = [judge(parts(one, 0 * one), mode="max", look=2).kind == "better" for one in d]
    assert 0.75 < np.mean(found) < 0.9


def test_a_difference_far_below_the_noise_is_not_worth_its_seeds():
    d = np.array([-10.0, 0.0, 10.3])[:, None] + ZERO_3X4
    verdict = judge(parts(d, ZERO_3X4), mode="max")
    assert verdict.text == "can't tell yet: more than 50 more seeds, so no difference worth it"
    assert verdict.more_seeds is None


def test_where_items_disagree_more_seeds_would_not_help():
    d = np.array([-9.0, 11.0, -9.0, 11.0])[None] + np.array([0.0, 0.01, -0.01])[:, None]
    verdict = judge(parts(d, ZERO_3X4), mode="max")
    assert verdict.text == "can't tell yet: more validation items, not seeds"


# --- what the rule promises


def coverage(rng, seeds, items, deviations, tails, tries):
    of_seed, of_item, of_cell = deviations
    inside = 0
    for _ in range(tries):
        d = of_seed * noise(rng, (seeds, 1), tails) + of_item * noise(rng, (1, items), tails)
        d = d + of_cell * noise(rng, (seeds, items), tails)
        low, high = judge(parts(d, np.zeros_like(d)), mode="max").interval
        inside += low <= 0 <= high
    return inside / tries


NOISES = {"seeds": (1, 0.1, 1), "items": (0.1, 1, 1), "cells": (0, 0, 1), "both": (1, 3, 3)}


@pytest.mark.parametrize("deviations", NOISES.values(), ids=NOISES)
def test_an_interval_by_itself_covers_the_truth_as_often_as_it_says(deviations):
    # 0.95 less three standard errors of 300 tries.
    assert coverage(np.random.default_rng(2), 3, 8, deviations, "normal", 300) > 0.912


@pytest.mark.slow
@pytest.mark.parametrize("tails", ["normal", "t3"])
@pytest.mark.parametrize("deviations", NOISES.values(), ids=NOISES)
def test_intervals_cover_the_truth_for_few_and_many_seeds_and_items(deviations, tails):
    rng = np.random.default_rng(3)
    for seeds in (2, 3, 4, 5, 8):
        for items in (8, 16, 64):
            got = coverage(rng, seeds, items, deviations, tails, 1000)
            assert got > 0.929, (seeds, items)


def test_a_percentile_bootstrap_over_three_seeds_is_far_too_narrow():
    rng, inside = np.random.default_rng(4), 0
    for _ in range(300):
        d = noise(rng, 3)
        low, high = np.quantile(d[rng.integers(0, 3, (400, 3))].mean(1), (0.025, 0.975))
        inside += low <= 0 <= high
    assert inside / 300 < 0.85


def test_seven_variants_that_differ_in_nothing_seldom_make_a_better_one():
    rng = np.random.default_rng(5)
    scores = [sweep(rng) for _ in range(300)]
    single = np.mean([(s[1:, 0].mean(1) > s[0, 0].mean()).any() for s in scores])
    assert single == pytest.approx(7 / 8, abs=0.06)  # one run against one run
    assert np.mean(["better" in kinds(s) for s in scores]) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("tails", ["normal", "t3"])
@pytest.mark.parametrize("noisy", [None, 1, 0, slice(0, 4)], ids=["equal", "one", "base", "half"])
@pytest.mark.parametrize(("variants", "seeds"), [(8, 2), (8, 3), (8, 5), (3, 3), (20, 3)])
def test_intervals_of_null_sweeps_hold_together_when_some_are_noisier(
    variants, seeds, noisy, tails
):
    rng = np.random.default_rng(6)
    options = {"variants": variants, "seeds": seeds, "noisy": noisy, "tails": tails}
    found = [kinds(sweep(rng, **options)) for _ in range(600)]
    # 0.05 plus two and a half standard errors.
    assert np.mean([bool({"better", "worse"} & set(k)) for k in found]) <= 0.072
    assert np.mean(["better" in k for k in found]) <= 0.05


def plain_power(scores, level=0.95):
    """Each variant by itself against the baseline, unpaired (Welch) with the same correction, and
    the same runs."""
    from scipy import stats

    means = scores.mean(-1)  # (V, N)
    test = stats.ttest_ind(means[1], means[0], equal_var=False)
    return test.pvalue < (1 - level) / (len(scores) - 1) and test.statistic > 0


def test_a_true_difference_is_found_where_the_plain_comparison_of_the_same_runs_misses_it():
    rng = np.random.default_rng(7)
    scores = [sweep(rng, effect=5.0) for _ in range(150)]
    ours = np.mean([kinds(s)[0] == "better" for s in scores])
    plain = np.mean([plain_power(s) for s in scores])
    assert ours > 0.7
    assert plain < 0.15


def test_a_neighbour_that_all_but_diverges_does_not_hide_what_the_others_show():
    scores = sweep(np.random.default_rng(8), effect=12.0)
    scores[7, :, :] *= 1000
    assert kinds(scores)[0] == "better"


@pytest.mark.slow
def test_looking_again_and_again_makes_errors_more_frequent_unless_looks_are_counted():
    rng = np.random.default_rng(9)
    looks = (3, 6, 12)
    scores = [sweep(rng, variants=2, seeds=12) for _ in range(1000)]

    def wrong(s, n, look=1):
        return kinds(s[:, :n], comparisons=1, look=look)[0] != "open"

    naive = np.mean([any(wrong(s, n) for n in looks) for s in scores])
    counted = np.mean([any(wrong(s, n, i) for i, n in enumerate(looks, 1)) for s in scores])
    assert naive > 0.06
    assert counted <= 0.05
