"""Which candidate is best, and which are as good, on scores where the answer is plain."""

import numpy as np
import pytest

from bgray import plateau

CANDIDATES = [100, 200, 300, 400, 500]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_plateau_ends_at_the_first_candidate_that_falls_behind_on_either_side():
    level = np.array([0.99, 0.5, 0.985, 1.0, 0.97])  # 100 is within 0.02 dB, but beyond a valley
    scores = np.tile(level[:, None], (6, 1, 1))
    found = plateau.best(scores, tolerance=0.02)
    assert (found.index, found.low, found.high) == (3, 2, 3)
    assert found.score == 1.0


def test_what_tracks_disagree_on_belongs_to_the_plateau_and_what_they_agree_on_does_not():
    tracks = noise(12, 1, 1)  # songs differ by much, but alike for all candidates
    ahead = np.array([-0.1, -0.1, 0.0])[None, :, None]
    taste = noise(12, 1, 1, seed=1)
    taste = 0.5 * (taste - taste.mean()) * np.array([0.0, 1.0, 0.0])[None, :, None]
    found = plateau.best(tracks + ahead + taste, tolerance=0.02)
    assert (found.low, found.index, found.high) == (1, 2, 2)
    found = plateau.best(tracks + ahead, tolerance=0.02)
    assert (found.low, found.index, found.high) == (2, 2, 2)


def test_the_spread_over_tracks_is_that_of_the_best_candidate():
    scores = np.array([[[0.0], [3.0]], [[9.0], [7.0]]])
    found = plateau.best(scores, tolerance=0.02)
    assert (found.index, found.track_low, found.track_high) == (1, 3.0, 7.0)


def test_a_source_that_rests_counts_for_nothing_neither_here_nor_in_resamplings():
    scores = np.full((4, 2, 2), np.nan)
    scores[:, :, 0] = [1.0, 2.0]
    scores[0, :, 1] = [5.0, 3.0]
    np.testing.assert_array_equal(plateau.means(scores), [[1.0, 5.0], [2.0, 3.0]])
    np.testing.assert_array_equal(plateau.totals(scores), [3.0, 2.5])
    alone = plateau.best(scores[:, :, 1:], tolerance=0.02)
    assert (alone.low, alone.index, alone.high) == (0, 0, 0)  # one track has a say, and no doubt
    assert (alone.track_low, alone.track_high) == (5.0, 5.0)


def test_the_gain_is_a_mean_over_sources_whose_interval_holds_it():
    scores = np.zeros((8, 3, 2))
    scores[:, 1, 0] = 0.6 + 0.1 * noise(8)
    scores[:, 2, 1] = 0.2
    by_source, mean, (low, high) = plateau.mean_gain(scores, [1, 2], 0)
    assert by_source == pytest.approx([scores[:, 1, 0].mean(), 0.2])
    assert mean == pytest.approx(sum(by_source) / 2)
    assert low < mean < high
    assert high - low < 0.2


def test_the_summary_tells_windows_not_places():
    rows = [
        [
            {"bass": float(b), "drums": float(d), "piano": None}
            for b, d in zip(bass, drums, strict=True)
        ]
        for bass, drums in [((1, 2, 3, 4, 5), (9, 8, 7, 6, 1)), ((1, 2, 3, 4, 7), (9, 8, 7, 6, 2))]
    ]
    found = plateau.summarize(rows, CANDIDATES, [200], {42: [300, 200, 300]}, tolerance=0.02)
    assert list(found["per_target"]) == ["bass", "drums"]  # the piano rests in all tracks
    assert found["per_target"]["bass"]["window"] == 500
    assert found["per_target"]["bass"]["tracks_db"] == [5.0, 7.0]
    assert found["per_target"]["drums"]["window"] == 100
    assert found["single"]["window"] == 100  # level with 200, 300 and 400
    assert found["single"]["as_good"] == [100, 400]
    assert found["single"]["by_target"] == {"bass": 1.0, "drums": 9.0, "mean": 5.0}
    assert found["controls"]["200"] == {"bass": 2.0, "drums": 8.0, "mean": 5.0}
    assert found["gain_over_controls"]["200"]["bass"] == 4.0
    assert found["gain_over_controls"]["200"]["mean"] == 2.5  # of 4 and 1: not their sum
    assert found["gain_over_single"]["mean"] == 2.5
    assert found["seeds"]["42"]["bass"] == {"window": 300, "sdr_db": 3.0}
    assert found["seeds"]["42"]["drums"] == {"window": 200, "sdr_db": 8.0}
    assert found["seeds"]["42"]["mean"]["sdr_db"] == 5.0
