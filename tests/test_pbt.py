import contextlib
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bgray import checkpoint, pbt, storage
from bgray.agenda import Agenda
from bgray.build import build_loss, build_model, build_optimizer
from bgray.config import ConfigError
from bgray.context import Context
from bgray.draws import entry
from bgray.experiment import load, prepare_data
from bgray.records import read_info, read_lines, reopen
from bgray.search import expand
from bgray.trial import run_trial

EVERY, STEPS = 4, 12
VARY = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "loss.l1": {"uniform": [0.5, 2.0]}}


def write_sweep(tmp_path, tiny, *, results="results", **keys):
    raw = copy.deepcopy(tiny)
    raw["runtime"]["results"] = str(tmp_path / results)
    raw["train"] |= {"steps": STEPS, "batch_size": 2}
    raw["validation"] |= {"every": EVERY, "items": 2, "clips": 0}
    raw["optim"] = {"name": "adamw", "lr": 1e-3}
    settings = {"every": EVERY, "population": 3, "vary": VARY, **keys.pop("pbt", {})}
    raw |= {"pbt": settings, **keys}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path)


class Killed(BaseException):
    pass


def drive(agenda, starts=1000):
    """Train in this process what the agenda wants, one start after another."""
    while starts and (trial := agenda.start()) is not None:
        starts -= 1
        reopen(trial.url)

        def report(step, metrics, trial=trial):
            if not agenda.report(trial.id, step, metrics):
                raise SystemExit

        with contextlib.suppress(SystemExit):
            run_trial(trial.experiment, prepare_data(trial.experiment), Context(report=report))
        agenda.close(trial.id)
    return agenda


def manifest(agenda):
    return json.loads(Path(agenda.folder, "sweep.json").read_text())


def weights(url):
    return checkpoint.load(url)["model"]


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def records(agenda):
    """What each member has left, without the clock."""
    return [
        (
            read_lines(storage.join(trial.url, "metrics.jsonl")),
            {name: value.tolist() for name, value in weights(trial.url).items()},
        )
        for trial in agenda.trials.values()
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards_url):
    """A population trained to its end: (the sweep's file, its agenda, the raw experiment)."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("population")
    raw = {**copy.deepcopy(TINY), "name": "tiny"}
    raw["data"]["path"] = shards_url
    path = write_sweep(folder, raw)
    agenda = drive(Agenda(*expand(path)))
    agenda.write_manifest()
    return path, agenda, raw


def test_every_member_trains_to_the_end_and_each_round_one_copies_another(trained):
    _, agenda, _ = trained
    assert agenda.over()
    assert {known.step for known in agenda.known.values()} == {STEPS}
    rounds = manifest(agenda)["pbt"]["rounds"]
    assert [(held["step"], held["done"]) for held in rounds] == [(4, True), (8, True)]
    for held in rounds:
        [copied] = held["copies"]
        ranked = sorted(held["scores"], key=held["scores"].__getitem__)
        worst, best = (ranked[0], ranked[-1])[:: 1 if agenda.sweep.mode == "max" else -1]
        assert (copied["to"], copied["from"]) == (worst, best)


def test_whoever_copied_goes_on_from_the_others_weights_with_values_near_the_others(
    trained, tmp_path
):
    _, _, raw = trained
    agenda = Agenda(*expand(write_sweep(tmp_path, raw)))
    drive(agenda, starts=3)
    before = {run_id: weights(trial.url) for run_id, trial in agenda.trials.items()}
    trial = agenda.start()  # the first of the second stretch: the copying is done
    assert trial is not None
    [copied] = agenda.population.rounds[0]["copies"]
    to, source = agenda.trials[copied["to"]], agenda.trials[copied["from"]]
    assert equal(weights(to.url), before[source.id])
    assert not equal(before[to.id], before[source.id])
    old = agenda.population.first[source.id]
    for path, value in copied["values"].items():
        low, high = next(iter(VARY[path].values()))
        assert low <= value <= high
        assert value != old[path]
    # What this member had before is still there under the name of its own state.
    assert any(name == "step-00000004.pt" for name in storage.listdir(f"{to.url}/checkpoint"))
    history = read_history(to.url)
    assert [(item["step"], item["from"]) for item in history] == [(0, None), (4, source.id)]


def read_history(url):
    return json.loads(Path(url, "pbt.json").read_text())["history"]


def test_the_run_says_when_it_copied_and_trains_with_the_new_rate(trained):
    _, agenda, _ = trained
    for copied in agenda.population.rounds[-1]["copies"]:
        url = agenda.trials[copied["to"]].url
        info = read_info(url)
        assert info["pbt"][-1] == {
            "step": 8, "from": copied["from"], "values": copied["values"]
        }  # fmt: skip
        saved = checkpoint.load(url)["optimizer"]
        rates = {group["initial_lr"] for group in saved["param_groups"]}
        assert rates == {copied["values"]["optim.lr"]}
        first = yaml.safe_load(Path(url, "experiment.yaml").read_text())
        assert first["optim"]["lr"] == agenda.population.first[copied["to"]]["optim.lr"]


def test_each_members_lines_are_its_own_and_every_step_is_there_once(trained):
    _, agenda, _ = trained
    for trial in agenda.trials.values():
        steps = [
            line["step"]
            for line in read_lines(storage.join(trial.url, "metrics.jsonl"))
            if "loss" in line
        ]
        assert steps == list(range(2, STEPS + 1, 2))


@pytest.mark.parametrize("when", ["journalled", "half copied", "copied"])
def test_killed_within_an_exchange_the_same_command_ends_the_same(
    trained, tmp_path, monkeypatch, when
):
    _, whole, raw = trained
    path = write_sweep(tmp_path, raw)
    agenda = drive(Agenda(*expand(path)), starts=3)
    write, adopt = storage.write_bytes, checkpoint.adopt

    def torn(url, data):  # the state is there, the pointer is not
        if url.endswith("checkpoint/latest"):
            raise Killed
        write(url, data)

    def killed(*args):
        if when == "copied":
            adopt(*args)
        raise Killed

    if when == "half copied":
        monkeypatch.setattr(storage, "write_bytes", torn)
    else:
        monkeypatch.setattr(checkpoint, "adopt", killed)
    with pytest.raises(Killed):
        agenda.start()
    monkeypatch.undo()
    again = drive(Agenda(*expand(path)))
    assert again.over()
    assert records(again) == records(whole)
    again.write_manifest()
    assert manifest(again)["pbt"]["rounds"] == manifest(whole)["pbt"]["rounds"]


def test_a_command_that_ends_anywhere_between_goes_on_as_the_unbroken_one(trained, tmp_path):
    _, whole, raw = trained
    path = write_sweep(tmp_path, raw)
    starts = 0
    while not (agenda := Agenda(*expand(path))).over():
        drive(agenda, starts=2)
        agenda.write_manifest()
        starts += 2
    assert starts >= 9
    assert records(agenda) == records(whole)


def test_the_schedule_that_was_found_follows_the_weights_from_member_to_member(trained):
    _, agenda, _ = trained
    found = manifest(agenda)["pbt"]["found"]
    finals = agenda.finals()
    sign = 1 if agenda.sweep.mode == "min" else -1
    assert found["winner"] == min(finals, key=lambda run_id: sign * finals[run_id])
    steps = [item["step"] for item in found["schedule"]]
    assert steps[0] == 0
    assert steps == sorted(set(steps))
    for earlier, later in zip(found["schedule"], found["schedule"][1:], strict=False):
        [copied] = [
            copied
            for held in agenda.population.rounds
            for copied in held["copies"]
            if held["step"] == later["step"] and copied["to"] == later["member"]
        ]
        assert copied["values"] == later["values"]
        assert copied["from"] == earlier["member"]
    text = agenda.population.text(finals, {i: t.label for i, t in agenda.trials.items()})
    assert "from step 0: optim.lr" in text


def test_lineage_by_hand(trained):
    _, agenda, _ = trained
    population = copy.copy(agenda.population)
    a, b, c = population.members
    population.rounds = [
        {"step": 8, "copies": [{"to": c, "from": a, "values": {"x": 1}}], "done": True},
        {"step": 16, "copies": [{"to": b, "from": c, "values": {"x": 2}}], "done": True},
    ]
    found = [(item["step"], item["member"]) for item in population.schedule(b)]
    assert found == [(0, a), (8, c), (16, b)]
    assert [(i["step"], i["member"]) for i in population.schedule(c)] == [(0, a), (8, c)]
    assert population.schedule(a) == [{"step": 0, "member": a, "values": population.first[a]}]


def test_more_steps_go_on_with_more_rounds_and_other_settings_are_refused(trained, tmp_path):
    _, _, raw = trained
    path = write_sweep(tmp_path, raw)
    drive(Agenda(*expand(path))).write_manifest()
    longer = Agenda(*expand(path, ("train.steps=20",)))
    assert not longer.over()
    assert longer.population.allowed() == 12
    drive(longer)
    assert [held["step"] for held in longer.population.rounds] == [4, 8, 12, 16]
    assert {known.step for known in longer.known.values()} == {20}
    with pytest.raises(ConfigError, match="begun with another base or other `pbt` keys"):
        Agenda(*expand(path, ("pbt.every=8",)))


def test_a_member_that_is_lost_is_not_waited_for(trained, tmp_path):
    _, _, raw = trained
    agenda = Agenda(*expand(write_sweep(tmp_path, raw)))
    lost = next(iter(agenda.trials))
    agenda.lose(lost)
    drive(agenda)
    assert agenda.over()
    assert [known.step for known in agenda.known.values()] == [0, STEPS, STEPS]
    assert all(lost not in held["scores"] for held in agenda.population.rounds)
    assert all(
        lost not in copied.values() for h in agenda.population.rounds for copied in h["copies"]
    )


def test_only_a_state_of_that_very_step_is_copied(trained, tmp_path):
    _, agenda, _ = trained
    urls = [trial.url for trial in agenda.trials.values()]
    with pytest.raises(ConfigError, match="step-00000012.pt, but was to be copied at step 8"):
        checkpoint.adopt(str(tmp_path / "to"), urls[0], 8)
    with pytest.raises(ConfigError, match="has no checkpoint, but was to be copied at step 8"):
        checkpoint.adopt(urls[0], str(tmp_path / "none"), 8)
    checkpoint.adopt(str(tmp_path / "to"), urls[0], 12)
    assert equal(weights(str(tmp_path / "to")), weights(urls[0]))


# --- values


def test_values_change_by_a_fifth_or_to_a_neighbour_and_never_leave_their_range():
    space = {
        "optim.lr": entry({"loguniform": [1e-4, 1e-2]}),
        "optim.weight_decay": entry({"choice": [0.0, 0.1, 0.2]}),
    }
    now = {"optim.lr": 1e-3, "optim.weight_decay": 0.1}
    found = [pbt.explore(space, now, np.random.default_rng(i)) for i in range(400)]
    rates = [values["optim.lr"] for values in found]
    near = [rate for rate in rates if rate in (8e-4, 1.2e-3)]
    assert 250 <= len(near) <= 350  # three in four, the others drawn anew
    assert 0.4 <= sum(rate == 8e-4 for rate in near) / len(near) <= 0.6
    assert {values["optim.weight_decay"] for values in found} == {0.0, 0.1, 0.2}
    edge = {"optim.lr": 1e-2, "optim.weight_decay": 0.2}
    for i in range(100):
        values = pbt.explore(space, edge, np.random.default_rng(i))
        assert space["optim.lr"].has(values["optim.lr"])


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon", "psgd", "soap"])
def test_each_option_that_may_vary_reaches_the_groups_and_the_moments_stay(
    name, tiny, tmp_path, monkeypatch
):
    values = {"lr": 0.0123, "adamw_lr": 0.0234, "momentum": 0.456, "betas": [0.11, 0.22],
              "eps": 0.00031, "weight_decay": 0.0789, "adamw_weight_decay": 0.0678}  # fmt: skip
    source = tmp_path / "e.yaml"
    source.write_text(yaml.safe_dump({**tiny, "optim": {"name": name}}))
    experiment = load(str(source))
    model = build_model(experiment)
    optimizer, loss = build_optimizer(experiment, model), build_loss(experiment)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    options = {k: values.get(k, v) for k, v in experiment.optim.options.items()}
    entries = [{"step": 0, "from": None, "values": {}, "optim": options, "loss": {"l1": 0.25}}]
    (tmp_path / "pbt.json").write_text(json.dumps({"history": entries}))
    pbt.apply(str(tmp_path), 8, experiment, model, optimizer, loss)
    seen = [x for group in optimizer.param_groups for x in group.items()]
    for option in set(options) & set(pbt.OPTIONS):
        value = tuple(values[option]) if option == "betas" else values[option]
        assert any(key in pbt.OPTIONS[option] and found == value for key, found in seen), option
    assert optimizer.param_groups[0]["initial_lr"] == 0.0123
    assert loss.weights == {"l1": 0.25}
    after = optimizer.state_dict()["state"]
    assert str(after) == str(state)


def test_a_run_of_no_population_is_left_alone(tmp_path, tiny):
    assert pbt.apply(str(tmp_path), 8, None, None, None, None) == {}


@pytest.mark.parametrize(
    "text", ['{"history": [{"st', "[1]", "{}", '{"history": 3}', '{"history": [{"step": 0}]}']
)
def test_a_damaged_history_is_refused_and_not_taken_for_none(tmp_path, text):
    url = tmp_path / "population" / "member"
    url.mkdir(parents=True)
    (url / "pbt.json").write_text(text)
    said = rf"pbt.json:\n  is damaged .*move the population's folder {url.parent} away"
    with pytest.raises(ConfigError, match=said):
        pbt.apply(str(url), 8, None, None, None, None)


def test_a_weight_is_changed_beside_the_losss_other_options(tiny, tmp_path):
    source = tmp_path / "e.yaml"
    tiny["data"]["segment"] = 4096
    source.write_text(yaml.safe_dump({**tiny, "loss": {"l1": 1, "mrstft": {"n_bins": 8}}}))
    experiment = load(str(source))
    found = pbt.changes({"loss.mrstft": 3.0, "optim.lr": 0.1}, experiment)
    assert found["optim.lr"] == 0.1
    assert found["loss"]["mrstft"] == {**experiment.loss["mrstft"].options, "weight": 3.0}
    assert found["loss"]["l1"] == {"weight": 1.0}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"pbt": {"every": 6}}, "pbt.every: 6 is not a multiple of validation.every = 4"),
        ({"pbt": {"every": 12}}, "pbt.every: 12 is not below train.steps = 12"),
        ({"seeds": 2}, "seeds: does not go with pbt"),
        ({"search": {"optim.eps": [1e-8]}}, "search: does not go with pbt"),
        ({"variants": {"a": {}}}, "variants: does not go with pbt"),
        ({"asha": {"grace_steps": 4}}, "asha: does not go with pbt"),
        ({"screening": {}}, "screening: does not go with pbt"),
        ({"schedule": {"name": "plateau"}}, "schedule: plateau lowers the rate"),
        ({"pbt": {"vary": {"model.kernels": {"choice": [[7]]}}}}, "cannot change during a run"),
        ({"pbt": {"vary": {"optim.momentum": {"uniform": [0, 1]}}}}, "unknown option"),
        ({"pbt": {"vary": {"loss.l2": {"uniform": [0, 1]}}}}, "unknown loss 'l2'; there is l1"),
        ({"pbt": {"vary": {"optim.lr": {"randint": [1, 2]}}}}, "expected uniform, loguniform"),
        ({"pbt": {"vary": {"optim.lr": {"uniform": [-1, 1]}}}}, "must be above 0, got -1"),
        ({"pbt": {"vary": {"optim.lr": {"uniform": [1]}}}}, "expected two numbers"),
        ({"pbt": {"vary": {"train.seed": {"choice": [1]}}}}, "seeds are no variants"),
    ],
)  # fmt: skip
def test_a_population_that_cannot_be_is_refused_with_the_way_out(tmp_path, tiny, keys, text):
    with pytest.raises(ConfigError) as caught:
        expand(write_sweep(tmp_path, tiny, **keys))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("runtime.workers=2", "runtime.workers: must be 1 with pbt"),
        ("runtime.checkpoint_every=3", "3 does not divide pbt.every = 4"),
        ("optim.lr=0.1", "sets it for each trial"),
    ],
)
def test_where_it_runs_must_fit_a_population(tmp_path, tiny, change, text):
    with pytest.raises(ConfigError) as caught:
        expand(write_sweep(tmp_path, tiny), (change,))
    assert text in str(caught.value)


@pytest.mark.slow
@pytest.mark.ray
def test_on_tune_members_copy_and_end_as_they_do_in_one_process(trained, tmp_path, capfd):
    from bgray.sweep import main

    _, whole, raw = trained
    path = write_sweep(tmp_path, raw)
    with pytest.raises(SystemExit) as ended:
        main([path])
    assert ended.value.code == 0
    agenda = Agenda(*expand(path))
    assert agenda.over()
    assert manifest(agenda)["pbt"]["rounds"] == manifest(whole)["pbt"]["rounds"]
    assert records(agenda) == records(whole)
    assert "The schedule that member" in capfd.readouterr().out
