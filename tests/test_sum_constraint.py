"""The waveform sum constraint by hand."""

import pytest
import torch

from bgray.losses.sum_constraint import SumConstraint


def test_only_the_sum_of_the_sources_counts():
    target = torch.tensor([[1.0, 2.0], [3.0, -2.0]]).reshape(1, 2, 1, 2)  # sums 4, 0
    swapped = target.flip(1)
    louder = 1.5 * target  # sums 6, 0
    loss = SumConstraint()
    assert loss(swapped, target).item() == 0
    assert loss(louder, target).item() == 1.0
    assert loss(target + torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1), target).item() == 0


def test_one_source_is_refused_with_the_way_out():
    one = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="needs two sources or more, got 1; use l1 instead"):
        SumConstraint()(one, one)
