import math

import numpy as np
import pytest

from bgray.hearing import (
    Level,
    agreement,
    average_ranks,
    better_way,
    guessing,
    in_words,
    level_of,
    matched,
    needed,
    normalised,
    power,
    shared,
    spearman,
)

RATE = 48000


def sine(hz=997.0, seconds=3.0, amplitude=1.0, rate=RATE):
    return amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


# --- loudness


def test_a_full_scale_sine_of_997_hz_has_the_standards_minus_3_01_lufs():
    assert level_of(sine(), RATE).lufs == pytest.approx(-3.01, abs=0.005)
    both = np.stack([sine(), sine()], 1)
    assert level_of(both, RATE).lufs == pytest.approx(0.0, abs=0.005)


def test_a_clip_too_short_to_gate_has_the_loudness_of_a_longer_one():
    short, long = level_of(sine(seconds=0.25), RATE), level_of(sine(), RATE)
    assert short.lufs == pytest.approx(long.lufs, abs=0.01)


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_loudness_is_pyloudnorms(rate):
    import pyloudnorm

    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal((2 * rate, 2))
    noise[rate:] *= 0.03  # 30 dB down: the gate leaves it out
    meter = pyloudnorm.Meter(rate, filter_class="DeMan")
    assert level_of(noise, rate).lufs == pytest.approx(meter.integrated_loudness(noise), abs=1e-9)
    # Its other filters are another design of the same curve.
    other = pyloudnorm.Meter(rate).integrated_loudness(noise)
    assert level_of(noise, rate).lufs == pytest.approx(other, abs=0.15)


def test_the_gate_leaves_out_pauses():
    speech = np.concatenate([sine(seconds=3), np.zeros(3 * RATE)])
    # Only the blocks over the edge count besides, at less power; without a gate it were 3 dB less.
    assert level_of(speech, RATE).lufs == pytest.approx(-3.01, abs=0.35)


@pytest.mark.parametrize("seconds", [0.25, 3.0])
def test_channels_add_up_in_loudness_however_short_the_clip(seconds):
    one, both = sine(seconds=seconds), np.stack([sine(seconds=seconds)] * 2, 1)
    more = level_of(both, RATE).lufs - level_of(one, RATE).lufs
    assert more == pytest.approx(10 * math.log10(2), abs=1e-6)


def test_half_the_amplitude_is_6_db_less():
    a, b = level_of(sine(), RATE), level_of(sine(amplitude=0.5), RATE)
    assert a.lufs - b.lufs == pytest.approx(20 * math.log10(2), abs=1e-6)
    assert (a.peak, b.peak) == (pytest.approx(1, abs=1e-3), pytest.approx(0.5, abs=1e-3))


@pytest.mark.parametrize("seconds", [0.1, 1.0])
def test_silence_is_silent_and_so_is_what_the_gate_drops(seconds):
    zeros = level_of(np.zeros(round(seconds * RATE)), RATE)
    assert zeros.silent
    assert zeros.lufs == -math.inf
    assert level_of(sine(seconds=seconds, amplitude=1e-4), RATE).silent
    assert not level_of(sine(seconds=seconds, amplitude=1e-3), RATE).silent


def test_gains_bring_every_clip_to_the_target():
    levels = [Level(-20, 0.5), Level(-26, 0.25), Level(-17, 0.7)]
    found = matched(levels, 0)
    assert found.gains_db == pytest.approx((0, 6, -3))
    assert (found.goal_lufs, found.trim_db) == (-20, 0)


def test_one_trim_for_all_keeps_the_loudest_peak_at_full_scale():
    levels = [Level(-20, 0.5), Level(-32, 0.5)]  # the second would peak at 1.99
    found = matched(levels, 0)
    peaks = [x.peak * 10 ** (g / 20) for x, g in zip(levels, found.gains_db, strict=True)]
    loud = [x.lufs + g for x, g in zip(levels, found.gains_db, strict=True)]
    assert max(peaks) == pytest.approx(1.0)
    assert loud[0] == pytest.approx(loud[1])
    assert found.trim_db == pytest.approx(-(12 + 20 * math.log10(0.5)))
    assert found.goal_lufs == pytest.approx(loud[0])
    assert found.cause == 1
    assert matched([Level(-math.inf, 0.0), Level(-30, 0.5), Level(-20, 0.5)], 2).cause == 1
    assert matched([Level(-20, 0.5), Level(-20, 0.5)], 0).cause is None


def test_samples_with_these_gains_are_equally_loud_to_a_hundredth_of_a_db():
    rng = np.random.default_rng(1)
    clips = [sine(hz, amplitude=a) for hz, a in ((300, 0.3), (1000, 0.05), (4000, 0.9))]
    clips.append(0.02 * rng.standard_normal(3 * RATE))
    found = matched([level_of(clip, RATE) for clip in clips], 0)
    again = [level_of(c * 10 ** (g / 20), RATE) for c, g in zip(clips, found.gains_db, strict=True)]
    assert np.ptp([x.lufs for x in again]) < 0.01
    assert max(x.peak for x in again) <= 1 + 1e-9


def test_a_silent_clip_is_left_alone_and_a_silent_target_is_no_reference():
    silent = Level(-math.inf, 0.0)
    assert matched([silent, Level(-20, 0.1), Level(-25, 0.1)], 0).gains_db == pytest.approx(
        (0, -5, 0)
    )
    assert matched([silent, silent], 0).goal_lufs is None


# --- ABX


def test_p_values_of_abx_are_the_binomial_sums():
    assert guessing(16, 16) == pytest.approx(2**-16)
    assert guessing(0, 16) == pytest.approx(1)
    ways = sum(math.comb(16, k) for k in range(12, 17))
    assert guessing(12, 16) == pytest.approx(ways / 2**16)
    assert needed(16) == 12
    assert needed(4) is None
    assert power(16, 0.5) == pytest.approx(guessing(12, 16))
    with pytest.raises(ValueError, match="from 0 to 16, got 17"):
        guessing(17, 16)


def test_the_words_never_call_a_large_p_a_proof():
    assert "no difference was shown" in in_words(9, 16)
    assert "not proof" in in_words(9, 16)
    assert "63%" in in_words(9, 16)
    assert "a difference was heard" in in_words(12, 16)
    assert "once in 26 times" in in_words(12, 16)


def test_answers_so_wrong_are_as_unlikely_as_so_many_right_ones():
    assert "mixed up" in in_words(0, 16)
    assert "once in 65,536 times" in in_words(0, 16)
    assert "mixed up" in in_words(4, 16)
    assert "mixed up" not in in_words(5, 16)
    assert "no difference was shown" in in_words(5, 16)


# --- ranks


def test_ties_share_their_places():
    assert average_ranks([1, 1, 3]) == [1.5, 1.5, 3]
    assert average_ranks([7, 2, 2]) == [3, 1.5, 1.5]
    assert normalised([1, 2, 3]) == [0, 0.5, 1]
    assert normalised([4, 4]) == [0.5, 0.5]


def test_spearman_is_scipys_and_none_where_all_are_tied():
    from scipy import stats

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 5, 6), rng.normal(size=6)
        if len(set(a)) > 1:
            assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman([1, 1], [1, 2]) is None
    assert spearman([1], [1]) is None


NINE = [f"v{i}" for i in range(9)]


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_plus_one_means_that_ears_and_score_agree_whichever_way_is_better(mode, sign):
    rounds = [(NINE[:3], [1, 2, 3], [sign * v for v in (0.1, 0.2, 0.3)])] * 6
    assert agreement("m", mode, rounds).rho == pytest.approx(1)
    other = [(NINE[:3], [3, 2, 1], [sign * v for v in (0.1, 0.2, 0.3)])] * 6
    assert agreement("m", mode, other).rho == pytest.approx(-1)


def test_few_rankings_get_no_interval_and_none_no_correlation():
    few = agreement("m", "min", [(NINE[:2], [1, 2], [0.1, 0.2])] * 4)
    assert (few.interval, few.rounds) == (None, 4)
    assert "too few" in few.text
    two = NINE[:2]
    none = agreement("m", "min", [(two, [1, 1], [0.1, 0.2]), (two, [1, 2], [None, 0.2])])
    assert (none.rho, none.rounds) == (None, 0)


def test_rounds_of_the_same_few_variants_are_no_proof_however_many_they_are():
    """Two steady orders of four variants are the same by chance once in 24 times."""
    for lanes in (2, 4):
        found = agreement("m", "min", [(NINE[:lanes], range(lanes), range(lanes))] * 100)
        assert found.interval is not None
        assert found.interval[0] < 0
        assert "can't tell, with so few variants" in found.text


def test_nine_variants_that_ears_and_score_order_alike_agree():
    found = agreement("m", "min", [(NINE, range(9), range(9))] * 5, "at step 100")
    assert found.interval == (pytest.approx(1 - 1.96 / math.sqrt(8)), 1)
    assert found.text.endswith("5 rankings at step 100): agrees")
    other = agreement("m", "max", [(NINE, range(9), range(9))] * 5)
    assert other.text.endswith("disagrees")


@pytest.mark.parametrize(
    ("a", "b"), [("abcd", "abcd"), ("abcd", "abce"), ("abc", "abcde"), ("abcd", "aefg")]
)
def test_two_sets_share_as_much_of_chance_as_random_orders_show(a, b):
    rng, products = np.random.default_rng(0), []
    for _ in range(4000):
        ears, score = (dict(zip("abcdefg", rng.permutation(7), strict=True)) for _ in range(2))
        rho = [spearman([ears[v] for v in s], [score[v] for v in s]) for s in (a, b)]
        products.append(rho[0] * rho[1])
    assert shared(frozenset(a), frozenset(b)) == pytest.approx(np.mean(products), abs=0.02)


def test_sets_without_a_variant_in_common_are_independent():
    assert shared(frozenset("ab"), frozenset("cd")) == 0
    for k in (2, 5, 9):
        assert shared(frozenset(NINE[:k]), frozenset(NINE[:k])) == pytest.approx(1 / (k - 1))


@pytest.mark.parametrize(("lanes", "rounds"), [(2, 5), (4, 5), (4, 12), (9, 6)])
def test_the_interval_of_an_agreement_holds_zero_when_ranks_are_unrelated(lanes, rounds):
    rng = np.random.default_rng(lanes * 100 + rounds)
    wrong = 0
    for _ in range(400):
        made = [
            (NINE[:lanes], rng.permutation(lanes), rng.normal(size=lanes)) for _ in range(rounds)
        ]
        low, high = agreement("m", "min", made).interval
        wrong += not low <= 0 <= high
    assert wrong / 400 <= 0.05


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("lanes", "rounds"), [(3, 20), (4, 20), (6, 10), (9, 5), (9, 20)])
def test_steady_orders_that_have_nothing_to_do_with_each_other_seldom_agree(lanes, rounds, overlap):
    """Each listener likes the same variants every time, and the score always favours others. With
    `overlap` every other round leaves one variant out."""
    rng, wrong = np.random.default_rng(lanes * 100 + rounds), 0
    for _ in range(200):
        liked, scored = rng.standard_normal((2, lanes))
        made = []
        for n in range(rounds):
            some = np.arange(lanes - (overlap and lanes > 3 and n % 2))
            ranks = liked[some] + 0.3 * rng.standard_normal(len(some))
            scores = scored[some] + 0.3 * rng.standard_normal(len(some))
            made.append(([NINE[i] for i in some], ranks, scores))
        low, high = agreement("m", "min", made).interval
        wrong += not low <= 0 <= high
    assert wrong / 200 <= 0.06


def test_which_way_a_score_is_better_is_what_every_task_says():
    from bgray.tasks import TASKS

    for name, task in TASKS.items():
        scores = task(targets=["bass", "drums"]).scores if name == "separation" else task.scores
        for score, mode in scores.items():
            assert better_way(score) == mode, score
    assert better_way("val_si_sdr", "val_si_sdr", "min") == "min"
