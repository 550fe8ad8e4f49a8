"""Validation items estimated together score what each scores alone."""

import pytest
import torch

from bgray.context import Context
from bgray.evaluation import Evaluator
from bgray.experiment import prepare_data, resolve


@pytest.mark.parametrize("at_once", [2, 3])
def test_items_estimated_together_score_as_alone_and_their_clips_are_the_same(
    tiny, tmp_path, at_once
):
    tiny["validation"] |= {"items": 3, "clips": 3}
    experiment = resolve(tiny, "test")
    sizes, found, clips = [], [], []

    def estimate(inputs):
        sizes[-1].append(len(inputs))
        return 0.9 * inputs[:, None].roll(1, -1)

    for many in (1, at_once):
        folder = tmp_path / str(many)
        evaluator = Evaluator(experiment, prepare_data(experiment), Context(), str(folder))
        assert evaluator.at_once == 1  # on a CPU
        evaluator.at_once = many
        sizes.append([])
        found.append((evaluator.scores(estimate, "step"), evaluator.heard.tolist()))
        clips.append({p.name: p.read_bytes() for p in (folder / "clips").iterdir()})
    assert sizes == [[1, 1, 1], [at_once, 3 - at_once] if at_once < 3 else [3]]
    assert found[0] == found[1]
    assert len(set(torch.tensor(found[0][0]["val_stft"]).tolist())) > 1
    assert clips[0] == clips[1]
    assert len(clips[0]) == 3
