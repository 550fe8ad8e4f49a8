"""What is between the trials of a sweep, from times that are made up here; and once for real."""

import json

import pytest

from bgray import bench_sweep
from bgray.config import ConfigError
from bgray.experiment import resolve
from bgray.resources import Plan


def run(entered, *, warm=True, first=1.0, steps=10.0, rate=None):
    """A trial that is at its first step `first` s after it was entered, then trains `steps` s."""
    return {
        "warm": warm,
        "entered_at": entered,
        "first_step_at": entered + first,
        "parts": {"model": 0.25, "baseline": first - 0.25, "first_step": 0.5},
        "ended_at": entered + first + steps,
        "steps_per_second": 2.0,
        "step_seconds": 0.9 * steps,
        "other_seconds": 3.0,
        "hit_rate": rate,
    }


@pytest.fixture
def found(tiny):
    tiny["train"]["steps"], tiny["validation"]["every"] = 7200, 3600
    experiment = resolve(tiny, "test")
    warm = [run(0, warm=False), run(12, rate=1.0), run(25, rate=0.5)]  # gaps of 2 s and 3 s
    cold = [run(0, warm=False), run(19, first=4.0, warm=False), run(42, first=4.0, warm=False)]
    plan = [run(0, warm=False), run(0.5, warm=False), run(12), run(12.5)]
    rounds = {"warm": [warm], "cold": [cold], "plan": [plan], "threads": [warm]}
    made = Plan.make(experiment, 4, [{"CPU": 2.0}])
    figures = bench_sweep._figures(rounds, experiment, made, own=5, gpu=False)
    return {"device": "2 CPUs", "steps": 20, **figures}


def test_a_gap_goes_from_the_last_line_of_a_trial_to_the_first_step_of_the_next(found):
    assert found["warm"]["gaps"] == [2.0, 3.0]
    assert found["cold"]["gaps"] == [12.0, 13.0]
    assert found["warm"]["parts"]["tune"] == 1.5
    assert found["warm"]["parts"]["baseline"] == 0.75
    gap = sum(s for name, s in found["warm"]["parts"].items() if name != "first_step")
    assert gap == found["warm"]["gap_seconds"] == 2.5
    assert found["under_4_s"]


def test_trials_an_hour_are_counted_from_the_first_process_on(found):
    assert found["trials_per_hour"]["warm"] == [300.0]  # 3 in 36 s
    assert found["at_a_time"] == 2
    assert found["plan_to_one"] == pytest.approx((4 / 23.5) / (3 / 36))


def test_the_forecast_is_of_the_experiments_own_sweep(found):
    # Five trials, two at a time: three turns of 7200 steps at 2 a second, two evaluations each.
    assert found["forecast"]["hours"] == pytest.approx(3 * (3600 + 2.5 + 6) / 3600)
    assert found["forecast"]["outside_share"] == pytest.approx(8.5 / 3608.5)
    assert found["hit_rate"] == 0.75


def test_the_table_says_whether_the_gap_is_small_enough_and_what_is_in_it(found):
    text = bench_sweep.as_text(found)
    assert "under 4 s in a warm process: yes (2.00 to 3.00)" in text
    assert "the plan / one at a time: 2.04" in text
    assert "75 % of the work units" in text
    gap = next(line for line in text.splitlines() if line.startswith("in all"))
    assert gap.split()[-2:] == ["2.50", "12.50"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(("at_a_time", "why"), [(1, "more than half"), (3, "MPS")])
def test_where_sharing_a_gpu_does_not_pay_the_table_says_why(found, at_a_time, why):
    found |= {"threads": None, "at_a_time": at_a_time, "plan_to_one": 1.4}
    assert why in bench_sweep.as_text(found)
    assert why not in bench_sweep.as_text({**found, "plan_to_one": 1.6})


def test_two_trials_have_too_few_gaps(tiny):
    with pytest.raises(ConfigError, match="three or more"):
        bench_sweep.measured(resolve(tiny, "test"), trials=2)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.ray
def test_a_small_sweep_is_measured_and_warm_is_faster_than_cold(tiny):
    tiny["runtime"]["concurrency"] = 1
    found = bench_sweep.measured(resolve(tiny, "test"), trials=3, steps=8, rounds=1)
    assert found["warm"]["warm"] == [True, True]
    assert found["cold"]["warm"] == [False, False]
    assert found["warm"]["gap_seconds"] < 0.5 * found["cold"]["gap_seconds"]
    assert found["hit_rate"] == 1.0
    assert found["at_a_time"] == 1
    bench_sweep.as_text(found)
