import copy

import pytest
import yaml

from bgray.config import ConfigError
from bgray.search import combinations, expand
from bgray.sweep_config import Sweep


def labels(**spec):
    return [label for label, _ in combinations(Sweep(base={}, **spec), "f")]


def test_variants_multiply_the_grid():
    found = combinations(
        Sweep(
            base={},
            search={"model.kernels": [[7], [7, 23]], "optim.lr": {"grid": [1, 2]}},
            variants={"plain": {}, "wide": {"model.width": 48}},
        ),
        "f",
    )
    assert len(found) == 8
    assert found[0] == ("plain kernels=[7] optim.lr=1", {"model.kernels": [7], "optim.lr": 1})
    assert found[-1] == (
        "wide kernels=[7,23] optim.lr=2",
        {"model.width": 48, "model.kernels": [7, 23], "optim.lr": 2},
    )


def test_no_search_is_one_trial_the_base():
    assert combinations(Sweep(base={}), "f") == [("base", {})]


def test_random_draws_repeat_with_the_sample_seed_and_stay_in_range():
    spec = {
        "a": {"uniform": [2, 3]},
        "b": {"loguniform": [1e-4, 1e-1]},
        "c": {"randint": [5, 8]},
        "d": {"choice": ["x", [1]]},
    }
    draws = [d for _, d in combinations(Sweep(base={}, search=spec, samples=200), "f")]
    assert draws == [d for _, d in combinations(Sweep(base={}, search=spec, samples=200), "f")]
    assert draws != [
        d for _, d in combinations(Sweep(base={}, search=spec, samples=200, sample_seed=1), "f")
    ]
    assert all(2 <= d["a"] <= 3 for d in draws)
    assert {d["c"] for d in draws} == {5, 6, 7}
    assert {str(d["d"]) for d in draws} == {"x", "[1]"}
    # As many draws per decade, give or take: that is what the log means.
    for low in (1e-4, 1e-3, 1e-2):
        assert 40 <= sum(low <= d["b"] < 10 * low for d in draws) <= 95


def test_more_samples_keep_the_draws_there_are():
    spec = {"lr": {"loguniform": [1e-4, 1e-1]}}
    few = combinations(Sweep(base={}, search=spec, samples=3), "f")
    assert combinations(Sweep(base={}, search=spec, samples=5), "f")[:3] == few


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"a": {"loguniform": [0, 1]}}, "expected 0 < low < high"),
        ({"a": {"uniform": [3, 1]}}, "expected low < high"),
        ({"a": {"uniform": ["1e-4", 1]}}, "write 1.0e-4"),
        ({"a": {"gird": [1]}}, "unknown kind 'gird'; there is grid"),
        ({"a": []}, "expected a list with values"),
        ({"a": {}}, "is empty"),
        ({"a": {"uniform": [0, 1], "grid": [1]}}, "expected one of"),
    ],
)
def test_a_search_that_cannot_be_drawn_from_says_why(spec, text):
    with pytest.raises(ConfigError, match="search.a") as caught:
        combinations(Sweep(base={}, search=spec), "f")
    assert text in str(caught.value)


@pytest.fixture
def sweep_file(tiny, tmp_path):
    def write(**keys):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**copy.deepcopy(tiny), **keys}))
        return str(path)

    return write


def test_every_trial_is_resolved_and_a_mistake_in_one_is_named_with_it(sweep_file):
    path = sweep_file(search={"model.kernels": [[7], [8]]})
    with pytest.raises(ConfigError, match=r"sweep.yaml \[kernels=\[8\]\]:\n  model.kernels"):
        expand(path)


def test_the_same_experiment_by_two_ways_is_one_trial(sweep_file):
    _, trials = expand(
        sweep_file(variants={"base": {}, "seven": {"model.kernels": [7]}, "x": {"optim.lr": 0.1}})
    )
    assert [trial.label for trial in trials] == ["base = seven", "x"]


def test_a_search_over_a_section_that_is_not_written_uses_its_default_name(sweep_file):
    _, trials = expand(sweep_file(search={"optim.lr": [1e-3]}))
    assert trials[0].experiment.optim.name == "muon"


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"metric": "val_sftf"}, "metric"),
        ({"metric": "val_si_sdr", "mode": "min"}, "mode"),
        ({"asha": {"grace_steps": 24}}, "asha.grace_steps"),
        ({"asha": {"grace_steps": 4}}, "validation.every"),
    ],
)
def test_a_sweep_whose_rungs_or_metric_make_no_sense_is_refused(sweep_file, keys, path):
    with pytest.raises(ConfigError) as caught:
        expand(sweep_file(**keys))
    assert path in dict(caught.value.problems)


def test_every_variant_gets_the_same_random_points():
    spec = {"search": {"optim.lr": {"loguniform": [1e-4, 1e-2]}}, "samples": 3}
    found = combinations(Sweep(base={}, variants={"a": {}, "b": {"x": 1}}, **spec), "f")
    rates = [changes["optim.lr"] for _, changes in found]
    assert rates[:3] == rates[3:]


@pytest.mark.parametrize(
    ("keys", "sets", "text"),
    [
        ({"search": {"optim.lr": [0.1, 1]}}, ("optim.lr=0.3",), "search sets it for each trial"),
        ({"variants": {"a": {"optim.lr": 0.1}}}, ("optim={lr: 0.3}",), "a sets it for each trial"),
        ({"search": {"train.seed": [0, 1]}}, (), "write `seeds: 3`"),
        ({"search": {"runtime.gpus": [0.5, 1]}}, (), "'runtime' cannot vary"),
        ({"search": {"asha.grace_steps": [1]}}, (), "'asha' cannot vary"),
        ({"search": {"name": ["a", "b"]}}, (), "'name' cannot vary"),
    ],
)
def test_what_cannot_take_effect_is_refused(sweep_file, keys, sets, text):
    with pytest.raises(ConfigError) as caught:
        expand(sweep_file(**keys), sets)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [{"uniform": [0.1, float("inf")]}, {"uniform": [0, float("nan")]}, {"randint": [1.5, 9.5]}],
)
def test_numbers_that_cannot_be_drawn_between_are_refused(spec):
    with pytest.raises(ConfigError, match="search.a"):
        combinations(Sweep(base={}, search={"a": spec}), "f")


def test_a_variant_has_one_id_for_all_its_seeds_and_runs_differ(sweep_file):
    sweep, trials = expand(sweep_file(search={"model.kernels": [[7], [7, 23]]}, seeds=3))
    assert [trial.seed for trial in trials] == [0, 0, 1, 1, 2, 2]
    assert len({trial.variant for trial in trials}) == 2
    assert len({trial.id for trial in trials}) == 6
    assert sweep.baseline == "kernels=[7]"
    assert trials[1].with_seed(2) == trials[5]


def test_more_steps_are_the_same_run_unless_the_schedule_depends_on_them(sweep_file):
    def ids(**keys):
        path = sweep_file(**keys)
        return {expand(path, (f"train.steps={n}",))[1][0].id for n in (24, 48)}

    assert len(ids()) == 1
    assert len(ids(schedule={"name": "plateau"})) == 1
    assert len(ids(schedule={"name": "wsd"})) == 2


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"seeds": 0}, "seeds"),
        ({"baseline": "kernels=[8]"}, "baseline"),
        ({"screening": {"shortlist": 1, "seeds": 3}, "seeds": 2}, "seeds"),
        ({"screening": {"shortlist": 1, "seeds": 1}}, "screening.seeds"),
        ({"budget": {"gpu_hours": 0}}, "budget.gpu_hours"),
        ({"asha": {"grace_steps": 8, "controls": 2}}, "asha.controls"),
        ({"search": {"train.steps": [16, 24]}}, "train.steps"),
        (
            {
                "asha": {"grace_steps": 8},
                "schedule": {"name": "wsd"},
                "search": {"train.steps": [16, 24]},
            },
            "train.steps",
        ),
    ],
)
def test_what_makes_no_sense_of_seeds_and_rungs_is_refused(sweep_file, keys, path):
    with pytest.raises(ConfigError) as caught:
        expand(sweep_file(**keys))
    assert path in dict(caught.value.problems)
