"""What is left out of a curve is not seen to be missing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgray.thinning import thinned

VALUES = st.lists(
    st.one_of(
        st.floats(-1e6, 1e6), st.sampled_from([np.nan, np.nan, np.inf, -np.inf]), st.just(0.5)
    ),
    min_size=1,
    max_size=400,
).map(np.array)


@given(VALUES, st.integers(8, 60))
def test_no_more_than_asked_for_rising_and_with_both_ends(values, most):
    kept = thinned(values, most)
    assert len(kept) <= most
    assert (np.diff(kept) > 0).all()
    assert kept[0] == 0
    assert kept[-1] == len(values) - 1


@given(VALUES, st.integers(8, 60))
def test_the_least_and_the_greatest_value_are_kept(values, most):
    finite = values[np.isfinite(values)]
    kept = values[thinned(values, most)]
    kept = kept[np.isfinite(kept)]
    assert (len(kept) == 0) == (len(finite) == 0)
    if len(finite):
        assert kept.min() == finite.min()
        assert kept.max() == finite.max()


@given(VALUES, st.integers(8, 60))
def test_between_two_kept_numbers_is_a_gap_exactly_where_there_was_one(values, most):
    kept = thinned(values, most)
    numbers = [i for i in kept if np.isfinite(values[i])]
    for one, other in zip(numbers, numbers[1:], strict=False):
        before = not np.isfinite(values[one : other + 1]).all()
        after = not np.isfinite(values[[i for i in kept if one <= i <= other]]).all()
        assert before == after


def test_a_spike_of_one_step_in_a_hundred_thousand_survives():
    values = np.sin(np.arange(100_000) / 500)
    values[70_001], values[31_415] = 9.0, -7.0
    kept = thinned(values, 1000)
    assert {70_001, 31_415} <= {*kept.tolist()}


def test_each_stretch_keeps_its_own_extremes():
    """Drawn as columns of pixels, the thinned curve covers what the whole one does."""
    values = np.random.default_rng(0).normal(size=10_000)
    kept = thinned(values, 1002)
    for start in range(0, 10_000, 20):
        stretch = values[start : start + 20]
        mine = values[kept[(kept >= start) & (kept < start + 20)]]
        assert mine.min() == stretch.min()
        assert mine.max() == stretch.max()


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_short_curve_is_left_as_it_is(number):
    assert thinned(np.full(number, np.nan), 1000).tolist() == list(range(number))
