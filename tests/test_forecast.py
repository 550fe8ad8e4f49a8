"""What a sweep would take, from costs that are made up here; one real forecast against a run."""

import io
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from test_costs import kind

from bgray import forecast as module
from bgray.agenda import Agenda
from bgray.context import Context
from bgray.costs import Range
from bgray.experiment import prepare_data, resolve, run_url
from bgray.forecast import Run, fits, forecast, halved, planned, print_dry, shorter, warn_if_long
from bgray.records import read_info
from bgray.rehearsal import cost_key
from bgray.search import expand
from bgray.trial import run_trial

KERNELS = str(Path(__file__).parent.parent / "sweeps" / "kernels.yaml")


@pytest.mark.parametrize(
    ("steps", "rungs", "factor", "exempt", "expected"),
    [
        (100, (), 3, 0.0, 100.0),
        (90, (10, 30), 3, 0.0, 10 + 20 / 3 + 60 / 9),
        (90, (10, 30), 3, 1.0, 90.0),
        (90, (10, 30), 3, 0.5, (90 + 10 + 20 / 3 + 60 / 9) / 2),
        (8, (10, 30), 3, 0.0, 8.0),
    ],
)
def test_mean_steps_under_halving(steps, rungs, factor, exempt, expected):
    assert halved(steps, rungs, factor, exempt) == pytest.approx(expected)


def test_runs_fit_a_budget_in_their_order():
    assert fits(6.0, [2.0, 2.0, 2.0, 2.0]) == 3
    assert fits(6.0, [2.0, 5.0, 1.0]) == 1
    assert fits(6.0, [2.0, 2.0], spent_hours=3.0) == 1
    assert fits(6.0, [0.1] * 60) == 60  # whatever floats make of sixty tenths
    assert fits(1.0, []) == 0


@pytest.fixture
def made_up(monkeypatch):
    """Every kind takes 1 s a step (0.5 to 2) and 42 s aside for 24 steps."""

    def measure(experiments, **_):
        return {cost_key(experiment): kind() for _, experiment in experiments}

    monkeypatch.setattr(module, "measure", measure)


def runs(tiny, number=4, **runtime):
    tiny["runtime"] |= {"concurrency": 2, **runtime}
    experiment = resolve(tiny, "f")
    return [Run("a", experiment, 24, 24.0)] * number


def test_hours_are_those_of_all_runs_at_so_many_at_a_time(tiny, made_up, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    found = forecast(runs(tiny))
    assert (found.trials, found.steps, found.expected_steps) == (4, 96, 96.0)
    assert found.hours == Range(2 * 54 / 3600, 2 * 66 / 3600, 2 * 90 / 3600)
    assert found.device_hours.middle == pytest.approx(4 * 66 / 3600)
    assert found.run_hours == pytest.approx((66 / 3600,) * 4)
    one = forecast(runs(tiny, 1))
    assert one.hours.middle == pytest.approx(66 / 3600)  # never less than the longest run


def test_stopped_runs_cost_what_they_do_and_the_whole_is_told_beside(tiny, made_up, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    some = [Run(run.label, run.experiment, 24, 8.0) for run in runs(tiny)]
    found = forecast(some)
    assert found.longest_hours.middle == pytest.approx(2 * 66 / 3600)
    assert found.hours.middle == pytest.approx(2 * (8 + 10 + 2 + 8 + 2) / 3600)
    text = "\n".join(found.lines())
    assert "steps    96 at most, about 32 as rungs stop some" in text
    assert "2 min if none is stopped" in text


def test_it_says_that_hours_without_a_gpu_are_not_those_with_one(tiny, made_up, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = "\n".join(forecast(runs(tiny, device="auto")).lines())
    assert "no GPU here: with one, hours are far fewer" in text
    assert "how much 2 trials at a time slow each other" in text
    assert "no GPU here: with" not in "\n".join(forecast(runs(tiny, device="cpu")).lines())


def test_what_asks_for_a_gpu_is_forecast_without_one(tiny, made_up, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert forecast(runs(tiny, device="cuda")).device == "cpu"


def test_runs_that_share_a_gpu_cost_their_share_of_its_hours(tiny, monkeypatch):
    seen = kind(device="L4", vram_gib=4.0, overhead_gib=0.5, gpu_gib=24.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        module, "measure", lambda experiments, **_: {cost_key(experiments[0][1]): seen}
    )
    some = runs(tiny, 8, device="auto", concurrency=None)
    alone = forecast(some)
    assert alone.hours.middle == pytest.approx(8 * 66 / 3600)
    assert alone.device_hours.middle == pytest.approx(8 * 66 / 3600)
    assert alone.memory_gib == 4.5
    # 5.25 of 24 GiB: 0.22 of it, four at a time
    packed = forecast(runs(tiny, 8, vram="auto", concurrency=None))
    assert packed.hours.middle == pytest.approx(2 * 66 / 3600)
    assert packed.device_hours.middle == pytest.approx(0.22 * 8 * 66 / 3600)
    assert "VRAM the largest" in "\n".join(packed.lines())


@pytest.fixture
def sweep_of(tiny, tmp_path):
    def make(**keys):
        path = tmp_path / "tiny.yaml"
        variants = {"a": {}, "b": {"model.kernels": [9]}, "c": {"model.kernels": [11]}}
        path.write_text(yaml.safe_dump({**tiny, "variants": variants, **keys}))
        return expand(str(path))

    return make


def test_seeds_and_rungs_are_planned(sweep_of):
    sweep, trials = sweep_of(seeds=2, asha={"grace_steps": 8, "reduction_factor": 2})
    found = planned(Agenda(sweep, trials))
    assert [run.steps for run in found] == [24] * 6
    # The baseline, a third of the variants, always runs to the end; so does a share of 0.1.
    rungs = Agenda(sweep, trials).rungs
    assert found[0].expected == pytest.approx(halved(24, rungs, 2, 1 / 3 + 0.1))
    assert 8 < found[0].expected < 24


def test_a_screenings_second_round_is_planned_too(sweep_of):
    found = planned(Agenda(*sweep_of(screening={"shortlist": 1, "seeds": 4})))
    assert [run.label for run in found] == ["a", "b", "c", *["a", "b"] * 4]


def test_what_is_done_is_not_planned_again(sweep_of, made_up, capsys):
    sweep, trials = sweep_of()
    done = trials[0]
    run_trial(done.experiment, prepare_data(done.experiment), Context())
    assert [run.steps for run in planned(Agenda(sweep, trials))] == [24, 24]
    print_dry(Agenda(sweep, trials))
    said = capsys.readouterr().out
    assert "trials   2" in said
    assert "finished" in said


def test_dry_says_what_is_hardly_meant(sweep_of, capsys):
    schedule = {"name": "wsd", "decay_share": 0.9}
    sweep, trials = sweep_of(asha={"grace_steps": 8, "reduction_factor": 2}, schedule=schedule)
    print_dry(Agenda(sweep, trials), seconds=0.1)
    assert "\nCareful: the learning rate of a decays from step 2 on" in capsys.readouterr().out


def test_dry_lists_every_trial_says_how_sure_it_is_and_writes_nothing(sweep_of, tiny, capsys):
    sweep, trials = sweep_of(seeds=2, budget={"gpu_hours": 1000})
    print_dry(Agenda(sweep, trials), seconds=1.0)
    said = capsys.readouterr().out
    for trial in trials:
        assert trial.id in said
    assert "trials   6\nsteps    144\n" in said
    assert "budget   1000 hours, 0 of them spent: about 6 of 6 runs" in said
    assert "3 of 3 kinds of trial measured on this machine's CPU" in said
    assert "not in it: waiting for data" in said
    assert not Path(tiny["runtime"]["results"]).exists()


@pytest.mark.slow
@pytest.mark.alone
def test_the_forecast_of_a_run_is_within_a_factor_of_two_of_its_time(tiny):

    tiny["train"] |= {"steps": 100, "batch_size": 8}
    tiny["data"]["segment"] = 2048
    tiny["validation"]["every"] = 50
    tiny["runtime"]["checkpoint_every"] = 50
    experiment = resolve(tiny, "f")
    run = Run("one", experiment, 100, 100.0)
    ratios = []
    for number in range(3):  # others use this machine, too: one of three tells
        found = forecast([run], seconds=3.0)
        tiny["train"]["seed"] = number
        real = resolve(tiny, "f")
        run_trial(real, prepare_data(real), Context(threads=1))
        timing = read_info(run_url(real))["timing"]
        seconds = sum(timing[f"{what}_seconds"] for what in ("train", "warm_up", "other"))
        ratios.append(found.hours.middle * 3600 / seconds)
    assert 0.5 < sorted(ratios)[1] < 2, ratios


# --- before a run without a GPU


def said(sweep, trials, **options):
    out = io.StringIO()
    warn_if_long(sweep, trials, 1, 2, Console(file=out, width=500), **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def kernels():
    return expand(KERNELS)


def test_a_full_size_sweep_on_a_cpu_says_how_long_and_how_to_make_it_short(kernels):
    text = said(*kernels)
    assert "No GPU here: about" in text
    assert "days for these 5 trials" in text
    assert "--set train.steps=100" in text
    assert "--set asha=null" in text


def test_what_it_suggests_is_valid_and_far_shorter(kernels):
    changes = shorter(kernels[0], kernels[1][0].experiment)
    sets = tuple(f"{key}={'null' if value is None else value}" for key, value in changes.items())
    _, trials = expand(KERNELS, sets)
    assert len(trials) == 5
    train, data = trials[0].experiment.train, trials[0].experiment.data
    assert train.steps * train.batch_size * data.segment * 500 < 10_000 * 32 * 32768


def test_a_sweep_within_a_persons_patience_says_nothing(kernels):
    assert said(*kernels, patience_seconds=float("inf")) == ""


def test_trials_write_below_the_sweeps_name(kernels):
    assert all(f"/kernels/{t.id}" in run_url(t.experiment) for t in kernels[1])
