import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate import write_tracks
from torch import nn

from bgray import checkpoint, guards, probes, trial
from bgray.context import Context
from bgray.experiment import prepare_data, resolve, run_url
from bgray.records import CTRL_C, Run, Superseded, read_info
from bgray.shards import Options, prepare
from bgray.trial import run_trial


def grams(estimates, targets, items=3):
    """Of items whose signals are these, (S, T) each, and their sum."""
    signals = np.concatenate([estimates, targets, [np.sum(targets, axis=0)]])
    return np.stack([signals @ signals.T / signals.shape[1]] * items)


def noise(seed, scale=0.1):
    return scale * np.random.default_rng(seed).standard_normal(20_000)


def test_silence_is_an_output_sixty_db_below_its_target():
    drums, bass = noise(0), noise(1)
    for factor, silent in ((1e-3 * 1.1, False), (1e-3 / 1.1, True), (0.0, True)):
        text = guards.silent(grams([drums, factor * bass], [drums, bass]), ("drums", "bass"))
        assert bool(text) is silent
    assert text == "bass is 180 dB below its target (median of 3 items)"
    assert not guards.silent(grams([drums, 0 * bass], [drums, 1e-5 * bass]), ("drums", "bass"))


@pytest.mark.parametrize("gain", [1e-3, 1.0, -30.0])
def test_outputs_that_are_one_signal_at_any_level_have_collapsed(gain):
    drums, bass, voice = noise(0, 0.3), noise(1), noise(2)
    targets, names = [drums, bass, voice], ("drums", "bass", "voice")
    same = [drums + 0.01 * voice, gain * (drums + 0.01 * bass), voice]
    text = guards.collapsed(grams(same, targets), names, mixture=True)
    assert text == (
        "drums and bass are nearly the same signal (correlation 1.0000, their targets 0.01), most "
        "like the target of drums (1.00)"
    )
    good = [gain * drums + 0.05 * bass, bass + 0.2 * drums, voice + 0.1 * bass]
    assert not guards.collapsed(grams(good, targets), names, mixture=True)


def test_outputs_are_alike_in_order_where_their_targets_are():
    drums = noise(0)
    both = grams([drums, 0.5 * drums], [drums, 0.5 * drums + 0.01 * noise(1)])
    assert not guards.collapsed(both, ("left", "right"), mixture=True)


def test_a_single_output_that_is_the_mixture_has_collapsed_and_in_restoration_it_has_not():
    bass, rest = noise(0), noise(1, 0.3)
    mixture = bass + rest
    one = np.array([[mixture * 0.7, bass, mixture]])[0]
    gram = (one @ one.T / one.shape[1])[None]
    assert guards.collapsed(gram, ("bass",), mixture=True).startswith("bass is nearly the whole")
    assert not guards.collapsed(gram, ("restored",), mixture=False)


def test_estimates_that_are_no_numbers_say_nothing_of_silence_or_collapse():
    broken = np.full((4, 5, 5), np.nan)
    assert not guards.silent(broken, ("a", "b"))
    assert not guards.collapsed(broken, ("a", "b"), mixture=True)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_stagnation_is_no_gain_over_half_the_evaluations_and_none_over_the_input(mode):
    sign = 1 if mode == "min" else -1
    rng = np.random.default_rng(0)

    def found(scores, baseline):
        return guards.stagnation([sign * s for s in scores], sign * baseline, mode)

    flat = 3 + 0.01 * rng.standard_normal(12)
    assert "nothing gained in the last 6 of 12 evaluations" in found(flat, 2.0)
    assert not found(flat, 3.5)  # better than the input
    assert not found(np.linspace(5, 3, 12) + 0.01 * rng.standard_normal(12), 2.0)  # it learns
    assert not found(flat[:5], 2.0)
    assert not guards.stagnation(list(flat), None, mode)


def test_flat_noise_is_mostly_found_and_slow_learning_never_taken_for_it():
    flat = slow = 0
    for seed in range(200):
        unrest = np.random.default_rng(seed).standard_normal(12)
        flat += bool(guards.stagnation(list(3 + 0.01 * unrest), 2.0, "min"))
        # Each evaluation gains as much as the unrest is.
        falling = 3 - 0.01 * np.arange(12) + 0.01 * unrest
        slow += bool(guards.stagnation(list(falling), 2.0, "min"))
    assert flat > 100
    assert slow == 0


def test_an_explosion_is_three_lines_a_hundred_times_above_the_median():
    steady = list(1 + 0.1 * np.random.default_rng(0).random(20))
    assert "loss is 500, its median over the 20 lines" in guards.exploding(
        "loss", [*steady, 150, 200, 500]
    )
    assert not guards.exploding("loss", [*steady, 150, 1.0, 500])  # it came back
    assert not guards.exploding("loss", [*steady, 50, 60, 90])
    assert not guards.exploding("loss", [*steady[:5], 150, 200, 500])  # too little to compare with
    assert guards.exploding("grad_norm", [*steady, 2000, 2000, 2000])
    assert not guards.exploding("grad_norm", [*steady, 500, 500, 500])


def test_a_negative_loss_that_falls_does_not_explode_and_one_that_rises_far_does():
    """SI-SDR as a loss goes through zero."""
    falling = list(np.linspace(5, -20, 60))
    for end in range(5, 60):
        assert not guards.exploding("loss", falling[:end])
    assert guards.exploding("loss", [*[-10.0] * 30, 1e4, 1e4, 1e4])


def test_no_convergence_is_a_score_no_better_than_the_inputs():
    assert guards.unconverged("val", 2.0, 2.0, "min")
    assert not guards.unconverged("val", 1.9, 2.0, "min")
    assert guards.unconverged("val", 1.9, 2.0, "max") == (
        "val is 1.9 at the end, no better than the unprocessed input's 2"
    )
    assert guards.unconverged("val", float("nan"), 2.0, "max")
    assert not guards.unconverged("val", None, 2.0, "max")


def test_scores_that_are_no_numbers_are_counted_and_missing_ones_are_not():
    scores = {"a": [1.0, None, float("nan"), float("inf")], "b": [1.0, None, 2.0, 3.0]}
    assert guards.no_number(scores) == "a of 2 of 4 items"


# --- on runs


@pytest.fixture(scope="module")
def stems_url(tmp_path_factory):
    root = tmp_path_factory.mktemp("stems")
    songs = write_tracks(root / "songs", num=4, seconds=6.0)
    options = Options(sample_rate=8000, stems=True, validation_groups=("track3",))
    prepare(str(songs), str(root / "shards"), options, workers=0)
    return str(root / "shards")


def separation(url, results, **train):
    raw = {
        "name": "sep",
        "task": {"name": "separation", "instruments": ["drums", "bass"]},
        "data": {"path": url, "sample_rate": 8000, "segment": 2048},
        "model": {"name": "conv_separator", "kernels": [33, 5], "inner_channels": 8},
        "loss": {"l1": 1.0},
        "optim": {"name": "adamw", "lr": 1.0e-2},
        "train": {"steps": 60, "batch_size": 4, **train},
        "validation": {"every": 10, "items": 2, "segment": 8192, "clips": 0},
        "runtime": {"results": str(results), "device": "cpu", "threads": 1, "log_every": 1},
    }
    return resolve(raw, "test")


def trained(experiment, **context):
    said = []
    try:
        run_trial(experiment, prepare_data(experiment), Context(warn=said.append, **context))
    except trial.NotFinite:
        pass
    return read_info(run_url(experiment)), said


class Bent(nn.Module):
    """A model whose estimate goes through a function."""

    def __init__(self, model, bend):
        super().__init__()
        self.model, self.bend = model, bend

    def forward(self, x):
        return self.bend(self.model(x))


def bend(monkeypatch, function):
    build = trial.build_model
    monkeypatch.setattr(trial, "build_model", lambda experiment: Bent(build(experiment), function))


def test_a_run_that_learns_hears_nothing_of_the_guards(stems_url, tmp_path):
    info, said = trained(separation(stems_url, tmp_path))
    assert info["state"] == "finished"
    assert (said, info["warnings"], info["guards"]) == ([], [], {})
    assert info["converged"] is True
    assert info["metrics"]["val_si_sdr"] > info["baseline"]["val_si_sdr"]


def test_a_run_whose_output_is_silent_says_so_once_and_has_not_converged(
    stems_url, tmp_path, monkeypatch
):
    bend(monkeypatch, lambda estimate: 1e-6 * estimate)
    experiment = separation(stems_url, tmp_path)
    asked = iter([""] * 34 + [CTRL_C])
    info, first = trained(experiment, stop=lambda: next(asked))
    assert (info["state"], info["converged"]) == ("interrupted", None)
    assert info["guards"] == {"silent output": 20}  # the second evaluation that found it
    assert [text for text in first if "silent" in text] == info["warnings"]
    info, then = trained(experiment)
    assert not [text for text in then if text.startswith("silent")]
    assert info["converged"] is False
    assert [text for text in info["warnings"] if text.startswith("silent")] == first


def without_end(monkeypatch):
    """Killed after the last checkpoint, before the record says that the run is finished."""

    def killed(*_, **__):
        raise Superseded("kill -9")

    monkeypatch.setattr(trial.Logbook, "finish", killed)


@pytest.mark.parametrize("learns", [True, False])
def test_killed_between_its_last_checkpoint_and_its_end_a_run_still_has_its_verdict(
    stems_url, tmp_path, monkeypatch, learns
):
    if not learns:
        bend(monkeypatch, lambda estimate: 1e-6 * estimate)
    experiment = separation(stems_url, tmp_path)
    with monkeypatch.context() as patch:
        without_end(patch)
        with pytest.raises(Superseded):
            trained(experiment)
    info = read_info(run_url(experiment))
    assert (info["state"], info["converged"]) == ("running", None)
    info, _ = trained(experiment)
    assert (info["state"], info["converged"]) == ("finished", learns)
    assert ("no convergence" in info["guards"]) is not learns
    again, _ = trained(experiment)
    assert (again["converged"], again["warnings"]) == (learns, info["warnings"])


def test_silence_at_the_evaluation_before_a_kill_counts_after_it(stems_url, tmp_path, monkeypatch):
    bend(monkeypatch, lambda estimate: 1e-6 * estimate)
    experiment = separation(stems_url, tmp_path)
    asked = iter([""] * 14 + [CTRL_C])
    info, _ = trained(experiment, stop=lambda: next(asked))
    assert (info["step"], info["guards"]) == (15, {})
    info, _ = trained(experiment)
    assert info["guards"]["silent output"] == 20  # as in the run that nobody stopped


@pytest.mark.parametrize("said", [True, False, None])
def test_a_checkpoint_of_older_versions_leaves_the_verdict_that_was_found(
    stems_url, tmp_path, said
):
    experiment = separation(stems_url, tmp_path)
    trained(experiment)
    url = run_url(experiment)
    saved = checkpoint.load(url)
    del saved["guards"]
    checkpoint.save(url, saved["step"], saved)
    path = Path(url, "run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "converged": said}))
    info, _ = trained(experiment)
    assert info["converged"] is (True if said is None else said)


def test_each_warning_is_kept_once_and_the_last_twenty_of_them(stems_url, tmp_path):
    experiment = separation(stems_url, tmp_path)
    url, said = run_url(experiment), []
    run = Run(url, experiment, "d" * 64)
    run.begin(0)
    clock = probes.Clock(torch.device("cpu"))
    book = trial.Logbook(experiment, Context(warn=said.append), url, run, clock)
    book.guard("silent output", 10, "drums")
    for number in range(30):
        book.warn(f"{number}")
    for _ in range(100):
        book.warn("no batch for 30 s")
        book.warn("29")
    kept = read_info(url)["warnings"]
    assert kept[0] == "silent output at step 10: drums"
    assert kept[1:] == [*map(str, range(11, 29)), "no batch for 30 s", "29"]
    assert len(said) == 231


def test_a_run_whose_outputs_are_all_one_signal_says_so_from_half_of_its_steps_on(
    stems_url, tmp_path, monkeypatch
):
    bend(monkeypatch, lambda e: e[:, :1] * torch.tensor([1.0, 0.3])[:, None, None])
    info, said = trained(separation(stems_url, tmp_path))
    assert info["guards"]["collapse"] == 30
    assert any("drums and bass are nearly the same signal" in text for text in said)
    assert info["converged"] is False


def test_a_learning_rate_far_too_high_is_said_before_or_when_it_diverges(stems_url, tmp_path):
    experiment = separation(stems_url, tmp_path)
    raw = experiment.resolved()
    raw["optim"]["lr"] = 1.0
    raw["optim"]["name"] = "adamw"
    raw["train"]["grad_clip"] = None
    raw["train"]["steps"] = 120
    info, said = trained(resolve(raw, "test"))
    assert info["converged"] is False
    assert info["state"] == "diverged" or info["guards"], said


def test_scores_that_are_no_numbers_are_a_warning_and_null_in_the_items(
    stems_url, tmp_path, monkeypatch
):
    def broken(estimate):
        return estimate if estimate.requires_grad else estimate * float("inf")

    bend(monkeypatch, broken)
    info, said = trained(separation(stems_url, tmp_path))
    assert info["state"] == "finished"
    assert said[0].startswith("score not a number at step 10: val_si_sdr of ")
    assert info["converged"] is False
    from bgray.records import ITEMS, read_lines

    lines = read_lines(f"{run_url(separation(stems_url, tmp_path))}/{ITEMS}")
    assert all(value is None for line in lines for value in line["val_si_sdr"])
