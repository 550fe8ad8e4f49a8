"""BSSEval against cases solved by hand, its definition written out, museval, and MATLAB."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

from bgray import bss
from bgray.bss import FRAME_METRICS, bss_eval, over_tracks, score_track

RATE = 4000
TAPS = 512


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def db(signal, distortion):
    return 10 * np.log10(signal / distortion)


def test_impulses_far_apart_give_the_scores_that_their_energies_say():
    reference, estimate = np.zeros((2, 1, 6000)), np.zeros((2, 1, 6000))
    reference[0, 0, 1000] = reference[1, 0, 3000] = 1
    estimate[1] = reference[1]
    estimate[0, 0, 1000] = 1.0  # the source,
    estimate[0, 0, 1010] = 0.5  # its echo: spatial distortion, for 10 is below 512 taps,
    estimate[0, 0, 3005] = 0.25  # the other source, late: interference,
    estimate[0, 0, 5000] = 0.125  # what no filter of either makes: an artifact
    frames = bss_eval(reference, estimate, RATE, window_seconds=9).frames
    spatial, interference, artifact = 0.5**2, 0.25**2, 0.125**2
    expected = {
        "SDR": db(1, spatial + interference + artifact),
        "ISR": db(1, spatial),
        "SIR": db(1 + spatial, interference),
        "SAR": db(1 + spatial + interference, artifact),
    }
    for name, value in expected.items():
        assert frames[name][0] == pytest.approx([value], abs=1e-9), name


def delays(sources):
    """(T + TAPS - 1, S * TAPS): every source at every delay, the space that BSSEval projects on."""
    length = sources.shape[-1]
    columns = np.zeros((length + TAPS - 1, len(sources) * TAPS))
    for i, source in enumerate(sources):
        for delay in range(TAPS):
            columns[delay : delay + length, i * TAPS + delay] = source
    return columns


def energy(x):
    return np.square(x, dtype=np.float64).sum()


def test_stereo_scores_are_least_squares_onto_delayed_sources():
    reference = noise(2, 2, 2600)
    estimate = reference + 0.4 * reference[::-1] + 0.2 * noise(2, 2, 2600, seed=1)
    frames = bss_eval(reference, estimate, RATE, window_seconds=9).frames
    true, guess = (
        np.pad(np.moveaxis(x, 1, 2), ((0, 0), (0, TAPS - 1), (0, 0))).astype(np.float64)
        for x in (reference, estimate)
    )  # (S, T + TAPS - 1, C)

    def project(space, signals):
        basis = delays(space.astype(np.float64))
        return basis @ scipy.linalg.lstsq(basis, signals, lapack_driver="gelsy")[0]

    everything = project(reference.reshape(4, -1), np.hstack([guess[0], guess[1]]))
    for i in range(2):
        own, both = project(reference[i], guess[i]), everything[:, 2 * i : 2 * i + 2]
        expected = {
            "SDR": db(energy(true[i]), energy(guess[i] - true[i])),
            "ISR": db(energy(true[i]), energy(own - true[i])),
            "SIR": db(energy(own), energy(both - own)),
            "SAR": db(energy(both), energy(guess[i] - both)),
        }
        for name, value in expected.items():
            assert frames[name][i, 0] == pytest.approx(value, abs=1e-6), name


@pytest.fixture
def museval():
    """The package itself, which does not import without ffmpeg."""
    if shutil.which("ffmpeg") is None and not os.environ.get("BGRAY_LAB_REQUIRED"):
        pytest.skip("needs ffmpeg")
    import museval

    return museval


def test_frames_are_musevals(museval):
    reference = noise(2, 2, 9500)
    estimate = reference + 0.5 * reference.mean(0) + 0.1 * noise(2, 2, 9500, seed=1)
    frames = bss_eval(reference, estimate, RATE, window_seconds=0.5, hop_seconds=0.25).frames
    theirs = museval.evaluate(
        reference.transpose(0, 2, 1).astype(float),
        estimate.transpose(0, 2, 1).astype(float),
        win=2000,
        hop=1000,
    )
    for name, values in zip(FRAME_METRICS, theirs, strict=True):
        assert frames[name].shape == (2, 8)  # the last 500 samples fill no window
        np.testing.assert_allclose(frames[name], values, rtol=0, atol=1e-9)


def test_a_frame_of_the_matlab_toolbox_comes_out_the_same():
    # First frame (1200 samples at 8 kHz, int16) of case 2 of mir_eval's separation tests with
    # bss_eval_images' results: three sources, the estimates' right channel at `gain` times the
    # left.
    with np.load(Path(__file__).parent / "golden" / "bss_matlab.npz") as case:
        reference, estimate = (case[key] / 32768 for key in ("reference", "estimate"))
        reference = np.stack([reference, reference], axis=1)  # (S, C, T)
        estimate = np.stack([estimate, case["gain"] * estimate], axis=1)
        found = bss_eval(reference, estimate, 8000).medians()
        for name in FRAME_METRICS:
            np.testing.assert_allclose(found[name], case[name], rtol=0, atol=1e-2)


def test_a_frame_in_which_any_source_is_silent_scores_none_of_them():
    reference = noise(2, 1, 4 * RATE)
    estimate = reference + 0.1 * noise(2, 1, 4 * RATE, seed=1)
    reference[0, :, RATE : 2 * RATE] = 0
    estimate[1, :, 3 * RATE :] = 0
    found = bss_eval(reference, estimate, RATE)
    for name in FRAME_METRICS:
        scored = ~np.isnan(found.frames[name])
        np.testing.assert_array_equal(scored, [[True, False, True, False]] * 2)
        assert np.isfinite(found.medians()[name]).all()
    assert found.silent_references == found.silent_estimates == ()


def test_a_source_that_never_plays_is_named_and_leaves_the_others_as_they_are():
    reference = noise(3, 1, 2 * RATE)
    estimate = reference + 0.3 * noise(3, 1, 2 * RATE, seed=1)
    reference[1] = 0
    found = bss_eval(reference, estimate, RATE)
    assert found.silent_references == (1,)
    assert found.silent_estimates == ()
    alone = bss_eval(reference[[0, 2]], estimate[[0, 2]], RATE)
    for name in FRAME_METRICS:
        assert np.isnan(found.frames[name][1]).all()
        np.testing.assert_array_equal(found.frames[name][[0, 2]], alone.frames[name])


def test_a_source_estimated_as_silence_is_named_and_still_interferes_with_the_others():
    reference = noise(2, 1, 2 * RATE)
    estimate = np.stack([reference[0] + 0.5 * reference[1], reference[1]])
    full = bss_eval(reference, estimate, RATE)
    estimate[1] = 0
    found = bss_eval(reference, estimate, RATE)
    assert found.silent_estimates == (1,)
    for name in FRAME_METRICS:
        assert np.isnan(found.frames[name][1]).all()
    np.testing.assert_allclose(found.frames["SIR"][0], full.frames["SIR"][0], atol=1e-9)
    assert found.medians()["SIR"][0] == pytest.approx(6.02, abs=0.5)


def test_a_track_in_which_nothing_plays_has_frames_without_scores():
    found = bss_eval(np.zeros((2, 1, 3 * RATE)), noise(2, 1, 3 * RATE), RATE)
    assert found.frames["SDR"].shape == (2, 3)
    assert np.isnan(found.frames["SDR"]).all()
    assert found.silent_references == (0, 1)


def test_mono_written_as_stereo_scores_as_mono():
    reference = noise(2, 1, RATE)
    estimate = reference + 0.2 * noise(2, 1, RATE, seed=1)
    mono = bss_eval(reference, estimate, RATE).frames
    stereo = bss_eval(reference.repeat(2, 1), estimate.repeat(2, 1), RATE).frames
    for name in FRAME_METRICS:
        np.testing.assert_array_equal(stereo[name], mono[name])


def test_equations_without_a_solution_are_refused_with_the_reason(monkeypatch):
    def solve(*_):
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setattr(np.linalg, "solve", solve)
    with pytest.raises(ValueError, match="is a filtered copy of others"):
        bss_eval(noise(2, 1, RATE), noise(2, 1, RATE, seed=1), RATE)


def test_shapes_that_do_not_fit_and_broken_numbers_are_refused():
    with pytest.raises(ValueError, match=r"must both be \(S, C, T\), got \(2, 1, 8\) and \(2, 8\)"):
        bss_eval(np.ones((2, 1, 8)), np.ones((2, 8)), RATE)
    with pytest.raises(ValueError, match="estimate: holds NaN or Inf"):
        bss_eval(np.ones((1, 1, 8)), np.full((1, 1, 8), np.nan), RATE)


def test_a_track_has_every_metric_of_every_source_that_plays():
    reference = noise(3, 1, 2 * RATE)
    reference -= reference.mean(-1, keepdims=True)
    estimate = 0.5 * reference
    reference[1] = 0
    estimate[2] = 0
    scores = score_track(reference, estimate, RATE, ("bass", "drums", "vocals"))
    assert list(scores["bass"]) == list(bss.METRICS)
    assert scores["bass"]["uSDR"] == pytest.approx(6.0206, abs=1e-4)  # half is missing
    assert scores["bass"]["SDR"] == pytest.approx(6.0206, abs=1e-4)
    assert scores["bass"]["ISR"] == pytest.approx(6.0206, abs=0.01)
    assert scores["bass"]["SI-SDR"] > 70  # does not hear the gain
    assert set(scores["drums"].values()) == {None}
    assert scores["vocals"]["SDR"] is None
    assert scores["vocals"]["uSDR"] == pytest.approx(0, abs=1e-6)


def test_medians_over_frames_then_tracks_are_musevals(museval):
    store = museval.EvalStore()
    tracks = {}
    for number in range(4):
        reference = noise(2, 1, 5 * RATE, seed=number)
        estimate = reference + 0.1 * (1 + number) * noise(2, 1, 5 * RATE, seed=9)
        estimate[:, :, : 2 * RATE] *= 0.5
        reference[0, :, (4 - number) * RATE :] = 0
        name = f"track {number}"
        tracks[name] = score_track(reference, estimate, RATE, ("bass", "drums"))
        frames = bss_eval(reference, estimate, RATE).frames
        track = museval.TrackStore(track_name=name)
        for i, source in enumerate(("bass", "drums")):
            track.add_target(source, {metric: frames[metric][i] for metric in FRAME_METRICS})
        store.add_track(track.df)
    theirs = store.agg_frames_tracks_scores()  # of frames rounded to five digits
    ours = over_tracks(tracks)
    for source in ("bass", "drums"):
        for metric in FRAME_METRICS:
            assert ours[source][metric] == pytest.approx(theirs[source][metric], abs=1e-5)


def test_tracks_without_a_score_count_for_nothing():
    tracks = {
        "one": {"bass": {"SDR": 1.0}, "drums": {"SDR": None}},
        "two": {"bass": {"SDR": 2.0}, "drums": {"SDR": None}},
        "three": {"bass": {"SDR": 9.0}},
        "four": {"bass": {"SDR": None}},
    }
    found = over_tracks(tracks)
    assert found["bass"]["SDR"] == 2.0
    assert found["drums"]["SDR"] is None
    assert bss.values(tracks, "bass", "SDR") == [1.0, 2.0, 9.0]


def test_the_median_bears_infinite_scores():
    assert bss.median([np.inf, np.inf, 1.0, np.nan]) == np.inf
    assert bss.median([np.inf, np.inf]) == np.inf
    assert bss.median([1.0, 2.0, np.inf]) == 2.0
    assert np.isnan(bss.median([np.nan]))
